"""quorum: options, children that come and go, and votes, beside QEMU's."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from contract.disks import opened, read

from kit.libnbd import script
from kit.livedisk import Daemon
from kit.qemu import StorageDaemon
from kit.qmp import QmpError

MIB = 1 << 20
Step = tuple[str, dict[str, Any]]


def add(name: str, **options: Any) -> Step:
    return "blockdev-add", {"node-name": name, **{key.replace("_", "-"): value for key, value in options.items()}}


def zeroes(name: str, size: int = MIB) -> Step:
    return add(name, driver="null-co", size=size, read_zeroes=True)


def quorum(*children: Any, **options: Any) -> Step:
    return add("q", driver="quorum", children=list(children), **options)


def change(**arguments: str) -> Step:
    return "x-blockdev-change", arguments


DELETE: Step = ("blockdev-del", {"node-name": "q"})
LOOK: Step = ("query-named-block-nodes", {"flat": True})
GRAPH: Step = ("x-debug-query-block-graph", {})
STEPS: list[Step] = [
    *(zeroes(f"c{number}") for number in range(4)), zeroes("small", 4096), add("r", driver="raw", file="c0"),
    quorum(vote_threshold=1), quorum("c0", "c1", vote_threshold=0), quorum("c0", "c1", vote_threshold=3),
    quorum("c0", "c1", vote_threshold=-1), quorum("c0", "c1"), quorum("c0", "c1", vote_threshold=1, read_pattern="x"),
    quorum("c0", "c1", "c2", vote_threshold=2, blkverify=True), quorum("c0", "c1", vote_threshold=1, blkverify=True),
    quorum("c0", "c1", vote_threshold=2, blkverify=True, rewrite_corrupted=True),
    quorum("c0", vote_threshold=2, read_pattern="fifo"), quorum("c1", "small", vote_threshold=1),
    quorum("c1", "nope", vote_threshold=1), LOOK,
    quorum("c1", {"driver": "null-co", "size": MIB}, vote_threshold=1, rewrite_corrupted=True), GRAPH, DELETE,
    quorum("c1", vote_threshold=1), LOOK, GRAPH, change(parent="q", node="c3"), change(parent="q", node="c3"), GRAPH,
    change(parent="q", child="children.1"), change(parent="q", child="children.9"), change(parent="q", child="children.0"),
    change(parent="nope", node="c3"), change(parent="q", node="nope"), change(parent="q"),
    change(parent="q", child="children.0", node="c1"), change(parent="r", node="c1"), change(parent="r", child="file"), DELETE,
    quorum("c1", "c2", vote_threshold=2, blkverify=True), change(parent="q", node="c3"), DELETE,
    quorum("c1", "c2", vote_threshold=1, read_pattern="fifo", rewrite_corrupted=True), LOOK, DELETE,
]  # fmt: skip


def test_options_children_and_names_are_those_of_qemu(short_path: Path) -> None:
    answers: list[list[Any]] = []
    for daemon in (StorageDaemon(short_path, name="q"), Daemon(short_path, name="l")):
        answers.append([])
        with daemon, daemon.qmp() as qmp:
            for command, arguments in STEPS:
                try:
                    answers[-1].append(_comparable(qmp.call(command, arguments)))
                except QmpError as error:
                    answers[-1].append((error.kind, error.desc))
    for step, theirs, ours in zip(STEPS, *answers, strict=True):
        assert ours == theirs, step


def _comparable(answer: Any) -> Any:
    if isinstance(answer, list):  # nodes: without generated names
        return [(node["drv"], _parsed(node["file"]), node["image"]["virtual-size"]) for node in answer]
    if "edges" in answer:
        return sorted((edge["name"], sorted(edge["perm"]), sorted(edge["shared-perm"])) for edge in answer["edges"])
    return answer


def _parsed(name: str) -> Any:
    return json.loads(name.removeprefix("json:")) if name.startswith("json:") else name


BAD = {"event": "none", "iotype": "read", "sector": 128}
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[int, int]]] = {
    # options of the quorum, of each child's blkdebug, and which child holds another byte in its first sector
    "all agree": ({"vote-threshold": 2}, [{}, {}, {}], {}),
    "one differs": ({"vote-threshold": 2}, [{}, {}, {}], {1: 9}),
    "one differs and is repaired": ({"vote-threshold": 2, "rewrite-corrupted": True}, [{}, {}, {}], {2: 9}),
    "all differ": ({"vote-threshold": 2}, [{}, {}, {}], {1: 8, 2: 9}),
    "one cannot be read": ({"vote-threshold": 2}, [{"inject-error": [BAD]}, {}, {}], {}),
    "two cannot be read": ({"vote-threshold": 2}, [{"inject-error": [BAD]}, {"inject-error": [BAD]}, {}], {}),
    "one cannot be written": ({"vote-threshold": 3}, [{"inject-error": [{**BAD, "iotype": "write", "errno": 28}]}, {}, {}], {}),
    "enough can be written": ({"vote-threshold": 2}, [{"inject-error": [{**BAD, "iotype": "write"}]}, {}, {}], {}),
    "one cannot be flushed": ({"vote-threshold": 2}, [{"inject-error": [{"event": "none", "iotype": "flush"}]}, {}, {}], {}),
    "first in, first out": (
        {"vote-threshold": 1, "read-pattern": "fifo"}, [{"inject-error": [BAD]}, {}, {}], {1: 9}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_votes_errors_and_events_are_those_of_qemu(name: str, short_path: Path) -> None:
    options, faults, differing = CASES[name]
    answers: list[Any] = []
    for daemon in (StorageDaemon(short_path, name="q"), Daemon(short_path, name="l")):
        children = []
        for number, fault in enumerate(faults):
            path = short_path / f"{number}.raw"
            path.write_bytes(bytes([differing.get(number, 0)]) * 512 + bytes(MIB - 512))
            image = {"driver": "file", "filename": str(path)}
            children.append(
                {"driver": "raw", "node-name": f"c{number}", "file": {"driver": "blkdebug", "image": image, **fault}}
            )
        with daemon, daemon.qmp() as qmp:
            qmp.call("blockdev-add", {"driver": "quorum", "node-name": "q", "children": children, **options})
            qmp.execute("block-export-add", type="nbd", id="e", node_name="q", writable=True)
            replies = script(
                daemon.uri("q"),
                """
                result = []
                for name, *arguments in (("pread", 512, 0), ("pread", 512, 65536), ("pwrite", b"w" * 512, 65536), ("flush",),
                                     ("zero", 4096, 8192), ("pread", 512, 0)):
                    try:
                        found = getattr(h, name)(*arguments)
                        result.append(found[:1].hex() if found else 0)
                    except nbd.Error as error:
                        result.append(error.errno)
                """,
                before="h.set_request_structured_replies(False)",
            )
            qmp.execute("query-version")
            told = [(event["event"], event["data"]) for event in qmp.events if event["event"].startswith("QUORUM")]
        disks = [(short_path / f"{number}.raw").read_bytes() for number in range(len(faults))]
        answers.append((replies, sorted(told, key=str), disks))
    assert answers[1] == answers[0]


def test_children_that_must_not_differ_fail_the_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(bytes(MIB))
    paths[1].write_bytes(bytes(100) + b"x" + bytes(MIB - 101))
    children = [{"driver": "file", "filename": str(path)} for path in paths]

    async def act() -> None:
        options = {"driver": "quorum", "children": children, "vote-threshold": 2, "blkverify": True}
        async with opened(options) as backend:
            with pytest.raises(OSError):
                await read(backend, 0, 512)
            await backend.write(0, memoryview(b"y" * 512))
            assert await read(backend, 0, 512) == b"y" * 512

    asyncio.run(act())
    assert capfd.readouterr().err == "quorum: offset=0 bytes=512 contents mismatch at offset 100\n"
