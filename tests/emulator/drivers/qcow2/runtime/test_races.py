"""Crossings of requests, errors and damage that would lose data, each made to happen on purpose."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from kit.peers import run
from kit.qcow2_disk import file_options, opened
from kit.qemu import check, create
from livedisk.emulator.block.reopen import reopen
from livedisk.emulator.block.types import Discard
from livedisk.emulator.drivers.qcow2.geometry import COPIED
from livedisk.emulator.drivers.qcow2.options import Qcow2Options
from livedisk.emulator.drivers.qcow2.refcount import Refcounts
from livedisk.emulator.drivers.qcow2.storage import Storage

MIB = 1 << 20
CLUSTER = 65536


def word(path: Path, offset: int) -> int:
    return int.from_bytes(path.read_bytes()[offset : offset + 8], "big")


def patch(path: Path, offset: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(8, "big"))


def test_a_whole_write_to_a_zero_cluster_that_claims_metadata_is_prevented(tmp_path: Path) -> None:
    """Such a write needs no copying and goes straight to the host file; the check must stand before that way, too."""
    path = create(tmp_path / "image.qcow2", MIB)
    run(["qemu-io", "-f", "qcow2", "-c", "write 0 64k", path])
    l1 = word(path, 40)
    patch(
        path, word(path, l1) & ~COPIED, l1 | COPIED | 1
    )  # reads as zeroes, and its own host cluster is the L1 table's
    before = path.read_bytes()[l1 : l1 + CLUSTER]

    async def write() -> None:
        async with opened(path) as disk:
            with pytest.raises(OSError, match="overlaps with active L1 table"):
                await disk.write(0, b"x" * CLUSTER)

    asyncio.run(write())
    assert path.read_bytes()[l1 : l1 + CLUSTER] == before


def test_zeroing_a_subcluster_waits_for_a_write_that_copies_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write moves the whole cluster, which an internal snapshot shares. It begins while the zeroing waits for the L2
    table, and must not put back what was zeroed."""
    path = create(tmp_path / "image.qcow2", MIB, options="extended_l2=on")
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", path])
    run(["qemu-img", "snapshot", "-c", "before", path])
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 2 512k 64k", path])  # the active L2 table is its own again

    async def cross() -> None:
        async with opened(path) as disk:
            loading, go = asyncio.Event(), asyncio.Event()
            filling, fill = asyncio.Event(), asyncio.Event()
            table = disk.image.tables.l1[0] & ~COPIED
            read, write = Storage.read, type(disk.node.file).write

            async def slow_read(self: Storage, offset: int, length: int, *event: Any) -> bytearray:
                raw = await read(self, offset, length, *event)
                if offset == table and not loading.is_set():
                    loading.set()
                    await go.wait()
                return raw

            async def slow_write(self: Any, offset: int, data: memoryview) -> None:
                filling.set()
                await fill.wait()
                await write(self, offset, data)

            monkeypatch.setattr(Storage, "read", slow_read)
            monkeypatch.setattr(type(disk.node.file), "write", slow_write)
            # The order in which they wait for the table is the order in which they go on.
            writing = asyncio.create_task(disk.backend.write(2048 * 9, memoryview(b"w" * 2048)))
            await loading.wait()
            zeroing = asyncio.create_task(disk.backend.write_zeroes(2048 * 3, 2048))
            await asyncio.sleep(0.01)
            go.set()
            await filling.wait()
            await asyncio.sleep(0.01)
            fill.set()
            await asyncio.gather(writing, zeroing)
            assert await disk.read(2048 * 3, 2048) == bytes(2048)
            assert await disk.read(2048 * 9, 2048) == b"w" * 2048
            assert await disk.read(2048 * 4, 2048) == b"\1" * 2048

    asyncio.run(cross())
    check(path)


def test_an_error_between_two_refcount_blocks_lowers_no_refcount_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = create(tmp_path / "image.qcow2", MIB, options="cluster_size=512,refcount_bits=64")
    run(["qemu-io", "-f", "qcow2", "-c", "write 0 256k", path])

    async def lower() -> None:
        async with opened(path) as disk:
            allocator, refcounts = disk.image.allocator, disk.image.refcounts
            border = 4 * refcounts.per_block  # well inside the data: all of these are used once
            shared = [border - 1, border, border + 1]
            for cluster in shared:
                block = await refcounts.block(cluster // refcounts.per_block)
                assert block is not None
                assert refcounts.counts(block, cluster, 1) == [1]
                refcounts.change(block, cluster, 3)
            allocator.retire(shared[0] * 512, 3 * 512)
            entries, allocator.retired = allocator.retired, []
            real = Refcounts.block

            async def failing(self: Refcounts, index: int) -> Any:
                if index == border // refcounts.per_block:
                    raise OSError(errno.EIO, "Input/output error")
                return await real(self, index)

            with monkeypatch.context() as patched:
                patched.setattr(Refcounts, "block", failing)
                with pytest.raises(OSError, match="Input/output error"):
                    await allocator.settle(entries)
            entries, allocator.retired = allocator.retired, []
            await allocator.settle(entries)
            assert [await refcounts.get(cluster) for cluster in shared] == [2, 2, 2]

    asyncio.run(lower())


def test_a_reopen_passes_discards_on_as_its_own_options_say(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", MIB)

    async def use() -> None:
        async with opened(path) as disk:
            assert disk.image.discards.request
            options = Qcow2Options(
                driver="qcow2", file=disk.node.file.node.name, discard=Discard.IGNORE, node_name=disk.node.name
            )
            await reopen(disk.graph, {disk.node: options})
            assert not disk.image.discards.request

    asyncio.run(use())


def test_an_image_inside_an_image_is_read_fast_or_slowly_but_without_errors(tmp_path: Path) -> None:
    """Where the outer image's tables are at hand, the inner one's may not be."""
    inner = create(tmp_path / "inner.qcow2", 16 * MIB, options="cluster_size=512")
    outer = create(tmp_path / "outer.qcow2", 4 * MIB)
    run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", outer, inner])

    async def use() -> None:
        small = Qcow2Options(driver="qcow2", file=file_options(inner), l2_cache_size=1024)
        async with opened(small) as disk:
            for number in range(64):
                await disk.write(number * CLUSTER, bytes([number + 1]) * CLUSTER)
            for number in range(64):
                assert await disk.read(number * CLUSTER, 4096) == bytes([number + 1]) * 4096

    asyncio.run(use())
