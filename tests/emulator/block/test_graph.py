"""Structure: names, permissions in QEMU's words, replacing, and that a refused change changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from contract.disks import ALL_WRITES, new_graph, parse

from kit.qemu import StorageDaemon, create
from kit.qmp import QmpError
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.permissions import Perm, Role
from livedisk.emulator.block.transaction import Transaction
from livedisk.emulator.errors import BlockError, LiveDiskError, PermissionConflict


def graph_test(body: Callable[[Graph], Awaitable[None]]) -> None:
    """Run the body on a new graph; the graph is closed, and must then be empty."""

    async def run() -> None:
        graph = new_graph()
        try:
            await body(graph)
        finally:
            await graph.close()
        assert not graph.nodes
        assert not graph.backends

    asyncio.run(run())


def shape(graph: Graph) -> Any:
    """Everything that a refused change must leave as it was."""
    return {
        name: (
            node.perm,
            node.shared,
            {edge: (child.node.name, child.perm, child.shared) for edge, child in node.children.items()},
            [(edge.parent_description, edge.name, edge.perm, edge.shared) for edge in node.parents],
        )
        for name, node in graph.nodes.items()
    }


NULL = {"driver": "null-co", "size": 65536}


@pytest.mark.parametrize(
    "steps",
    [
        [{"node-name": "1x", **NULL}],
        [{"node-name": "#x", **NULL}],
        [{"node-name": "x" * 32, **NULL}],
        [{"node-name": "a", **NULL}, {"node-name": "a", **NULL}],
        [{"node-name": "r", "driver": "raw", "file": "nobody"}],
        [
            {"node-name": "f", "driver": "file", "filename": "disk.qcow2"},
            {"node-name": "one", "driver": "qcow2", "file": "f"},
            {"node-name": "two", "driver": "qcow2", "file": "f"},
        ],
        [
            {"node-name": "f", "driver": "file", "filename": "disk.qcow2", "read-only": True},
            {"node-name": "one", "driver": "qcow2", "file": "f"},
        ],
    ],
    ids=lambda steps: steps[-1]["node-name"][:3] + str(len(steps)),
)
def test_refusals_are_qemus_and_change_nothing(
    steps: list[dict[str, Any]], tmp_path: Path, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    create(tmp_path / "disk.qcow2", 65536)
    with StorageDaemon(short_path, cwd=tmp_path) as daemon, daemon.qmp() as peer:
        for step in steps[:-1]:
            peer.call("blockdev-add", step)
        with pytest.raises(QmpError) as theirs:
            peer.call("blockdev-add", steps[-1])

    async def body(graph: Graph) -> None:
        for step in steps[:-1]:
            await graph.add(parse(step))
        before = shape(graph)
        with pytest.raises(LiveDiskError) as ours:
            await graph.add(parse(steps[-1]))
        assert str(ours.value) == theirs.value.desc
        assert shape(graph) == before

    graph_test(body)


def test_a_part_keeps_its_file_from_being_resized_in_qemus_words(tmp_path: Path, short_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(4096))
    file = {"node-name": "f", "driver": "file", "filename": str(tmp_path / "disk.raw")}
    parts: list[dict[str, Any]] = [
        {"node-name": "one", "driver": "raw", "file": "f", "size": 1024},
        {"node-name": "two", "driver": "raw", "file": "f", "offset": 1024},
    ]
    with StorageDaemon(short_path) as daemon, daemon.qmp() as peer:
        for step in (file, *parts):
            peer.call("blockdev-add", step)
        with pytest.raises(QmpError) as theirs:
            peer.call("block_resize", {"node-name": "two", "size": 8192})

    async def body(graph: Graph) -> None:
        for step in (file, *parts):
            await graph.add(parse(step))
        before = shape(graph)
        with pytest.raises(PermissionConflict) as ours:
            graph.attach_root(BlockBackend(graph, "b"), graph.find("two"), ALL_WRITES, Perm.ALL)
        assert str(ours.value) == theirs.value.desc
        assert shape(graph) == before

    graph_test(body)


def test_replacing_a_node_moves_its_users_and_can_be_undone() -> None:
    async def body(graph: Graph) -> None:
        old, new = [await graph.add(parse({"node-name": name, **NULL})) for name in ("old", "new")]
        filters = await graph.add(parse({"node-name": "r", "driver": "raw", "file": "old"}))
        disk = BlockBackend(graph, "disk")
        seen: list[str] = []
        disk.on_root_changed.append(lambda: seen.append(disk.node.name))
        graph.attach_root(disk, old, ALL_WRITES, Perm.ALL)
        before = shape(graph)
        tran = Transaction()
        graph.replace_node(old, new, tran)
        assert disk.node is new
        assert filters.file.node is new
        assert not old.parents
        tran.abort()
        assert shape(graph) == before
        assert seen == ["new", "old"]
        graph.replace_node(old, new)
        assert new.perm & Perm.WRITE
        assert old.perm == Perm.NONE

    graph_test(body)


def test_an_overlay_put_between_takes_over_and_keeps_its_backing_edge(tmp_path: Path) -> None:
    create(tmp_path / "top.qcow2", 65536)

    async def body(graph: Graph) -> None:
        base = await graph.add(parse({"node-name": "base", **NULL}))
        disk = BlockBackend(graph, "disk")
        graph.attach_root(disk, base, ALL_WRITES, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED)
        file = {"driver": "file", "filename": str(tmp_path / "top.qcow2")}
        top = await graph.open(parse({"node-name": "top", "driver": "qcow2", "backing": None, "file": file}))
        with Transaction() as tran:
            edge = graph.attach_child(top, base, "backing", Role.COW, tran)
            graph.replace_node(base, top, tran, but=[edge])
        assert disk.node is top
        assert top.backing is edge
        assert not base.perm & Perm.WRITE, "a backing file is only read"
        with pytest.raises(BlockError, match="would create a cycle"):
            graph.attach_child(base, top, "backing", Role.COW)

    graph_test(body)


def test_a_frozen_edge_stays() -> None:
    async def body(graph: Graph) -> None:
        for name in ("a", "b"):
            await graph.add(parse({"node-name": name, **NULL}))
        raw = await graph.add(parse({"node-name": "r", "driver": "raw", "file": "a"}))
        raw.file.frozen = True
        for change in (
            lambda: graph.replace_edge(raw.file, graph.find("b")),
            lambda: graph.detach_child(raw.file),
            lambda: graph.replace_node(graph.find("a"), graph.find("b")),
        ):
            with pytest.raises(BlockError, match="Cannot change frozen 'file' link from 'r' to 'a'"):
                change()
        assert raw.file.node.name == "a"

    graph_test(body)


def test_a_node_that_fails_to_open_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(512))

    async def body(graph: Graph) -> None:
        file = {"driver": "file", "node-name": "f", "filename": str(tmp_path / "disk.raw")}
        with pytest.raises(BlockError, match="Offset"):
            await graph.add(parse({"node-name": "r", "driver": "raw", "offset": 1024, "file": file}))
        assert not graph.nodes

    graph_test(body)


def test_closing_takes_off_what_is_still_attached() -> None:
    async def body(graph: Graph) -> None:
        node = await graph.add(parse({"node-name": "n", **NULL}))
        disk = BlockBackend(graph, "disk")
        graph.attach_root(disk, node, ALL_WRITES, Perm.ALL)
        await graph.close()
        assert disk.root is None

    graph_test(body)


def test_who_takes_hold_of_a_node_while_all_are_closed_is_taken_off_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(graph: Graph) -> None:
        first, second = [await graph.add(parse({"node-name": name, **NULL})) for name in ("first", "second")]

        async def close() -> None:
            graph.attach_root(BlockBackend(graph, "late"), second, Perm.CONSISTENT_READ, Perm.ALL)

        monkeypatch.setattr(first.driver, "close", close)

    graph_test(body)


def test_a_node_that_cannot_be_closed_keeps_no_other_from_being_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other images must get to the disk what they hold, also those below the one that failed."""
    closed: list[str] = []

    async def run() -> None:
        graph = new_graph()
        for name in ("one", "two"):
            create(tmp_path / name, 1 << 20)
            file = {"driver": "file", "node-name": f"{name}-file", "filename": str(tmp_path / name)}
            node = await graph.add(parse({"driver": "qcow2", "node-name": name, "file": file}))
            for each in (node, node.file.node):
                real = each.driver.close

                async def close(name: str = each.name, real: Callable[[], Awaitable[None]] = real) -> None:
                    closed.append(name)
                    await real()
                    if name == "one":
                        raise OSError(28, "No space left on device")

                monkeypatch.setattr(each.driver, "close", close)
        with pytest.raises(OSError, match="No space left on device"):
            await graph.close()
        assert not graph.nodes

    asyncio.run(run())
    assert sorted(closed) == ["one", "one-file", "two", "two-file"]
