"""The flat map answers as the slow path does, whatever happens to the chain below it."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from contract.disks import ALL_WRITES, new_graph, parse, read
from hypothesis import given
from hypothesis import strategies as st

import kit.layer_driver
from kit.layer_driver import LayerDriver
from livedisk.emulator.block import flatmap
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.flatmap import DATA, HOLE, MISS
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.types import Kind

assert kit.layer_driver

TOP = 150_000 // 512 * 512
"""Bytes of the top layer: no multiple of a cluster."""

layers = st.lists(
    st.tuples(st.sampled_from([4096, 8192, 65536]), st.sampled_from([TOP, 60_416, 512, 200_192])),
    min_size=1,
    max_size=4,
)
places = st.integers(0, TOP - 1)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("read"), places, st.sampled_from([1, 512, 4096, 10_000, TOP])),
        st.tuples(st.just("write"), places, st.sampled_from([1, 512, 4096, 20_000]), st.integers(0, 255)),
        st.tuples(st.just("zero"), places, st.sampled_from([100, 8192, 65536])),
        st.tuples(st.just("share"), st.integers(0, 3)),
        st.tuples(st.just("hide"), places),
        st.tuples(st.just("snapshot"), st.sampled_from([4096, 65536])),
        st.tuples(
            st.just("shrink-table"),
        ),
    ),
    max_size=25,
)


def _part(file: Path, offset: int, length: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)


class Chain:
    """Layers on host files, and the disk's content as a bytearray."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.graph: Graph = new_graph()
        self.disk = BlockBackend(self.graph, "test")
        self.content = bytearray(TOP)
        self.made = 0
        self.shared: dict[tuple[Path, int], bytes] = {}
        """What a snapshot holds on to: it must never change."""

    async def layer(self, cluster: int, size: int, backing: Node | None) -> Node:
        self.made += 1
        path = self.folder / f"{self.made}.bin"
        path.write_bytes(b"")
        options: dict[str, Any] = {
            "driver": "test-layer",
            "size": size,
            "cluster-size": cluster,
            "backing": backing.name if backing is not None else None,
            "file": {"driver": "file", "filename": str(path)},
        }
        return await self.graph.open(parse(options))

    async def build(self, layers: list[tuple[int, int]]) -> None:
        """Every layer but the top holds something everywhere at times; sizes differ."""
        node: Node | None = None
        for number, (cluster, size) in enumerate(layers):
            node = await self.layer(cluster, TOP if number == len(layers) - 1 else size, node)
            await self.fill(node, number)
        assert node is not None
        self.graph.attach_root(self.disk, node, ALL_WRITES, Perm.ALL)
        self.content[:] = await read(self.disk, 0, TOP)

    async def fill(self, node: Node, number: int) -> None:
        """Write some clusters, through a writer of its own that leaves again."""
        writer = BlockBackend(self.graph, "writer")
        self.graph.attach_root(writer, node, ALL_WRITES, Perm.ALL)
        node.monitor_owned = True  # outlives the writer
        for start in range(number * 4096, node.size - 5000, 40_000):
            await writer.write(start, memoryview(bytes([number + 65]) * 5000))
        await self.graph.detach_root(writer)

    async def do(self, step: tuple[Any, ...]) -> None:
        name, *arguments = step
        await getattr(self, name.replace("-", "_"))(*arguments)

    async def read(self, offset: int, length: int) -> None:
        length = min(length, TOP - offset)
        for _ in range(2):
            buffer = bytearray(b"\xa5" * length)
            outcome = self.disk.try_read(offset, memoryview(buffer))
            if outcome == HOLE:
                assert buffer == b"\xa5" * length
                buffer = bytearray(length)
            if outcome != MISS:
                assert buffer == self.content[offset : offset + length]
            assert await read(self.disk, offset, length) == self.content[offset : offset + length]

    async def write(self, offset: int, length: int, fill: int) -> None:
        data = memoryview(bytes([fill]) * min(length, TOP - offset))
        if self.disk.try_write(offset, data) == MISS:
            await self.disk.write(offset, data)
        self.content[offset : offset + len(data)] = data

    async def zero(self, offset: int, length: int) -> None:
        length = min(length, TOP - offset)
        await self.disk.write_zeroes(offset, length)
        self.content[offset : offset + length] = bytes(length)

    async def share(self, which: int) -> None:
        nodes = [node for node in self.graph.nodes.values() if isinstance(node.driver, LayerDriver)]
        driver = nodes[which % len(nodes)].driver
        assert isinstance(driver, LayerDriver)
        driver.share_all()
        file, step = Path(driver.node.file.node.driver.filename), driver.options.cluster_size
        for cluster in driver.clusters.values():
            if cluster.kind is Kind.DATA:
                self.shared[file, cluster.host * step] = _part(file, cluster.host * step, step)

    async def hide(self, offset: int) -> None:
        driver = self.disk.node.driver
        assert isinstance(driver, LayerDriver)
        driver.hide(offset // driver.options.cluster_size)

    async def snapshot(self, cluster: int) -> None:
        """A new overlay on top, as a live snapshot puts it."""
        old = self.disk.node
        new = await self.layer(cluster, TOP, old)
        async with self.graph.drained(old):
            self.graph.replace_node(old, new, but=[edge for edge in old.parents if edge.parent is new])

    async def shrink_table(self) -> None:
        """Metadata leaves the cache: the flat map may keep what it knows."""
        driver = self.disk.node.driver
        assert isinstance(driver, LayerDriver)
        driver._loaded.clear()

    async def close(self) -> None:
        for (file, offset), old in self.shared.items():
            assert _part(file, offset, len(old)) == old
        await self.graph.detach_root(self.disk)
        await self.graph.close()


@given(layers=layers, steps=steps)
def test_fast_answers_equal_slow_ones(layers: list[tuple[int, int]], steps: list[tuple[Any, ...]]) -> None:
    async def run(folder: Path) -> None:
        chain = Chain(folder)
        await chain.build(layers)
        for step in steps:
            await chain.do(step)
        await chain.read(0, TOP)
        await chain.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))


def test_reading_one_page_of_a_deep_chain_is_served_fast(tmp_path: Path) -> None:
    async def run() -> None:
        chain = Chain(tmp_path)
        await chain.build([(4096, TOP)] + [(65536, TOP)] * 7)
        page = memoryview(bytearray(4096))
        for start in range(0, TOP - 4096, 4096):
            await chain.disk.read(start, page)  # loads the tables
            assert chain.disk.try_read(start, page) != MISS
        await chain.close()

    asyncio.run(run())


def test_number_of_regions_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatmap, "MAX_REGIONS", 3)
    size = 1 << 36

    async def run() -> None:
        chain = Chain(tmp_path)
        node = await chain.layer(4096, size, None)
        chain.graph.attach_root(chain.disk, node, ALL_WRITES, Perm.ALL)
        page = memoryview(bytearray(4096))
        for start in range(0, size, size // 50):
            start = start // 4096 * 4096
            await chain.disk.read(start, page)
            assert chain.disk.try_read(start, page) == HOLE
        assert len(chain.disk.fast._regions) == 3
        await chain.close()

    asyncio.run(run())


class Tracker:
    """A dirty map that lists what it was told."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, int]] = []

    def mark(self, offset: int, length: int) -> None:
        self.marks.append((offset, length))


def test_fast_writes_are_marked_dirty_and_counted_on_every_node(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    options = {"driver": "raw", "file": {"driver": "file", "node-name": "f", "filename": str(tmp_path / "disk.raw")}}

    async def run() -> None:
        graph = new_graph()
        disk = BlockBackend(graph, "test")
        node = await graph.open(parse({"node-name": "r", **options}))
        graph.attach_root(disk, node, ALL_WRITES, Perm.ALL)
        above, below = Tracker(), Tracker()
        node.trackers.append(above)
        graph.changed()
        page = memoryview(b"x" * 4096)
        assert disk.try_write(8192, page) == DATA
        assert above.marks == [(8192, 4096)]
        assert node.wr_highest == graph.find("f").wr_highest == 12288
        graph.find("f").trackers.append(below)
        graph.changed()
        assert disk.try_write(0, page) == MISS, "a tracker below the root must see the write"
        await disk.write(0, page)
        assert below.marks == [(0, 4096)]
        await graph.detach_root(disk)
        await graph.close()

    asyncio.run(run())


def test_fast_path_is_closed_while_drained_and_without_permission(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"y" * 65536)
    options = {"driver": "file", "node-name": "f", "filename": str(tmp_path / "disk.raw")}

    async def run() -> None:
        graph = new_graph()
        disk = BlockBackend(graph, "test")
        node = await graph.open(parse(options))
        graph.attach_root(disk, node, Perm.CONSISTENT_READ, Perm.ALL)
        page = memoryview(bytearray(4096))
        assert disk.try_read(0, page) == DATA
        assert disk.try_write(0, page) == MISS
        graph.set_root_permissions(disk, ALL_WRITES, Perm.ALL)
        assert disk.try_write(0, page) == DATA
        async with graph.drained(node):
            assert disk.try_read(0, page) == MISS
            assert disk.try_write(0, page) == MISS
        assert disk.try_read(0, page) == DATA
        await graph.detach_root(disk)
        assert disk.try_read(0, page) == MISS
        await graph.close()

    asyncio.run(run())


def test_a_write_that_the_host_refuses_fails_on_the_slow_path(tmp_path: Path) -> None:
    options = {"driver": "host_device", "node-name": "full", "filename": "/dev/full"}

    async def run() -> None:
        graph = new_graph()
        disk = BlockBackend(graph, "test")
        node = await graph.open(parse(options))
        node.driver._size = 65536  # type: ignore[attr-defined]  # a device that claims room and then has none
        graph.attach_root(disk, node, ALL_WRITES, Perm.ALL)
        page = memoryview(bytearray(4096))
        assert disk.try_write(0, page) == MISS
        with pytest.raises(OSError, match="No space left on device"):
            await disk.write(0, page)
        await graph.detach_root(disk)
        await graph.close()

    asyncio.run(run())
