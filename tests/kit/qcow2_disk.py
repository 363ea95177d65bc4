"""A qcow2 image opened in this process, as a guest would use it: a graph, a backend, and the variants of the format."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from livedisk.emulator import drivers
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.driver import DRIVERS
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.types import Discard
from livedisk.emulator.drivers.qcow2.driver import Qcow2
from livedisk.emulator.drivers.qcow2.image import Image
from livedisk.emulator.drivers.qcow2.options import Qcow2Options

assert drivers.__all__  # importing registers them

VARIANTS: dict[str, str] = {
    "default": "",
    "clusters of 512": "cluster_size=512",
    "clusters of 2M": "cluster_size=2M",
    "version 2": "compat=0.10",
    "refcounts of 1 bit": "cluster_size=512,refcount_bits=1",
    "refcounts of 2 bits": "cluster_size=1k,refcount_bits=2",
    "refcounts of 4 bits": "cluster_size=4k,refcount_bits=4",
    "refcounts of 8 bits": "refcount_bits=8",
    "refcounts of 32 bits": "refcount_bits=32",
    "refcounts of 64 bits": "cluster_size=512,refcount_bits=64",
    "subclusters": "extended_l2=on",
    "subclusters of 512": "extended_l2=on,cluster_size=16k",
    "lazy refcounts": "lazy_refcounts=on",
    "zstd": "compression_type=zstd",
    "preallocated metadata": "preallocation=metadata",
    "preallocated subclusters": "extended_l2=on,preallocation=metadata",
    "data file": "data_file={folder}/data",
    "raw data file": "data_file={folder}/data,data_file_raw=on",
    "data file with subclusters": "data_file={folder}/data,extended_l2=on",
}
"""Options of ``qemu-img create``, by name."""


def file_options(path: Path, **given: Any) -> BlockdevOptions:
    """Options of a file node."""
    make: Any = DRIVERS["file"].Options
    options: BlockdevOptions = make(driver="file", filename=str(path), **given)
    return options


class Disk:
    """An open image: its graph, node, backend and inner parts."""

    def __init__(self, graph: Graph, node: Node, backend: BlockBackend) -> None:
        self.graph = graph
        self.node = node
        self.backend = backend

    @property
    def driver(self) -> Qcow2:
        assert isinstance(self.node.driver, Qcow2)
        return self.node.driver

    @property
    def image(self) -> Image:
        return self.driver.image

    async def read(self, offset: int, length: int) -> bytes:
        """By the fast path where it answers, else the slow one."""
        raw = bytearray(length)
        answer = self.backend.try_read(offset, memoryview(raw))
        if answer == 0:
            await self.backend.read(offset, memoryview(raw))
        return bytes(length) if answer == 2 else bytes(raw)

    async def write(self, offset: int, data: bytes) -> None:
        if self.backend.try_write(offset, memoryview(data)) == 0:
            await self.backend.write(offset, memoryview(data))


@asynccontextmanager
async def opened(path: Path | BlockdevOptions, *, writable: bool = True, **options: Any) -> AsyncIterator[Disk]:
    """The image at ``path`` (or on these file options), closed at the end."""
    graph = Graph()
    file = path if isinstance(path, BlockdevOptions) else file_options(path)
    options.setdefault("discard", Discard.UNMAP)
    node = await graph.add(Qcow2Options(driver="qcow2", file=file, read_only=not writable, **options))
    backend = BlockBackend(graph, "guest")
    try:
        graph.attach_root(backend, node, Perm.ALL if writable else Perm.CONSISTENT_READ, Perm.ALL)
        yield Disk(graph, node, backend)
    finally:
        if backend.root is not None:
            await graph.detach_root(backend)
        await graph.close()
