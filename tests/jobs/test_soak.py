"""Every job in every mode under clients that never rest, with pauses, speeds, snapshots, cancels and kill -9 at random moments.

A round starts ``livedisk daemon`` on a chain of images: of one of several layouts, on plain files or through filters, the lowest
one without a format at times. Clients read, write, zero, discard and flush through the
device without pause and judge each read at once (`SectorHistory`). Meanwhile one operator runs job after job, each
with random steps in between, and looks after each: the chain on disk (``qemu-img info --backing-chain``) is what the
job promised, a mirror's or backup's target holds a moment between the command and its reply or event. Then the daemon
is stopped, or killed in the middle of whatever it did: the guest's data, as far as it was flushed, is whole in the
chain that the headers name; of a pivot either the old chain or the new one has all of it. ``qemu-img check`` finds
nothing (after a kill: at most leaks); internal snapshots, made and deleted between the jobs, hold their moments.

The choices come from a seed, the timing does not. ``SOAK_SEED=n`` runs that seed; the soak (``scripts/test --soak``)
runs new seeds for ``SOAK_SECONDS`` (600).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from kit.clients import Clients
from kit.livedisk import Daemon
from kit.peers import run
from kit.qemu import info, qemu_img, read_all
from kit.qmp import Qmp, QmpError
from kit.sector_history import SECTOR, Impossible, Look, SectorHistory
from kit.soak_disks import drawn_mirror, repair
from kit.soak_operators import hurry

SECTORS: Final = 8192
SIZE: Final = SECTORS * SECTOR
LONGEST_CHAIN: Final = 6
MOST_SECTORS: Final = 2 * SECTORS
LAYOUTS: Final = (
    "cluster_size=4096",
    "",
    "extended_l2=on,cluster_size=16k",
    "cluster_size=4096,lazy_refcounts=on",
    "cluster_size=512",
    "cluster_size=2M",
    "cluster_size=4096,data_file={data}",
    "extended_l2=on,data_file={data}",
)
STORES: Final = ("file", "file", "file", "throttle", "blkdebug", "quorum", "raw", "filtered")
"""What images stand on: host files, or other nodes on these; "filtered": the images below do."""
FULL_SPEED_AFTER: Final = 60
"""Steps with a job after which nothing holds it up any more."""


class Disk:
    """The chain of images on disk, from the base up, and what its top may hold. Images are known by the names of their nodes.

    ``tops``: the images that may be the guest's after a kill now: more than one while a pivot is asked for. ``store``: what
    stands between images and files. ``raw``: images without a format. ``kept``: by image and name, the internal snapshots, and
    what the disk could show when they were made.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.layout = self.chance.choice(LAYOUTS)
        self.store = self.chance.choice(STORES)
        self.history = SectorHistory(SECTORS)
        self.sectors = SECTORS
        self.serial = 0
        self.raw: set[str] = set()
        self.kept: dict[tuple[str, str], Look] = {}
        self.chain = [self.new_image(None, raw=self.chance.random() < 0.3)]
        self.tops: list[str] = []

    def new_image(self, below: str | None, *, raw: bool = False) -> str:
        """An empty image, whose header names the one below."""
        self.serial += 1
        name = f"i{self.serial}"
        size = self.sectors * SECTOR
        if raw:
            self.raw.add(name)
            with self.path(name).open("wb") as file:
                file.truncate(size)
        else:
            backing = f"backing_file={self.path(below)},backing_fmt={self.format(below)}" if below else ""
            options = ",".join(filter(None, (self.layout.format(data=self.data(name)), backing)))
            # -u: the daemon has the image below.
            qemu_img(
                "create", "-q", "-u", "-f", "qcow2", *(("-o", options) if options else ()), self.path(name), str(size)
            )
        if self.store == "quorum":
            shutil.copy(self.path(name), self.twin(name))
        return name

    @property
    def plain(self) -> bool:
        return self.store == "file"

    def format(self, name: str) -> str:
        return "raw" if name in self.raw else "qcow2"

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.qcow2"

    def data(self, name: str) -> Path:
        return self.folder / f"{name}.data"

    def twin(self, name: str) -> Path:
        return self.folder / f"{name}.twin"

    def forget(self, name: str) -> None:
        """Nobody has the image any more."""
        for path in (self.path(name), self.data(name), self.twin(name)):
            path.unlink(missing_ok=True)
        self.kept = {key: look for key, look in self.kept.items() if key[0] != name}

    def node(self, name: str, below: str | None, **more: Any) -> dict[str, Any]:
        """Options of the node of an image."""
        backing: Any = below
        if below is not None and self.store == "filtered":
            kinds = ("throttle", "copy-on-read", "compress")
            kind = self.chance.choice(kinds[: 2 if below in self.raw or "data_file" in self.layout else 3])
            backing = {"driver": kind, "file": below, "read-only": True}
            backing |= {"throttle-group": "limits"} if kind == "throttle" else {}
        node = {"driver": self.format(name), "node-name": name, "file": self._stored(name), "discard": "unmap", **more}
        return node if name in self.raw else {**node, "backing": backing}

    def _stored(self, name: str) -> dict[str, Any]:
        file: dict[str, Any] = {"driver": "file", "filename": str(self.path(name)), "discard": "unmap"}
        match self.store:
            case "throttle":
                return {"driver": "throttle", "throttle-group": "limits", "file": file, "discard": "unmap"}
            case "blkdebug":
                return {"driver": "blkdebug", "image": file, "discard": "unmap", "max-transfer": 65536}
            case "raw":
                return {"driver": "raw", "file": file, "discard": "unmap"}
            case "quorum":
                both = [file, {**file, "filename": str(self.twin(name))}]
                return {"driver": "quorum", "vote-threshold": 1, "read-pattern": "fifo", "children": both}
        return file

    def on_disk(self, top: str) -> list[str]:
        """The chain that the headers name, from the base up."""
        found = info(self.path(top), "-U", "--backing-chain")
        return [Path(image["filename"]).stem for image in reversed(found)]

    def ended(self, *, crashed: bool) -> None:
        """The daemon is gone: look at everything that it left, and go on with that."""
        refused: list[str] = []
        for top in dict.fromkeys([self.chain[-1], *self.tops]):
            names = self.on_disk(top)
            for name in names:
                if name not in self.raw:
                    repair(self.path(name), crashed=crashed)
            image = read_all(self.path(top), self.folder, "-f", self.format(top))
            found = len(image) // SECTOR
            try:
                if found < self.sectors:
                    raise Impossible(f"{found} sectors are left of {self.sectors}")
                if found > self.sectors:  # the growth was not acknowledged
                    self.history.grow(found)
                self.sectors = found
                self.history.check_crash(image) if crashed else None
            except Impossible as error:
                refused.append(f"{top}: {error}")
                continue
            self.history.ended(image, crashed=crashed)
            self.chain = names
            self.tops = []
            self._look_at_snapshots()
            if self.store == "quorum":
                for name in names:
                    shutil.copy(self.path(name), self.twin(name))
            return
        raise AssertionError(f"no chain has all that was flushed: {refused}")

    def _look_at_snapshots(self) -> None:
        """The internal snapshots of the guest's image and of those below hold the moments at which they were made."""
        for (image, name), look in self.kept.items():
            if image in self.chain:
                data = read_all(self.path(image), self.folder, "-f", "qcow2", "-l", f"snapshot.name={name}")
                self.history.judge(look, data, f"snapshot {name} of {image}")


@dataclass
class Asked:
    """A job that was asked for: the command, and what it leads to.

    ``outcome``: the chain if it succeeds. ``end``: what to do when it is ready ("" if it never is). ``pivot``: the
    image that the guest goes over to. ``target``: an image that gets a copy of a moment: of its end or, with
    ``at_start``, of its start. ``endless``: only a cancel ends it. ``made``: images that were made for it.
    """

    command: str
    arguments: dict[str, Any]
    outcome: list[str]
    end: str = ""
    pivot: str = ""
    target: str = ""
    made: list[str] = field(default_factory=list)
    at_start: bool = False
    endless: bool = False
    aborted: bool = False


class Soak(Clients):
    """One round: a daemon, its clients and its operator."""

    def __init__(self, disk: Disk, daemon: Daemon, qmp: Qmp) -> None:
        super().__init__(daemon, qmp, disk.history, disk.sectors)
        self.disk = disk
        self.chance = disk.chance
        self.doing = ""

    async def operate(self) -> None:
        """One thing after the other."""
        jobs = [self.stream, self.stream, self.commit, self.commit, self.active_commit, self.mirror, self.mirror]
        jobs += [self.backup, self.backup]
        while not self.over:
            await asyncio.sleep(self.chance.uniform(0, 0.05))
            if self.chance.random() < 0.2:
                await self.chance.choice((self.grow, self.internal_snapshot))()
            if len(self.disk.chain) < 3 or self.chance.random() < 0.3:
                await self.snapshot()
                continue
            asked = await self.chance.choice(jobs)()
            if asked is not None:
                await self._run_job(asked)

    def count(self, what: str) -> None:
        self.done[what] = self.done.get(what, 0) + 1

    # -- snapshots and jobs to ask for -----------------------------------------------------------------------------------
    async def grow(self) -> None:
        disk = self.disk
        more = disk.sectors + 8 * self.chance.randrange(1, 128)
        # A quorum cannot be resized, nor a base of a commit under a filter.
        if more <= MOST_SECTORS and disk.store not in ("quorum", "filtered"):
            await self.command("block_resize", node_name=disk.chain[-1], size=more * SECTOR)
            disk.history.grow(more)
            disk.sectors = self.sectors = more
            self.count("growth")

    async def internal_snapshot(self) -> None:
        """A new one of the guest's image; and one that goes."""
        disk, top = self.disk, self.disk.chain[-1]
        if top in disk.raw or "data_file" in disk.layout:
            return
        known = [name for image, name in disk.kept if image == top]
        if known and self.chance.random() < 0.6:
            name = self.chance.choice(known)
            del disk.kept[top, name]
            await self.command("blockdev-snapshot-delete-internal-sync", device="d0", name=name)
            self.count("internal snapshot deleted")
            return
        disk.serial += 1
        name = f"s{disk.serial}"
        look = await self._during(self.command("blockdev-snapshot-internal-sync", device="d0", name=name))
        disk.kept[top, name] = look
        self.count("internal snapshot")

    async def snapshot(self) -> None:
        disk = self.disk
        if len(disk.chain) >= LONGEST_CHAIN:
            return
        old = disk.chain[-1]
        name = disk.new_image(old)
        if disk.plain:
            await self.command(
                "blockdev-snapshot-sync",
                node_name=old, snapshot_file=str(disk.path(name)), snapshot_node_name=name, mode="existing",
            )  # fmt: skip
        else:
            await self.command("blockdev-add", **disk.node(name, None))
            await self.command("blockdev-snapshot", node=old, overlay=name)
        disk.chain.append(name)
        self.count("snapshot")

    async def stream(self) -> Asked | None:
        chain = self.disk.chain
        into = self.chance.randrange(1, len(chain))
        base = self.chance.randrange(-1, into)
        arguments: dict[str, Any] = {"device": chain[into]}
        if base >= 0:
            arguments |= self.chance.choice(({"base-node": chain[base]}, {"bottom": chain[base + 1]}))
        if base == into - 1 and "bottom" in arguments:
            return None  # nothing lies between, and the bottom would be the image itself
        if base >= 0:
            arguments |= self._told_name(chain[base])
        return Asked("block-stream", arguments, chain[: base + 1] + chain[into:])

    def _told_name(self, image: str) -> dict[str, str]:
        """Where images do not stand on plain files alone, their own names, json:{...}, do not lead to what is on disk."""
        return {} if self.disk.plain else {"backing-file": str(self.disk.path(image))}

    async def commit(self) -> Asked | None:
        chain = self.disk.chain
        top = self.chance.randrange(1, len(chain) - 1)
        base = self.chance.randrange(top)
        arguments = {
            "device": chain[-1],
            "top-node": chain[top],
            "base-node": chain[base],
            **self._told_name(chain[base]),
        }
        return Asked("block-commit", arguments, chain[: base + 1] + chain[top + 1 :])

    async def active_commit(self) -> Asked | None:
        chain = self.disk.chain
        base = self.chance.randrange(len(chain) - 1)
        arguments = {"device": chain[-1], "base-node": chain[base]}
        if self.chance.random() < 0.3:
            return Asked("block-commit", arguments, [*chain], "cancel")
        return Asked("block-commit", arguments, chain[: base + 1], "complete", pivot=chain[base])

    async def mirror(self) -> Asked | None:
        disk, chain = self.disk, self.disk.chain
        sync = self.chance.choice(("full", "top", "none") if disk.plain else ("full", "top"))
        below = {"full": [], "top": chain[:-1], "none": chain}[sync]
        end = self.chance.choice(("complete", "complete", "cancel")) if sync != "none" else "complete"
        raw = sync == "full" and self.chance.random() < 0.2
        target = disk.new_image(below[-1] if below else None, raw=raw)
        name, arguments = drawn_mirror(self.chance, chain[-1], sync, target, disk.path(target))
        if not disk.plain and sync == "top":
            name, arguments = "blockdev-mirror", {"device": chain[-1], "sync": sync, "target": target}
        if name == "blockdev-mirror":
            await self.command("blockdev-add", **disk.node(target, below[-1] if below else None))
        else:
            arguments["format"] = disk.format(target)
        asked = Asked(name, arguments, [*below, target], end, pivot=target, made=[target])
        if end == "cancel":
            asked.outcome, asked.pivot, asked.target = [*chain], "", target if sync == "full" else ""
        return asked

    async def backup(self) -> Asked | None:
        disk, chain = self.disk, self.disk.chain
        sync = self.chance.choice(("full", "full", "top", "none") if disk.plain else ("full", "top"))
        below = chain[-2] if sync == "top" else None
        target = disk.new_image(below)
        compress = self.chance.random() < 0.3 and "data_file" not in disk.layout
        arguments: dict[str, Any] = {"device": chain[-1], "sync": sync, "compress": compress}
        if sync == "none" or (self.chance.random() < 0.5 and disk.plain):
            name = "drive-backup"
            arguments |= {"target": str(disk.path(target)), "format": "qcow2", "mode": "absolute-paths"}
        else:
            name = "blockdev-backup"
            arguments["target"] = target
            await self.command("blockdev-add", **disk.node(target, below))
        asked = Asked(name, arguments, [*chain], made=[target], at_start=True, endless=sync == "none")
        asked.target = "" if asked.endless else target
        return asked

    # -- a job's life ----------------------------------------------------------------------------------------------------
    async def _run_job(self, asked: Asked) -> None:
        self.doing = f"{asked.command} {asked.arguments} then {asked.end}"
        before = [*self.disk.chain]
        options = {"job-id": "j", "auto-dismiss": False, **asked.arguments}
        if asked.command in ("block-stream", "block-commit"):
            # What an internal snapshot leaves to the backing files is soon not there any more, or another, also after a kill
            # half-way; as in QEMU.
            self.disk.kept = {key: look for key, look in self.disk.kept.items() if key[0] == before[0]}
        if self.chance.random() < 0.3:
            options["speed"] = self.chance.choice((1 << 20, 4 << 20, 64 << 20))
        moment = await self._during(self.command(asked.command, **options)) if asked.at_start else None
        if moment is None:
            await self.command(asked.command, **options)
        await self._accompany(asked)
        error = next(job for job in await self.command("query-jobs") if job["id"] == "j").get("error")
        await self.command("job-dismiss", id="j")
        if error is not None:
            assert asked.aborted, f"{self.doing}: {error}"
            assert error == "Operation canceled", f"{self.doing}: {error}"
            self.count(f"{asked.command} aborted")
        else:
            self.disk.chain = asked.outcome
            mode = asked.arguments.get("sync", "")
            self.count(" ".join(filter(None, (asked.command, mode, asked.end))))
            if moment is not None and asked.target:
                await self._check_copy(asked.target, moment)
        self.disk.tops = []
        await self._look_at_chain(asked, before)

    async def _during(self, doing: Awaitable[Any]) -> Look:
        """Do it; what the guest's disk could show meanwhile."""
        look = self.history.look(0, self.disk.sectors)
        try:
            await doing
            return Look(0, [set(one) for one in look.seen])
        finally:
            self.history.give_up(look)

    async def _accompany(self, asked: Asked) -> None:
        """Random steps until it is concluded. Nothing holds it up for ever."""
        steps = 0
        while (status := await self._status()) != "concluded":
            steps += 1
            await asyncio.sleep(self.chance.uniform(0, 0.02))
            if status == "ready" and asked.end and self.chance.random() < 0.4:
                await self._end(asked)
                continue
            if asked.endless and steps > 20 and not asked.aborted:
                asked.aborted = True
                await self.command("block-job-cancel", device="j")
                continue
            if steps > FULL_SPEED_AFTER:
                await hurry(self.command, "j", mirrors=asked.command.endswith("mirror"))
                continue
            if self.chance.random() < 0.3:
                await self._interfere(asked)

    async def _status(self) -> str:
        return str(next(job for job in await self.command("query-jobs") if job["id"] == "j")["status"])

    async def _interfere(self, asked: Asked) -> None:
        step = self.chance.choice(("pause", "speed", "change", "snapshot", "stop", "abort"))
        try:
            if step == "pause":
                await self.command("job-pause", id="j")
                await asyncio.sleep(self.chance.uniform(0, 0.05))
                await self.command("job-resume", id="j")
            elif step == "speed":
                await self.command("block-job-set-speed", device="j", speed=self.chance.choice((0, 1 << 20, 16 << 20)))
            elif step == "change":
                await self.command(
                    "block-job-change",
                    id="j",
                    type="mirror",
                    copy_mode=self.chance.choice(("background", "write-blocking")),
                )
            elif step == "snapshot":
                await self.command("blockdev-snapshot-sync", node_name=self.disk.chain[-1], snapshot_file="/nowhere/x")
            elif step == "stop":
                await self.command("stop")
                await self.command("cont")
            elif self.chance.random() < 0.2:
                asked.aborted = True
                await self.command("job-cancel", id="j")
        except QmpError:
            self.count(f"{step} refused")
        else:
            self.count(step)

    async def _end(self, asked: Asked) -> None:
        end, asked.end = asked.end, ""
        seen = await self._during(self._end_now(asked, end))
        asked.end = end
        if asked.target and not asked.aborted:
            await self._check_copy(asked.target, seen)

    async def _end_now(self, asked: Asked, end: str) -> None:
        try:
            if end == "complete":
                self.disk.tops = [asked.pivot]
                await self.command("job-complete", id="j")
            else:
                await self.command("block-job-cancel", device="j")
            while await self._status() != "concluded":
                await asyncio.sleep(0.005)
        except QmpError:
            assert asked.aborted

    async def _check_copy(self, target: str, seen: Look) -> None:
        """The target holds a moment of those that were seen."""
        if self.doing.startswith("blockdev"):
            await self.command("blockdev-del", node_name=target)
        path = self.disk.path(target)
        form = self.disk.format(target)
        data = await asyncio.to_thread(
            read_all, path, self.disk.folder, "-U", "-f", form
        )  # it may stand on an image of ours
        if form == "qcow2":
            await asyncio.to_thread(run, ["qemu-img", "check", "-U", "-f", "qcow2", path])
        self.history.judge(seen, data, f"{self.doing}: the target")
        self.count("copy checked")

    async def _look_at_chain(self, asked: Asked, before: list[str]) -> None:
        """The chain on disk is the one that was promised; what is no part of it is closed and forgotten."""
        chain = self.disk.chain
        found = await asyncio.to_thread(self.disk.on_disk, chain[-1])
        assert found == chain, f"{self.doing}: the chain on disk is {found}, not {chain}"
        opened = await self._opened_chain()
        assert opened == chain, f"{self.doing}: the chain of nodes is {opened}, not {chain}"
        for name in reversed([*before, *asked.made]):
            if name not in chain:
                try:
                    await self.command("blockdev-del", node_name=name)
                except QmpError as error:
                    if "Failed to find node" not in error.desc:  # it was closed with its last user
                        raise
                self.disk.forget(name)

    async def _opened_chain(self) -> list[str]:
        """The guest's chain of nodes, from the base up."""
        graph = await self.command("x-debug-query-block-graph")
        names = {node["id"]: node["name"] for node in graph["nodes"]}
        below = {edge["parent"]: edge["child"] for edge in graph["edges"] if edge["name"] in ("root", "backing")}
        through = {edge["parent"]: edge["child"] for edge in graph["edges"] if edge["name"] == "file"}
        device = next(node["id"] for node in graph["nodes"] if node["type"] == "block-backend" and "d0" in node["name"])
        found: list[str] = []
        while (device := below.get(device)) is not None:
            while names[device].startswith("#"):  # a filter between images
                device = through[device]
            found.insert(0, names[device])
        return found


async def load(soak: Soak, *, seconds: float, kill: bool) -> None:
    """Clients and operator for that long; then everybody stops, or is stopped by the daemon's end."""
    chance = soak.chance
    clients = [soak.client("guest", chance.randrange(1 << 30), depth=2) for _ in range(2)]
    clients += [soak.client("guest", chance.randrange(1 << 30), depth=2, vanishing=True)]
    tasks = [asyncio.create_task(each) for each in (soak.operate(), *clients)]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    broken = [task for task in tasks if task.done() and not task.cancelled() and task.exception() is not None]
    if kill and not broken:
        soak.daemon.kill()
    soak.over = True
    _, late = await asyncio.wait(tasks, timeout=60)
    for task in late:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert not late, f"requests or commands without an answer during {soak.doing}"
    for result in results:
        if isinstance(result, BaseException) and not (kill and not broken and isinstance(result, (OSError, EOFError))):
            raise result


def one_round(disk: Disk, folder: Path, *, seconds: float, kill: bool) -> Counter[str]:
    """Start, load, end; what was done."""
    options = ["--object", "throttle-group,id=limits,x-iops-total=100000"]
    for below, name in zip([None, *disk.chain], disk.chain, strict=False):
        read_only = {"read-only": True} if name != disk.chain[-1] else {}
        options += ["--blockdev", json.dumps(disk.node(name, below, **read_only))]
    options += ["--device", f"virtio-blk,drive={disk.chain[-1]},id=d0,share-rw=on"]
    with Daemon(folder, *options) as daemon, daemon.qmp(timeout=60) as qmp:
        qmp.execute("block-export-add", type="nbd", id="guest", node_name="d0", name="guest", writable=True)
        soak = Soak(disk, daemon, qmp)
        try:
            asyncio.run(load(soak, seconds=seconds, kill=kill))
        except BaseException as error:
            error.add_note(f"during {soak.doing}; chain {disk.chain}; layout {disk.layout}; on {disk.store}")
            raise
        if not kill:
            daemon.stop(expect=0)
    return Counter(soak.done)


def soak_a_disk(folder: Path, seed: int, rounds: int, seconds: float) -> Counter[str]:
    """Rounds on one disk, each going on with what the one before left."""
    disk, done = Disk(folder, seed), Counter[str]()
    for number in range(rounds):
        kill = bool((seed + number) % 2)
        done += one_round(disk, folder, seconds=seconds, kill=kill)
        disk.ended(crashed=kill)
        for path in folder.glob("i*.qcow2"):
            if path.stem not in disk.chain:
                disk.forget(path.stem)
    return done


SEEDS = [int(os.environ["SOAK_SEED"])] if "SOAK_SEED" in os.environ else [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_jobs_under_load_lose_nothing(seed: int, short_path: Path) -> None:
    print(dict(soak_a_disk(short_path, seed, rounds=2, seconds=3)))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_jobs_under_load_lose_nothing_in_the_long_run(short_path: Path) -> None:
    deadline = time.monotonic() + float(os.environ.get("SOAK_SECONDS", "600"))
    done, seed = Counter[str](), int(os.environ.get("SOAK_SEED", str(random.randrange(1 << 20))))
    while time.monotonic() < deadline:
        print(f"seed {seed}", flush=True)
        done += soak_a_disk(short_path, seed, rounds=4, seconds=5)
        seed += 1
        for path in short_path.glob("i*.*"):
            path.unlink()
    print(dict(sorted(done.items())))
