"""How long a guest is held by ``livedisk migrate``: three disks of a loaded instance, again and again.

Every run has daemons of its own. fio loads each disk through a proxy of its own, as a guest that follows would; so there are two
figures: what the source says (``query-migrate``, the time from STOP to the destination's word that it runs), and the slowest
request that the load saw, which includes all else that a busy machine does meanwhile.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmark.servers import LiveDisk, ServerFailed

DISKS: Final = 3
SIZE: Final = 128 << 20
TARGET: Final = 100.0
"""Milliseconds: the median hold that is asked for."""
_LOAD: Final = ("--rw=randwrite", "--bs=4k", "--iodepth=4", "--rate_iops=500", "--time_based", "--runtime=120")
_PATIENCE: Final = 20.0


@dataclass(frozen=True)
class Hold:
    """One migration: how long the guest was held, and its slowest request. Milliseconds."""

    held: float
    slowest: float


@contextmanager
def _running(arguments: list[str], log: Path, ready: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process until the end, once its socket is there. Raises ServerFailed."""
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerFailed(f"{' '.join(arguments)}: {log.read_text()}")
            time.sleep(0.02)
        yield process
    finally:
        process.terminate()
        process.wait()


def _livedisk(*arguments: str) -> list[str]:
    return [LiveDisk.executable()[0], *arguments]


def _daemon(folder: Path, name: str, *options: str) -> list[str]:
    qmp = ("-qmp", f"unix:{folder}/{name}.qmp,server=on,wait=off")
    return _livedisk("daemon", *options, "-nbd-server", f"addr.type=unix,addr.path={folder}/{name}.nbd", *qmp)


def _disk(folder: Path, number: int) -> list[str]:
    image = folder / f"d{number}.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    node = f"driver=qcow2,node-name=d{number},file.driver=file,file.filename={image}"
    return ["-blockdev", node, "-device", f"virtio-blk,drive=d{number},id=virtio{number}"]


def one(folder: Path) -> Hold:
    """Load, move, measure. Raises ServerFailed."""
    (folder / "new").mkdir()
    with ExitStack() as stack:
        disks = [word for number in range(DISKS) for word in _disk(folder, number)]
        for name, options in (("a", disks), ("b", ["-incoming", "defer"])):
            stack.enter_context(
                _running(_daemon(folder, name, *options), folder / f"{name}.log", folder / f"{name}.qmp")
            )
        loads = []
        for number in range(DISKS):
            export = ("nbd-server-add", f"device=virtio{number}", f"name=d{number}", "writable=true")
            subprocess.run(_livedisk("qmp", f"{folder}/a.qmp", *export), check=True, stdout=subprocess.DEVNULL)
            places = [f"nbd+unix:///d{number}?socket={folder}/{name}.nbd" for name in "ab"]
            socket = folder / f"d{number}.sock"
            proxy = _livedisk("proxy", "--socket", str(socket), *places)
            stack.enter_context(_running(proxy, folder / f"proxy{number}.log", socket))
            loads.append(_load(f"nbd+unix:///d{number}?socket={socket}", folder / f"fio{number}.json"))
        time.sleep(2)
        ends = ("--from", f"{folder}/a.qmp", "--to", f"{folder}/b.qmp", "--target", f"{folder}/new")
        moved = subprocess.run(_livedisk("migrate", *ends), capture_output=True, text=True, timeout=300, check=False)
        time.sleep(0.5)
        for load in loads:
            load.terminate()  # in order: it writes its results
            load.wait()
        found = re.search(r"held for (\d+) ms", moved.stdout)
        if found is None:
            raise ServerFailed(moved.stdout + moved.stderr)
        return Hold(float(found[1]), max(_slowest(folder / f"fio{number}.json") for number in range(DISKS)))


def _load(uri: str, results: Path) -> subprocess.Popen[bytes]:
    arguments = ["fio", "--name=guest", "--ioengine=nbd", f"--uri={uri}", f"--size={SIZE}", *_LOAD]
    arguments += ["--output-format=json", f"--output={results}"]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _slowest(results: Path) -> float:
    text = results.read_text()
    job = json.loads(text[text.index("{") :])["jobs"][0]
    return float(job["write"]["clat_ns"]["max"]) / 1e6


def measure(runs: int, tell: Callable[[str, float], None]) -> list[Hold]:
    """All runs. Raises ServerFailed."""
    holds = []
    for number in range(runs):
        tell(f"migration {number + 1} of {runs}", number / runs)
        with tempfile.TemporaryDirectory(prefix="ld", dir="/tmp") as folder:
            holds.append(one(Path(folder)))
    return holds


def lines(holds: list[Hold]) -> Iterator[str]:
    """For people."""
    held, slowest = [hold.held for hold in holds], [hold.slowest for hold in holds]
    yield f"{DISKS} disks of a loaded instance moved {len(holds)} times, the guest held each time (ms):"
    yield "  " + ", ".join(f"{value:.0f}" for value in held)
    yield f"  median {statistics.median(held):.0f} ms (at most {TARGET:.0f}), worst {max(held):.0f} ms"
    yield f"  the guest's slowest request: median {statistics.median(slowest):.0f} ms, worst {max(slowest):.0f} ms"


def missed(holds: list[Hold]) -> bool:
    """Whether the median is above the target."""
    return statistics.median(hold.held for hold in holds) > TARGET
