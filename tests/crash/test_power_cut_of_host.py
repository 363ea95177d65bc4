"""Power cuts while jobs work on a chain of host files, at the level of the host's own writes.

`test_power_cut.py` cuts a single image on a crash disk. Here a whole daemon works on files, with the ways of writing that do not
pass through a node below the image: the flat map's, the inline allocating write, the kernel's copies. Guests write, flush and
read without pause; at random writes, often at a header's, and when a job has ended, the files are put aside as a power cut would
leave them, with what may be found then. Afterwards: the chain that the headers name passes ``qemu-img check`` but for leaks, and
holds all that was flushed. While a guest goes over to another image, the old chain or the new one does. A persistent bitmap that
recorded from the start has all that reached the disk.
"""

from __future__ import annotations

import asyncio
import copy
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from kit.hostcuts import HostDisk
from kit.peers import run
from kit.qcow2_disk import opened
from kit.qemu import info, qemu_img, read_all
from kit.sector_history import SECTOR, Impossible, SectorHistory
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.types import ZeroFlags
from livedisk.emulator.daemon import Daemon
from livedisk.emulator.drivers.file import FileDriver
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.registry import load_plugins, registry

load_plugins()

SECTORS: Final = 2048
SIZE: Final = SECTORS * SECTOR
RECORDED: Final = "i2"
"""The guest's image at first, with a bitmap."""
LAYOUTS: Final = {
    "default": "",
    "tiny": "cluster_size=512",
    "subclusters": "extended_l2=on,cluster_size=16k",
    "lazy": "cluster_size=4k,lazy_refcounts=on",
    "data file": "cluster_size=4k,data_file={name}.data",
    "huge": "cluster_size=2M",
}


@dataclass
class Cut:
    """What is on the disk, what may be there, and the images that may be the guest's."""

    where: str
    files: dict[str, bytes]
    history: SectorHistory
    tops: list[str]


class Trial:
    """A daemon on a chain ``i0`` <- ``i1`` <- ``i2`` in the working folder, guests on it, and one job after the other."""

    def __init__(self, folder: Path, seed: int, layout: str, *, cuts: int) -> None:
        self.folder, self.layout, self.most = folder, LAYOUTS[layout], cuts
        self.chance = random.Random(seed)
        self.history = SectorHistory(SECTORS)
        self.disk: HostDisk | None = None
        self.cuts: list[Cut] = []
        self.done: Counter[str] = Counter()
        self.made = 0
        self.over = False
        self.chain = [self.image(None)]
        for _ in range(2):
            self.chain.append(self.image(self.chain[-1]))
        self.tops = [self.chain[-1]]
        self.daemon: Daemon
        self.guest: BlockBackend
        self._candidates = 0

    def image(self, below: str | None) -> str:
        """A new image, whose header names the one below as somebody in the folder would."""
        name = f"i{self.made}"
        self.made += 1
        backing = f"backing_file={below},backing_fmt=qcow2" if below else ""
        options = ",".join(filter(None, (self.layout.format(name=name), backing)))
        qemu_img("create", "-q", "-u", "-f", "qcow2", *(("-o", options) if options else ()), name, str(SIZE))
        if self.disk is not None:
            for path in self.folder.glob(f"{name}*"):
                if path.stem == name:
                    self.disk.made(path)
        return name

    def node(self, name: str, below: str | None, *, read_only: bool) -> dict[str, Any]:
        file = {"driver": "file", "filename": name, "discard": "unmap"}
        return {
            "driver": "qcow2", "node-name": name, "file": file, "discard": "unmap", "backing": below,
            "read-only": read_only, "l2-cache-size": 4096 if "512" in self.layout else 65536,
        }  # fmt: skip

    async def ask(self, name: str, /, **arguments: Any) -> Any:
        """A QMP command."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        return await registry.execute(Context(self.daemon), name, given)

    # -- cutting ---------------------------------------------------------------------------------------------------------
    def may_cut(self, name: str, offset: int, *, where: str = "write") -> None:
        """Put a cut aside, by chance; at a write of a header always."""
        if not offset:
            where = f"header of {name}"
        self._candidates += 1
        kept = len(self.cuts)
        place = kept if kept < self.most else self.chance.randrange(self._candidates)
        if place < self.most or (not offset and self.chance.random() < 0.3):
            self.cuts[place : place + 1] = [self.cut(where)]

    def cut(self, where: str, seed: int | None = 1) -> Cut:
        """The power fails now. ``seed`` None: nothing of what was not flushed is there."""
        assert self.disk is not None
        return Cut(where, self.disk.cut(seed and self.chance.randrange(1 << 30)), self._now(), [*self.tops])

    def _now(self) -> SectorHistory:
        twin = copy.copy(self.history)
        twin._survives = [set(one) for one in self.history._survives]
        twin._zeroes = set(self.history._zeroes)
        return twin

    async def cut_now_and_then(self) -> None:
        """Also between writes: while flushes are under way, and after them."""
        while not self.over:
            await asyncio.sleep(self.chance.choice((0, 0, 0.001)))
            if self.chance.random() < 0.02:
                self.may_cut("", 1, where="pause")

    def judge(self, cut: Cut, folder: Path) -> None:
        """A chain that the guest may be on has all that was flushed, and every image of it is whole."""
        for path in folder.iterdir():
            path.unlink()
        for name, content in cut.files.items():
            (folder / name).write_bytes(content)
        refused = []
        for top in cut.tops:
            try:
                self._judge_chain(cut, folder / top, folder)
            except Impossible as error:
                refused.append(f"{top}: {error}")
            else:
                return
        raise AssertionError(f"cut at {cut.where}: {refused}")

    def _judge_chain(self, cut: Cut, top: Path, folder: Path) -> None:
        name: str | None = top.name
        while name is not None:
            path = folder / name
            if path.read_bytes()[79] & 1:
                run(["qemu-img", "check", "-r", "all", "-f", "qcow2", path], expect=None)
            if name == RECORDED:
                asyncio.run(self._look_at_bitmap(path))
            report = run(["qemu-img", "check", "-f", "qcow2", path], expect=None)
            if report.returncode not in (0, 3):
                raise Impossible(f"{name}: {report.stdout}{report.stderr}")
            name = info(path).get("backing-filename")
        cut.history.check_crash(read_all(top, folder, "-f", "qcow2"))

    async def _look_at_bitmap(self, path: Path) -> None:
        """The image was empty when it was made: what is there, and not zero, was written since."""
        async with opened(path, writable=False, backing=None) as disk:
            bitmap = disk.node.bitmaps.get("always")
            dirty = {at // SECTOR for start, length in bitmap.runs() for at in range(start, start + length, SECTOR)}
            data = await disk.read(0, SIZE)
        written = {at for at in range(SECTORS) if any(data[at * SECTOR : (at + 1) * SECTOR])}
        if not written <= dirty or bitmap.inconsistent:
            raise Impossible(f"{path.name}: the bitmap misses {sorted(written - dirty)[:5]}")

    # -- guests ------------------------------------------------------------------------------------------------------------
    async def work(self) -> None:
        """Requests one after the other."""
        chance, history = random.Random(self.chance.random()), self.history
        while not self.over:
            kind = chance.choices(("write", "read", "zero", "discard", "flush"), (55, 15, 8, 8, 14))[0]
            count = chance.choice((1, 1, 2, 8, 8, 8, 16, 64, 128, 200))
            start = chance.randrange(SECTORS - count + 1)
            if chance.random() < 0.5:
                start -= start % 8
            self.done[kind] += 1
            if kind == "flush":
                flush = history.flush()
                await self.guest.flush()
                history.flushed(flush)
            elif kind == "read":
                look, view = history.look(start, count), bytearray(count * SECTOR)
                await self.guest.read(start * SECTOR, memoryview(view))
                history.looked(look, bytes(view))
            else:
                change = history.change(start, count, zeroes=kind != "write")
                await self._change(kind, start * SECTOR, count * SECTOR, history.data(change))
                history.done(change, certain=kind != "discard")
            if chance.random() < 0.3:
                await asyncio.sleep(chance.choice((0, 0, 0.001, 0.004)))

    async def _change(self, kind: str, offset: int, length: int, data: bytes) -> None:
        if kind == "zero":
            await self.guest.write_zeroes(offset, length, self.chance.choice((ZeroFlags.NONE, ZeroFlags.MAY_UNMAP)))
        elif kind == "discard":
            await self.guest.discard(offset, length)
        elif not self.guest.try_write(offset, memoryview(data)):
            await self.guest.write(offset, memoryview(data))

    # -- what is done under them ---------------------------------------------------------------------------------------------
    async def snapshot(self) -> None:
        old = self.chain[-1]
        name = self.image(old)
        self.tops.append(name)
        await self.ask(
            "blockdev-snapshot-sync", node_name=old, snapshot_file=name, snapshot_node_name=name, mode="existing"
        )
        self.chain.append(name)
        self.tops = [name]

    async def stream(self) -> None:
        into = self.chance.randrange(1, len(self.chain))
        base = self.chance.randrange(-1, into)
        below = {"base-node": self.chain[base]} if base >= 0 else {}
        await self.job("block-stream", device=self.chain[into], **below)
        self.chain[base + 1 : into] = []

    async def commit(self) -> None:
        top = self.chance.randrange(1, len(self.chain) - 1)
        base = self.chance.randrange(top)
        names = {"top-node": self.chain[top], "base-node": self.chain[base]}
        await self.job("block-commit", device=self.chain[-1], **names)
        self.chain[base + 1 : top + 1] = []

    async def active_commit(self) -> None:
        base = self.chance.randrange(len(self.chain) - 1)
        await self.job("block-commit", self.chain[base], device=self.chain[-1], **{"base-node": self.chain[base]})
        self.chain[base + 1 :] = []

    async def mirror(self) -> None:
        sync = self.chance.choice(("full", "top"))
        below = self.chain[:-1] if sync == "top" else []
        target = self.image(below[-1] if below else None)
        await self.ask("blockdev-add", **self.node(target, below[-1] if below else None, read_only=False))
        mode = self.chance.choice(("background", "write-blocking"))
        await self.job(
            "blockdev-mirror", target, device=self.chain[-1], target=target, sync=sync, **{"copy-mode": mode}
        )
        self.chain = [*below, target]

    async def bitmap(self) -> None:
        """A persistent bitmap comes, and goes again later."""
        node, name = self.chain[-1], f"b{self.made}"
        await self.ask("block-dirty-bitmap-add", node=node, name=name, persistent=True)
        await asyncio.sleep(0.02)
        await self.ask("block-dirty-bitmap-remove", node=node, name=name)

    async def internal_snapshot(self) -> None:
        """One of the guest's image comes and goes."""
        if "data_file" in self.layout:
            return  # QEMU has none there
        node, name = self.chain[-1], f"s{self.made}"
        await self.ask("blockdev-snapshot-internal-sync", device=node, name=name)
        await asyncio.sleep(0.02)
        await self.ask("blockdev-snapshot-delete-internal-sync", device=node, name=name)

    async def job(self, command: str, /, pivot: str = "", **arguments: Any) -> None:
        """Start it, complete it when it is ready, see its end."""
        await self.ask(command, job_id="j", auto_dismiss=False, **arguments)
        completing = False
        while True:
            [job] = await self.ask("query-jobs")
            if job.status == "ready" and not completing:
                completing = True
                self.tops.append(pivot)
                await self.ask("job-complete", id="j")
            if job.status == "concluded":
                break
            await asyncio.sleep(0.001)
        assert not isinstance(job.error, str), f"{command} {arguments}: {job.error}"
        await self.ask("job-dismiss", id="j")
        if pivot:
            self.tops = [pivot]
        # Twice: once with nothing but what was flushed.
        self.cuts += [self.cut(f"end of {command}"), self.cut(f"end of {command}", seed=None)]
        self.done[command] += 1

    async def operate(self, steps: int) -> None:
        """Things to do, one after the other, with all jobs in them."""
        acts: list[Callable[[], Awaitable[None]]] = [self.stream, self.commit, self.active_commit, self.mirror]
        acts += [self.bitmap, self.internal_snapshot]
        for number in range(steps):
            while len(self.chain) < 3:
                await self.snapshot()
                await asyncio.sleep(0.01)
            act = self.chance.choice(acts) if number >= len(acts) else acts[number]
            await act()
            await asyncio.sleep(0.01)
            await self.forget()

    async def forget(self) -> None:
        """Close what is no part of the chain any more, from above."""
        for path in sorted(self.folder.glob("i*"), reverse=True):
            if path.suffix or path.name in self.chain:
                continue
            if any(node["node-name"] == path.name for node in await self.named()):
                await self.ask("blockdev-del", node_name=path.name)
            path.unlink()
            (self.folder / f"{path.name}.data").unlink(missing_ok=True)

    async def named(self) -> list[dict[str, str]]:
        return [{"node-name": one.node_name} for one in await self.ask("query-named-block-nodes", flat=True)]

    async def run(self, steps: int) -> None:
        """Do it all; judge nothing yet."""
        self.daemon = Daemon()
        with HostDisk(self.folder, self.chance) as self.disk:
            for below, name in zip([None, *self.chain], self.chain, strict=False):
                await self.ask("blockdev-add", **self.node(name, below, read_only=name != self.chain[-1]))
            await self.ask("block-dirty-bitmap-add", node=RECORDED, name="always", persistent=True, granularity=4096)
            self.guest = BlockBackend(self.daemon.graph, "guest")
            root = self.daemon.graph.find(self.chain[-1])
            self.daemon.graph.attach_root(self.guest, root, Perm.ALL & ~Perm.RESIZE, Perm.ALL)
            self.disk.before = lambda name, offset: self.may_cut(name, offset)
            tasks = [asyncio.create_task(self.work()) for _ in range(3)]
            tasks.append(asyncio.create_task(self.cut_now_and_then()))
            operator = asyncio.create_task(self.operate(steps))
            await asyncio.wait([*tasks, operator], return_when=asyncio.FIRST_COMPLETED)
            self.over = True
            await operator
            await asyncio.gather(*tasks)
            self.disk.before = lambda name, offset: None
            await self.daemon.graph.detach_root(self.guest)
            await self.daemon.close()
        for name in self.chain:
            qemu_img("check", "-f", "qcow2", name)
        self.history.ended(read_all(self.folder / self.chain[-1], self.folder.parent), crashed=False)


def trial(layout: str, seed: int, folder: Path, *, steps: int, cuts: int) -> Counter[str]:
    """One daemon's life, and its cuts."""
    images = folder / "images"
    images.mkdir()
    before = Path.cwd()
    left = folder / "cut"
    left.mkdir()
    patch = pytest.MonkeyPatch()
    # Tracked bitmaps are believed in the file that they were tracked in only, and not in a copy of it.
    patch.setattr(FileDriver, "identity", lambda self: 0)
    try:
        os.chdir(images)
        one = Trial(images, seed, layout, cuts=cuts)
        asyncio.run(one.run(steps))
        os.chdir(left)  # the name of a data file is taken as it stands
        for cut in one.cuts:
            one.judge(cut, left)
    finally:
        patch.undo()
        os.chdir(before)
    return one.done + Counter({"cuts": len(one.cuts)})


SEED = int(os.environ.get("SOAK_SEED", "1"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["default", "tiny", "subclusters", "data file"])
def test_power_cuts_during_jobs_lose_nothing_that_was_flushed(layout: str, tmp_path: Path) -> None:
    print(trial(layout, SEED, tmp_path, steps=6, cuts=12))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_power_cuts_during_jobs_in_the_long_run(tmp_path: Path) -> None:
    deadline = time.monotonic() + float(os.environ.get("SOAK_SECONDS", "600"))
    done, seed = Counter[str](), int(os.environ.get("SOAK_SEED", str(random.randrange(1 << 20))))
    while time.monotonic() < deadline:
        for layout in LAYOUTS:
            print(f"seed {seed}, {layout}", flush=True)
            folder = tmp_path / f"{seed} {layout}"
            folder.mkdir()
            done += trial(layout, seed, folder, steps=8, cuts=30)
            shutil.rmtree(folder)
        seed += 1
    print(dict(sorted(done.items())))
