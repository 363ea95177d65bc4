"""Jobs on parts of one chain whose ends come at the same time: none sees the other's half-changed chain."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from kit.livedisk import Daemon
from kit.qemu import QemuNbd, check, create, info, qemu_io, read_all
from kit.qmp import Qmp


def chain(folder: Path) -> list[str]:
    """A <- B <- C <- D, each with 64 KiB of its own; the options that open it, with a fault injector below D."""
    options, below = [], None
    for number, name in enumerate("ABCD"):
        create(folder / name, "1M", backing=folder / below if below else None)
        qemu_io(folder / name, f"write -q -P {ord(name)} {number * 64}k 64k")
        file = {"driver": "file", "filename": str(folder / name)}
        if name == "D":
            file = {"driver": "blkdebug", "image": file}
        node = {"driver": "qcow2", "node-name": name, "file": file, "backing": below, "read-only": name != "D"}
        options += ["--blockdev", json.dumps(node)]
        below = name
    return options


def statuses(qmp: Qmp) -> dict[str, str]:
    return {job["id"]: job["status"] for job in qmp.execute("query-jobs")}


def test_a_stream_that_ends_does_not_stand_on_the_filter_of_one_that_ended_meanwhile(short_path: Path) -> None:
    options = chain(short_path)
    before = read_all(short_path / "D", short_path)
    with (
        Daemon(short_path, *options, "--export", "nbd,id=e,node-name=D,name=d") as daemon,
        daemon.qmp() as qmp,
    ):
        qmp.human('qemu-io D "break flush_to_disk held"')
        # Slow at first, so that the lower one has its filter between C and B when the upper one ends.
        qmp.execute("block-stream", job_id="upper", device="D", base_node="B", speed=1)
        qmp.execute("block-stream", job_id="lower", device="B", speed=1)
        qmp.execute("block-job-set-speed", device="upper", speed=0)
        qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data == {"id": "upper", "status": "pending"})
        qmp.human('qemu-io D "wait_break held"')
        qmp.execute("block-job-set-speed", device="lower", speed=0)
        qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data == {"id": "lower", "status": "pending"})
        time.sleep(0.2)  # were it not held back, it would be over by then
        assert statuses(qmp) == {"lower": "pending", "upper": "pending"}
        qmp.human('qemu-io D "resume held"')
        for job in ("upper", "lower"):
            assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED", lambda data, job=job: data["device"] == job)
        graph = qmp.execute("x-debug-query-block-graph")
        names = {node["id"]: node["name"] for node in graph["nodes"]}
        below = {names[edge["parent"]]: names[edge["child"]] for edge in graph["edges"] if edge["name"] == "backing"}
        assert below["D"] == "B"
        assert read_all(daemon.uri("d"), short_path, "-f", "raw") == before
        daemon.stop(expect=0)
    assert [Path(layer["filename"]).name for layer in info(short_path / "D", "--backing-chain")] == ["D", "B"]
    for name in "BD":
        check(short_path / name)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_daemon_ends_although_a_jobs_target_gives_no_answer(short_path: Path) -> None:
    """It waits for half a minute, says for what, and gives the target up."""
    options = chain(short_path)
    create(short_path / "t", "1M", format="raw")
    target = {"driver": "nbd", "node-name": "t", "server": {"type": "unix", "path": str(short_path / "far.nbd")}}
    with (
        QemuNbd(short_path, short_path / "t", name="far") as far,
        Daemon(short_path, *options, "--blockdev", json.dumps(target)) as daemon,
        daemon.qmp() as qmp,
    ):
        far.child.send_signal(signal.SIGSTOP)
        qmp.execute("blockdev-mirror", job_id="j", device="D", target="t", sync="full")
        daemon.child.terminate()
        assert daemon.child.wait(100) == 0
        assert "node 't': requests without an answer are given up" in daemon.log.read_text()
        far.child.send_signal(signal.SIGCONT)
