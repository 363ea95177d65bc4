"""Power cuts and kill -9 with persistent bitmaps: none is lost, none is too clean, and QEMU takes the image for what it is.

A workload of writes and of commands on bitmaps runs on a crash disk. Before each metadata write, and before each barrier, the
disk as a power cut would leave it is put aside with what each bitmap must say at the least: every write that was acknowledged
while it recorded. Whatever else reached the disk must be dirty too, in the bitmap that was there all the time.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kit.crashdisk import CrashDisk, CrashDiskOptions, Platter
from kit.peers import run
from kit.qcow2_disk import Disk, opened
from kit.qemu import create, info, qemu_img, qemu_io
from livedisk.emulator.block.bitmaps import DirtyBitmap
from livedisk.emulator.drivers.qcow2 import bitmaps as module
from livedisk.emulator.drivers.qcow2.points import Point

SIZE = 24 << 20
"""Bytes: several regions."""
STEP = 4096
PER_POINT = 3
HERE = Path(__file__).resolve().parent

Granules = set[int]
"""Of `STEP` bytes."""


@dataclass
class Cut:
    """``least``: by bitmap, what must be dirty. ``gone``: bitmaps that were removed for good."""

    point: str
    disk: bytes
    least: dict[str, Granules]
    most: Granules
    gone: set[str]


@dataclass
class Recorder:
    """Puts cuts aside: the first at each point, then a few more, by seed."""

    platter: Platter
    chance: random.Random
    least: dict[str, Granules] = field(default_factory=dict)
    most: Granules = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    cuts: dict[str, list[Cut]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)

    def __call__(self, point: Point | None) -> None:
        name = point.value if point is not None else "barrier"
        self.seen[name] += 1
        known = self.cuts.setdefault(name, [])
        place = len(known) if len(known) < PER_POINT else self.chance.randrange(self.seen[name])
        if place < PER_POINT:
            disk = self.platter.after_power_cut(self.chance.randrange(1 << 30))
            least = {name: set(granules) for name, granules in self.least.items()}
            known[place : place + 1] = [Cut(name, disk, least, set(self.most), set(self.gone))]


class Workload:
    """Writes and commands, one after the other, and what each bitmap must say."""

    def __init__(self, image: bytes, seed: int) -> None:
        self.chance = random.Random(seed)
        self.platter = Platter(image)
        self.recorder = Recorder(self.platter, self.chance)
        self.least = self.recorder.least
        self.disk: Disk
        self.size = SIZE

    async def run(self, steps: int) -> None:
        options = CrashDiskOptions(driver="crash-disk", platter=self.platter)
        async with opened(options) as self.disk:
            self.disk.image.storage.observer = self.recorder
            await self.add("always", STEP)
            for _ in range(steps):
                await self.step()
        self.recorder(None)

    def named(self, name: str) -> DirtyBitmap:
        return self.disk.node.bitmaps.get(name)

    async def add(self, name: str, granularity: int) -> None:
        self.disk.driver.check_bitmap_storable(name, granularity)
        self.recorder.gone.discard(name)
        self.disk.node.bitmaps.create(granularity, name, persistent=True)
        await self.disk.driver.sync_bitmaps()
        self.least[name] = set()

    async def step(self) -> None:
        what = self.chance.choice(["write"] * 8 + ["many", "flush", "flush", "zero", "discard", "command", "crossing"])
        if what == "write":
            await self.write(self.chance.choice([512, 4096, 70_000 // 512 * 512, 1 << 20]))
        elif what == "many":
            await asyncio.gather(*(self.write(4096) for _ in range(5)))
        elif what == "crossing":
            await asyncio.gather(*(self.write(70_000 // 512 * 512) for _ in range(3)), self.command(but="resize"))
        elif what == "flush":
            await self.disk.backend.flush()
        elif what == "zero":
            await self.change(65536, lambda offset, length: self.disk.backend.write_zeroes(offset, length))
        elif what == "discard":
            await self.change(65536, lambda offset, length: self.disk.backend.discard(offset, length))
        else:
            await self.command()

    async def write(self, length: int) -> Granules:
        data = self.chance.randbytes(length)
        return await self.change(length, lambda offset, _: self.disk.write(offset, data))

    async def change(self, length: int, act: Callable[[int, int], Awaitable[None]]) -> Granules:
        offset = self.chance.randrange((self.size - length) // 512) * 512
        granules = set(range(offset // STEP, (offset + length - 1) // STEP + 1))
        self.recorder.most |= granules
        recording = [name for name in self.least if self.named(name).recording]
        await act(offset, length)
        for name in recording:
            if name in self.least and self.named(name).recording:  # not removed or switched off meanwhile
                self.least[name] |= granules
        return granules

    async def command(self, but: str = "") -> None:
        others = [name for name in self.least if name != "always"]
        what = self.chance.choice(["add", "clear", "merge", "switch", "remove", "job", "resize"])
        if what == but:
            return
        if what == "add" and len(others) < 3:
            free = next(name for name in ("a", "b", "c", "d") if name not in self.least)
            await self.add(free, self.chance.choice([STEP, 65536]))
        elif what == "resize":
            await self.resize()
        elif others and what != "add":
            await getattr(self, what)(self.chance.choice(others))

    async def clear(self, name: str) -> None:
        self.least[name] = set()
        self.named(name).clear()
        await self.disk.driver.sync_bitmaps()

    async def merge(self, name: str) -> None:
        self.named(name).merge(self.named("always"))
        granules = set(self.least["always"])
        await self.disk.driver.sync_bitmaps()
        self.least[name] |= granules

    async def switch(self, name: str) -> None:
        bitmap = self.named(name)
        (bitmap.enable if bitmap.disabled else bitmap.disable)()
        await self.disk.driver.sync_bitmaps()

    async def remove(self, name: str) -> None:
        del self.least[name]
        self.disk.node.bitmaps.remove(self.named(name))
        await self.disk.driver.sync_bitmaps()
        self.recorder.gone.add(name)

    async def job(self, name: str) -> None:
        """As a backup freezes a bitmap, and then lets the successor take over, or not."""
        bitmap = self.named(name)
        bitmap.freeze()
        since = await self.write(4096)
        for _ in range(3):  # the region becomes exact
            await self.disk.backend.flush()
        await self.disk.driver.sync_bitmaps()
        since |= await self.write(4096)
        if self.chance.random() < 0.5:
            self.least[name] = since if bitmap.recording else set()
            bitmap.abdicate()
        else:
            bitmap.reclaim()
        await self.disk.driver.sync_bitmaps()

    async def resize(self) -> None:
        size = self.chance.choice([SIZE // 2, SIZE, SIZE + 100 * 512])
        for granules in self.least.values():
            granules -= {one for one in granules if one * STEP >= size}
        async with self.disk.graph.drained(self.disk.node):
            await self.disk.node.truncate(size)
        self.size = size


def said(disk: Disk, name: str) -> Granules:
    runs = disk.node.bitmaps.get(name).runs()
    return {one for offset, length in runs for one in range(offset // STEP, -(-(offset + length) // STEP))}


def judge(cut: Cut, folder: Path) -> None:
    path = folder / "cut.qcow2"
    path.write_bytes(cut.disk)
    if cut.disk[79] & 1:  # lazy refcounts: the dirty bit's promise is that a repair finds everything
        run(["qemu-img", "check", "-r", "all", "-f", "qcow2", path], expect=None)
    report = run(["qemu-img", "check", "-f", "qcow2", path], expect=None)
    assert report.returncode in (0, 3), f"cut at {cut.point}: {report.stdout}{report.stderr}"
    path.write_bytes(cut.disk)
    asyncio.run(look(cut, path))
    theirs = {one["name"]: one["flags"] for one in info(path)["format-specific"]["data"].get("bitmaps", [])}
    assert not cut.gone & theirs.keys(), cut.point
    assert cut.least.keys() <= theirs.keys(), cut.point


async def look(cut: Cut, path: Path) -> None:
    async with opened(path, writable=bool(cut.disk[79] & 1)) as disk:
        assert not cut.gone & {one.name for one in disk.node.bitmaps}
        for name, least in cut.least.items():
            bitmap = disk.node.bitmaps.get(name)
            assert not bitmap.inconsistent, f"cut at {cut.point}: {name}"
            missed = {one for one in least if one * STEP < disk.node.size} - said(disk, name)
            assert not missed, f"cut at {cut.point}: {name} misses {sorted(missed)[:5]}"
        if "always" in cut.least:
            # The disk was empty when this one was made: whatever is not zero was written since.
            dirty = said(disk, "always")
            for granule in sorted(cut.most - dirty):
                if granule * STEP < disk.node.size:
                    data = await disk.read(granule * STEP, min(STEP, disk.node.size - granule * STEP))
                    assert not any(data), f"cut at {cut.point}: {granule} was written and is clean"


@pytest.fixture(autouse=True)
def often_tidy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIDY_SECONDS", 0.0)


VARIANTS = {
    "clusters of 64k": "",
    "clusters of 512": "cluster_size=512",
    "subclusters": "extended_l2=on,cluster_size=16k",
    "lazy refcounts": "lazy_refcounts=on,cluster_size=4k",
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_power_cut_at_every_write_leaves_no_bitmap_too_clean(variant: str, seed: int, tmp_path: Path) -> None:
    path = create(tmp_path / "start.qcow2", SIZE, options=VARIANTS[variant])
    work = Workload(path.read_bytes(), seed)
    asyncio.run(work.run(100))
    assert {"bitmap-data", "bitmap-table", "bitmap-directory", "header"} <= set(work.recorder.seen)
    for known in work.recorder.cuts.values():
        for cut in known:
            judge(cut, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_closed_is_exact_for_qemu(variant: str, tmp_path: Path) -> None:
    path = create(tmp_path / "start.qcow2", SIZE, options=VARIANTS[variant])
    work = Workload(path.read_bytes(), 5)

    asyncio.run(work.run(60))
    path.write_bytes(work.platter.now)
    report = json.loads(qemu_img("check", "--output=json", path))
    assert not report.get("leaks")
    for one in info(path)["format-specific"]["data"]["bitmaps"]:
        assert "in-use" not in one["flags"]


@pytest.mark.parametrize("how", ["added", "cleared", "handed over"])
def test_the_moment_at_which_a_bitmap_begins_survives(how: str, tmp_path: Path) -> None:
    """A backup may have copied what was written before and not flushed. If a power cut took it back, an increment would miss
    that."""
    path = create(tmp_path / "image.qcow2", SIZE, options="cluster_size=4k")
    qemu_img("bitmap", "--add", "-g", str(STEP), path, "x")
    platter = Platter(path.read_bytes())
    before = b"before" * 2000

    async def begin() -> None:
        async with opened(CrashDiskOptions(driver="crash-disk", platter=platter)) as disk:
            await disk.write(5 << 20, before)
            bitmap = disk.node.bitmaps.get("x")
            if how == "added":
                disk.node.bitmaps.create(STEP, "y", persistent=True)
            elif how == "cleared":
                bitmap.clear()
            else:
                bitmap.freeze()
                bitmap.abdicate()
            await disk.driver.sync_bitmaps()
            path.write_bytes(platter.durable)

    asyncio.run(begin())

    async def look() -> bytes:
        async with opened(path, writable=False) as disk:
            return await disk.read(5 << 20, len(before))

    assert asyncio.run(look()) == before


def region_of(offset: int) -> range:
    first = offset // module.MIN_REGION * module.MIN_REGION
    return range(first // STEP, (first + module.MIN_REGION) // STEP)


def test_after_a_crash_only_regions_that_were_written_are_dirty(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", SIZE)
    qemu_img("bitmap", "--add", "-g", str(STEP), path, "x")
    platter = Platter(path.read_bytes())

    async def write() -> None:
        async with opened(CrashDiskOptions(driver="crash-disk", platter=platter)) as disk:
            await disk.write(5 << 20, b"x" * 100)
            await disk.backend.flush()
            path.write_bytes(platter.durable)

    asyncio.run(write())

    async def look() -> None:
        async with opened(path) as disk:
            assert said(disk, "x") == set(region_of(5 << 20))

    asyncio.run(look())
    asyncio.run(look())  # opened and closed: exact for everybody, and as dirty as it was
    assert info(path)["format-specific"]["data"]["bitmaps"][0]["flags"] == ["auto"]


def test_a_region_that_is_left_alone_becomes_exact_again(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", SIZE)
    qemu_img("bitmap", "--add", "-g", str(STEP), path, "x")
    platter = Platter(path.read_bytes())

    async def write() -> None:
        async with opened(CrashDiskOptions(driver="crash-disk", platter=platter)) as disk:
            await disk.write(5 << 20, b"x" * 100)
            for _ in range(3):
                await disk.write(10 << 20, b"y" * 100)
                await disk.backend.flush()
            path.write_bytes(platter.durable)

    asyncio.run(write())

    async def look() -> None:
        async with opened(path, writable=False) as disk:
            assert said(disk, "x") == {(5 << 20) // STEP, *region_of(10 << 20)}

    asyncio.run(look())


@pytest.mark.parametrize("meanwhile", ["another bitmap", "tidied"])
def test_a_write_that_is_under_way_keeps_its_mark(
    meanwhile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = create(tmp_path / "image.qcow2", SIZE)
    qemu_io(path, "write 0 8M")
    qemu_img("bitmap", "--add", "-g", str(STEP), path, "x")
    platter = Platter(path.read_bytes())
    entered, go_on = asyncio.Event(), asyncio.Event()
    write = CrashDisk.write

    async def slow(self: CrashDisk, offset: int, data: memoryview) -> None:
        if bytes(data[:4]) == b"slow":
            entered.set()
            await go_on.wait()
        await write(self, offset, data)

    async def scene() -> None:
        async with opened(CrashDiskOptions(driver="crash-disk", platter=platter)) as disk:
            task = asyncio.create_task(disk.write(5 << 20, b"slow" * 1024))
            await entered.wait()
            if meanwhile == "another bitmap":
                disk.node.bitmaps.create(STEP, "y", persistent=True)
                await disk.driver.sync_bitmaps()
            else:
                for _ in range(3):
                    await disk.backend.flush()
            go_on.set()
            await task
            # The image's bits are left as they are: the power goes with what the write has put on the disk.
            path.write_bytes(platter.now)

    monkeypatch.setattr(CrashDisk, "write", slow)
    asyncio.run(scene())
    asyncio.run(all_dirty(path, {5 << 20}))


@pytest.mark.parametrize(
    ("records", "point"), [(True, "barrier"), (False, "bitmap-table"), (False, "header"), (False, "barrier")]
)
def test_what_could_not_be_stored_is_stored_when_it_is_tried_again(records: bool, point: str, tmp_path: Path) -> None:
    """A command fails at the disk, is given once more and succeeds: then a power cut must not take it back."""
    path = create(tmp_path / "image.qcow2", SIZE)
    qemu_img("bitmap", "--add", "-g", str(STEP), *([] if records else ["--disable"]), path, "x")
    platter = Platter(path.read_bytes())
    seen: set[str] = set()

    def fail(reached: Point | None) -> None:
        """The first time that the point is reached after bits were put."""
        name = "barrier" if reached is None else reached.value
        again = name in seen
        if seen or name == "bitmap-data":
            seen.add(name)
        if name == point and name in seen and not again:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def scene() -> None:
        async with opened(CrashDiskOptions(driver="crash-disk", platter=platter)) as disk:
            bitmap = disk.node.bitmaps.get("x")
            if records:
                await disk.write(20 << 20, b"x" * 100)  # it is tracked
            disk.image.storage.observer = fail
            bitmap.bits[5] = 1
            bitmap.bits[1 << 10] = 1
            text = f"{os.strerror(errno.EIO)}: the dirty bitmaps of node '{disk.node.name}' could not be stored"
            with pytest.raises(OSError, match=text):
                await disk.driver.sync_bitmaps()
            await disk.driver.sync_bitmaps()
            path.write_bytes(platter.durable)

    asyncio.run(scene())
    asyncio.run(all_dirty(path, {5 * STEP, STEP << 10}))


def test_a_write_that_waits_for_a_mark_that_fails_makes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the mark for two writes nor the end of the tracking can be written, but a moment later the disk is well again."""
    path = create(tmp_path / "image.qcow2", SIZE)
    qemu_img("bitmap", "--add", "-g", str(STEP), path, "x")
    platter = Platter(path.read_bytes())
    steps = ["bitmap-data", "bitmap-data fails", "header fails"]
    write = CrashDisk.write

    async def slow(self: CrashDisk, offset: int, data: memoryview) -> None:
        await asyncio.sleep(0)
        await write(self, offset, data)

    def fail(reached: Point | None) -> None:
        if steps and reached is not None and steps[0].startswith(reached.value) and "fails" in steps.pop(0):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def scene() -> None:
        async with opened(CrashDiskOptions(driver="crash-disk", platter=platter)) as disk:
            await disk.write(20 << 20, b"x" * 100)  # it is tracked
            disk.image.storage.observer = fail
            writes = [disk.write(start << 20, b"y" * 100) for start in (0, 5, 10)]  # one marks, two wait for it
            ends = await asyncio.gather(*writes, return_exceptions=True)
            assert [type(end) for end in ends] == [type(None), OSError, type(None)]
            await disk.backend.flush()
            path.write_bytes(platter.durable)

    monkeypatch.setattr(module, "TIDY_SECONDS", 1e9)
    monkeypatch.setattr(CrashDisk, "write", slow)
    asyncio.run(scene())
    assert not steps
    asyncio.run(all_dirty(path, {0, 10 << 20, 20 << 20}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_power_cut_while_the_tracking_ends_leaves_no_bitmap_too_clean(variant: str, tmp_path: Path) -> None:
    """A mark cannot be written. Wherever the power goes from then on, a bitmap is inconsistent or says all that was written."""
    path = create(tmp_path / "image.qcow2", SIZE, options=VARIANTS[variant])
    qemu_img("bitmap", "--add", "-g", str(STEP), path, "x")
    qemu_img("bitmap", "--add", "-g", str(STEP), "--disable", path, "exact")
    platter = Platter(path.read_bytes())
    chance = random.Random(variant)
    cuts: list[tuple[str, bytes, Granules]] = []
    written: Granules = set()
    failed = False

    def cut(reached: Point | None) -> None:
        nonlocal failed
        if reached is Point.BITMAP_DATA:
            failed = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if failed:
            for _ in range(4):
                name = "barrier" if reached is None else reached.value
                cuts.append((name, platter.after_power_cut(chance.randrange(1 << 30)), set(written)))

    async def scene() -> None:
        async with opened(CrashDiskOptions(driver="crash-disk", platter=platter)) as disk:
            await disk.write(20 << 20, b"x" * STEP)  # it is tracked
            written.add((20 << 20) // STEP)
            await disk.backend.flush()
            disk.image.storage.observer = cut
            for offset in (5 << 20, 10 << 20):
                await disk.write(offset, b"y" * STEP)
                written.add(offset // STEP)
                await disk.backend.flush()
            cut(None)
            disk.image.storage.observer = None

    asyncio.run(scene())
    assert {"header", "bitmap-directory", "barrier"} <= {name for name, _, _ in cuts}
    believed = 0

    async def look(name: str, least: Granules) -> None:
        nonlocal believed
        async with opened(path, writable=bool(path.read_bytes()[79] & 1)) as disk:
            bitmap = disk.node.bitmaps.get("x")
            if not bitmap.inconsistent:
                believed += 1
                assert not least - said(disk, "x"), name

    for name, content, least in cuts:
        path.write_bytes(content)
        assert run(["qemu-img", "check", "-r", "all", "-f", "qcow2", path], expect=None).returncode in (0, 3)
        path.write_bytes(content)
        asyncio.run(look(name, least))
    assert believed < len(cuts), "once its end is on the disk it is not believed"


def crashed(tmp_path: Path) -> Path:
    """An image with a tracked bitmap ``x``, as a power cut left it."""
    path = create(tmp_path / "image.qcow2", SIZE)
    qemu_img("bitmap", "--add", path, "x")
    platter = Platter(path.read_bytes())

    async def write() -> None:
        async with opened(CrashDiskOptions(driver="crash-disk", platter=platter)) as disk:
            await disk.write(5 << 20, b"x" * 100)
            await disk.backend.flush()
            path.write_bytes(platter.durable)

    asyncio.run(write())
    return path


def state(path: Path, *, writable: bool = False) -> bool:
    """Whether ``x`` is inconsistent for us."""

    async def look() -> bool:
        async with opened(path, writable=writable) as disk:
            return disk.node.bitmaps.get("x").inconsistent

    return asyncio.run(look())


def test_qemu_takes_a_tracked_bitmap_for_in_use(tmp_path: Path) -> None:
    path = crashed(tmp_path)
    assert info(path)["format-specific"]["data"]["bitmaps"][0]["flags"] == ["in-use", "auto"]
    qemu_img("check", path)
    assert not state(path)


@pytest.mark.parametrize(
    "how", ["a write", "an opening for writing", "a resize", "a snapshot", "an amendment", "a repair"]
)
def test_whatever_another_program_writes_makes_it_inconsistent(how: str, tmp_path: Path) -> None:
    path = crashed(tmp_path)
    match how:
        case "a write":
            qemu_io(path, "write 20M 4k")
        case "an opening for writing":
            qemu_io(path, "read 0 512")
        case "a resize":
            run(["qemu-img", "resize", path, "+1M"], expect=None)
        case "a snapshot":
            qemu_img("snapshot", "-c", "s", path)
        case "an amendment":
            qemu_img("amend", "-o", "lazy_refcounts=on", path)
        case _:
            qemu_img("check", "-r", "all", path)
    assert state(path)
    assert state(path, writable=True)
    assert state(path)


def test_reading_by_another_program_changes_nothing(tmp_path: Path) -> None:
    path = crashed(tmp_path)
    qemu_io(path, "read 0 512", options=["-r"])
    qemu_img("convert", "-O", "raw", path, tmp_path / "copy")
    assert not state(path)


def test_a_copy_of_an_image_in_use_is_not_believed(tmp_path: Path) -> None:
    """Nobody knows of which moments its bits and its data are."""
    path = create(tmp_path / "image.qcow2", SIZE)
    qemu_img("bitmap", "--add", path, "x")
    copy, renamed, kept = tmp_path / "copy.qcow2", tmp_path / "renamed.qcow2", tmp_path / "kept"

    async def use() -> None:
        async with opened(path) as disk:
            await disk.write(5 << 20, b"x" * 100)
            await disk.backend.flush()
            shutil.copy(path, copy)
            kept.write_bytes(path.read_bytes())

    asyncio.run(use())
    assert state(copy)
    qemu_img("check", copy)
    path.write_bytes(kept.read_bytes())  # as a crash would have left it
    assert not state(path)
    path.rename(renamed)
    assert not state(renamed)


def test_kill_9_loses_no_bitmap(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", 1 << 30)
    qemu_img("bitmap", "--add", path, "x")
    written: Granules = set()
    for number in range(3):
        child = subprocess.Popen(
            [sys.executable, str(HERE / "kill_bitmap_child.py"), str(path), str(number)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        )
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(50)]
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
        child.wait()
        child.stdout.close()
        written |= {int(line) for line in lines if line.endswith(b"\n")}
        assert len(lines) > 40
        qemu_img("check", path, expect=None)

        asyncio.run(all_dirty(path, written))


async def all_dirty(path: Path, offsets: set[int]) -> None:
    async with opened(path, writable=False) as disk:
        bitmap = disk.node.bitmaps.get("x")
        assert not bitmap.inconsistent
        assert all(bitmap.any(offset, 1) for offset in offsets)
