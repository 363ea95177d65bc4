"""The same commands on jobs to qemu-storage-daemon and to livedisk: the same replies, events in the same order, images.

What the two tell while a job runs depends on who is faster, so replies are compared with replies and the events of each job
with the events of that job, not how they interleave. Differences that are meant:

* SHUTDOWN is QEMU's emulator's, not its storage daemon's.
* QEMU pauses and resumes a job whenever its nodes are drained, and tells: how often depends on how its drains nest. An
  internal pause that a user did not ask for is therefore left out (`Played.told`).
* A job that was cancelled tells how far it had come, which is a matter of speed (`UNEQUAL`).
* After an active commit that was cancelled when ready, QEMU leaves the base writable that it made so; here it is read-only again.
* The nodes of a job that is concluded but kept are free here; in QEMU they are blocked until it is dismissed.
* A mirror that waits to be finalized holds the guest in QEMU, and so is paused; here the guest writes on.
* block-job-change back to background, which QEMU does not know, or with another job's type, which it takes.
* qemu-storage-daemon 10.0.2 crashes at its end if a failed job was kept: these scripts dismiss it.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon
from kit.qemu import StorageDaemon, check, create, info, qemu_io, read_all
from kit.qmp import Qmp, QmpError

Step = tuple[str, dict[str, Any]] | str
"""A command with its arguments; or the name of an event (or "status of a job") to wait for."""

SLOW = 65536
UNEQUAL = {"BLOCK_JOB_CANCELLED": ("offset", "len")}
"""Members of events that are not compared."""


def images(folder: Path) -> None:
    """A <- B <- C <- D of 8 MiB, each with 2 MiB of its own that overlap the next one's by one; targets."""
    for index, name in enumerate("abcd"):
        below = {"backing": folder / f"{'abcd'[index - 1]}.qcow2"} if index else {}
        path = create(folder / f"{name}.qcow2", "8M", **below)
        qemu_io(path, f"write -P {index + 1} {index}M 2M")
    create(folder / "t.qcow2", "8M")
    create(folder / "small.qcow2", "4M")
    create(folder / "u.qcow2", "8M", backing=folder / "c.qcow2")


def options(folder: Path) -> list[str]:
    given: list[str] = []
    above = None
    for name in "abcd":
        file = {"driver": "file", "filename": str(folder / f"{name}.qcow2"), "node-name": f"{name}-file"}
        node = {"driver": "qcow2", "node-name": name, "file": file}
        if above is not None:
            node["backing"] = above
        if name != "d":
            node |= {"read-only": True, "auto-read-only": True}
            file["auto-read-only"] = True
        given += ["--blockdev", json.dumps(node)]
        above = name
    for name in ("t", "small", "u"):
        file = {"driver": "file", "filename": str(folder / f"{name}.qcow2")}
        node = {"driver": "qcow2", "node-name": name, "file": file}
        if name == "u":
            node["backing"] = None
        given += ["--blockdev", json.dumps(node)]
    return given


def c(command: str, /, **arguments: Any) -> Step:
    return command, {name.replace("_", "-"): value for name, value in arguments.items()}


def stream(**more: Any) -> Step:
    return c("block-stream", **{"job_id": "j", "device": "d", **more})


def commit(**more: Any) -> Step:
    return c("block-commit", **{"job_id": "j", "device": "d", **more})


def mirror(**more: Any) -> Step:
    return c("blockdev-mirror", **{"job_id": "j", "device": "d", "target": "t", "sync": "full", **more})


BOTH = [c("query-jobs"), c("query-block-jobs")]
ALL_VERBS = [
    c("job-pause", id="j"),
    "paused",
    *(c(f"job-{verb}", id="j") for verb in ("pause", "complete", "finalize", "dismiss", "resume", "resume")),
    *(c(f"block-job-{verb}", id="j") for verb in ("finalize", "dismiss")),
    c("block-job-complete", device="j"),
    c("block-job-set-speed", device="j", speed=-1),
    c("block-job-change", id="j", type="mirror", copy_mode="write-blocking"),
]

SCRIPTS: dict[str, list[Step]] = {
    "stream": [stream(), "null"],
    "stream to a base": [stream(base_node="b"), "null"],
    "stream to a base by name": [stream(base="FOLDER/a.qcow2", backing_file="./a.qcow2"), "null"],
    "stream with a bottom": [stream(bottom="c"), "null"],
    "stream in the middle": [stream(device="c", base_node="a"), "null"],
    "stream of nothing": [stream(device="a"), "null", stream(bottom="d"), "null"],
    "stream refused": [
        stream(device="x"),
        stream(base="x", base_node="a"),
        stream(base="x", bottom="a"),
        stream(base_node="x", bottom="a"),
        stream(base="x"),
        stream(base_node="x"),
        stream(base_node="d"),
        stream(base_node="t"),
        stream(bottom="x"),
        stream(bottom="t"),
        stream(backing_file="x"),
        stream(speed=-1),
        stream(filter_node_name="a"),
        stream(filter_node_name="1"),
        stream(job_id="1"),
        c("block-stream", device="d"),
        stream(on_error="x"),
        stream(snapshot_node_name="x"),
        *BOTH,
    ],
    "stream, verbs while it runs": [stream(speed=SLOW), *ALL_VERBS, c("job-cancel", id="j"), "null"],
    "stream, held at the end": [
        stream(auto_finalize=False, auto_dismiss=False),
        "pending",
        *BOTH,
        c("job-pause", id="j"),
        c("block-job-set-speed", device="j", speed=1),
        c("job-complete", id="j"),
        c("job-dismiss", id="j"),
        c("job-finalize", id="j"),
        *BOTH,
        c("job-finalize", id="j"),
        c("job-cancel", id="j"),
        c("job-dismiss", id="j"),
        *BOTH,
    ],
    "stream, cancelled and kept": [
        stream(speed=SLOW, auto_dismiss=False),
        c("job-cancel", id="j"),
        "concluded",
        c("job-dismiss", id="j"),
    ],
    "stream, cancelled when pending": [stream(auto_finalize=False), "pending", c("job-cancel", id="j"), "null"],
    "stream, paused and cancelled": [
        stream(speed=SLOW),
        c("block-job-pause", device="j"),
        "paused",
        c("block-job-cancel", device="j"),
        c("block-job-cancel", device="j", force=True),
        "null",
    ],
    "nodes in use": [
        stream(speed=SLOW),
        *(c("blockdev-del", node_name=name) for name in "dca"),
        stream(job_id="k"),
        commit(job_id="k", top_node="c", base_node="b"),
        c("block_resize", node_name="d", size=1 << 20),
        c("blockdev-snapshot", node="d", overlay="t"),
        mirror(job_id="k", device="t", target="d"),
        c("job-cancel", id="j"),
        "null",
    ],
    "no such job": [
        *(c(f"job-{verb}", id="x") for verb in ("pause", "resume", "cancel", "complete", "finalize", "dismiss")),
        *(c(f"block-job-{verb}", device="x") for verb in ("pause", "resume", "cancel", "complete")),
        *(c(f"block-job-{verb}", id="x") for verb in ("finalize", "dismiss")),
        c("block-job-set-speed", device="x", speed=1),
        c("block-job-change", id="x", type="mirror", copy_mode="background"),
    ],
    "commit": [commit(top_node="c", base_node="b"), "null"],
    "commit two layers": [commit(top_node="c"), "null"],
    "commit in the middle": [commit(top_node="b", base_node="a"), "null"],
    "commit by names": [commit(top="FOLDER/c.qcow2", base="FOLDER/a.qcow2", backing_file="./a.qcow2"), "null"],
    "commit cancelled": [commit(top_node="c", speed=SLOW), *ALL_VERBS[:4], c("job-cancel", id="j"), "null"],
    "commit refused": [
        commit(device="x"),
        commit(device="c"),
        commit(top="x"),
        commit(base="x"),
        commit(top_node="x"),
        commit(base_node="x"),
        commit(top_node="t"),
        commit(base_node="t"),
        commit(top_node="a", base_node="c"),
        commit(top_node="c", base_node="c"),
        commit(top_node="c", top="c"),
        commit(base_node="c", base="c"),
        commit(backing_file="x"),
        commit(speed=-1),
        commit(top_node="c", speed=-1),
        commit(filter_node_name="a"),
        commit(top_node="c", filter_node_name="a"),
        commit(job_id=""),
    ],
    "active commit completed": [commit(), "ready", *BOTH, c("job-complete", id="j"), "null"],
    "active commit into the middle": [commit(base_node="b"), "ready", c("block-job-complete", device="j"), "null"],
    "active commit cancelled": [commit(base_node="b"), "ready", c("block-job-cancel", device="j"), "null"],
    "active commit cancelled by force": [commit(), "ready", c("job-cancel", id="j"), "null"],
    "active commit, completed in standby": [
        commit(),
        "ready",
        c("job-pause", id="j"),
        "standby",
        c("job-complete", id="j"),
        c("job-resume", id="j"),
        "null",
    ],
    "mirror completed": [mirror(), "ready", *BOTH, c("job-complete", id="j"), "null"],
    "mirror cancelled": [mirror(), "ready", c("block-job-cancel", device="j"), "null"],
    "mirror cancelled by force": [mirror(), "ready", c("block-job-cancel", device="j", force=True), "null"],
    "mirror top": [mirror(sync="top", target="u"), "ready", c("job-complete", id="j"), "null"],
    "mirror none": [mirror(sync="none"), "ready", *BOTH, c("block-job-cancel", device="j"), "null"],
    "mirror write-blocking": [
        mirror(copy_mode="write-blocking"),
        "ready",
        *BOTH,
        c("job-complete", id="j"),
        "null",
    ],
    "mirror changed": [
        mirror(),
        "ready",
        c("block-job-change", id="j", type="mirror", copy_mode="background"),
        c("block-job-change", id="j", type="mirror"),
        c("job-cancel", id="j"),
        "null",
    ],
    "mirror held at the end": [
        mirror(auto_finalize=False, auto_dismiss=False),
        "ready",
        c("job-complete", id="j"),
        "pending",
        c("query-jobs"),
        c("job-finalize", id="j"),
        *BOTH,
        c("job-dismiss", id="j"),
    ],
    "mirror to another size": [mirror(target="small"), "null"],
    "mirror refused": [
        mirror(device="x"),
        mirror(target="x"),
        mirror(device="c"),
        mirror(target="d"),
        mirror(target="c"),
        mirror(granularity=100),
        mirror(granularity=3000),
        mirror(granularity=1 << 27),
        mirror(granularity=-1),
        mirror(buf_size=-1),
        mirror(speed=-1),
        mirror(sync="bitmap"),
        mirror(sync="incremental"),
        mirror(sync="x"),
        mirror(replaces="x"),
        mirror(replaces="c"),
        mirror(replaces="t"),
        mirror(filter_node_name="a"),
        mirror(copy_mode="x"),
        mirror(job_id="a b"),
    ],
}


class Played:
    """What a script came to: replies in order, events a job, the chain on disk of every image, the bytes of each."""

    def __init__(self, peer: type[StorageDaemon], folder: Path, script: list[Step], scratch: Path) -> None:
        folder.mkdir()
        images(folder)
        self._folder = folder
        self._compares_read_only = script is not SCRIPTS["active commit cancelled"]
        self.replies: list[Any] = []
        self.events: list[Any] = []
        with peer(folder, *options(folder), nbd=False) as daemon, daemon.qmp(timeout=20) as qmp:
            self._qmp = qmp
            for step in script:
                if isinstance(step, str):
                    self._wait(step)
                else:
                    self.replies.append(self._ask(qmp, *step))
            self._collect()
            self.replies.append(self._comparable(self._graph(qmp)))
            self._collect()
        self.chains = {}
        for name in ("a", "b", "c", "d", "t", "u"):
            path = folder / f"{name}.qcow2"
            check(path)
            self.chains[name] = self._comparable([one["filename"] for one in info(path, "--backing-chain")])
        self.bytes = {name: read_all(folder / f"{name}.qcow2", scratch) for name in ("d", "t")}

    def _ask(self, qmp: Qmp, command: str, arguments: dict[str, Any]) -> Any:
        arguments = json.loads(json.dumps(arguments).replace("FOLDER", str(self._folder)))
        try:
            answer = qmp.call(command, arguments)
        except QmpError as error:
            return self._comparable({"class": error.kind, "desc": error.desc})
        finally:
            self._collect()
        return self._comparable(answer)

    def _comparable(self, answer: Any) -> Any:
        text = json.dumps(answer, sort_keys=True).replace(str(self._folder), "")
        # Whether it works at this very moment is a matter of chance.
        return json.loads(re.sub(r'"busy": \w+', '"busy": 0', text))

    def _graph(self, qmp: Qmp) -> list[Any]:
        nodes = qmp.execute("query-named-block-nodes", flat=True)
        members = (
            ("node-name", "drv", "ro", "backing_file")
            if self._compares_read_only
            else ("node-name", "drv", "backing_file")
        )
        found = [{name: node[name] for name in members if name in node} for node in nodes]
        return sorted((one for one in found if not one["node-name"].startswith("#")), key=lambda one: one["node-name"])

    def _wait(self, status: str) -> None:
        deadline = time.monotonic() + 20
        while not any(event[1].get("status") == status for event in self.events):
            assert time.monotonic() < deadline, f"no {status}: {self.events}"
            time.sleep(0.01)
            self._qmp.execute("query-version")
            self._collect()
        # The next one waits for one that is to come.
        self.events = [
            (name, {**data, "status": f"*{data['status']}"} if "status" in data else data) for name, data in self.events
        ]

    def _collect(self) -> None:
        while self._qmp.events:
            event = self._qmp.events.popleft()
            self.events.append((event["event"], event.get("data", {})))

    def told(self) -> list[Any]:
        """The events, without the pauses that nobody asked for, and whatever SHUTDOWN."""
        kept: list[Any] = []
        for name, data in self.events:
            left_out = UNEQUAL.get(name, ())
            one = (name, {key: str(value).removeprefix("*") for key, value in data.items() if key not in left_out})
            kept.append(one)
        statuses = [one[1].get("status") for one in kept]
        drop: set[int] = set()
        for index, status in enumerate(statuses):
            if status in ("paused", "standby") and statuses[index + 1 : index + 2] in (["running"], ["ready"]):
                drop |= {index, index + 1}
        return [one for index, one in enumerate(kept) if index not in drop]


@pytest.mark.parametrize("name", SCRIPTS)
def test_replies_events_and_images_are_those_of_qemu(name: str, short_path: Path, tmp_path: Path) -> None:
    theirs = Played(StorageDaemon, short_path / "q", SCRIPTS[name], tmp_path)
    ours = Played(Daemon, short_path / "l", SCRIPTS[name], tmp_path)
    asked = [*(step for step in SCRIPTS[name] if not isinstance(step, str)), "the nodes at the end"]
    for step, one, other in zip(asked, theirs.replies, ours.replies, strict=True):
        assert other == one, step
    assert ours.told() == theirs.told()
    assert ours.chains == theirs.chains
    assert ours.bytes == theirs.bytes
