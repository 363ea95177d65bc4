"""Many requests at once on an image whose disk is slow, fails at random and loses power at random.

Every operation of the disk below takes a random number of turns of the loop, so that requests, write-backs and flushes cross
each other in many ways; a flush only covers what was written before it began. While faults are on, any operation may fail,
writes after a part of them was made. A request that failed may have had its effect or not, now or at any later time. What the
guest reads, what stands in the image after a power cut at any moment, and what is there in the end is compared with
`SectorHistory`; the image must pass ``qemu-img check`` but for leaks each time.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from kit.crashdisk import CrashDisk, CrashDiskOptions, Platter
from kit.peers import run
from kit.qemu import create, qemu_img, read_all
from kit.sector_history import SECTOR, SectorHistory
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.driver import DRIVERS, register
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.types import Discard, ZeroFlags
from livedisk.emulator.drivers.qcow2.options import Qcow2Options

SECTORS = 4096
HOT = 400
WORKERS = 8


class Weather:
    """What the disk does to its users. ``faults``: the chance that an operation fails."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.faults = 0.0

    async def pass_by(self) -> None:
        """Take a while, now and then so long that much else is done meanwhile."""
        for _ in range(self.chance.choice((0, 0, 1, 2, 5)) if self.chance.random() < 0.97 else 400):
            await asyncio.sleep(0)

    def strike(self) -> None:
        """Raise EIO or ENOSPC, sometimes."""
        if self.chance.random() < self.faults:
            number = self.chance.choice((errno.EIO, errno.ENOSPC))
            raise OSError(number, os.strerror(number))


class RoughDiskOptions(CrashDiskOptions, kw_only=True):
    """``weather``: shared by all disks of a test."""

    weather: Any


class RoughDisk(CrashDisk):
    """A crash disk in bad weather."""

    name = "rough-disk"
    Options = RoughDiskOptions

    async def open(self) -> None:
        await super().open()
        self.weather: Weather = self.options.weather

    async def read(self, offset: int, view: memoryview) -> None:
        await self.weather.pass_by()
        self.weather.strike()
        await super().read(offset, view)

    async def write(self, offset: int, data: memoryview) -> None:
        await self.weather.pass_by()
        try:
            self.weather.strike()
        except OSError:
            await super().write(offset, data[: len(data) // 2 // SECTOR * SECTOR])
            raise
        await super().write(offset, data)
        await self.weather.pass_by()

    async def discard(self, offset: int, length: int) -> None:
        await self.weather.pass_by()
        self.weather.strike()
        await super().discard(offset, length)

    async def flush(self) -> None:
        covered = self.platter.pending[-1] if self.platter.pending else None
        await self.weather.pass_by()
        self.weather.strike()
        self.platter.flush_up_to(covered)


if RoughDisk.name not in DRIVERS:
    register(RoughDisk)


class Trial:
    """One image, its users, and the history of its sectors."""

    def __init__(self, image: Path, seed: int, folder: Path) -> None:
        self.chance = random.Random(seed)
        self.weather = Weather(seed + 1)
        self.calm = False
        self.platter = Platter(image.read_bytes())
        self.history = SectorHistory(SECTORS)
        self.folder = folder
        self.over = False
        self.failed = self.served = 0

    async def run(self, turns: int) -> None:
        graph = Graph()
        options = Qcow2Options(
            driver="qcow2",
            file=RoughDiskOptions(driver="rough-disk", platter=self.platter, weather=self.weather),
            discard=Discard.UNMAP,
            l2_cache_size=1024,
            refcount_cache_size=1024,
        )
        node = await graph.open(options)
        self.backend = BlockBackend(graph, "guest")
        graph.attach_root(self.backend, node, Perm.ALL, Perm.ALL)
        workers = [asyncio.create_task(self._work()) for _ in range(WORKERS)]
        for _ in range(turns):
            for _ in range(self.chance.randrange(20, 2000)):
                await asyncio.sleep(0)
            self.weather.faults = 0.0 if self.calm else self.chance.choice((0.0, 0.0, 0.01, 0.2))
            self.power_cut()
        self.weather.faults = 0.0
        self.over = True
        await asyncio.gather(*workers)
        flush = self.history.flush()
        await self.backend.flush()
        self.history.flushed(flush)
        self.power_cut()
        await graph.detach_root(self.backend)
        await graph.close()
        self.history.ended(self._content(bytes(self.platter.now), leaks=True), crashed=False)

    def power_cut(self) -> None:
        """What would be there if the power failed now."""
        left = self.platter.after_power_cut(self.chance.randrange(1 << 30))
        self.history.check_crash(self._content(left, leaks=True))

    def _content(self, disk: bytes, *, leaks: bool) -> bytes:
        path = self.folder / "cut.qcow2"
        path.write_bytes(disk)
        if disk[79] & 1 and disk[7] == 3:
            run(["qemu-img", "check", "-r", "all", "-f", "qcow2", path], expect=None)
        report = run(["qemu-img", "check", "-f", "qcow2", path], expect=None)
        assert report.returncode in ((0, 3) if leaks else (0,)), report.stdout + report.stderr
        return read_all(path, self.folder, "-f", "qcow2")

    async def _work(self) -> None:
        chance = random.Random(self.chance.random())
        while not self.over:
            kind = chance.choices(("write", "read", "zero", "discard", "flush", "packed"), (45, 20, 12, 12, 12, 4))[0]
            count = chance.choice((1, 1, 2, 8, 8, 16, 64, 128, 300))
            # Half of it in one corner, where requests meet more often.
            start = chance.randrange(max(chance.choice((HOT, SECTORS)) - count, 0) + 1)
            if chance.random() < 0.6:
                start -= start % 8
            try:
                await getattr(self, f"_{kind}")(chance, start, count)
                self.served += 1
            except OSError as error:
                if error.errno not in (errno.EIO, errno.ENOSPC):
                    raise
                self.failed += 1

    async def _write(self, chance: random.Random, start: int, count: int) -> None:
        change = self.history.change(start, count)
        data = memoryview(self.history.data(change))
        stable = chance.random() < 0.05
        if stable or not self.backend.try_write(start * SECTOR, data):
            await self.backend.write(start * SECTOR, data, fua=stable)
        self.history.done(change, stable=stable)

    async def _zero(self, chance: random.Random, start: int, count: int) -> None:
        change = self.history.change(start, count, zeroes=True)
        await self.backend.write_zeroes(
            start * SECTOR, count * SECTOR, chance.choice((ZeroFlags.NONE, ZeroFlags.MAY_UNMAP))
        )
        self.history.done(change)

    async def _discard(self, chance: random.Random, start: int, count: int) -> None:
        change = self.history.change(start, count, zeroes=True)
        await self.backend.discard(start * SECTOR, count * SECTOR)
        self.history.done(change, certain=False)

    async def _packed(self, chance: random.Random, start: int, count: int) -> None:
        cluster = self.backend.node.driver.cluster_size() // SECTOR
        start = start // cluster * cluster
        count = min(cluster, SECTORS - start)
        change = self.history.change(start, count)
        data = self.history.data(change)
        try:
            await self.backend.node.write_compressed(start * SECTOR, memoryview(data))
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            await self.backend.write(start * SECTOR, memoryview(data))
        self.history.done(change)

    async def _read(self, chance: random.Random, start: int, count: int) -> None:
        look = self.history.look(start, count)
        data = bytearray(count * SECTOR)
        try:
            await self.backend.read(start * SECTOR, memoryview(data))
        except BaseException:
            self.history.give_up(look)
            raise
        self.history.looked(look, bytes(data))

    async def _flush(self, chance: random.Random, start: int, count: int) -> None:
        flush = self.history.flush()
        await self.backend.flush()
        self.history.flushed(flush)


SEEDS = [int(os.environ["STRESS_SEED"])] if "STRESS_SEED" in os.environ else [1]
LAYOUTS = {
    "default": "",
    "tiny": "cluster_size=512",
    "one-bit": "cluster_size=512,refcount_bits=1",
    "wide-counts": "cluster_size=1k,refcount_bits=64",
    "lazy": "cluster_size=4k,lazy_refcounts=on",
    "subclusters": "extended_l2=on,cluster_size=16k",
    "old": "compat=0.10,cluster_size=4k",
    "snapshot": "cluster_size=4k",
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors_and_power_cuts_among_many_requests_lose_nothing(layout: str, seed: int, tmp_path: Path) -> None:
    one = trial(layout, seed, 12, tmp_path)
    assert 0 < one.failed < one.served


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layout", ["default", "tiny", "subclusters", "snapshot"])
def test_requests_that_cross_each_other_lose_nothing(layout: str, seed: int, tmp_path: Path) -> None:
    """Without errors it is known more exactly what every sector may hold."""
    one = trial(layout, seed, 6, tmp_path, calm=True)
    assert not one.failed


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(100, 140))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors_and_power_cuts_in_the_long_run(layout: str, seed: int, tmp_path: Path) -> None:
    trial(layout, seed, 60, tmp_path)
    trial(layout, seed, 60, tmp_path, calm=True)


def trial(layout: str, seed: int, turns: int, folder: Path, *, calm: bool = False) -> Trial:
    """Run one image through it all."""
    image = create(folder / "image.qcow2", SECTORS * SECTOR, options=LAYOUTS[layout])
    one = Trial(image, seed, folder)
    if layout == "snapshot":
        change = one.history.change(0, SECTORS)
        (folder / "fill.raw").write_bytes(one.history.data(change))
        one.history.done(change)
        qemu_img("convert", "-n", "-f", "raw", "-O", "qcow2", folder / "fill.raw", image)
        qemu_img("snapshot", "-c", "before", image)
        one.history.ended((folder / "fill.raw").read_bytes(), crashed=False)
        one.platter = Platter(image.read_bytes())
    one.calm = calm
    asyncio.run(one.run(turns))
    return one
