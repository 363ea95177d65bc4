"""Dirty bitmaps beside qemu-storage-daemon: what commands on them cost on a huge disk, and what they cost a writing guest.

*Commands* are run on an image of 1 TiB whose bitmaps, of 64 KiB granularity, are dirty all over: in every page of their memory
and in every cluster that stores them. Told are their time, and by how much the daemon's resident memory was higher at some
moment of the command than before it (the kernel's own high-water mark, set back before each). Between the image's opening and
its closing the page cache has all of it.

*Guest* rows are fio's 4 KiB random writes at depth 32 to a disk that was written once, with no bitmap, with four, with four of
different granularities, and with four persistent ones. The bitmaps come and go under one export of one daemon, in turn, in short
runs, so that what the machine does meanwhile is shared by all; told is the median of each turn's ratio to no bitmap.

Both daemons in turn, interleaved; medians.
"""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmark.images import CLUSTER
from benchmark.jobs import DAEMONS, Monitor, _Empty
from benchmark.measure import Plan, Tell, fio, machine

HUGE: Final = 1 << 40
GRANULARITY: Final = 65536
PLACES: Final = 512
"""Writes that make a bitmap dirty: one for each 4 KiB of its bits."""
MIB: Final = 1 << 20
MOST_SECONDS: Final = 1.0
MOST_BYTES: Final = 20 * MIB
LEAST_KEPT: Final = 0.9

COMMANDS: Final = {
    "add": "add a persistent bitmap",
    "merge": "merge one into another",
    "clear": "clear",
    "store": "store both (close the image)",
    "load": "load both (open the image)",
}


@dataclass(frozen=True)
class Bitmaps:
    """What bitmaps a guest's disk has: one of each of the ``granularities``, in bytes."""

    title: str
    granularities: tuple[int, ...]
    persistent: bool = False


NONE: Final = Bitmaps("no bitmap", ())
FOUR: Final = Bitmaps("four bitmaps", (GRANULARITY,) * 4)
MIXED: Final = Bitmaps("four of different granularities", (4096, 16384, 65536, 262144))
STORED: Final = Bitmaps("four persistent bitmaps", (GRANULARITY,) * 4, persistent=True)


@dataclass(frozen=True)
class Guest:
    """A guest's disk in one format."""

    format: str
    kinds: tuple[Bitmaps, ...]


AIMED: Final = (FOUR, STORED)
"""Where `LEAST_KEPT` is asked for: bitmaps as they are made by default, of one granularity."""
TURNS: Final = 4
"""Of each kind of bitmaps, a run."""
GUESTS: Final = (Guest("raw", (NONE, FOUR, MIXED)), Guest("qcow2", (NONE, FOUR, MIXED, STORED)))


@dataclass
class Sample:
    """One turn. A command: ``seconds``, and ``memory``, bytes. A guest: ``iops``, ``kept`` (of those without a bitmap), and the
    daemon's CPU ``seconds`` a write."""

    seconds: float = 0
    memory: int = 0
    iops: float = 0
    kept: float = 1


@dataclass
class BitmapsResult:
    """All samples of one call, by row's title and daemon."""

    runs: int
    seconds: float
    size: int
    machine: str
    date: str
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)

    def put(self, row: str, daemon: str, sample: Sample) -> None:
        self.samples.setdefault((row, daemon), []).append(sample)

    def median(self, row: str, daemon: str, what: str) -> float | None:
        found = self.samples.get((row, daemon))
        return statistics.median(getattr(sample, what) for sample in found) if found else None

    def missed(self) -> list[str]:
        """Every aim that was measured and not reached, in words."""
        found = []
        for title in COMMANDS.values():
            seconds, memory = (self.median(title, "livedisk", what) for what in ("seconds", "memory"))
            if seconds is not None and seconds > MOST_SECONDS:
                found.append(f"{title}: {seconds:.2f} s, wanted {MOST_SECONDS:g} s")
            if memory is not None and memory > MOST_BYTES:
                found.append(f"{title}: {memory / MIB:.0f} MiB, wanted {MOST_BYTES // MIB} MiB")
        for guest in GUESTS:
            for kind in guest.kinds:
                kept = self.median(row_title(guest, kind), "livedisk", "kept")
                if kind in AIMED and kept is not None and kept < LEAST_KEPT:
                    found.append(f"{row_title(guest, kind)}: {kept:.2f} of those without, wanted {LEAST_KEPT:g}")
        return found

    def as_json(self) -> str:
        return json.dumps(
            {
                "date": self.date,
                "machine": self.machine,
                "runs": self.runs,
                "seconds": self.seconds,
                "size_bytes": self.size,
                "rows": {
                    row: {
                        name: [vars(sample) for sample in self.samples[row, name]]
                        for at, name in self.samples
                        if at == row
                    }
                    for row in dict.fromkeys(row for row, _ in self.samples)
                },
                "missed": self.missed(),
            },
            indent=1,
        )


def row_title(guest: Guest, kind: Bitmaps) -> str:
    return f"{guest.format}, 4 KiB random write, {kind.title}"


def node(path: Path) -> dict[str, Any]:
    return {
        "driver": path.suffix[1:],
        "node-name": "disk",
        "file": {"driver": "file", "filename": str(path)},
        "discard": "unmap",
    }


def add(monitor: Monitor, name: str, granularity: int = GRANULARITY, *, persistent: bool = False) -> None:
    monitor.run("block-dirty-bitmap-add", node="disk", name=name, granularity=granularity, persistent=persistent)


@contextmanager
def exported(daemon: _Empty, monitor: Monitor) -> Iterator[str]:
    """The URI of the disk, while it is exported."""
    monitor.run("block-export-add", type="nbd", id="e", node_name="disk", name="", writable=True)
    yield daemon.uri
    monitor.run("block-export-del", id="e", mode="hard")
    monitor.wait("BLOCK_EXPORT_DELETED")


def write_everywhere(daemon: _Empty, monitor: Monitor) -> None:
    """Zeroes in `PLACES` places all over the disk."""
    step = HUGE // PLACES
    writes = [f"write -z {number * step} 64k" for number in range(PLACES)]
    with exported(daemon, monitor) as uri:
        command = ["qemu-io", "-f", "raw", *(part for write in writes for part in ("-c", write)), uri]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def commands(kind: type[_Empty], folder: Path, result: BitmapsResult) -> None:
    """One turn of every command."""
    path = folder / "huge.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(HUGE)], check=True)

    def measured(row: str, act: Callable[[], object]) -> None:
        before = daemon.reset_peak()
        start = time.perf_counter()
        act()
        seconds = time.perf_counter() - start
        result.put(COMMANDS[row], kind.name, Sample(seconds, max(daemon.memory("VmHWM") - before, 0)))

    with kind(()) as daemon:
        monitor = Monitor(daemon)
        monitor.run("blockdev-add", **node(path))
        write_everywhere(daemon, monitor)  # so that the image's tables are in memory
        measured("add", lambda: add(monitor, "one", persistent=True))
        write_everywhere(daemon, monitor)
        add(monitor, "two", persistent=True)
        measured("merge", lambda: monitor.run("block-dirty-bitmap-merge", node="disk", target="two", bitmaps=["one"]))
        measured("store", lambda: monitor.run("blockdev-del", node_name="disk"))
        measured("load", lambda: monitor.run("blockdev-add", **node(path)))
        measured("clear", lambda: monitor.run("block-dirty-bitmap-clear", node="disk", name="two"))
        monitor.close()
    path.unlink()


def disk(folder: Path, format: str, size: int) -> Path:
    """A guest's disk, written once; made where it is not there yet."""
    path = folder / f"guest.{format}"
    if not path.exists():
        subprocess.run(["qemu-img", "create", "-q", "-f", format, path, str(size)], check=True)
        writes = [
            part for at in range(0, size, 64 * MIB) for part in ("-c", f"write -P 5 {at} {min(64 * MIB, size - at)}")
        ]
        subprocess.run(["qemu-io", "-f", format, *writes, path], check=True, stdout=subprocess.DEVNULL)
    return path


def guest_turns(kind: type[_Empty], guest: Guest, path: Path, plan: Plan, result: BitmapsResult) -> None:
    """Every kind of bitmaps under one export: as many turns as the plan has runs, forward and backward."""
    with kind(()) as daemon:
        monitor = Monitor(daemon)
        monitor.run("blockdev-add", **node(path))
        with exported(daemon, monitor) as uri:
            for number in range(plan.runs):
                turn: dict[Bitmaps, Sample] = {}
                for bitmaps in guest.kinds if number % 2 == 0 else guest.kinds[::-1]:
                    turn[bitmaps] = _guest_run(daemon, monitor, bitmaps, uri, plan)
                for bitmaps, sample in turn.items():
                    sample.kept = sample.iops / turn[NONE].iops
                    result.put(row_title(guest, bitmaps), kind.name, sample)
        monitor.run("blockdev-del", node_name="disk")
        monitor.close()


def _guest_run(daemon: _Empty, monitor: Monitor, bitmaps: Bitmaps, uri: str, plan: Plan) -> Sample:
    for number, granularity in enumerate(bitmaps.granularities):
        add(monitor, f"b{number}", granularity, persistent=bitmaps.persistent)
    load = {"uri": uri, "rw": "randwrite", "iodepth": 32, "size": plan.size}
    # Every region of the disk is written to once: what a first write costs is told by docs/bitmaps.md.
    fio({**load, "bs": "64k"})
    before = daemon.cpu_seconds()
    writes = fio({**load, "bs": "4k", "runtime": plan.seconds}, "--time_based", "--norandommap")["write"]
    cpu = daemon.cpu_seconds() - before
    for number in range(len(bitmaps.granularities)):
        monitor.run("block-dirty-bitmap-remove", node="disk", name=f"b{number}")
    return Sample(seconds=cpu / max(writes["total_ios"], 1), iops=float(writes["iops"]))


def measure_bitmaps(folder: Path, plan: Plan, tell: Tell) -> BitmapsResult:
    """Run everything in ``folder``; the plan's size is that of the guest's disk. Raises ServerFailed or LoadFailed."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    size = plan.size // CLUSTER * CLUSTER
    result = BitmapsResult(plan.runs, plan.seconds, size, machine(), date)
    steps = (1 + len(GUESTS)) * len(DAEMONS) * plan.runs
    done = 0
    for number in range(plan.runs):
        for kind in DAEMONS if number % 2 == 0 else DAEMONS[::-1]:
            tell(f"commands, {kind.name}, run {number + 1}", done / steps)
            commands(kind, folder, result)
            done += 1
            for guest in GUESTS:
                tell(f"guest, {guest.format}, {kind.name}, run {number + 1}", done / steps)
                guest_turns(kind, guest, disk(folder, guest.format, size), Plan(TURNS, plan.seconds, size), result)
                done += 1
    return result
