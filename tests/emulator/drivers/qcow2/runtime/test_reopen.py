"""Reopening with other options, while what is cached and what is on the disk stay the same image."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kit.qcow2_disk import Disk, opened
from kit.qemu import check, create
from livedisk.emulator.block.reopen import reopen
from livedisk.emulator.block.types import Discard
from livedisk.emulator.drivers.qcow2.options import OverlapMode, Qcow2Options
from livedisk.emulator.drivers.qcow2.overlap import Section
from livedisk.emulator.errors import BlockError

MIB = 1 << 20


async def change(disk: Disk, **options: Any) -> None:
    """blockdev-reopen of the image on the same file."""
    options.setdefault("discard", Discard.UNMAP)
    name = disk.node.file.node.name
    await reopen(disk.graph, {disk.node: Qcow2Options(driver="qcow2", node_name=disk.node.name, file=name, **options)})


def test_caches_checks_discards_and_lazy_refcounts_change(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", 64 * MIB, options="cluster_size=4k")

    async def use() -> None:
        async with opened(path) as disk:
            await disk.write(0, b"a" * MIB)
            await change(
                disk,
                l2_cache_size=8192,
                l2_cache_entry_size=512,
                refcount_cache_size=32768,
                overlap_check=OverlapMode.NONE,
                lazy_refcounts=True,
                pass_discard_request=False,
            )
            assert disk.image.tables.slices.limit == 16
            assert disk.image.tables.slice_bytes == 512
            assert disk.image.refcounts.blocks.limit == 8
            assert disk.image.storage.guard.checked == Section.NONE
            assert disk.image.lazy
            assert not disk.image.discards.request
            await disk.write(MIB, b"b" * MIB)
            assert disk.image.header.dirty
            await change(disk)
            assert not disk.image.header.dirty
            assert await disk.read(0, 2 * MIB) == b"a" * MIB + b"b" * MIB

    asyncio.run(use())
    check(path)


def test_a_refused_reopen_changes_nothing(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", MIB)

    async def use() -> None:
        async with opened(path) as disk:
            with pytest.raises(BlockError, match="L2 cache entry size must be a power of two"):
                await change(disk, l2_cache_entry_size=3)
            await disk.write(0, b"still writable" + bytes(498))
            assert (await disk.read(0, 14)) == b"still writable"

    asyncio.run(use())
    check(path)


def test_read_only_and_back(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", MIB, options="lazy_refcounts=on")

    async def use() -> None:
        from livedisk.emulator.block.permissions import Perm

        async with opened(path) as disk:
            await disk.write(0, b"x" * 512)
            disk.graph.set_root_permissions(disk.backend, Perm.CONSISTENT_READ, Perm.ALL)
            await change(disk, read_only=True)
            assert not path.read_bytes()[79] & 1, "a read-only image is clean"
            with pytest.raises(OSError):
                await disk.node.write(0, memoryview(b"y" * 512))
            await change(disk, read_only=False)
            disk.graph.set_root_permissions(disk.backend, Perm.ALL, Perm.ALL)
            await disk.write(512, b"z" * 512)
            assert await disk.read(0, 1024) == b"x" * 512 + b"z" * 512

    asyncio.run(use())
    check(path)
