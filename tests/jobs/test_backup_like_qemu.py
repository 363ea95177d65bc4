"""The same commands on backups, filters and their bitmaps to qemu-storage-daemon and to livedisk; see `kit.job_scripts`.

Differences that are meant, and so not in these scripts:

* A raw target does not get what reads as zeroes allocated.
* A backup is lost where a copy for a guest's write fails; QEMU fails the write.
* drive-backup to an existing image without its format: QEMU probes.
* What reads as zeroes through snapshot-access is copied as zeroes; QEMU takes it for data.
* Formats that livedisk does not know (vmdk).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.job_scripts import Stage, Step, assert_alike, c
from kit.qemu import create, qemu_io

SLOW = 65536
ODD = (1 << 20) + 1536


def images(folder: Path) -> None:
    """A <- B of 8 MiB; ODD of no whole clusters; targets of the same sizes, a smaller one, a raw one, one over a."""
    qemu_io(create(folder / "a.qcow2", "8M"), "write -P 1 0 2M")
    qemu_io(create(folder / "b.qcow2", "8M", backing=folder / "a.qcow2"), "write -P 2 1M 2M", "write -z 5M 1M")
    qemu_io(create(folder / "odd.qcow2", ODD), f"write -P 3 0 {ODD}")
    for name, size in (("t", "8M"), ("u", "8M"), ("small", "4M"), ("oddt", ODD)):
        create(folder / f"{name}.qcow2", size)
    create(folder / "over.qcow2", "8M", backing=folder / "a.qcow2")
    create(folder / "inc.qcow2", "8M", backing=folder / "t.qcow2")
    (folder / "r.raw").write_bytes(b"\xcc" * (8 << 20))


def options(folder: Path) -> list[str]:
    def node(name: str, **more: Any) -> str:
        file = {"driver": "file", "filename": str(folder / f"{name}.qcow2")}
        return json.dumps({"driver": "qcow2", "node-name": name, "file": file, **more})

    given = [node("b"), *(node(name) for name in ("odd", "t", "u", "small", "oddt", "over"))]
    given += [node("inc", backing=None), f"driver=file,node-name=r,filename={folder}/r.raw"]
    return [part for one in given for part in ("--blockdev", one)]


STAGE = Stage(
    prepare=images,
    options=options,
    images=("a", "b", "odd", "t", "u", "oddt", "over", "inc"),
    contents=("b", "odd", "t", "u", "oddt", "over"),
)


def backup(**more: Any) -> Step:
    return c("blockdev-backup", **{"job_id": "j", "device": "b", "target": "t", "sync": "full", **more})


def drive(**more: Any) -> Step:
    return c("drive-backup", **{"job_id": "j", "device": "b", "target": "FOLDER/new", "sync": "full", **more})


def act(type: str, /, **data: Any) -> dict[str, Any]:
    return {"type": type, "data": {name.replace("_", "-"): value for name, value in data.items()}}


def several(*actions: dict[str, Any], **properties: Any) -> Step:
    names = {name.replace("_", "-"): value for name, value in properties.items()}
    return c("transaction", actions=list(actions), **({"properties": names} if names else {}))


def one(**more: Any) -> dict[str, Any]:
    return act("blockdev-backup", **{"job_id": "j", "device": "b", "target": "t", "sync": "full", **more})


def two(**more: Any) -> dict[str, Any]:
    return one(**{"job_id": "k", "device": "odd", "target": "oddt", **more})


def bitmap(verb: str, **more: Any) -> Step:
    return c(f"block-dirty-bitmap-{verb}", **{"node": "b", "name": "m", **more})


GROUPED = {"completion_mode": "grouped"}
BOTH = [c("query-jobs"), c("query-block-jobs")]
BITMAPS = c("query-named-block-nodes", flat=True)

SCRIPTS: dict[str, list[Step]] = {
    "full": [backup(), "null"],
    "full, not whole clusters": [backup(device="odd", target="oddt"), "null"],
    "top": [backup(sync="top", target="over"), "null"],
    "top without a backing file": [backup(device="odd", target="oddt", sync="top"), "null"],
    "none": [backup(sync="none"), *BOTH, c("job-pause", id="j"), "paused", *BOTH, c("job-cancel", id="j"), "null"],
    "compressed": [backup(compress=True), "null"],
    "into clusters of its own size": [backup(x_perf={"min-cluster-size": 1 << 20, "max-workers": 1}), "null"],
    "through memory": [backup(x_perf={"use-copy-range": False}), "null"],
    "in chunks": [backup(x_perf={"max-chunk": 65536, "use-copy-range": True}), "null"],
    "held at the end": [
        backup(auto_finalize=False, auto_dismiss=False),
        "pending",
        *BOTH,
        c("blockdev-del", node_name="t"),
        c("job-finalize", id="j"),
        *BOTH,
        c("job-dismiss", id="j"),
    ],
    "cancelled": [backup(speed=SLOW), c("job-cancel", id="j"), "null"],
    "verbs while it runs": [
        backup(speed=SLOW),
        *(c(f"job-{verb}", id="j") for verb in ("complete", "finalize", "dismiss", "resume")),
        c("job-pause", id="j"),
        "paused",
        c("job-pause", id="j"),
        c("block-job-cancel", device="j"),
        c("block-job-set-speed", device="j", speed=0),
        c("job-resume", id="j"),
        "null",
    ],
    "nodes in use": [
        backup(speed=SLOW, filter_node_name="flt"),
        *(c("blockdev-del", node_name=name) for name in ("b", "t", "flt")),
        backup(job_id="k"),
        backup(job_id="k", device="t", target="u"),
        backup(job_id="k", device="flt", target="u"),
        backup(job_id="k", device="u", target="b"),
        c("block_resize", node_name="b", size=1 << 20),
        c("block_resize", node_name="t", size=1 << 20),
        c("block_resize", node_name="flt", size=1 << 20),
        c("blockdev-mirror", job_id="k", device="b", target="u", sync="full"),
        c("block-commit", job_id="k", device="b"),
        c("job-cancel", id="j"),
        "null",
    ],
    "refused": [
        backup(device="x"),
        backup(target="x"),
        backup(target="b"),
        backup(target="small"),
        backup(target="r", compress=True),
        backup(sync="bitmap"),
        backup(sync="incremental"),
        backup(sync="bitmap", bitmap="x"),
        backup(sync="incremental", bitmap="x", bitmap_mode="never"),
        backup(bitmap="x"),
        backup(bitmap_mode="never"),
        backup(speed=-1),
        backup(job_id="1"),
        backup(job_id=""),
        backup(filter_node_name="t"),
        backup(filter_node_name="1"),
        backup(x_perf={"max-workers": 0}),
        backup(x_perf={"max-workers": 1 << 40}),
        backup(x_perf={"max-chunk": -1}),
        backup(x_perf={"max-chunk": 1000}),
        backup(x_perf={"min-cluster-size": 1000}),
        backup(x_perf={"min-cluster-size": 1 << 63}),
        backup(x_perf={"foo": 1}),
        backup(sync="x"),
        backup(on_source_error="x"),
        c("blockdev-backup", device="b", target="t", sync="full"),
        backup(),
        "pending",
    ],
    "two at once": [several(one(), two()), "null@j", "null@k"],
    "two at once, grouped": [several(one(), two(), **GROUPED), "null@j", "null@k"],
    "two at once, one cancelled": [
        several(one(speed=SLOW), two(), **GROUPED),
        "waiting@k",
        c("job-cancel", id="j"),
        "null@j",
        "null@k",
    ],
    "two at once, held at the end": [
        several(one(auto_finalize=False, auto_dismiss=False), two(auto_dismiss=False), **GROUPED),
        "pending@j",
        "pending@k",
        *BOTH,
        c("job-finalize", id="j"),
        c("job-dismiss", id="j"),
        c("job-dismiss", id="k"),
    ],
    "two from one node": [several(one(filter_node_name="one"), one(job_id="k", target="u")), "null@j", "null@k"],
    "transactions refused": [
        several(one(), act("abort")),
        several(one(), act("abort"), **GROUPED),
        several(one(), two(target="x")),
        several(one(), two(target="x"), **GROUPED),
        several(one(), two(job_id="j")),
        several(act("blockdev-backup", job_id="j")),
        *BOTH,
    ],
    "transactions undone": [
        several(one(), act("blockdev-snapshot", node="b", overlay="u"), act("abort")),
        several(act("blockdev-snapshot", node="b", overlay="u"), one(device="u"), act("abort")),
        several(
            act("block-dirty-bitmap-add", node="b", name="m"),
            one(sync="incremental", bitmap="m", target="inc"),
            act("block-dirty-bitmap-add", node="b", name="m2"),
            act("block-dirty-bitmap-clear", node="b", name="m"),
        ),
        BITMAPS,
    ],
    "a snapshot in the same step": [
        several(one(filter_node_name="flt"), act("blockdev-snapshot", node="b", overlay="inc")),
        "null",
        BITMAPS,
    ],
    "the source discarded": [
        c("blockdev-add", driver="copy-before-write", node_name="cbw", file="b", target="t"),
        c("blockdev-add", driver="snapshot-access", node_name="then", file="cbw", discard="unmap"),
        backup(device="then", target="u", discard_source=True),
        "null",
        backup(device="then", target="u", auto_dismiss=False),
        "concluded",
        *BOTH,
        c("job-dismiss", id="j"),
    ],
    "drive-backup": [drive(), "null", drive(target="FOLDER/top", sync="top"), "null"],
    "drive-backup none": [drive(sync="none"), c("query-block-jobs"), c("job-cancel", id="j"), "null"],
    "drive-backup to what exists": [
        drive(target="FOLDER/over.qcow2", mode="existing", format="qcow2"),
        c("blockdev-del", node_name="over"),
        drive(target="FOLDER/over.qcow2", mode="existing", format="qcow2", sync="top"),
        "null",
    ],
    "drive-backup of a file": [drive(device="r", target="file:FOLDER/new"), "null"],
    "drive-backup in a transaction": [
        several(
            act("drive-backup", job_id="j", device="b", target="FOLDER/one", sync="full"),
            act("drive-backup", job_id="k", device="odd", target="FOLDER/two", sync="full", format="raw"),
            **GROUPED,
        ),
        "null@j",
        "null@k",
    ],
    "drive-backup refused": [
        drive(device="x"),
        drive(format="raw", sync="top"),
        drive(format="raw", sync="none"),
        drive(format="raw", compress=True),
        drive(format="xx"),
        drive(format="xx", mode="existing"),
        drive(format="qcow2", mode="existing"),
        drive(target="/nonexistent/x"),
        drive(target=""),
        drive(target="foo:bar"),
        drive(target="FOLDER/b.qcow2"),
        drive(target="FOLDER/t.qcow2"),
        drive(sync="bitmap"),
        drive(speed=-1),
        drive(job_id="1"),
        drive(mode="x"),
    ],
    "incremental": [
        several(act("block-dirty-bitmap-add", node="b", name="m"), one()),
        "null",
        backup(target="inc", sync="incremental", bitmap="m"),
        "null",
        BITMAPS,
    ],
    "incremental, persistent": [
        several(act("block-dirty-bitmap-add", node="b", name="m", persistent=True), one()),
        "null",
        backup(target="inc", sync="incremental", bitmap="m"),
        "null",
        several(
            act("block-dirty-bitmap-add", node="b", name="m2", persistent=True, granularity=131072),
            act("block-dirty-bitmap-merge", node="b", target="m2", bitmaps=["m"]),
            act("block-dirty-bitmap-disable", node="b", name="m2"),
            act("blockdev-backup", job_id="k", device="b", target="u", sync="bitmap", bitmap="m", bitmap_mode="never"),
        ),
        "null@k",
        *(c("x-debug-block-dirty-bitmap-sha256", node="b", name=name) for name in ("m", "m2")),
    ],
    "bitmaps busy": [
        bitmap("add", granularity=4096),
        backup(target="inc", sync="bitmap", bitmap="m", bitmap_mode="always", auto_finalize=False),
        "pending",
        *(bitmap(verb) for verb in ("add", "remove", "clear", "enable", "disable")),
        bitmap("merge", target="m", bitmaps=["m"]),
        backup(job_id="k", target="u", sync="incremental", bitmap="m"),
        BITMAPS,
        c("job-finalize", id="j"),
        BITMAPS,
    ],
    "bitmaps refused": [
        bitmap("add"),
        backup(bitmap="m"),
        backup(bitmap="m", bitmap_mode="never"),
        backup(sync="none", bitmap="m", bitmap_mode="always"),
        backup(sync="incremental", bitmap="m", bitmap_mode="always"),
        backup(sync="incremental", bitmap="m", speed=-1),
        backup(sync="incremental", bitmap="m", target="small"),
        backup(sync="bitmap", bitmap="m"),
        several(one(sync="incremental", bitmap="m"), act("abort")),
        BITMAPS,
    ],
    "filters": [
        c("blockdev-add", driver="copy-before-write", node_name="cbw", file="b", target="t"),
        c("blockdev-add", driver="snapshot-access", node_name="then", file="cbw"),
        BITMAPS,
        c("blockdev-del", node_name="cbw"),
        c("blockdev-del", node_name="t"),
        c("block_resize", node_name="b", size=16 << 20),
        c("block_resize", node_name="cbw", size=16 << 20),
        c("blockdev-reopen", options=[{"driver": "copy-before-write", "node-name": "cbw", "file": "b", "target": "t"}]),
        c("blockdev-reopen", options=[{"driver": "snapshot-access", "node-name": "then", "file": "cbw"}]),
        backup(device="then", target="u", sync="full"),
        "null",
        c("blockdev-del", node_name="then"),
        c("blockdev-del", node_name="cbw"),
    ],
    "filters refused": [
        *(
            c(
                "blockdev-add",
                **{"driver": "copy-before-write", "node_name": f"f{number}", "file": "u", "target": "r", **more},
            )
            for number, more in enumerate(
                (
                    {"file": "x"},
                    {"target": "x"},
                    {"target": None},
                    {"on_cbw_error": "x"},
                    {"cbw_timeout": -1},
                    {"cbw_timeout": 1 << 33},
                    {"min_cluster_size": 1000},
                    {"min_cluster_size": 1 << 63},
                    {"bitmap": {"node": "b", "name": "x"}},
                    {"bitmap": {"node": "x", "name": "x"}},
                    {"bitmap": {"node": "x"}},
                    {"foo": 1},
                )
            )
        ),
        c("blockdev-add", driver="snapshot-access", node_name="then", file="x"),
        c("blockdev-add", driver="snapshot-access", node_name="then"),
        bitmap("add"),
        backup(sync="incremental", bitmap="m", target="inc", auto_finalize=False),
        "pending",
        c("blockdev-add", driver="copy-before-write", file="u", target="r", bitmap={"node": "b", "name": "m"}),
        c("job-cancel", id="j"),
        "null",
        c(
            "blockdev-add",
            driver="copy-before-write",
            node_name="f",
            file="odd",
            target="oddt",
            bitmap={"node": "b", "name": "m"},
        ),
    ],
}


def faulty_images(folder: Path) -> None:
    for name in ("source", "target"):
        (folder / f"{name}.raw").write_bytes((b"\x01" if name == "source" else b"\xcc") * (2 << 20))
    create(folder / "packed.qcow2", "2M")


def faulty(name: str, fault: str, **rule: Any) -> str:
    """A node that the rule applies to, over one of the images."""
    file = {"driver": "file", "filename": f"FOLDER/{fault}.raw"}
    blkdebug = {"driver": "blkdebug", "image": file, "inject-error": [{"event": "none", **rule}]}
    return json.dumps({"driver": "raw", "node-name": name, "file": blkdebug})


def faulty_options(*nodes: str) -> Stage:
    def options(folder: Path) -> list[str]:
        file = {"driver": "file", "filename": str(folder / "packed.qcow2")}
        given = [json.dumps({"driver": "qcow2", "node-name": "packed", "file": file})]
        given += [node.replace("FOLDER", str(folder)) for node in nodes]
        return [part for one in given for part in ("--blockdev", one)]

    return Stage(prepare=faulty_images, options=options, images=("packed",), contents=("packed",))


GOOD_SOURCE = faulty("s", "source", iotype="flush", errno=0)
GOOD_TARGET = faulty("t", "target", iotype="flush", errno=0)


def run(**more: Any) -> Step:
    """One piece at a time, of the same size on both sides, so that progress can be compared."""
    perf = {"max-workers": 1, "max-chunk": 1 << 20}
    return c("blockdev-backup", **{"job_id": "j", "device": "s", "target": "t", "sync": "full", "x_perf": perf, **more})


END: list[Step] = ["concluded", *BOTH, c("job-dismiss", id="j")]
POLICIES = ((5, "report"), (5, "ignore"), (5, "stop"), (5, "enospc"), (28, "enospc"), (28, "auto"), (28, "report"))
FAULTS: dict[str, tuple[list[str], list[Step]]] = {}
for side, iotype in (("source", "read"), ("target", "write")):

    def faulty_pair(side: str = side, **rule: Any) -> list[str]:
        bad = faulty(side[0], side, **rule)
        return [bad, GOOD_TARGET] if side == "source" else [GOOD_SOURCE, bad]

    for number, policy in POLICIES:
        how = {f"on_{side}_error": policy, "auto_dismiss": False}
        stops = policy == "stop" or (policy in ("enospc", "auto") and number == 28)
        meanwhile: list[Step] = ["stopped", *BOTH, c("job-resume", id="j")] if stops else []
        nodes = faulty_pair(iotype=iotype, errno=number, once=True)
        FAULTS[f"{iotype} fails once with {number}, {policy}"] = nodes, [run(**how), *meanwhile, *END]
    FAULTS[f"{iotype} fails, stopped and cancelled"] = (
        faulty_pair(iotype=iotype, errno=5),
        [
            run(**{f"on_{side}_error": "stop"}),
            "stopped",
            *BOTH,
            c("block-job-cancel", device="j"),
            c("block-job-cancel", device="j", force=True),
            "null",
        ],
    )


@pytest.mark.parametrize("name", FAULTS)
def test_failures_are_answered_as_in_qemu(name: str, short_path: Path, tmp_path: Path) -> None:
    nodes, script = FAULTS[name]
    assert_alike(faulty_options(*nodes), script, short_path, tmp_path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_replies_events_and_images_are_those_of_qemu(name: str, short_path: Path, tmp_path: Path) -> None:
    assert_alike(STAGE, SCRIPTS[name], short_path, tmp_path)
