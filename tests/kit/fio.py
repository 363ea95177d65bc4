"""fio over its nbd engine: load with verification, and figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.peers import run


@dataclass(frozen=True)
class Side:
    """What fio measured in one direction: requests per second, bytes per second, bytes moved, mean latency (ns)."""

    iops: float
    bandwidth: float
    moved: int
    latency: float


@dataclass(frozen=True)
class FioResult:
    """The sum over all jobs."""

    read: Side
    write: Side
    errors: int


def fio(uri: str, folder: Path, *, timeout: float = 120, **options: Any) -> FioResult:
    """Run one fio job on an NBD export.

    ``options`` are fio's, ``True`` for those without value: ``rw="randwrite", bs="4k", iodepth=32, size="16m", verify="crc32c"``.
    ``folder`` takes fio's report and state files. A verification error makes fio, and so this, fail.
    """
    report = folder / "fio.json"
    settings = {"name": "kit", "ioengine": "nbd", "uri": uri, "group_reporting": True, "randrepeat": 1, **options}
    arguments = ["fio", "--output-format=json", f"--output={report}", f"--aux-path={folder}"]
    for name, value in settings.items():
        arguments.append(f"--{name}" if value is True else f"--{name}={value}")
    run(arguments, timeout=timeout, cwd=folder)
    # fio puts notes before its JSON.
    text = report.read_text()
    jobs = json.loads(text[text.index("{") :])["jobs"]
    result = FioResult(_sum(jobs, "read"), _sum(jobs, "write"), sum(job["error"] for job in jobs))
    if result.errors:
        raise AssertionError(f"fio saw errors: {text}")
    return result


def _sum(jobs: list[dict[str, Any]], side: str) -> Side:
    parts = [job[side] for job in jobs]
    return Side(
        iops=sum(part["iops"] for part in parts),
        bandwidth=sum(part["bw_bytes"] for part in parts),
        moved=sum(part["io_bytes"] for part in parts),
        latency=max((part["clat_ns"]["mean"] for part in parts), default=0.0),
    )
