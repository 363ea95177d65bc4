"""The same commands on jobs to qemu-storage-daemon and to livedisk: the same replies, events in the same order, images.

What the two tell while a job runs depends on who is faster, so replies are compared with replies and the events of each job
with the events of that job, not how they interleave. Differences that are meant:

* SHUTDOWN is QEMU's emulator's, not its storage daemon's.
* QEMU pauses and resumes a job whenever its nodes are drained, and tells: how often depends on how its drains nest. An
  internal pause that a user did not ask for is therefore left out (`kit.job_scripts`).
* A job that was cancelled tells how far it had come, which is a matter of speed (likewise).
* After an active commit that was cancelled when ready, QEMU leaves the base writable that it made so; here it is read-only again.
* The nodes of a job that is concluded but kept are free here; in QEMU they are blocked until it is dismissed.
* A mirror that waits to be finalized holds the guest in QEMU, and so is paused; here the guest writes on.
* block-job-change back to background, which QEMU does not know, or with another job's type, which it takes.
* qemu-storage-daemon 10.0.2 crashes at its end if a failed job was kept: these scripts dismiss it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.job_scripts import Stage, Step, assert_alike, c
from kit.qemu import create, qemu_io

SLOW = 65536


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


def stage(name: str) -> Stage:
    members = ("node-name", "drv", "backing_file") if name == "active commit cancelled" else Stage.members
    return Stage(prepare=images, options=options, images="abcdtu", contents="dt", members=members)


@pytest.mark.parametrize("name", SCRIPTS)
def test_replies_events_and_images_are_those_of_qemu(name: str, short_path: Path, tmp_path: Path) -> None:
    assert_alike(stage(name), SCRIPTS[name], short_path, tmp_path)


def filtered(folder: Path) -> list[str]:
    """The chain with a filter on each image that has another above it."""
    given = ["--object", "throttle-group,id=limits"]
    for line in options(folder):
        node = json.loads(line) if line.startswith("{") else {}
        below = node.get("backing")
        if below is not None:
            on = {
                "driver": "throttle",
                "throttle-group": "limits",
                "node-name": f"f{below}",
                "file": below,
                "read-only": True,
            }
            given[-1:-1] = ["--blockdev", json.dumps(on)]
            line = json.dumps({**node, "backing": f"f{below}"})
        given.append(line)
    return given


THROUGH_FILTERS: dict[str, list[Step]] = {
    "commit": [commit(top_node="c", base_node="a"), "concluded"],
    "active commit": [commit(base_node="b"), "ready", c("job-complete", id="j"), "concluded"],
}


@pytest.mark.parametrize("name", THROUGH_FILTERS)
def test_a_commit_into_an_image_under_a_filter(name: str, short_path: Path, tmp_path: Path) -> None:
    # The chain of d is not compared: where a filter stands between, only here the header is changed.
    setting = Stage(prepare=images, options=filtered, images="abc", contents="abc", members=("node-name", "drv"))
    assert_alike(setting, THROUGH_FILTERS[name], short_path, tmp_path)
