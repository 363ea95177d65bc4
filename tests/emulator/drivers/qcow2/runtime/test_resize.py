"""A new virtual size: what is new reads as zeroes, what is gone is freed, and qemu-img agrees."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kit.qcow2_disk import VARIANTS, opened
from kit.qemu import check, create, info, measure_map, qemu_img
from livedisk.emulator.block.types import Preallocation
from livedisk.emulator.errors import BlockError

MIB = 1 << 20


@pytest.mark.parametrize("variant", VARIANTS)
def test_shrink_and_grow_shows_no_old_data(variant: str, tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", 4 * MIB, options=VARIANTS[variant].format(folder=tmp_path))

    async def resize() -> bytes:
        async with opened(path) as disk:
            await disk.write(0, b"\xaa" * 4 * MIB)
            await disk.node.truncate(MIB + 512)
            assert disk.backend.size == MIB + 512
            await disk.node.truncate(8 * MIB)
            return await disk.read(0, 8 * MIB)

    assert asyncio.run(resize()) == (b"\xaa" * (MIB + 512)).ljust(8 * MIB, b"\0")
    check(path)
    assert info(path)["virtual-size"] == 8 * MIB


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=4k", ""])
def test_growth_moves_the_l1_table_while_writes_go_on(options: str, tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", MIB, options=options)

    async def grow() -> None:
        async with opened(path) as disk:
            for size in (64 * MIB, 8 << 30 if options != "cluster_size=512" else 256 * MIB):
                writes = [
                    disk.backend.write(at, memoryview(bytes([at >> 16 & 255]) * 512)) for at in range(0, MIB, 65536)
                ]
                await asyncio.gather(disk.node.truncate(size), *writes)
                await disk.write(size - 512, b"e" * 512)
            for at in range(0, MIB, 65536):
                assert await disk.read(at, 512) == bytes([at >> 16 & 255]) * 512

    asyncio.run(grow())
    check(path)


def test_growth_hides_a_longer_backing_file(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"\xbb" * 2 * MIB)
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path, str(MIB + 1024))

    async def grow() -> bytes:
        async with opened(path) as disk:
            await disk.node.truncate(3 * MIB)
            return await disk.read(0, 3 * MIB)

    assert asyncio.run(grow()) == (b"\xbb" * (MIB + 1024)).ljust(3 * MIB, b"\0")
    check(path)


@pytest.mark.parametrize("variant", ["default", "subclusters", "data file", "clusters of 512"])
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocation_gives_every_new_cluster_a_place_that_reads_as_zeroes(
    variant: str, mode: str, tmp_path: Path
) -> None:
    path = create(tmp_path / "image.qcow2", MIB, options=VARIANTS[variant].format(folder=tmp_path))

    async def grow() -> bytes:
        async with opened(path) as disk:
            await disk.write(0, b"\xaa" * MIB)
            await disk.backend.discard(0, MIB)  # so that clusters with old data are used again
            await disk.backend.flush()
            await disk.node.truncate(3 * MIB, prealloc=Preallocation(mode))
            for at in range(MIB, 3 * MIB, 65536):
                assert disk.image.tables.has_host((await disk.image.lookup(at, 1)).entry)
            return await disk.read(0, 3 * MIB)

    assert asyncio.run(grow()) == bytes(3 * MIB)
    check(path)
    if mode != "metadata":
        store = tmp_path / "data" if "data" in variant else path
        assert store.stat().st_blocks * 512 >= 2 * MIB


def test_shrinking_gives_the_host_its_space_back(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", 16 * MIB)

    async def shrink() -> None:
        async with opened(path) as disk:
            await disk.write(0, b"\xaa" * 16 * MIB)
            await disk.node.truncate(MIB)

    asyncio.run(shrink())
    assert path.stat().st_size < 3 * MIB
    check(path)
    assert sum(extent["length"] for extent in measure_map(path) if extent["data"]) == MIB


def test_what_qemu_refuses_is_refused_in_its_words(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", MIB, options="compat=0.10")
    qemu_img("snapshot", "-c", "s", path)
    other = create(tmp_path / "other.qcow2", MIB)

    async def refused(path: Path, size: int, prealloc: Preallocation) -> str:
        async with opened(path) as disk:
            with pytest.raises(BlockError) as caught:
                await disk.node.truncate(size, prealloc=prealloc)
            return str(caught.value)

    off, full = Preallocation.OFF, Preallocation.FULL
    assert asyncio.run(refused(other, MIB + 1, off)) == "The new size must be a multiple of 512"
    assert asyncio.run(refused(other, MIB // 2, full)) == "Preallocation can't be used for shrinking an image"
    assert asyncio.run(refused(path, MIB * 2, off)) == "Can't resize a v2 image which has snapshots"
    assert "Failed to grow the L1 table" in asyncio.run(refused(other, 1 << 61, off))
