"""What the soak of several jobs works on: disks with images, models and claims, and jobs as they were asked for.

A `Line` is a disk: a chain of images, what it holds (`SectorHistory`), who works on which of its images, and a chain of
incremental backups. An `Asked` is a job, and what is to come of it. Role and rules: `jobs/test_soak_together.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kit.clients import Clients
from kit.peers import run
from kit.qemu import check, info, qemu_img, read_all
from kit.sector_history import SECTOR, Impossible, Look, SectorHistory

SECTORS: Final = 4096
MOST_SECTORS: Final = 8192
LONGEST_CHAIN: Final = 7
LAYOUTS: Final = ("cluster_size=4096", "", "extended_l2=on,cluster_size=16k", "cluster_size=4096,lazy_refcounts=on")


@dataclass
class Saved:
    """A disk's bitmap, and the backups that it continues.

    ``image``: the backup that holds the moment since when the bitmap records; ``partial``: an image upon it that a failed
    backup with mode *always* left unfinished: the next goes on with it. ``busy``: a job has the bitmap.
    """

    name: str
    node: str
    image: str
    partial: str = ""
    busy: bool = False


class Line:
    """A disk: its chain of images from the base up, its history, its bitmap, and who works on which image."""

    def __init__(self, folder: Path, name: str, chance: random.Random) -> None:
        self.folder, self.name, self.chance = folder, name, chance
        self.layout = chance.choice(LAYOUTS)
        self.history = SectorHistory(SECTORS)
        self.sectors = SECTORS
        self.serial = 0
        self.chain = [self.new_image(None)]
        self.tops: Counter[str] = Counter()
        """Images that the guest may go over to right now."""
        self.saved: Saved | None = None
        self.kept: set[str] = set()
        """Images of backups, which stay when their job is over."""
        self.start_over()
        self.clients: Clients

    def start_over(self) -> None:
        """Nobody works on anything."""
        self.lock = asyncio.Lock()
        self.working: list[Asked] = []
        self.alone: set[str] = set()
        self.together: Counter[str] = Counter()
        self.tops.clear()

    @property
    def top(self) -> str:
        return self.chain[-1]

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.qcow2"

    def new_image(self, below: str | None) -> str:
        """An empty image, whose header names the one below."""
        self.serial += 1
        name = f"{self.name}{self.serial}"
        backing = f"backing_file={self.path(below)},backing_fmt=qcow2" if below else ""
        options = ",".join(filter(None, (self.layout, backing)))
        size = str(self.sectors * SECTOR)
        # -u: the daemon has the image below.
        qemu_img("create", "-q", "-u", "-f", "qcow2", *(("-o", options) if options else ()), self.path(name), size)
        return name

    def free(self, alone: Iterable[str], together: Iterable[str] = ()) -> bool:
        """Whether nobody is in the way of such a claim."""
        alone, together = set(alone), set(together)
        return not (alone & self.alone or together & self.alone or any(self.together[name] for name in alone))

    def came_on_top(self, old: str, name: str) -> None:
        """A snapshot was taken: the filters of backups stand on the new image now, as the guest does."""
        self.chain.append(name)
        for asked in self.working:
            if asked.command.endswith("backup") and old in asked.together:
                asked.together += (name,)
                self.together[name] += 1

    @property
    def idle(self) -> bool:
        return not self.alone and not +self.together

    def on_disk(self, top: str) -> list[str]:
        """The chain that the headers name, from the base up."""
        found = info(self.path(top), "-U", "--backing-chain")
        return [Path(image["filename"]).stem for image in reversed(found)]

    def ended(self, *, crashed: bool) -> None:
        """The daemon is gone: look at everything that it left, and go on with that."""
        refused: list[str] = []
        for top in dict.fromkeys([self.top, *(+self.tops)]):
            for name in self.on_disk(top):
                repair(self.path(name), crashed=crashed)
            image = read_all(self.path(top), self.folder)
            found = len(image) // SECTOR
            try:
                if found < self.sectors:
                    raise Impossible(f"{found} sectors are left of {self.sectors}")
                if found > self.sectors:  # the growth was not acknowledged
                    self.history.grow(found)
                self.sectors = found
                if crashed:
                    self.history.check_crash(image)
            except Impossible as error:
                refused.append(f"{top}: {error}")
                continue
            self.history.ended(image, crashed=crashed)
            self.chain = self.on_disk(top)
            return
        raise AssertionError(f"no chain has all that was flushed: {refused}")


@dataclass
class Asked:
    """A job that was asked for, and what it leads to.

    ``removes``, ``puts_on``: what success does to the chain: these images leave it, that one becomes its top; ``pivot``: where
    the guest may be meanwhile. ``end``: what to do when it is ready. ``endless``: only a cancel ends it. ``target``: gets a copy
    of a moment: of the end or, with ``at_start``, of the start (``moment``). ``bitmap``: of the disk, with ``mode``. ``fails``:
    the error that it must end with.
    ``excused``: the reason why it may fail: somebody cancelled it or another of its group.
    """

    line: Line
    command: str
    arguments: dict[str, Any]
    alone: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    id: str = ""
    removes: tuple[str, ...] = ()
    puts_on: str = ""
    pivot: str = ""
    end: str = ""
    endless: bool = False
    target: str = ""
    made: str = ""
    at_start: bool = False
    moment: Look | None = None
    bitmap: Saved | None = None
    mode: str = ""
    fails: str = ""
    excused: str = ""
    status: str = "undefined"
    error: str | None = None
    told: str | None = None
    told_end: bool = False
    auto_dismiss: bool = False

    @property
    def over(self) -> bool:
        return self.status == "null" or (self.status == "concluded" and not self.auto_dismiss)

    def __str__(self) -> str:
        return f"{self.id}: {self.command} {self.arguments} then {self.end or 'nothing'} ({self.status})"


def drawn_mirror(chance: random.Random, device: str, sync: str, target: str, path: Path) -> tuple[str, dict[str, Any]]:
    """A mirror of ``device`` into the image ``target`` at ``path``: the command, and its arguments. For blockdev-mirror the node
    is yet to be added."""
    arguments: dict[str, Any] = {
        "device": device,
        "sync": sync,
        "copy-mode": chance.choice(("background", "write-blocking")),
        "granularity": chance.choice((4096, 65536, 1 << 20)),
    }
    if sync == "none" or chance.random() < 0.5:
        # With existing, what the header names is opened anew when the guest goes over: by names that nobody knows.
        mode = chance.choice(("existing", "absolute-paths")) if sync == "full" else "absolute-paths"
        return "drive-mirror", arguments | {"target": str(path), "node-name": target, "format": "qcow2", "mode": mode}
    return "blockdev-mirror", arguments | {"target": target}


def repair(path: Path, *, crashed: bool) -> None:
    """Check an image that nobody has open; after a crash it may have leaks, and go on without them."""
    if crashed and path.read_bytes()[79] & 1:  # lazy refcounts: the image says that it needs a repair
        run(["qemu-img", "check", "-r", "all", path], expect=None)
    check(path, leaks=crashed)
    if crashed:
        run(["qemu-img", "check", "-r", "leaks", path], expect=None)
        check(path)
