"""The same commands on dirty bitmaps to qemu-storage-daemon and to livedisk: the same replies, the same bitmaps, the same hashes.

Not compared, because QEMU 10.0.2 crashes on it: a merge of no bitmaps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon
from kit.qemu import StorageDaemon, check, create, info, qemu_img, qemu_io
from kit.qmp import QmpError

Step = tuple[str, dict[str, Any]] | list[str]
"""A command with its arguments; or qemu-io's commands, to the export of node ``a``."""

PREFIX = "block-dirty-bitmap-"


def act(verb: str, node: str = "a", name: str = "x", **more: Any) -> Step:
    return PREFIX + verb, {"node": node, "name": name, **more}


def merge(target: str, *bitmaps: Any, node: str = "a") -> Step:
    return PREFIX + "merge", {"node": node, "target": target, "bitmaps": list(bitmaps)}


def transaction(*steps: Step, **properties: Any) -> Step:
    actions = [{"type": step[0], "data": step[1]} for step in steps]
    return "transaction", {"actions": actions, **({"properties": properties} if properties else {})}


def sha(name: str = "x", node: str = "a") -> Step:
    return "x-debug-block-dirty-bitmap-sha256", {"node": node, "name": name}


LIST: Step = ("query-named-block-nodes", {"flat": True})
ABORT: Step = ("abort", {})
EXPORT: Step = (
    "block-export-add",
    {"type": "nbd", "id": "e", "node-name": "a", "name": "e", "writable": True},
)
WRITES: Step = ["write 64k 64k", "write 1M 100k", "discard 2M 64k", "write -z 3M 64k", "write 8188k 4k"]

SCRIPTS: dict[str, list[Step]] = {
    "add": [
        act("add"),
        act("add"),
        act("add", name=""),
        act("add", name="y" * 1023),
        act("add", name="y" * 1024),
        act("add", node="nowhere"),
        *(act("add", name="g", granularity=size) for size in (0, 100, 256, 3000, 2**32 - 1, 2**32, -1)),
        act("add", name="largest", granularity=1 << 31),
        act("add", name="d", disabled=True),
        act("add", node="null"),
        act("add", node="a-file"),
        act("add", node="small"),
        act("add", node="big", name="default"),
        act("add", node="tiny", name="default"),
        act("add", node="null", persistent=True),
        act("add", node="a-file", persistent=True),
        LIST,
    ],
    "names that are not there": [
        *(act(verb, name="z") for verb in ("remove", "clear", "enable", "disable")),
        *(act(verb, node="z") for verb in ("remove", "clear", "enable", "disable")),
        act("clear", name=""),
        sha(name="z"),
        sha(node="z"),
        merge("z"),
        merge("x", "z"),
        merge("x", node="z"),
        act("add"),
        merge("x", "z"),
        merge("x", {"node": "z", "name": "x"}),
        merge("x", {"node": "small", "name": "x"}),
        merge("x", {"node": "small"}),
    ],
    "what is written": [
        EXPORT,
        act("add"),
        act("add", name="fine", granularity=512),
        act("add", name="coarse", granularity=1 << 20),
        act("add", name="d", disabled=True),
        WRITES,
        LIST,
        *(sha(name) for name in ("x", "fine", "coarse", "d")),
        act("disable"),
        act("enable", name="d"),
        ["write 5M 5k"],
        LIST,
        act("clear"),
        act("clear", name="d"),
        act("enable"),
        ["write 512 512"],
        LIST,
        *(sha(name) for name in ("x", "fine", "coarse", "d")),
        act("remove", name="coarse"),
        LIST,
    ],
    "merge": [
        EXPORT,
        act("add"),
        act("add", name="same", disabled=True),
        act("add", name="fine", granularity=512, disabled=True),
        act("add", name="finer", granularity=512),
        act("add", name="coarse", granularity=1 << 20, disabled=True),
        act("add", node="b", name="other", granularity=4096, disabled=True),
        act("add", node="small"),
        WRITES,
        merge("same", "x"),
        merge("fine", "x"),
        merge("coarse", "finer"),
        merge("other", {"node": "a", "name": "finer"}, node="b"),
        merge("x", "x"),
        merge("x", {"node": "small", "name": "x"}),
        merge("same", "finer", "coarse"),
        *(sha(name) for name in ("x", "same", "fine", "finer", "coarse")),
        sha("other", node="b"),
        LIST,
    ],
    "transactions": [
        EXPORT,
        act("add"),
        act("add", name="p"),
        act("add", name="d", disabled=True),
        WRITES,
        transaction(
            act("add", name="t"),
            act("clear"),
            act("disable"),
            act("enable", name="d"),
            merge("d", "p"),
            act("remove", name="p"),
            ABORT,
        ),
        LIST,
        sha(),
        sha("d"),
        ["write 6M 64k"],
        LIST,
        transaction(act("add", name="t"), merge("t", "x"), act("clear"), act("disable"), act("remove", name="p")),
        LIST,
        sha("t"),
        transaction(act("remove"), act("remove")),
        transaction(act("remove"), act("add")),
        transaction(act("remove"), act("clear")),
        transaction(act("remove"), merge("t", "x")),
        transaction(act("add", name="u"), **{"completion-mode": "grouped"}),
        transaction(act("add", name="u"), act("add", name="u")),
        LIST,
    ],
    "resize": [
        act("add"),
        act("add", name="fine", granularity=512),
        EXPORT,
        WRITES,
        ("block-export-del", {"id": "e", "mode": "hard"}),
        ("block_resize", {"node-name": "a", "size": 12 << 20}),
        LIST,
        sha(),
        sha("fine"),
        ("block_resize", {"node-name": "a", "size": (2 << 20) + 512}),
        LIST,
        sha(),
        sha("fine"),
    ],
}


def reopen(name: str, *, read_only: bool) -> Step:
    options = {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "read-only": read_only}
    return "blockdev-reopen", {"options": [options]}


SCRIPTS["persistent"] = [
    LIST,
    *(act(verb, node="kept", name="lost") for verb in ("clear", "enable", "disable")),
    merge("lost", "auto", node="kept"),
    merge("auto", "lost", node="kept"),
    act("add", node="kept", name="lost"),
    act("add", node="kept", name="lost", persistent=True),
    act("add", node="kept", name="new", persistent=True, granularity=4096),
    act("add", node="old", persistent=True),
    act("add", node="a", name="x" * 1023, persistent=True),
    sha("auto", node="kept"),
    ("block_resize", {"node-name": "kept", "size": 16 << 20}),
    act("remove", node="kept", name="lost"),
    ("block_resize", {"node-name": "kept", "size": 16 << 20}),
    LIST,
    reopen("kept", read_only=True),
    *(act(verb, node="kept", name="auto") for verb in ("clear", "remove", "disable", "enable")),
    merge("auto", "off", node="kept"),
    act("enable", node="kept", name="off"),
    act("add", node="kept", name="volatile"),
    act("clear", node="kept", name="volatile"),
    LIST,
    reopen("kept", read_only=False),
    act("clear", node="kept", name="auto"),
    act("remove", node="kept", name="auto"),
    transaction(act("remove", node="kept", name="off"), act("add", node="kept", name="p", persistent=True), ABORT),
    LIST,
    transaction(act("remove", node="kept", name="off"), act("add", node="kept", name="p", persistent=True)),
    LIST,
]


def kept(folder: Path) -> None:
    """An image with a bitmap that records, one that does not, and one that is inconsistent."""
    path = create(folder / "kept.qcow2", "8M")
    qemu_img("bitmap", "--add", path, "lost")
    qemu_img("bitmap", "--add", path, "auto")
    qemu_img("bitmap", "--add", "--disable", "-g", "4096", path, "off")
    qemu_io(path, "write 1M 100k")
    raw = bytearray(path.read_bytes())
    extension = raw.index(bytes.fromhex("23852875"), 104) + 8
    directory = int.from_bytes(raw[extension + 16 : extension + 24], "big")
    assert raw[directory + 24 : directory + 28] == b"lost"
    raw[directory + 15] |= 1  # in use
    path.write_bytes(raw)


def options(folder: Path) -> list[str]:
    given: list[str] = []
    kept(folder)
    for name, size, how in (
        ("a", "8M", ""),
        ("b", "8M", ""),
        ("small", "4M", ""),
        ("big", "4M", "cluster_size=2M"),
        ("tiny", "4M", "cluster_size=512"),
        ("old", "4M", "compat=0.10"),
        ("kept", "", ""),
    ):
        if size:
            create(folder / f"{name}.qcow2", size, options=how)
        file = {"driver": "file", "filename": str(folder / f"{name}.qcow2"), "node-name": f"{name}-file"}
        given += ["--blockdev", json.dumps({"driver": "qcow2", "node-name": name, "file": file})]
    return [*given, "--blockdev", "driver=null-co,node-name=null,size=1073741824,read-zeroes=on"]


def play(peer: type[StorageDaemon], folder: Path, script: list[Step]) -> list[Any]:
    """The replies, and at the end what the images say of their bitmaps."""
    folder.mkdir()
    replies: list[Any] = []
    with peer(folder, *options(folder)) as daemon, daemon.qmp(timeout=20) as qmp:
        for step in script:
            if isinstance(step, list):
                qemu_io(daemon.uri("e"), *step, format="raw")
                continue
            try:
                answer = qmp.call(*step)
            except QmpError as error:
                answer = {"class": error.kind, "desc": error.desc}
            if step is LIST:
                answer = sorted((node["node-name"], node.get("dirty-bitmaps")) for node in answer)
            replies.append(answer)
    for name in ("a", "kept"):
        check(folder / f"{name}.qcow2")
        stored = info(folder / f"{name}.qcow2")["format-specific"]["data"].get("bitmaps", [])
        replies.append(sorted((one["name"], one["granularity"], one["flags"]) for one in stored))
    return replies


@pytest.mark.parametrize("name", SCRIPTS)
def test_replies_and_bitmaps_are_those_of_qemu(name: str, short_path: Path) -> None:
    theirs = play(StorageDaemon, short_path / "q", SCRIPTS[name])
    ours = play(Daemon, short_path / "l", SCRIPTS[name])
    asked = [*(step for step in SCRIPTS[name] if not isinstance(step, list)), "bitmaps of a", "bitmaps of kept"]
    for step, one, other in zip(asked, theirs, ours, strict=True):
        assert other == one, step


def test_a_merge_of_no_bitmaps_merges_nothing(short_path: Path) -> None:
    (short_path / "l").mkdir()
    with Daemon(short_path / "l", *options(short_path / "l")) as daemon, daemon.qmp() as qmp:
        qmp.call("block-dirty-bitmap-add", {"node": "a", "name": "x"})
        qmp.call("block-dirty-bitmap-merge", {"node": "a", "target": "x", "bitmaps": []})
        assert qmp.call(*LIST)[-1].get("dirty-bitmaps") is None
