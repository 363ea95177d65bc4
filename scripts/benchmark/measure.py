"""How it is measured: servers in turn, interleaved, page cache warm, medians."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.images import CLUSTER, Images
from benchmark.servers import QemuStorageDaemon, Server, qemu_aio
from benchmark.workloads import Workload

Tell = Callable[[str, float], None]
"""Takes what runs now and the share that is done."""


class LoadFailed(Exception):
    """fio failed. The text has what it printed."""


@dataclass(frozen=True)
class Plan:
    """``runs`` of ``seconds`` each for every server and workload, on disks of ``size`` bytes."""

    runs: int
    seconds: float
    size: int


@dataclass
class Result:
    """All samples of one call.

    ``load`` is the machine's load average before the first run. ``samples`` maps workload and server to one figure a
    run, in the workload's unit; ``client`` to the share of one core that fio used in it (0 to 1). ``greeting`` maps
    server to seconds from the start of the process to its QMP greeting, ``idle`` to resident bytes after that, ``peak``
    to the highest resident bytes of any run.
    """

    plan: Plan
    workloads: list[Workload]
    servers: list[str]
    machine: str
    date: str
    aio: str
    load: float
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    first: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    client: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    greeting: dict[str, list[float]] = field(default_factory=dict)
    idle: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)

    def median(self, workload: str, server: str) -> float | None:
        values = self.samples.get(workload, {}).get(server)
        return statistics.median(values) if values else None

    def client_busy(self, workload: str) -> float | None:
        """The share of one core that fio used beside livedisk: near 1, no server can be faster for this client."""
        values = self.client.get(workload, {}).get("livedisk")
        return statistics.median(values) if values else None

    def ratio(self, workload: str, peer: str) -> float | None:
        """livedisk's median over that of ``peer``."""
        own, other = self.median(workload, "livedisk"), self.median(workload, peer)
        return own / other if own is not None and other else None

    def ratio_against(self, workload: Workload) -> float | None:
        """livedisk's median over its own median of the workload that this one is held ``against``."""
        if workload.against is None:
            return None
        own, other = self.median(workload.name, "livedisk"), self.median(workload.against[0], "livedisk")
        return own / other if own is not None and other else None

    def missed(self) -> list[str]:
        """Every target that was measured and not reached, in words."""
        found = []
        for workload in self.workloads:
            pairs: list[tuple[str, float | None, float]] = [
                (peer, self.ratio(workload.name, peer), target) for peer, target in workload.targets.items()
            ]
            if workload.against is not None:
                pairs.append((workload.against[0], self.ratio_against(workload), workload.against[1]))
            found += [
                f"{workload.title}: {ratio:.2f} of {peer}, wanted {target}"
                for peer, ratio, target in pairs
                if ratio is not None and ratio < target
            ]
        greeting, idle = self.greeting.get("livedisk"), self.idle.get("livedisk")
        if greeting and statistics.median(greeting) > 0.25:
            found.append(f"QMP greeting after {statistics.median(greeting):.3f} s, wanted 0.25 s")
        if idle and statistics.median(idle) > 80 << 20:
            found.append(f"{statistics.median(idle) / (1 << 20):.0f} MiB idle, wanted 80 MiB")
        return found

    @property
    def disturbed(self) -> bool:
        """Whether the machine was busy before: three servers in turn share that burden, but not evenly."""
        return self.load > 0.5 * (os.cpu_count() or 1)

    def as_json(self) -> str:
        return json.dumps(
            {
                "date": self.date,
                "machine": self.machine,
                "qemu_aio": self.aio,
                "load_before": self.load,
                "runs": self.plan.runs,
                "seconds": self.plan.seconds,
                "disk_bytes": self.plan.size,
                "workloads": {
                    workload.name: {
                        "title": workload.title,
                        "unit": workload.unit,
                        "samples": self.samples.get(workload.name, {}),
                        "client_busy": self.client.get(workload.name, {}),
                        "first_pass_seconds": self.first.get(workload.name, {}),
                        "targets": dict(workload.targets),
                        "ratios": {peer: self.ratio(workload.name, peer) for peer in workload.targets},
                        "ratio_against": self.ratio_against(workload),
                    }
                    for workload in self.workloads
                },
                "qmp_greeting_seconds": self.greeting,
                "idle_resident_bytes": self.idle,
                "peak_resident_bytes": self.peak,
                "missed": self.missed(),
            },
            indent=1,
        )


def measure(servers: list[type[Server]], workloads: list[Workload], plan: Plan, images: Images, tell: Tell) -> Result:
    """Run everything. Raises `benchmark.servers.ServerFailed` or `LoadFailed`."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    result = Result(
        plan, workloads, [server.name for server in servers], machine(), date, qemu_aio(), os.getloadavg()[0]
    )
    total = len(workloads) * plan.runs * len(servers) + plan.runs * len(servers)
    done = 0
    for server, number in _turns(servers, plan.runs):
        tell(f"start-up, {server.name}, run {number + 1}", done / total)
        _measure_start(server, images, result)
        done += 1
    for workload in workloads:
        tell(f"{workload.title}: making the disk", done / total)
        files = images.files(workload.disk)
        for server, number in _turns(servers, plan.runs):
            done += 1
            if not server.serves(files) or (workload.behind and not server.has_qmp):
                continue
            tell(f"{workload.title}, {server.name}, run {number + 1}", done / total)
            images.warm(workload.disk)
            with ExitStack() as stack:
                behind = stack.enter_context(QemuStorageDaemon(files)) if workload.behind else None
                running = stack.enter_context(server(() if workload.behind else files, behind))
                first = touch_all(running.uri, plan)
                figure, busy = run_load(running.uri, workload, plan)
                result.peak[server.name] = max(result.peak.get(server.name, 0), running.memory("VmHWM"))
            result.samples.setdefault(workload.name, {}).setdefault(server.name, []).append(figure)
            result.client.setdefault(workload.name, {}).setdefault(server.name, []).append(busy)
            result.first.setdefault(workload.name, {}).setdefault(server.name, []).append(first)
    return result


def _turns(servers: list[type[Server]], runs: int) -> Iterable[tuple[type[Server], int]]:
    """Every server once a run, a different one first each time: none always follows the same neighbour."""
    for number in range(runs):
        first = number % len(servers)
        yield from ((server, number) for server in servers[first:] + servers[:first])


def _measure_start(server: type[Server], images: Images, result: Result) -> None:
    """Time to the QMP greeting and resident memory, with the raw disk exported and nobody connected."""
    with server(images.files("raw")) as running:
        if running.has_qmp:
            with running.connect(running.qmp_socket) as monitor:
                monitor.recv(1)
                result.greeting.setdefault(server.name, []).append(time.perf_counter() - running.started)
        time.sleep(0.1)
        result.idle.setdefault(server.name, []).append(running.memory("VmRSS"))


def touch_all(uri: str, plan: Plan) -> float:
    """Read 4 KiB of every cluster once, in order; returns the seconds that took.

    Servers keep what they know of an image's mapping in memory. A run is to show how they serve a disk in use, so
    each may learn the mapping first; how long that takes is a figure of its own.
    """
    # "read:60k" skips 60 KiB after each block, so that is one block a cluster; fio would start again at the end.
    once = {"size": plan.size, "io_size": plan.size // CLUSTER * 4096}
    job = fio({"uri": uri, "rw": "read:60k", "bs": "4k", "iodepth": 32, **once})
    return float(job["read"]["runtime"]) / 1000


def run_load(uri: str, workload: Workload, plan: Plan) -> tuple[float, float]:
    """One run; returns IOPS or MB/s, summed over all connections, and the share of one core that fio used for each."""
    job = fio(
        {
            "uri": uri,
            "rw": workload.rw,
            "bs": workload.block,
            "iodepth": workload.depth,
            "numjobs": workload.jobs,
            "size": plan.size,
            "runtime": plan.seconds,
            # The first moments show how fast connections are made, not what was asked.
            "ramp_time": 0.25,
        },
        "--time_based",
        "--norandommap",
        "--randrepeat=0",
    )
    side = job["write" if workload.writes else "read"]
    busy = (float(job["usr_cpu"]) + float(job["sys_cpu"])) / 100
    return (float(side["iops"]) if workload.unit == "IOPS" else float(side["bw_bytes"]) / 1e6), busy


def fio(settings: dict[str, Any], *flags: str) -> Any:
    """Run one fio job over its nbd engine; returns its part of the report. Raises `LoadFailed`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        common = {"name": "bench", "ioengine": "nbd", "output-format": "json", "output": report}
        done = subprocess.run(
            ["fio", *(f"--{name}={value}" for name, value in (common | settings).items()), "--group_reporting", *flags],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LoadFailed(f"fio: {done.stdout}{done.stderr}")
        text = report.read_text()
    return json.loads(text[text.index("{") :])["jobs"][0]


def machine() -> str:
    """Processor, cores, kernel and the peers' versions: what a figure means little without."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = " ".join(line.partition(":")[2].split())
            break
    kernel = ".".join(platform.release().split(".")[:2])
    qemu = _version(["qemu-img", "--version"], "qemu-img version ")
    nbdkit = _version(["nbdkit", "--version"], "nbdkit ")
    cores = os.cpu_count()
    return f"{cores} cores {model}, Linux {kernel}, Python {platform.python_version()}, QEMU {qemu}, nbdkit {nbdkit}"


def _version(command: list[str], before: str) -> str:
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return first.removeprefix(before).split()[0]
