"""``test-layer``: the least image format that has everything a flat map must get right, for tests of the block layer.

Clusters stand shuffled in the file child, or read as zeroes, or show the backing file, or must be asked for (opaque).
The table is only kept in memory, a part of it is "not loaded" at any time (NotMapped), and clusters that are shared with
a snapshot may not be written in place. No metadata is written: what is tested is the way through the graph.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any

import msgspec

from livedisk.emulator.block.driver import DRIVERS, Driver, register
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import BlockdevOptions, BlockdevRef, BlockdevRefOrNull, Size
from livedisk.emulator.block.permissions import Role
from livedisk.emulator.block.types import HostOffset, Kind, NotMapped, Preallocation, Segment, ZeroFlags


class LayerOptions(BlockdevOptions, kw_only=True):
    """``loaded``: how many clusters' table entries fit in memory."""

    file: BlockdevRef
    backing: BlockdevRefOrNull = None
    size: Size
    cluster_size: Size = 4096
    loaded: int = 8


@dataclass
class _Cluster:
    kind: Kind
    host: int = 0
    in_place: bool = True


class LayerDriver(Driver):
    name = "test-layer"
    Options = LayerOptions
    options: LayerOptions
    is_format = True
    supports_backing = True

    def __init__(self, node: Node, options: Any) -> None:
        super().__init__(node, options)
        self.clusters: dict[int, _Cluster] = {}
        self._loaded: dict[int, None] = {}
        self._next_host = 7
        self._size: int = options.size

    async def open(self) -> None:
        self.map_granularity = self.options.cluster_size
        graph = self.node.graph
        await graph.open_child(self.node, self.options.file, "file", Role.IMAGE)
        if self.options.backing is not None and self.options.backing is not msgspec.UNSET:
            await graph.open_child(self.node, self.options.backing, "backing", Role.COW)

    @property
    def size(self) -> int:
        return self._size

    def map(self, offset: int, length: int) -> Segment:
        step = self.options.cluster_size
        index, inside = divmod(offset, step)
        if index not in self._loaded:
            raise NotMapped
        length = min(length, step - inside, self._size - offset)
        cluster = self.clusters.get(index)
        if cluster is None:
            return Segment(Kind.UNALLOCATED, length)
        if cluster.kind is Kind.DATA:
            where = HostOffset(cluster.host * step + inside)
            return Segment(Kind.DATA, length, self.node.file, where, cluster.in_place)
        return Segment(cluster.kind, length)

    async def load(self, offset: int, length: int) -> None:
        self._loaded[offset // self.options.cluster_size] = None
        while len(self._loaded) > self.options.loaded:
            del self._loaded[next(iter(self._loaded))]

    async def read(self, offset: int, view: memoryview) -> None:
        step = self.options.cluster_size
        index, inside = divmod(offset, step)
        await self.node.file.read(self.clusters[index].host * step + inside, view)

    async def write(self, offset: int, data: memoryview) -> None:
        step, done = self.options.cluster_size, 0
        while done < len(data):
            index, inside = divmod(offset + done, step)
            part = data[done : done + step - inside]
            await self._write_cluster(index, inside, part)
            done += len(part)

    async def _write_cluster(self, index: int, inside: int, part: memoryview) -> None:
        step = self.options.cluster_size
        cluster = self.clusters.get(index)
        if cluster is None or not cluster.in_place or cluster.kind is not Kind.DATA:
            whole = bytearray(step)
            await self.old_content(index, memoryview(whole)[: min(step, self._size - index * step)])
            whole[inside : inside + len(part)] = part
            cluster = _Cluster(Kind.DATA, self._next_host)
            self._next_host += 3  # never next to each other, and past the end of the file
            await self.node.file.write(cluster.host * step, memoryview(whole))
            self.clusters[index] = cluster
            self.node.mapping_changed(index * step, step)
        else:
            await self.node.file.write(cluster.host * step + inside, part)

    async def old_content(self, index: int, view: memoryview) -> None:
        """What a cluster reads as now."""
        step = self.options.cluster_size
        cluster = self.clusters.get(index)
        if cluster is not None and cluster.kind is not Kind.ZERO:
            await self.node.file.read(cluster.host * step, view)
        elif cluster is None and self.node.backing is not None:
            await self.node.backing.read(index * step, view)

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        step = self.options.cluster_size
        if (offset | length) % step:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        for index in range(offset // step, (offset + length) // step):
            self.clusters[index] = _Cluster(Kind.ZERO)
        self.node.mapping_changed(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        step = self.options.cluster_size
        for index in range(-(-offset // step), (offset + length) // step):
            self.clusters.pop(index, None)
        self.node.mapping_changed(offset, length)

    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        step = self.options.cluster_size
        if size < self._size:
            for index in [index for index in self.clusters if index >= size // step]:
                del self.clusters[index]  # may show the backing file again: the caller's model knows
        self._size = size

    # -- what tests do to it -----------------------------------------------------------------------------------------
    def share_all(self) -> None:
        """As if a snapshot was taken: nothing may be written in place any more."""
        for cluster in self.clusters.values():
            cluster.in_place = False
        self.node.mapping_changed()

    def hide(self, index: int) -> None:
        """Make a data cluster opaque."""
        cluster = self.clusters.get(index)
        if cluster is not None and cluster.kind is Kind.DATA:
            self.clusters[index] = _Cluster(Kind.OPAQUE, cluster.host, in_place=False)
            step = self.options.cluster_size
            self.node.mapping_changed(index * step, step)


if LayerDriver.name not in DRIVERS:
    register(LayerDriver)
