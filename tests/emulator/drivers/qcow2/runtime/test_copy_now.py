"""A first write to a part of a cluster copies what is around it from below at once, where nothing has to be waited for."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from kit.qcow2_disk import Disk, opened
from kit.qemu import assert_same, check, create, qemu_img, qemu_io

SIZE = 4 << 20


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, bytearray]:
    """An overlay of an overlay of a short raw image, and what it reads as."""
    base = tmp_path / "base.raw"
    content = random.Random(1).randbytes(SIZE - 100_000)
    base.write_bytes(content)
    middle = create(tmp_path / "middle.qcow2", SIZE, options=f"backing_file={base},backing_fmt=raw")
    qemu_io(middle, "write -P 7 1M 64k", "write -z 2M 64k", "write -c -P 9 3M 64k")
    model = bytearray(content.ljust(SIZE, b"\0"))
    for start, byte in ((1 << 20, b"\7"), (2 << 20, b"\0"), (3 << 20, b"\11")):
        model[start : start + 65536] = byte * 65536
    return create(tmp_path / "top.qcow2", SIZE, backing=middle), model


async def get_ready(disk: Disk, model: bytearray) -> None:
    """Have the tables in memory and a free run at hand, and the pages below warm."""
    for start in range(0, SIZE, 65536):
        await disk.read(start, 65536)
    await disk.write(SIZE - 65536, b"first" * 100)
    model[SIZE - 65536 : SIZE - 65536 + 500] = b"first" * 100


def test_what_is_around_the_data_comes_from_below(chain: tuple[Path, bytearray], tmp_path: Path) -> None:
    path, model = chain

    async def act() -> None:
        async with opened(path) as disk:
            await get_ready(disk, model)
            for start in (0, 4096, 70_000, (1 << 20) + 512, (2 << 20) + 100):
                data = random.Random(start).randbytes(3000)
                assert disk.backend.try_write(start, memoryview(data)), start
                model[start : start + 3000] = data
                assert not disk.node.busy
            await disk.write(SIZE - 131072 + 5, b"where the base ends")  # within a sector: it takes its time
            model[SIZE - 131072 + 5 : SIZE - 131072 + 24] = b"where the base ends"
            assert await disk.read(0, SIZE) == model

    asyncio.run(act())
    check(path)
    (tmp_path / "model").write_bytes(model)
    qemu_img("convert", "-O", "raw", path, tmp_path / "read")
    assert_same(tmp_path / "read", tmp_path / "model", "-f", "raw", "-F", "raw")


def test_a_long_write_of_whole_clusters_needs_no_thread(tmp_path: Path) -> None:
    """As a mirror from another daemon sends them: 2 MiB, which is what a server's buffer holds."""
    path, data = create(tmp_path / "new.qcow2", 8 << 20), random.Random(3).randbytes(2 << 20)

    async def act() -> None:
        async with opened(path) as disk:
            await disk.write(0, bytes(512))
            assert disk.backend.try_write(4 << 20, memoryview(data))
            assert disk.backend.try_write(3 << 20, memoryview(data)[: 1 << 20])
            assert await disk.read(3 << 20, 3 << 20) == data[: 1 << 20] + data

    asyncio.run(act())
    check(path)


def test_it_leaves_to_the_slow_path_what_must_be_waited_for(chain: tuple[Path, bytearray]) -> None:
    path, model = chain

    async def act() -> None:
        async with opened(path) as disk:
            await get_ready(disk, model)
            assert not disk.backend.try_write((3 << 20) + 5, memoryview(b"compressed below"))
            backing = disk.node.backing
            assert backing is not None
            async with backing.node.exclusive(131072, 512):
                assert not disk.backend.try_write(131072 + 4096, memoryview(b"somebody changes what is below"))
                assert disk.backend.try_write(196608 + 4096, memoryview(b"elsewhere"))
            model[196608 + 4096 : 196608 + 4096 + 9] = b"elsewhere"
            assert disk.backend.try_write(131072 + 4096, memoryview(b"over"))
            model[131072 + 4096 : 131072 + 4100] = b"over"
            assert await disk.read(0, SIZE) == model

    asyncio.run(act())
    check(path)
