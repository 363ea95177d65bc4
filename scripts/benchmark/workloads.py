"""The workloads, one row each, with the ratios that livedisk has to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Disk = Literal["raw", "qcow2", "chain-8", "chain-32"]
"""Which of `benchmark.images` is served."""

Unit = Literal["IOPS", "MB/s"]


@dataclass(frozen=True)
class Workload:
    """One load that fio makes.

    ``targets`` maps a peer's name to the least ratio of livedisk's median to that peer's. ``against`` names another workload
    and the least ratio of livedisk's median here to its own median there. ``behind``: a qemu-storage-daemon has the disk, and the
    server that is measured passes it on through its nbd driver.
    """

    name: str
    title: str
    disk: Disk
    rw: str
    block: str
    depth: int
    jobs: int = 1
    unit: Unit = "IOPS"
    targets: Mapping[str, float] = field(default_factory=dict)
    against: tuple[str, float] | None = None
    behind: bool = False

    @property
    def writes(self) -> bool:
        return "write" in self.rw


def _targets(qemu: float, nbdkit: float | None = None) -> Mapping[str, float]:
    return {"qemu-storage-daemon": qemu} | ({} if nbdkit is None else {"nbdkit": nbdkit})


def _passed_on(rw: str, what: str, depth: int) -> Workload:
    title = f"driver nbd, 4 KiB random {what}, depth {depth}"
    return Workload(f"nbd-{rw}-{depth}", title, "raw", rw, "4k", depth, targets=_targets(1.0), behind=True)


WORKLOADS: Final = (
    Workload(
        "raw-randread-32", "raw, 4 KiB random read, depth 32", "raw", "randread", "4k", 32, targets=_targets(2.5, 1.5)
    ),
    Workload(
        "raw-randread-32x4",
        "raw, 4 KiB random read, depth 32, 4 connections",
        "raw",
        "randread",
        "4k",
        32,
        jobs=4,
        targets=_targets(2.5, 1.5),
    ),
    Workload(
        "raw-randwrite-32",
        "raw, 4 KiB random write, depth 32",
        "raw",
        "randwrite",
        "4k",
        32,
        targets=_targets(2.5, 1.2),
    ),
    Workload(
        "raw-randread-1", "raw, 4 KiB random read, depth 1", "raw", "randread", "4k", 1, targets=_targets(1.5, 1.2)
    ),
    Workload(
        "raw-randread-4", "raw, 4 KiB random read, depth 4", "raw", "randread", "4k", 4, targets=_targets(1.5, 1.2)
    ),
    Workload(
        "raw-seqread-16",
        "raw, 256 KiB sequential read, depth 16",
        "raw",
        "read",
        "256k",
        16,
        unit="MB/s",
        targets=_targets(2.5, 1.3),
    ),
    Workload(
        "raw-seqwrite-16",
        "raw, 256 KiB sequential write, depth 16",
        "raw",
        "write",
        "256k",
        16,
        unit="MB/s",
        targets=_targets(2.0, 1.0),
    ),
    Workload(
        "qcow2-randread-32", "qcow2, 4 KiB random read, depth 32", "qcow2", "randread", "4k", 32, targets=_targets(2.5)
    ),
    Workload(
        "qcow2-randwrite-32",
        "qcow2, 4 KiB random write, depth 32",
        "qcow2",
        "randwrite",
        "4k",
        32,
        targets=_targets(2.5),
    ),
    Workload(
        "chain-8-randread-32",
        "chain of 8, 4 KiB random read, depth 32",
        "chain-8",
        "randread",
        "4k",
        32,
        targets=_targets(4.0),
    ),
    Workload(
        "chain-32-randread-32",
        "chain of 32, 4 KiB random read, depth 32",
        "chain-32",
        "randread",
        "4k",
        32,
        targets=_targets(6.0),
        against=("qcow2-randread-32", 0.9),
    ),
    *(_passed_on(f"rand{what}", what, depth) for depth in (1, 32) for what in ("read", "write")),
)
