"""A background mirror that cannot catch up with its guest says so, and both documented ways out work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon
from kit.qemu import create, read_all
from kit.qmp import Qmp
from kit.writer import Writer

SIZE = 16 << 20
NO_LIMITS = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


@pytest.fixture
def chased(short_path: Path) -> Iterator[tuple[Qmp, Writer, Path, Daemon]]:
    """A mirror with a speed limit below what the client dirties."""
    create(short_path / "a", SIZE)
    target = create(short_path / "t", SIZE)
    options = ["--blockdev", f"qcow2,node-name=a,file.driver=file,file.filename={short_path}/a"]
    options += ["--blockdev", f"qcow2,node-name=t,file.driver=file,file.filename={target}"]
    options += ["--device", "virtio-blk,drive=a,id=d0"]
    with Daemon(short_path, *options) as daemon, daemon.qmp(timeout=60) as qmp:
        qmp.execute("nbd-server-add", device="d0", name="d", writable=True)
        with Writer(daemon.uri("d"), SIZE, short_path, depth=4) as writer:
            qmp.execute("blockdev-mirror", job_id="j", device="a", target="t", sync="full", speed=4 << 20)
            yield qmp, writer, target, daemon


def info(qmp: Qmp) -> dict[str, Any]:
    found: dict[str, Any] = qmp.execute("query-block-jobs")[0]
    return found


def wait_until_it_falls_behind(qmp: Qmp) -> None:
    deadline = time.monotonic() + 30
    while True:
        found = info(qmp)
        assert found["status"] == "running"
        assert found["x-remaining"] <= found["len"]
        if found["x-dirty-rate"] >= found["x-copy-rate"] > 0:
            assert "x-seconds-left" not in found
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["throttle", "write-blocking"])
def test_a_way_out(way: str, chased: tuple[Qmp, Writer, Path, Daemon], tmp_path: Path) -> None:
    qmp, writer, target, daemon = chased
    wait_until_it_falls_behind(qmp)
    if way == "throttle":
        qmp.call("block_set_io_throttle", {"id": "d0", **NO_LIMITS, "iops_wr": 10})
    else:
        qmp.execute("block-job-change", id="j", type="mirror", copy_mode="write-blocking")
    qmp.wait_event("BLOCK_JOB_READY")
    if way == "throttle":
        # The client can end now: what it waits for would take its time.
        qmp.call("block_set_io_throttle", {"id": "d0", **NO_LIMITS})
        qmp.execute("block-job-set-speed", device="j", speed=0)
    history = writer.finish()
    qmp.execute("job-complete", id="j")
    assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")
    daemon.stop()
    history.check_final(read_all(target, tmp_path))
