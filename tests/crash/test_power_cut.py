"""Power cuts at every metadata write: the image is sound but for leaks, and all that was flushed is there.

A workload runs on a crash disk. Before each metadata write, and before each barrier, the disk as a power cut would leave it is
put aside together with what the guest may find then; afterwards qemu-img judges them.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kit.crashdisk import CrashDiskOptions, History, Platter
from kit.peers import run
from kit.qemu import create, qemu_img
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.driver import Moment
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.types import Discard, ZeroFlags
from livedisk.emulator.drivers.qcow2.driver import Qcow2
from livedisk.emulator.drivers.qcow2.options import Qcow2Options
from livedisk.emulator.drivers.qcow2.points import Point

SIZE = 2 << 20
PER_POINT = 4
"""Cuts that are judged at each point of a workload."""


@dataclass
class Cut:
    """A power cut: where it fell, what the disk holds, what the guest may find."""

    point: str
    disk: bytes
    history: History


@dataclass
class Recorder:
    """Puts cuts aside: the first at each point, then a few more, by seed."""

    platter: Platter
    history: History
    chance: random.Random
    cuts: dict[str, list[Cut]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)

    def __call__(self, point: Point | None) -> None:
        name = point.value if point is not None else "barrier"
        self.seen[name] += 1
        known = self.cuts.setdefault(name, [])
        place = len(known) if len(known) < PER_POINT else self.chance.randrange(self.seen[name])
        if place < PER_POINT:
            cut = Cut(name, self.platter.after_power_cut(self.chance.randrange(1 << 30)), self.history.copy())
            known[place : place + 1] = [cut]


def judge(cut: Cut, folder: Path) -> None:
    """The image must pass a check but for leaks, and hold what it may hold."""
    path = folder / "cut.qcow2"
    path.write_bytes(cut.disk)
    if cut.disk[79] & 1:  # the dirty bit: its promise is that a repair finds everything
        run(["qemu-img", "check", "-r", "all", "-f", "qcow2", path], expect=None)
    report = run(["qemu-img", "check", "-f", "qcow2", path], expect=None)
    assert report.returncode in (0, 3), f"cut at {cut.point}: {report.stdout}{report.stderr}"
    raw = folder / "cut.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
    assert not cut.history.wrong(raw.read_bytes()), f"cut at {cut.point}: sectors lost or mixed up"


class Workload:
    """Random requests to one image on a crash disk."""

    def __init__(self, image: bytes, content: bytes, seed: int) -> None:
        self.chance = random.Random(seed)
        self.platter = Platter(image)
        self.history = History(content)
        self.recorder = Recorder(self.platter, self.history, self.chance)
        self.node: Node
        self.backend: BlockBackend
        self.size = len(content)

    async def run(self, steps: int, *extra: Callable[[Workload], Awaitable[None]]) -> None:
        """Open, do ``steps`` random requests with the extra ones in between, and close."""
        graph = Graph()
        options = Qcow2Options(
            driver="qcow2",
            file=CrashDiskOptions(driver="crash-disk", platter=self.platter),
            discard=Discard.UNMAP,
            l2_cache_size=2048,
        )
        self.node = await graph.open(options)
        driver = self.node.driver
        assert isinstance(driver, Qcow2)
        driver.image.storage.observer = self.recorder
        self.backend = BlockBackend(graph, "guest")
        graph.attach_root(self.backend, self.node, Perm.ALL, Perm.ALL)
        pauses = {self.chance.randrange(steps): action for action in extra}
        for step in range(steps):
            if step in pauses:
                await pauses[step](self)
            await self.request()
        await graph.detach_root(self.backend)
        self.recorder(None)

    async def request(self) -> None:
        length = 512 * self.chance.choice([1, 8, 128, self.chance.randrange(1, 200)])
        offset = self.chance.randrange(0, (self.size - length) // 512 + 1) * 512
        match self.chance.choice(["write"] * 5 + ["several", "zero", "discard", "compressed", "flush", "flush"]):
            case "write":
                await self.write(offset, self.chance.randbytes(length))
            case "several":
                step = self.size // 4
                parts = [(number * step, self.chance.randbytes(4096)) for number in range(4)]
                await asyncio.gather(*(self.write(at, data) for at, data in parts))
            case "zero":
                self.history.write(offset, bytes(length))
                await self.backend.write_zeroes(
                    offset, length, self.chance.choice([ZeroFlags.NONE, ZeroFlags.MAY_UNMAP])
                )
            case "discard":
                cluster = self.node.driver.cluster_size()
                offset, length = offset // cluster * cluster, -(-length // cluster) * cluster
                length = min(length, self.size - offset)
                self.history.write(offset, bytes(length))
                await self.backend.discard(offset, length)
            case "compressed":
                cluster = self.node.driver.cluster_size()
                offset = offset // cluster * cluster
                data = self.chance.randbytes(16) * (min(cluster, self.size - offset) // 16)
                self.history.write(offset, data)
                await self.node.write_compressed(offset, memoryview(data))
            case "flush":
                await self.backend.flush()
                self.history.flushed()

    async def write(self, offset: int, data: bytes) -> None:
        self.history.write(offset, data)
        await self.backend.write(offset, memoryview(data))


async def grow(work: Workload) -> None:
    """Double the disk."""
    size = work.size * 2
    work.history.grow(size)
    await work.node.truncate(size)
    work.size = size


async def grow_and_fill(work: Workload) -> None:
    """Double the disk and write all of it."""
    await grow(work)
    for at in range(0, work.size, 64 << 10):
        await work.write(at, work.chance.randbytes(64 << 10))


async def rename_backing(work: Workload) -> None:
    """Rewrite the header's strings, to something and back to nothing."""
    await work.node.driver.change_backing_file("zeroes.raw", "raw")
    await work.node.driver.change_backing_file(None, None)


async def snapshots_come_and_go(work: Workload) -> None:
    """Two snapshots are made with writes in between, one is deleted, the disk goes back to the other, which is deleted too."""

    async def changed(change: Coroutine[Any, Any, Any]) -> None:
        async with work.node.graph.drained(work.node):
            await change
        work.history.flushed()

    driver = work.node.driver
    await changed(driver.snapshot_create("first", Moment(1, 0)))
    then = bytes(work.history.now)
    for _ in range(8):
        await work.request()
    await changed(driver.snapshot_create("second", Moment(2, 0)))
    for _ in range(8):
        await work.request()
    ids = {one["name"]: one["id"] for one in driver.snapshots()}
    await changed(driver.snapshot_delete(ids["second"]))
    work.history.write(0, then)
    await changed(driver.snapshot_apply(ids["first"]))
    await changed(driver.snapshot_delete(ids["first"]))


VARIANTS = {
    "clusters of 64k": "",
    "clusters of 512": "cluster_size=512",
    "the refcount table grows": "cluster_size=512,refcount_bits=64",
    "refcounts of one bit": "cluster_size=1k,refcount_bits=1",
    "version 2": "compat=0.10,cluster_size=4k",
    "subclusters": "extended_l2=on,cluster_size=16k",
    "lazy refcounts": "lazy_refcounts=on,cluster_size=2k",
}


def start(folder: Path, options: str, *, snapshot: bool = False, bitmap: bool = False) -> tuple[bytes, bytes]:
    """An image that already holds something, and what its guest sees; and ``zeroes.raw`` to be its backing file for a time."""
    with (folder / "zeroes.raw").open("wb") as zeroes:
        zeroes.truncate(SIZE)
    path = create(folder / "start.qcow2", SIZE, options=options)
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 5 0 300k", "-c", "write -P 6 1M 70k", path])
    if snapshot:
        qemu_img("snapshot", "-c", "before", path)
    if bitmap:
        qemu_img("bitmap", "--add", path, "dirty")
    content = bytearray(SIZE)
    content[: 300 << 10] = b"\5" * (300 << 10)
    content[1 << 20 : (1 << 20) + (70 << 10)] = b"\6" * (70 << 10)
    return path.read_bytes(), bytes(content)


def cuts_of(work: Workload) -> list[Cut]:
    return [cut for known in work.recorder.cuts.values() for cut in known]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_power_cut_at_every_metadata_write_leaks_at_most(variant: str, seed: int, tmp_path: Path) -> None:
    work = Workload(*start(tmp_path, VARIANTS[variant]), seed)
    asyncio.run(work.run(80, grow_and_fill if "grows" in variant else grow, rename_backing))
    for cut in cuts_of(work):
        judge(cut, tmp_path)


@pytest.mark.parametrize("options", ["", "cluster_size=512", "extended_l2=on,cluster_size=16k"])
def test_power_cut_while_a_snapshot_shares_everything_leaks_at_most(options: str, tmp_path: Path) -> None:
    work = Workload(*start(tmp_path, options, snapshot=True), 3)
    asyncio.run(work.run(80))
    for cut in cuts_of(work):
        judge(cut, tmp_path)
        path = tmp_path / "cut.qcow2"
        qemu_img("convert", "-l", "before", "-O", "raw", path, tmp_path / "then.raw")
        assert (tmp_path / "then.raw").read_bytes()[: 300 << 10] == b"\5" * (300 << 10)


@pytest.mark.parametrize(
    "options",
    ["", "cluster_size=512", "extended_l2=on,cluster_size=16k", "compat=0.10,cluster_size=4k", "lazy_refcounts=on"],
)
def test_power_cut_while_snapshots_come_and_go_loses_nothing(options: str, tmp_path: Path) -> None:
    work = Workload(*start(tmp_path, options, snapshot=True), 5)
    asyncio.run(work.run(20, snapshots_come_and_go))
    for cut in cuts_of(work):
        path = tmp_path / "cut.qcow2"
        if "0.10" in options:  # no dirty bit says that refcounts and flags may disagree
            path.write_bytes(cut.disk)
            run(["qemu-img", "check", "-r", "all", "-f", "qcow2", path], expect=None)
            cut.disk = path.read_bytes()
        judge(cut, tmp_path)
        qemu_img("convert", "-l", "before", "-O", "raw", path, tmp_path / "then.raw")
        assert (tmp_path / "then.raw").read_bytes()[: 300 << 10] == b"\5" * (300 << 10), cut.point
    assert {point.value for point in Point if point.value.startswith("snapshot")} <= set(work.recorder.cuts)


def test_power_cut_while_bitmaps_are_tracked_leaks_at_most(tmp_path: Path) -> None:
    work = Workload(*start(tmp_path, "", bitmap=True), 4)
    asyncio.run(work.run(20))
    for cut in cuts_of(work):
        judge(cut, tmp_path)  # what the bitmap says then: test_bitmaps.py


def test_the_workloads_reach_every_metadata_write(tmp_path: Path) -> None:
    seen: set[str] = set()
    for number, options in enumerate(["cluster_size=512,refcount_bits=64", "lazy_refcounts=on"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        work = Workload(*start(folder, options), 1)
        asyncio.run(work.run(80, grow_and_fill, rename_backing))
        seen |= set(work.recorder.seen)
    for bitmap, *actions in ((True,), (False, snapshots_come_and_go)):
        folder = tmp_path / str(bitmap)
        folder.mkdir()
        work = Workload(*start(folder, "", bitmap=bitmap), 1)
        asyncio.run(work.run(10, *actions))
        seen |= set(work.recorder.seen)
    # The corrupt bit is only written on damage: tests/emulator/drivers/qcow2/runtime/test_damage.py.
    assert {point.value for point in Point} - seen == {Point.CORRUPT_BIT.value}


def test_a_crash_disk_loses_what_was_not_flushed_and_keeps_what_was() -> None:
    platter = Platter(bytes(2048))
    platter.write(0, b"a" * 1024)
    platter.flush()
    platter.write(512, b"b" * 1024)
    seen = {platter.after_power_cut(seed) for seed in range(200)}
    assert {found[:512] for found in seen} == {b"a" * 512}
    assert {found[512:1024] for found in seen} == {b"a" * 512, b"b" * 512}
    assert {found[1024:1536] for found in seen} == {bytes(512), b"b" * 512}
