"""Dirty bitmaps beside qemu-storage-daemon: what commands on them cost on a huge disk, and what they cost a writing guest.

*Commands* are timed on an empty image of 1 TiB with bitmaps of 64 KiB granularity that are dirty in places all over it: adding
a persistent one, merging, clearing, storing (the image is closed) and loading (it is opened again), and how much memory a bitmap
takes. *Guest* rows are fio's 4 KiB random writes to an image of which every cluster was written, with no bitmap, with four, and
with four that are persistent. Both daemons in turn, interleaved; medians.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmark.jobs import DAEMONS, Monitor, _Empty
from benchmark.measure import fio

HUGE: Final = 1 << 40
PLACES: Final = 256
"""Writes that make a bitmap dirty: several in each of its clusters."""
GRANULARITY: Final = 65536

Samples = dict[tuple[str, str], list[float]]
"""By row and daemon. Seconds, MiB or IOPS."""


def node(path: Path) -> dict[str, Any]:
    return {
        "driver": "qcow2",
        "node-name": "disk",
        "file": {"driver": "file", "filename": str(path)},
        "discard": "unmap",
    }


def add(monitor: Monitor, name: str, *, persistent: bool = False) -> None:
    monitor.run("block-dirty-bitmap-add", node="disk", name=name, granularity=GRANULARITY, persistent=persistent)


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


def commands(kind: type[_Empty], folder: Path, samples: Samples) -> None:
    """One run of every command."""
    path = folder / "huge.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(HUGE)], check=True)

    def timed(row: str, act: Callable[[], object]) -> None:
        start = time.perf_counter()
        act()
        samples.setdefault((row, kind.name), []).append(time.perf_counter() - start)

    with kind(()) as daemon:
        monitor = Monitor(daemon)
        monitor.run("blockdev-add", **node(path))
        write_everywhere(daemon, monitor)  # so that the image's tables are in memory
        before = daemon.memory("VmRSS")
        timed("add a persistent bitmap", lambda: add(monitor, "one", persistent=True))
        add(monitor, "two", persistent=True)
        write_everywhere(daemon, monitor)
        monitor.run("block-dirty-bitmap-clear", node="disk", name="two")
        timed("merge", lambda: monitor.run("block-dirty-bitmap-merge", node="disk", target="two", bitmaps=["one"]))
        used = daemon.memory("VmRSS") - before
        samples.setdefault(("memory of both, MiB", kind.name), []).append(used / (1 << 20))
        timed("store both (close the image)", lambda: monitor.run("blockdev-del", node_name="disk"))
        timed("load both (open the image)", lambda: monitor.run("blockdev-add", **node(path)))
        timed("clear", lambda: monitor.run("block-dirty-bitmap-clear", node="disk", name="two"))
        monitor.close()
    path.unlink()


def guest(kind: type[_Empty], folder: Path, size: int, seconds: float, samples: Samples) -> None:
    """One run of fio without bitmaps, with four, and with four persistent ones."""
    path = folder / "guest.qcow2"
    if not path.exists():
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True)
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", f"write -P 5 0 {size}", path], check=True, stdout=subprocess.DEVNULL
        )
    for row, count, persistent in (("no bitmap", 0, False), ("four", 4, False), ("four persistent", 4, True)):
        with kind(()) as daemon:
            monitor = Monitor(daemon)
            monitor.run("blockdev-add", **node(path))
            for number in range(count):
                add(monitor, f"b{number}", persistent=persistent)
            with exported(daemon, monitor) as uri:
                settings = {"rw": "randwrite", "bs": "4k", "iodepth": 32, "size": size, "uri": uri}
                fio({**settings, "bs": "64k", "rw": "randwrite", "runtime": 1}, "--time_based")
                report = fio({**settings, "runtime": seconds}, "--time_based")
            samples.setdefault((f"IOPS, {row}", kind.name), []).append(report["write"]["iops"])
            for number in range(count):
                monitor.run("block-dirty-bitmap-remove", node="disk", name=f"b{number}")
            monitor.run("blockdev-del", node_name="disk")
            monitor.close()


def measure_bitmaps(folder: Path, *, size: int, runs: int, seconds: float) -> Samples:
    """Run everything. Raises ServerFailed or LoadFailed."""
    samples: Samples = {}
    for number in range(runs):
        for kind in DAEMONS if number % 2 == 0 else DAEMONS[::-1]:
            commands(kind, folder, samples)
            guest(kind, folder, size, seconds, samples)
    return samples


def show(samples: Samples) -> str:
    """A table of medians."""
    rows = list(dict.fromkeys(row for row, _ in samples))
    names = [kind.name for kind in DAEMONS][::-1]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for row in rows:
        values = [statistics.median(samples[row, name]) for name in names]
        if row.startswith("IOPS"):
            shown = [f"{value / 1000:.1f} k" for value in values]
        elif "MiB" in row:
            shown = [f"{value:.1f}" for value in values]
        else:
            shown = [f"{value * 1000:.1f} ms" for value in values]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines)
