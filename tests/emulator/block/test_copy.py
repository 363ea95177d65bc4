"""One range copied from node to node: from every kind of source into every kind of target, and which side failed."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from contract.disks import ALL_WRITES, new_graph, parse, read

from kit.memory_disk import MemoryDriver
from kit.qcow2_disk import VARIANTS
from kit.qemu import check, create, info, measure_map, qemu_img, qemu_io
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.copy import SMALL, CopyFailed, Side, copy_now, copy_range
from livedisk.emulator.block.extents import COPY_BUFFER, copy_buffer
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.types import ZeroFlags

SIZE = (3 << 20) + (200 << 10) + 512
"""Bytes: longer than one step, no multiple of a cluster."""


def raw_source(folder: Path) -> dict[str, Any]:
    path = folder / "source.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for start, length in ((0, 70_000), (128 << 10, 4096), (1 << 20, 1 << 20), ((3 << 20) + 4096, 130_000)):
            file.seek(start)
            file.write(random.Random(start).randbytes(length))
    return {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}


def part_source(folder: Path) -> dict[str, Any]:
    """A part of a file whose bytes do not begin at a sector's place on the host."""
    path = folder / "part.raw"
    path.write_bytes(b"\xaa" * 512 + random.Random(1).randbytes(SIZE) + b"\xbb" * 512)
    return {"driver": "raw", "offset": 512, "size": SIZE, "file": {"driver": "file", "filename": str(path)}}


def chain_source(folder: Path) -> dict[str, Any]:
    """A short raw image below, compressed, zeroed and shuffled clusters above."""
    base = folder / "base.raw"
    base.write_bytes(random.Random(2).randbytes(1 << 20))
    middle = create(folder / "middle.qcow2", SIZE, options=f"backing_file={base},backing_fmt=raw,cluster_size=16k")
    qemu_io(middle, "write -P 7 1M 64k", "write -z 64k 64k", "write -c -P 9 1216k 16k", "write -P 8 512k 640k")
    qemu_io(middle, "write -P 5 0 32k")
    top = create(folder / "top.qcow2", SIZE, backing=middle)
    qemu_io(top, "write -P 6 2M 700k", "write -z 1088k 32k", f"write -P 4 {SIZE - 65536} 65536")
    return {"driver": "qcow2", "read-only": True, "file": {"driver": "file", "filename": str(top)}}


def memory_source(folder: Path) -> dict[str, Any]:
    """Nothing is known of where its bytes are."""
    return {"driver": "test-memory", "size": SIZE}


TARGETS = (
    *("raw", "default", "clusters of 512", "clusters of 2M", "version 2", "subclusters", "lazy refcounts"),
    *("data file", "raw data file"),
)
SOURCES = {"raw": raw_source, "part": part_source, "chain": chain_source, "memory": memory_source}


def raw_target(folder: Path, options: str) -> dict[str, Any]:
    path = folder / "target.raw"
    path.write_bytes(b"\xcc" * SIZE)
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    return {"driver": "raw", "discard": "unmap", "file": file}


def qcow2_target(folder: Path, options: str) -> dict[str, Any]:
    path = create(folder / "target.qcow2", SIZE, options=options.format(folder=folder))
    qemu_io(path, "write -P 0xcc 100k 300k", "write -P 0xcc 2M 512k")
    return {"driver": "qcow2", "discard": "unmap", "file": {"driver": "file", "filename": str(path)}}


@asynccontextmanager
async def two_disks(source: dict[str, Any], target: dict[str, Any]) -> AsyncIterator[tuple[BlockBackend, BlockBackend]]:
    graph = new_graph()
    pair: list[BlockBackend] = []
    try:
        for name, options in (("source", source), ("target", target)):
            if options["driver"] == "test-memory":
                node = await graph.open(parse_memory({"node-name": name, **options}))
            else:
                node = await graph.open(parse({"node-name": name, **options}))
            backend = BlockBackend(graph, name)
            graph.attach_root(backend, node, ALL_WRITES if name == "target" else Perm.CONSISTENT_READ, Perm.ALL)
            pair.append(backend)
        yield pair[0], pair[1]
    finally:
        await graph.close()


def parse_memory(options: dict[str, Any]) -> Any:
    make: Any = MemoryDriver.Options
    return make(driver="test-memory", node_name=options["node-name"], size=options["size"])


async def copy(source: BlockBackend, target: BlockBackend, offset: int, length: int, **how: Any) -> None:
    assert source.root is not None
    assert target.root is not None
    await copy_range(source.root, target.root, offset, length, **how)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("variant", TARGETS)
def test_the_target_reads_as_the_source_in_the_range_and_as_before_around_it(
    kind: str, variant: str, tmp_path: Path
) -> None:
    chance = random.Random(f"{kind} {variant}")
    target = raw_target(tmp_path, "") if variant == "raw" else qcow2_target(tmp_path, VARIANTS[variant])

    async def act() -> None:
        async with two_disks(SOURCES[kind](tmp_path), target) as (source, copied):
            if isinstance(source.node.driver, MemoryDriver):
                source.node.driver.bytes[:] = chance.randbytes(SIZE)
            wanted, model = await read(source, 0, SIZE), bytearray(await read(copied, 0, SIZE))
            ranges = [(chance.randrange(SIZE), chance.randrange(1, 1 << chance.randrange(9, 22))) for _ in range(12)]
            for start, length in [
                *((start // 512 * 512, -(-length // 512) * 512) for start, length in ranges),
                (0, SIZE),
            ]:
                length = min(length, SIZE - start)
                flags = chance.choice((ZeroFlags.NONE, ZeroFlags.MAY_UNMAP))
                await copy(source, copied, start, length, flags=flags, detect_zeroes=chance.random() < 0.5)
                model[start : start + length] = wanted[start : start + length]
                assert await read(copied, 0, SIZE) == model
            await copied.flush()

    asyncio.run(act())
    if variant != "raw":
        check(tmp_path / "target.qcow2")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", tmp_path / "target.qcow2", tmp_path / "read")
        assert os.path.getsize(tmp_path / "read") == SIZE


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("variant", TARGETS)
def test_what_is_copied_at_once_is_whole_and_the_rest_is_left_for_later(
    kind: str, variant: str, tmp_path: Path
) -> None:
    chance = random.Random(f"{variant} {kind}")
    target = raw_target(tmp_path, "") if variant == "raw" else qcow2_target(tmp_path, VARIANTS[variant])
    at_once = 0

    async def act() -> None:
        nonlocal at_once
        async with two_disks(SOURCES[kind](tmp_path), target) as (source, copied):
            wanted, model = await read(source, 0, SIZE), bytearray(await read(copied, 0, SIZE))
            assert source.root is not None
            assert copied.root is not None
            for _ in range(60):
                start = chance.randrange(SIZE // 512) * 512
                length = min(chance.randrange(1, 1 << chance.randrange(9, 18)) // 512 * 512 or 512, SIZE - start)
                if copy_now(source.root, copied.root, start, length):
                    at_once += 1
                else:
                    await copy(source, copied, start, length)
                model[start : start + length] = wanted[start : start + length]
                assert await read(copied, 0, SIZE) == model
            await copied.flush()

    asyncio.run(act())
    if variant != "raw":
        check(tmp_path / "target.qcow2")
    if kind == "memory":
        assert not at_once, "nothing is known of where its bytes are"
    elif variant in ("raw", "default"):
        assert at_once


def test_zeroes_holes_and_long_ranges_are_not_copied_at_once(tmp_path: Path) -> None:
    async def act() -> None:
        async with two_disks(raw_source(tmp_path), raw_target(tmp_path, "")) as (source, copied):
            assert source.root is not None
            assert copied.root is not None
            assert copy_now(source.root, copied.root, 1 << 20, SMALL)
            assert not copy_now(source.root, copied.root, 1 << 20, SMALL + 512)
            assert not copy_now(source.root, copied.root, 512 << 10, 4096), "a hole is to stay one"
            assert not copy_now(source.root, copied.root, (1 << 20) - 4096, 8192), "half of it is a hole"
            assert not copy_now(source.root, copied.root, SIZE - 512, 1024), "past the end"
            assert not copy_now(copied.root, source.root, 1 << 20, 4096), "no permission to write"

    asyncio.run(act())


def test_a_range_in_use_is_not_copied_at_once(tmp_path: Path) -> None:
    async def act() -> None:
        async with two_disks(raw_source(tmp_path), raw_target(tmp_path, "")) as (source, copied):
            assert source.root is not None
            assert copied.root is not None
            async with copied.node.exclusive(1 << 20, 4096):
                assert not copy_now(source.root, copied.root, 1 << 20, 4096), "somebody works on it in the target"
                assert copy_now(source.root, copied.root, (1 << 20) + 4096, 4096)
            async with source.node.exclusive(1 << 20, 4096):
                assert not copy_now(source.root, copied.root, 1 << 20, 4096), "somebody changes it in the source"
            assert copy_now(source.root, copied.root, 1 << 20, 4096)

    asyncio.run(act())


@pytest.mark.parametrize("kind", SOURCES)
def test_compressed_clusters_are_whole_whatever_the_runs_of_the_source(kind: str, tmp_path: Path) -> None:
    path = create(tmp_path / "packed.qcow2", SIZE)

    async def act() -> None:
        target = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
        async with two_disks(SOURCES[kind](tmp_path), target) as (source, copied):
            if isinstance(source.node.driver, MemoryDriver):
                source.node.driver.bytes[:] = b"\x11" * SIZE
            await copy(source, copied, 0, SIZE, flags=ZeroFlags.MAY_UNMAP, compressed=True)
            assert await read(copied, 0, SIZE) == await read(source, 0, SIZE)

    asyncio.run(act())
    check(path)
    if kind in ("chain", "memory"):
        assert any(extent.get("compressed") for extent in measure_map(path))


def test_zeroes_of_the_source_take_no_room_in_the_target(tmp_path: Path) -> None:
    path = create(tmp_path / "target.qcow2", SIZE)
    with (tmp_path / "zeroes.raw").open("wb") as file:
        file.write(bytes(1 << 20))  # stored, and zero
        file.truncate(SIZE)  # a hole

    async def act() -> None:
        file = {"driver": "file", "filename": str(tmp_path / "zeroes.raw")}
        target = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
        async with two_disks({"driver": "raw", "file": file}, target) as (source, copied):
            await copy(source, copied, 0, SIZE, flags=ZeroFlags.MAY_UNMAP, detect_zeroes=True)

    asyncio.run(act())
    assert info(path)["actual-size"] < 512 << 10
    assert not any(extent["data"] for extent in measure_map(path))


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_the_side_that_failed_is_told_with_its_error(side: Side, number: int) -> None:
    async def act() -> None:
        memory = {"driver": "test-memory", "size": 1 << 20}
        async with two_disks(memory, memory) as disks:
            driver = disks[0 if side is Side.SOURCE else 1].node.driver
            assert isinstance(driver, MemoryDriver)
            driver.faults.append(number)
            with pytest.raises(CopyFailed) as caught:
                await copy(*disks, 0, 1 << 20)
            assert caught.value.side is side
            assert caught.value.error.errno == number
            await copy(*disks, 0, 1 << 20)

    asyncio.run(act())


def test_buffers_of_many_copies_that_fail_at_once_may_still_be_looked_at() -> None:
    views: list[memoryview] = []
    with ExitStack() as copies:
        for _ in range(12):  # more than are kept
            views.append(memoryview(copies.enter_context(copy_buffer())))
    assert {len(view) for view in views} == {COPY_BUFFER}


@pytest.mark.parametrize("side", Side)
def test_a_range_outside_a_disk_is_that_sides_failure(side: Side) -> None:
    async def act() -> None:
        long, short = {"driver": "test-memory", "size": 1 << 20}, {"driver": "test-memory", "size": 1 << 19}
        async with two_disks(*((short, long) if side is Side.SOURCE else (long, short))) as disks:
            with pytest.raises(CopyFailed) as caught:
                await copy(*disks, 0, 1 << 20)
            assert caught.value.side is side
            assert caught.value.error.errno == errno.EIO

    asyncio.run(act())


def test_a_target_without_write_permission_is_not_written() -> None:
    async def act() -> None:
        memory = {"driver": "test-memory", "size": 1 << 20}
        async with two_disks(memory, memory) as (source, copied):
            copied.graph.set_root_permissions(copied, Perm.NONE, Perm.ALL)
            with pytest.raises(CopyFailed) as caught:
                await copy(source, copied, 0, 1 << 20)
            assert caught.value.side is Side.TARGET
            assert caught.value.error.errno == errno.EPERM

    asyncio.run(act())


def test_what_is_copied_is_marked_in_the_targets_trackers() -> None:
    class Tracker:
        def __init__(self) -> None:
            self.marked: list[tuple[int, int]] = []

        def mark(self, offset: int, length: int) -> None:
            self.marked.append((offset, length))

    async def act() -> None:
        memory = {"driver": "test-memory", "size": 1 << 20}
        async with two_disks(memory, memory) as (source, copied):
            tracker = Tracker()
            copied.node.trackers.append(tracker)
            await copy(source, copied, 65536, 131072)
            assert tracker.marked == [(65536, 131072)]

    asyncio.run(act())


def test_zeroes_that_the_target_has_are_left_alone_if_asked(tmp_path: Path) -> None:
    size = 1 << 40
    path = create(tmp_path / "target.qcow2", size)
    qemu_io(path, "write -P 3 512G 1M")
    with (tmp_path / "sparse.raw").open("wb") as file:
        file.truncate(size)
        file.seek(1 << 30)
        file.write(b"data" * (1 << 18))

    async def act() -> None:
        file = {"driver": "file", "filename": str(tmp_path / "sparse.raw")}
        target = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
        async with two_disks({"driver": "raw", "file": file}, target) as (source, copied):
            await copy(source, copied, 0, size, flags=ZeroFlags.MAY_UNMAP, leave_zeroes=True)
            assert await read(copied, 512 << 30, 2 << 20) == bytes(2 << 20)
            assert await read(copied, 1 << 30, 1 << 20) == b"data" * (1 << 18)

    asyncio.run(act())
    check(path)
    assert info(path)["actual-size"] < 8 << 20, "no tables for all of its terabyte"
