"""Random writes, bitmap commands, backups, failures, cancels and kill -9: what is restored is the disk at each checkpoint.

One story runs against ``livedisk daemon`` as a backup tool would: a guest writes, zeroes, discards and flushes over NBD; bitmaps
come, go, are cleared, switched and merged; a chain of one full backup and of increments grows, with each ``bitmap-mode``, and
each increment succeeds, is cancelled, has a broken target, or ends with the daemon's ``kill -9``. The models are the simplest
there are: the bytes of the disk (`History`: what a crash may leave of each sector), and for every bitmap the sectors that were
written while it recorded, with the disk as it was when it began.

* Every increment that succeeded restores, with qemu-img alone, the disk at its moment.
* A bitmap never misses a write; nor, after a crash, a sector that is not what it was (writes that were not flushed may be gone).
  Without a crash, it says nothing but what was written.
* What a tool needs after a failure is there: the next increment restores all the same.

``INCREMENTAL_SEED=n`` runs that story; the soak (``scripts/test --soak``) runs new ones for ``SOAK_SECONDS`` (600).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from kit.crashdisk import SECTOR, History
from kit.livedisk import Daemon
from kit.qemu import check, create, qemu_img
from kit.qmp import Qmp, QmpError
from livedisk.nbd.client import NbdClient

SIZE: Final = 8 << 20
LAYOUTS: Final = ("", "cluster_size=4k", "cluster_size=4k,lazy_refcounts=on", "extended_l2=on,cluster_size=16k")
GRANULARITIES: Final = (512, 4096, 65536, 262144)
LENGTHS: Final = (512, 4096, 9 * 512, 65536, 200 * 512, 1 << 20)
NAMES: Final = ("a", "b", "c")
CHAIN: Final = "chain"
"""The bitmap that increments are made from."""

Sectors = set[int]


def sectors(offset: int, length: int) -> range:
    return range(offset // SECTOR, (offset + length - 1) // SECTOR + 1)


def differing(one: bytes, other: bytes) -> Sectors:
    """Where two disks are not the same."""
    found: Sectors = set()
    for start in range(0, SIZE, 65536):
        if one[start : start + 65536] != other[start : start + 65536]:
            places = range(start, start + 65536, SECTOR)
            found |= {at // SECTOR for at in places if one[at : at + SECTOR] != other[at : at + SECTOR]}
    return found


@dataclass
class Bitmap:
    """``least``: sectors that must be dirty. ``most``: those that may be (None: after a crash, any). ``base``: the disk when it
    began, if it has recorded since."""

    granularity: int
    persistent: bool
    base: bytes | None
    recording: bool = True
    least: Sectors = field(default_factory=set)
    most: Sectors | None = field(default_factory=set)

    def mark(self, offset: int, length: int) -> None:
        if not self.recording:
            return
        self.least |= set(sectors(offset, length))
        self._may(offset, length)

    def _may(self, offset: int, length: int) -> None:
        if self.most is not None:
            first = offset // self.granularity * self.granularity
            end = -(-(offset + length) // self.granularity) * self.granularity
            self.most |= set(sectors(first, min(end, SIZE) - first))

    def merge(self, other: Bitmap) -> None:
        self.base = None
        self.least |= other.least
        if other.most is None:
            self.most = None
        elif self.most is not None:
            for at in other.most:
                self._may(at * SECTOR, SECTOR)


class Story:
    """One daemon on one disk after the other, the backups in ``folder``, and what all of it must be."""

    def __init__(self, seed: int, sockets: Path, folder: Path) -> None:
        self.chance = random.Random(seed)
        self.sockets = sockets
        self.folder = folder
        self.disk = create(folder / "disk.qcow2", SIZE, options=self.chance.choice(LAYOUTS))
        self.history = History(bytes(SIZE))
        self.bitmaps: dict[str, Bitmap] = {}
        self.backups: list[Path] = []
        self.half: Path | None = None
        """A target that a backup with bitmap-mode always left half made: the next increment goes on with it."""
        self.serial = 0
        self.done: list[str] = []
        self.crashed = False
        self.daemon: Daemon
        self.qmp: Qmp
        self.guest: NbdClient

    # -- the daemon --------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        self.serial += 1
        file = {"driver": "file", "filename": str(self.disk)}
        node = {"driver": "qcow2", "node-name": "disk", "file": file, "discard": "unmap"}
        self.daemon = Daemon(self.sockets, "--blockdev", json.dumps(node), name=f"d{self.serial}")
        self.qmp = self.daemon.qmp(timeout=60)
        self.qmp.execute("block-export-add", type="nbd", id="guest", node_name="disk", name="guest", writable=True)
        self.guest = await NbdClient.connect_unix(str(self.daemon.nbd_socket), "guest")

    async def crash(self) -> None:
        """kill -9, and again: what was flushed is there, and persistent bitmaps know of all that changed."""
        self.daemon.kill()
        self.guest.abort()
        self.qmp.close()
        self.crashed = True
        if not self._dirty():
            check(self.disk, leaks=True)
        await self.start()
        found = await self.guest.read(0, SIZE)
        assert not self.history.wrong(found)
        self.history = History(found)
        self.bitmaps = {name: one for name, one in self.bitmaps.items() if one.persistent}
        for one in self.bitmaps.values():
            one.most = None
        await self.judge()

    def _dirty(self) -> bool:
        """Whether the image has lazy refcounts that were not written: a check of it says so, rightly."""
        with self.disk.open("rb") as file:
            file.seek(79)
            return bool(file.read(1)[0] & 1)

    async def restart(self) -> None:
        await self.guest.disconnect()
        self.qmp.close()
        self.daemon.stop()
        check(self.disk, leaks=self.crashed)
        await self.start()
        found = await self.guest.read(0, SIZE)
        assert found == bytes(self.history.now)
        self.history = History(found)
        self.bitmaps = {name: one for name, one in self.bitmaps.items() if one.persistent}
        await self.judge()

    async def end(self) -> None:
        self.guest.abort()
        self.qmp.close()
        self.daemon.kill()

    # -- the guest ---------------------------------------------------------------------------------------------------
    def place(self) -> tuple[int, int]:
        length = self.chance.choice(LENGTHS)
        return self.chance.randrange((SIZE - length) // SECTOR + 1) * SECTOR, length

    def mark(self, offset: int, length: int) -> None:
        for one in self.bitmaps.values():
            one.mark(offset, length)

    async def write(self) -> None:
        offset, length = self.place()
        data = self.chance.randbytes(SECTOR) * (length // SECTOR)
        self.history.write(offset, data)
        await self.guest.write(offset, data)
        self.mark(offset, length)

    async def burst(self, *, crash: bool = False) -> None:
        """Several writes at once; or kill -9 in the middle of them."""
        step = SIZE // 8
        places = [
            (number * step + self.chance.randrange(100) * SECTOR, self.chance.choice(LENGTHS[:5]))
            for number in range(8)
        ]
        data = [self.chance.randbytes(SECTOR) * (length // SECTOR) for _, length in places]
        for (offset, _), part in zip(places, data, strict=True):
            self.history.write(offset, part)
        writes = [
            asyncio.ensure_future(self.guest.write(place[0], part)) for place, part in zip(places, data, strict=True)
        ]
        if crash:
            await asyncio.sleep(self.chance.random() * 0.01)
            self.daemon.kill()
        ends = await asyncio.gather(*writes, return_exceptions=True)
        for place, end in zip(places, ends, strict=True):
            if end is None:
                self.mark(*place)
            else:
                assert crash, end
        if crash:
            await self.crash()

    async def zero(self) -> None:
        offset, length = self.place()
        self.history.write(offset, bytes(length))
        await self.guest.write_zeroes(offset, length, may_unmap=self.chance.random() < 0.5)
        self.mark(offset, length)

    async def discard(self) -> None:
        """What is shown afterwards is anybody's choice: either what was there or zeroes."""
        offset, length = self.place()
        before = bytes(self.history.now[offset : offset + length])
        await self.guest.trim(offset, length)
        after = await self.guest.read(offset, length)
        for at in range(0, length, SECTOR):
            assert after[at : at + SECTOR] in (before[at : at + SECTOR], bytes(SECTOR))
        self.history.write(offset, after)
        self.mark(offset, length)

    async def flush(self) -> None:
        await self.guest.flush()
        self.history.flushed()

    async def work(self) -> None:
        """A guest's next few requests."""
        for _ in range(self.chance.randrange(1, 4)):
            what = self.chance.choice(
                [self.write, self.write, self.write, self.burst, self.zero, self.discard, self.flush]
            )
            await what()

    # -- bitmaps -----------------------------------------------------------------------------------------------------
    async def command(self) -> None:
        name = self.chance.choice(NAMES)
        one = self.bitmaps.get(name)
        if one is None:
            one = Bitmap(self.chance.choice(GRANULARITIES), self.chance.random() < 0.6, bytes(self.history.now))
            one.recording = self.chance.random() < 0.8
            extra = {"disabled": not one.recording, "persistent": one.persistent, "granularity": one.granularity}
            self.qmp.execute("block-dirty-bitmap-add", node="disk", name=name, **extra)
            self.bitmaps[name] = one
            if not one.recording:
                one.base = None
            return
        what = self.chance.choice(["clear", "remove", "switch", "switch", "merge", "merge"])
        if what == "merge":
            sources = [other for other in self.bitmaps if other != name and self.chance.random() < 0.6]
            if sources:
                self.qmp.execute("block-dirty-bitmap-merge", node="disk", target=name, bitmaps=sources)
                for source in sources:
                    one.merge(self.bitmaps[source])
        elif what == "switch":
            one.recording = not one.recording
            self.qmp.execute(f"block-dirty-bitmap-{'enable' if one.recording else 'disable'}", node="disk", name=name)
            one.base = None
        elif what == "clear":
            self.qmp.execute("block-dirty-bitmap-clear", node="disk", name=name)
            one.base = bytes(self.history.now) if one.recording else None
            one.least, one.most = set(), set()
        else:
            self.qmp.execute("block-dirty-bitmap-remove", node="disk", name=name)
            del self.bitmaps[name]

    async def judge(self) -> None:
        """Ask for every bitmap over NBD, and for what the monitor counts."""
        [node] = [one for one in self.qmp.execute("query-named-block-nodes") if one["node-name"] == "disk"]
        listed = {one["name"]: one for one in node.get("dirty-bitmaps", [])}
        assert listed.keys() == self.bitmaps.keys(), (listed.keys(), self.bitmaps.keys())
        found = await self._said()
        now = bytes(self.history.now)
        for name, one in self.bitmaps.items():
            assert not listed[name].get("inconsistent"), name
            assert listed[name]["recording"] == one.recording
            assert listed[name]["persistent"] == one.persistent
            dirty = found[name]
            assert not one.least - dirty, f"{name} misses {sorted(one.least - dirty)[:5]}"
            if one.base is not None:
                differs = differing(one.base, now)
                assert not differs - dirty, f"{name} misses that {sorted(differs - dirty)[:5]} changed"
            if one.most is not None:
                assert not dirty - one.most, f"{name} says more than was written: {sorted(dirty - one.most)[:5]}"
                assert listed[name]["count"] <= len(one.most) * SECTOR + one.granularity

    async def _said(self) -> dict[str, Sectors]:
        names = list(self.bitmaps)
        if not names:
            return {}
        self.qmp.execute(
            "block-export-add", type="nbd", id="judge", node_name="disk", name="judge", writable=True, bitmaps=names
        )
        contexts = [f"qemu:dirty-bitmap:{name}" for name in names]
        reader = await NbdClient.connect_unix(str(self.daemon.nbd_socket), "judge", contexts=contexts)
        found: dict[str, Sectors] = {name: set() for name in names}
        for name, context in zip(names, contexts, strict=True):
            at = 0
            while at < SIZE:
                for extent in (await reader.block_status(at, SIZE - at))[context]:
                    if extent.flags:
                        found[name] |= set(sectors(at, extent.length))
                    at += extent.length
        await reader.disconnect()
        self.qmp.execute("block-export-del", id="judge", mode="hard")
        self.qmp.wait_event("BLOCK_EXPORT_DELETED", lambda data: data["id"] == "judge")
        return found

    # -- backups -----------------------------------------------------------------------------------------------------
    @asynccontextmanager
    async def target(self, path: Path, *, broken: bool = False) -> AsyncIterator[None]:
        """The image as node ``target``; ``broken``: its file takes a few writes, and then none."""
        file: dict[str, Any] = {"driver": "file", "filename": str(path)}
        if broken:
            rule = {"event": "none", "iotype": "write", "errno": 5, "immediately": False, "once": False}
            file = {"driver": "blkdebug", "image": file, "inject-error": [{**rule, "sector": SIZE // 2 // SECTOR}]}
        await asyncio.sleep(0)
        self.qmp.execute("blockdev-add", driver="qcow2", node_name="target", file=file)
        daemon = self.daemon
        yield
        if self.daemon is daemon:
            self.qmp.execute("blockdev-del", node_name="target")

    def new(self, backing: Path | None) -> Path:
        self.serial += 1
        return create(self.folder / f"b{self.serial}.qcow2", SIZE, backing=backing)

    def restored(self, path: Path, wanted: bytes) -> None:
        """What somebody without livedisk gets out of the chain."""
        raw = self.folder / "restored"
        qemu_img("convert", "-O", "raw", path, raw)
        wrong = sorted(differing(raw.read_bytes(), wanted))
        assert not wrong, f"{path.name} differs from the checkpoint at sectors {wrong[:5]} and {len(wrong)} in all"

    def _tell(self, command: str, **arguments: Any) -> None:
        """To the job, if it has not ended, or is about to, just now."""
        try:
            self.qmp.execute(command, device="j", **arguments)
        except QmpError as error:
            if error.kind != "DeviceNotActive" and "cannot accept command verb" not in error.desc:
                raise

    async def _ended(self, fate: str, speed: int) -> bool:
        """Lead the job ``j`` to its fate, while the guest works; whether it succeeded."""
        for _ in range(self.chance.randrange(3)):
            await self.work()
        if fate == "kill":
            await self.burst(crash=True)
            return False
        if fate == "cancel":
            self._tell("block-job-cancel")
        elif speed:
            self._tell("block-job-set-speed", speed=0)
        while True:
            event = self.qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data["status"] == "null")
            if event["id"] == "j":
                break
        for event in list(self.qmp.events):
            if event["event"] in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"):
                self.qmp.events.clear()
                return event["event"] == "BLOCK_JOB_COMPLETED" and "error" not in event["data"]
        raise AssertionError("the job has ended, and no event said how")

    async def full(self) -> None:
        """A new chain: bitmap and full backup in one transaction."""
        path = self.new(None)
        self.half = None
        speed = self.chance.choice([0, 4 << 20])
        fate = self.chance.choice(["wait"] * 4 + ["cancel", "kill"])
        self.done.append(f"full {fate}")
        async with self.target(path):
            old = self.bitmaps.get(CHAIN)
            if old is None:
                granularity = self.chance.choice(GRANULARITIES)
                bitmap = {"node": "disk", "name": CHAIN, "persistent": True, "granularity": granularity}
                first = {"type": "block-dirty-bitmap-add", "data": bitmap}
            else:
                granularity = old.granularity
                first = {"type": "block-dirty-bitmap-clear", "data": {"node": "disk", "name": CHAIN}}
            backup = {"job-id": "j", "device": "disk", "target": "target", "sync": "full", "speed": speed}
            backup["auto-finalize"] = fate != "kill"
            self.qmp.events.clear()
            self.qmp.execute("transaction", actions=[first, {"type": "blockdev-backup", "data": backup}])
            moment = bytes(self.history.now)
            self.bitmaps[CHAIN] = Bitmap(granularity, True, moment)
            done = await self._ended(fate, speed)
        self.backups = [path] if done else []
        if done:
            self.restored(path, moment)

    async def increment(self) -> None:
        """Every mode with every fate, with what documentation promises of the bitmap."""
        if not self.backups:
            await self.full()
            return
        mode = self.chance.choice(["on-success", "on-success", "never", "always"])
        fate = self.chance.choice(["wait"] * 4 + ["cancel", "cancel", "kill", "broken"])
        speed = self.chance.choice([0, 1 << 20, 4 << 20])
        if self.half is not None:
            mode = "always"  # a target that is half made can only be finished by going on with it
            fate = self.chance.choice(["wait", "wait", "cancel", "broken"])
        path = self.half or self.new(self.backups[-1])
        bitmap = self.bitmaps[CHAIN]
        self.done.append(f"{mode} {fate}")
        async with self.target(path, broken=fate == "broken"):
            moment = bytes(self.history.now)
            before = (bitmap.base, set(bitmap.least), bitmap.most and set(bitmap.most))
            self.qmp.events.clear()
            self.qmp.execute(
                "blockdev-backup",
                job_id="j",
                device="disk",
                target="target",
                speed=speed,
                sync="bitmap",
                bitmap=CHAIN,
                bitmap_mode=mode,
                auto_finalize=fate != "kill",  # else nobody knows whether it had ended well just before
            )
            since = Bitmap(bitmap.granularity, True, moment)
            self.bitmaps[CHAIN] = since  # records from here on; put together with what was before below
            done = await self._ended(fate, speed)
            since = self.bitmaps[CHAIN]
            if not (done and mode != "never") and not (mode == "always" and fate != "kill" and not done):
                since.base = before[0]
                since.least |= before[1]
                since.most = None if before[2] is None or since.most is None else since.most | before[2]
            elif not done:
                # Always, and not all was copied: dirty are what was written since, and what is missing in the target.
                since.base, since.most = None, None
        if done:
            self.restored(path, moment)
            if mode != "never":
                self.backups.append(path)
                self.half = None
        elif mode == "always" and fate != "kill":
            self.half = path

    # -- the story ---------------------------------------------------------------------------------------------------
    async def run(self, steps: int) -> None:
        await self.start()
        try:
            for _ in range(steps):
                step = self.chance.choices(
                    [self.work, self.command, self.increment, self.full, self.restart, self.crash, self.crashing],
                    [8, 8, 5, 0.5, 1, 1, 1],
                )[0]
                self.done.append(step.__name__)
                await step()
                await self.judge()
            if self.half is not None or self.backups:
                await self.work()
                await self.increment()
        finally:
            await self.end()

    async def crashing(self) -> None:
        await self.burst(crash=True)


def play(seed: int, steps: int, sockets: Path, folder: Path) -> None:
    story = Story(seed, sockets, folder)
    try:
        asyncio.run(story.run(steps))
    except BaseException:
        print(f"INCREMENTAL_SEED={seed}: {', '.join(story.done)}")
        print(story.daemon.output()[-2000:])
        raise


SEEDS = [int(os.environ["INCREMENTAL_SEED"])] if "INCREMENTAL_SEED" in os.environ else [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_each_checkpoint_restores_and_no_bitmap_misses_a_write(seed: int, short_path: Path, tmp_path: Path) -> None:
    play(seed, 40, short_path, tmp_path)


@pytest.mark.soak
def test_soak_of_incremental_backups(short_path: Path, tmp_path: Path) -> None:
    until = time.monotonic() + float(os.environ.get("SOAK_SECONDS", "600"))
    seed = int(time.time())
    while time.monotonic() < until:
        seed += 1
        sockets, folder = short_path / str(seed), tmp_path / str(seed)
        sockets.mkdir()
        folder.mkdir()
        play(seed, 60, sockets, folder)
        for path in folder.iterdir():
            path.unlink()
