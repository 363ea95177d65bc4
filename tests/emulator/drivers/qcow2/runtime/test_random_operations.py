"""Random requests to every variant of the format, against a bytearray; qemu-img judges the image that is left."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.peers import run
from kit.qcow2_disk import VARIANTS, Disk, opened
from kit.qemu import assert_same, check, create, qemu_img
from livedisk.emulator.block.types import ZeroFlags

SIZE = 4 << 20
WORKERS = 4


class Guest:
    """One of several guests, each with a part of the disk to itself; their requests overlap in time and share clusters."""

    def __init__(self, disk: Disk, model: bytearray, low: int, high: int, seed: int) -> None:
        self.disk = disk
        self.model = model
        self.low = low
        self.high = high
        self.chance = random.Random(seed)

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            length = self.chance.choice([512, 4096, 65536, self.chance.randrange(1, 200_000)])
            length = min(length, self.high - self.low)
            offset = self.chance.randrange(self.low, self.high - length + 1)
            match self.chance.choice(["write"] * 5 + ["read"] * 5 + ["zero", "zero", "discard", "compressed", "flush"]):
                case "write":
                    await self.write(offset, self.chance.randbytes(length))
                case "read":
                    wanted = bytes(self.model[offset : offset + length])
                    assert await self.disk.read(offset, length) == wanted
                case "zero":
                    self.model[offset : offset + length] = bytes(length)
                    flags = self.chance.choice([ZeroFlags.NONE, ZeroFlags.MAY_UNMAP])
                    await self.disk.backend.write_zeroes(offset, length, flags)
                case "discard":
                    await self.discard(offset, length)
                case "compressed":
                    await self.compressed(offset)
                case "flush":
                    await self.disk.backend.flush()

    async def write(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        await self.disk.write(offset, data)

    def whole(self, offset: int, length: int) -> tuple[int, int]:
        cluster = self.disk.driver.cluster_size()
        return -(-offset // cluster) * cluster, (offset + length) // cluster * cluster

    async def discard(self, offset: int, length: int) -> None:
        start, end = self.whole(offset, length)
        if start < end and not (self.disk.image.header.version == 2 and self.disk.node.backing is not None):
            self.model[start:end] = bytes(end - start)
            await self.disk.backend.discard(start, end - start)

    async def compressed(self, offset: int) -> None:
        cluster = self.disk.driver.cluster_size()
        start = -(-offset // cluster) * cluster
        if start + cluster <= self.high and not self.disk.image.header.has_data_file:
            data = self.chance.randbytes(16) * (cluster // 16)
            self.model[start : start + cluster] = data
            await self.disk.node.write_compressed(start, memoryview(data))


async def exercise(path: Path, model: bytearray, seed: int, steps: int, cache: int) -> None:
    async with opened(path, l2_cache_size=cache) as disk:
        part = SIZE // WORKERS
        guests = [Guest(disk, model, number * part, (number + 1) * part, seed + number) for number in range(WORKERS)]
        await asyncio.gather(*(guest.run(steps) for guest in guests))


def judge(path: Path, model: bytearray, folder: Path) -> None:
    check(path)
    (folder / "model.raw").write_bytes(model)
    assert_same(path, folder / "model.raw", "-f", "qcow2", "-F", "raw")


def make(folder: Path, variant: str, *, backing: bool, snapshot: bool) -> tuple[Path, bytearray]:
    """An image and what its guest sees."""
    model = bytearray(SIZE)
    base = None
    if backing:  # shorter than the overlay, and not a multiple of any cluster
        base = create(folder / "base.qcow2", SIZE // 2 + 512)
        run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", "-c", "write -z 256k 64k", base])
        model[: 1 << 20] = b"\7" * (1 << 20)
        model[256 << 10 : 320 << 10] = bytes(64 << 10)
    path = create(folder / "image.qcow2", SIZE, options=VARIANTS[variant].format(folder=folder), backing=base)
    if snapshot:
        run(["qemu-io", "-f", "qcow2", "-c", "write -P 3 2M 500k", path])
        model[2 << 20 : (2 << 20) + (500 << 10)] = b"\3" * (500 << 10)
        qemu_img("snapshot", "-c", "then", path)
    return path, model


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=3)
@given(seed=st.integers(0, 1 << 30), cache=st.sampled_from([1 << 25, 4096]))
def test_every_variant_holds_what_was_written(variant: str, seed: int, cache: int) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        path, model = make(folder, variant, backing=False, snapshot=False)
        asyncio.run(exercise(path, model, seed, 25, cache))
        asyncio.run(exercise(path, model, seed + 100, 10, cache))  # what was written is read back after a new opening
        judge(path, model, folder)


@pytest.mark.parametrize(
    "variant", ["default", "clusters of 512", "version 2", "subclusters", "data file", "lazy refcounts"]
)
@settings(max_examples=3)
@given(seed=st.integers(0, 1 << 30))
def test_what_a_shorter_backing_file_shows_is_kept_around_writes(variant: str, seed: int) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        path, model = make(folder, variant, backing=True, snapshot=False)
        asyncio.run(exercise(path, model, seed, 25, 4096))
        judge(path, model, folder)


@pytest.mark.parametrize("variant", ["default", "clusters of 512", "version 2", "subclusters", "refcounts of 2 bits"])
@settings(max_examples=3)
@given(seed=st.integers(0, 1 << 30))
def test_an_internal_snapshot_keeps_what_it_had(variant: str, seed: int) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        path, model = make(folder, variant, backing=False, snapshot=True)
        then = bytes(model)
        asyncio.run(exercise(path, model, seed, 25, 4096))
        judge(path, model, folder)
        qemu_img("convert", "-l", "then", "-O", "raw", path, folder / "then.raw")
        assert (folder / "then.raw").read_bytes() == then
