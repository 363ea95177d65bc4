"""Statistics of one device, as QEMU keeps them.

Every request that passes the fast path costs two additions here (`counted_read`, `counted_write`); its time is taken
for one request in `SAMPLE` and counted for all of them, so ``*_total_time_ns`` is an estimate for fast requests and
exact for all others. When the device was last used is known to the batch of requests (see `touch`).

A discard counts as an unmap operation; QEMU's virtio-blk leaves discards out of the statistics altogether, which helps
nobody. Source: QEMU ``block/accounting.c``, ``qapi/block-core.json`` (BlockDeviceStats).
"""

from __future__ import annotations

import enum
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from livedisk.emulator.block.flatmap import MISS
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UInt64, UnsetType

SAMPLE: Final = 32
"""Of so many fast requests, one is timed. A power of two."""

FastPath = Callable[[int, memoryview], int]
_now = time.perf_counter_ns


class Kind(enum.StrEnum):
    """What is counted apart; the values are the prefixes of QEMU's members."""

    READ = "rd"
    WRITE = "wr"
    FLUSH = "flush"
    UNMAP = "unmap"


class BlockLatencyHistogramInfo(QapiStruct):
    """How many requests took how long: ``bins[i]`` of them from ``boundaries[i - 1]`` up to, not with, ``boundaries[i]``
    nanoseconds; below the first boundary, and from the last one on, likewise."""

    boundaries: list[UInt64]
    bins: list[UInt64]


class Timed(enum.StrEnum):
    """What a latency histogram can be of; the values are the prefixes of QEMU's members."""

    READ = "rd"
    WRITE = "wr"
    ZONE_APPEND = "zone_append"
    FLUSH = "flush"


class _Counters:
    """One kind's sums: operations and bytes that succeeded, operations that failed or were invalid, nanoseconds.

    ``fast`` tells what was served by the fast path, which keeps its own sums.
    """

    __slots__ = ("bytes", "failed", "fast", "invalid", "operations", "total_ns")

    def __init__(self) -> None:
        self.fast: list[Callable[[], tuple[int, int, int]]] = []
        self.operations = 0
        self.bytes = 0
        self.failed = 0
        self.invalid = 0
        self.total_ns = 0


class BlockDeviceStats(QapiStruct, omit_defaults=False):
    """QEMU's BlockDeviceStats. All sums are since the device was made; ``*_bytes`` and ``wr_highest_offset`` bytes."""

    rd_bytes: int = msgspec.field(name="rd_bytes", default=0)
    wr_bytes: int = msgspec.field(name="wr_bytes", default=0)
    zone_append_bytes: int = msgspec.field(name="zone_append_bytes", default=0)
    unmap_bytes: int = msgspec.field(name="unmap_bytes", default=0)
    rd_operations: int = msgspec.field(name="rd_operations", default=0)
    wr_operations: int = msgspec.field(name="wr_operations", default=0)
    zone_append_operations: int = msgspec.field(name="zone_append_operations", default=0)
    flush_operations: int = msgspec.field(name="flush_operations", default=0)
    unmap_operations: int = msgspec.field(name="unmap_operations", default=0)
    rd_total_time_ns: int = msgspec.field(name="rd_total_time_ns", default=0)
    wr_total_time_ns: int = msgspec.field(name="wr_total_time_ns", default=0)
    zone_append_total_time_ns: int = msgspec.field(name="zone_append_total_time_ns", default=0)
    flush_total_time_ns: int = msgspec.field(name="flush_total_time_ns", default=0)
    unmap_total_time_ns: int = msgspec.field(name="unmap_total_time_ns", default=0)
    wr_highest_offset: int = msgspec.field(name="wr_highest_offset", default=0)
    rd_merged: int = msgspec.field(name="rd_merged", default=0)
    wr_merged: int = msgspec.field(name="wr_merged", default=0)
    zone_append_merged: int = msgspec.field(name="zone_append_merged", default=0)
    unmap_merged: int = msgspec.field(name="unmap_merged", default=0)
    idle_time_ns: int | msgspec.UnsetType = msgspec.field(name="idle_time_ns", default=msgspec.UNSET)
    failed_rd_operations: int = msgspec.field(name="failed_rd_operations", default=0)
    failed_wr_operations: int = msgspec.field(name="failed_wr_operations", default=0)
    failed_zone_append_operations: int = msgspec.field(name="failed_zone_append_operations", default=0)
    failed_flush_operations: int = msgspec.field(name="failed_flush_operations", default=0)
    failed_unmap_operations: int = msgspec.field(name="failed_unmap_operations", default=0)
    invalid_rd_operations: int = msgspec.field(name="invalid_rd_operations", default=0)
    invalid_wr_operations: int = msgspec.field(name="invalid_wr_operations", default=0)
    invalid_zone_append_operations: int = msgspec.field(name="invalid_zone_append_operations", default=0)
    invalid_flush_operations: int = msgspec.field(name="invalid_flush_operations", default=0)
    invalid_unmap_operations: int = msgspec.field(name="invalid_unmap_operations", default=0)
    account_invalid: bool = msgspec.field(name="account_invalid", default=False)
    account_failed: bool = msgspec.field(name="account_failed", default=False)
    timed_stats: list[dict[str, Any]] = msgspec.field(name="timed_stats", default_factory=list)
    rd_latency_histogram: BlockLatencyHistogramInfo | UnsetType = msgspec.field(
        name="rd_latency_histogram", default=UNSET
    )
    wr_latency_histogram: BlockLatencyHistogramInfo | UnsetType = msgspec.field(
        name="wr_latency_histogram", default=UNSET
    )
    zone_append_latency_histogram: BlockLatencyHistogramInfo | UnsetType = msgspec.field(
        name="zone_append_latency_histogram", default=UNSET
    )
    flush_latency_histogram: BlockLatencyHistogramInfo | UnsetType = msgspec.field(
        name="flush_latency_histogram", default=UNSET
    )


class Accounting:
    """What one device was asked to do. ``account_invalid``, ``account_failed``: whether such requests count as use
    (idle time), and failed ones into the times.

    ``histograms``: how long requests took, where somebody asked (`set_histogram`). While there is one, no request may take
    the fast path, which does not look at the clock for each: whoever sets one closes it.
    """

    def __init__(self, *, account_invalid: bool = True, account_failed: bool = True) -> None:
        self.account_invalid = account_invalid
        self.account_failed = account_failed
        self.histograms: dict[Timed, BlockLatencyHistogramInfo] = {}
        self._counters = {kind: _Counters() for kind in Kind}
        self._used_ns = 0

    def set_histogram(self, of: Timed, boundaries: Sequence[int]) -> None:
        """Count from now on how long requests take, in the bins between ``boundaries`` (nanoseconds). Raises ValueError if
        these do not ascend from above 0; then nothing changes."""
        if any(above <= below for below, above in zip([0, *boundaries], boundaries, strict=False)):
            raise ValueError("the boundaries of a histogram must ascend")
        self.histograms[of] = BlockLatencyHistogramInfo(list(boundaries), [0] * (len(boundaries) + 1))

    def _took(self, kind: Kind, nanoseconds: int) -> None:
        if kind is not Kind.UNMAP and (histogram := self.histograms.get(Timed(kind))) is not None:
            histogram.bins[bisect_right(histogram.boundaries, nanoseconds)] += 1

    def touch(self) -> None:
        """The device is in use now."""
        self._used_ns = _now()

    @staticmethod
    def start() -> int:
        """The moment that a request began, for `done` and `failed` (nanoseconds)."""
        return _now()

    def done(self, kind: Kind, length: int, started: int) -> None:
        """A request of ``length`` bytes that began at ``started`` succeeded."""
        counters = self._counters[kind]
        counters.operations += 1
        counters.bytes += length
        self._used_ns = now = _now()
        counters.total_ns += now - started
        self._took(kind, now - started)

    def failed(self, kind: Kind, started: int) -> None:
        """A request failed."""
        counters = self._counters[kind]
        counters.failed += 1
        now = _now()
        self._took(kind, now - started)
        if self.account_failed:
            self._used_ns = now
            counters.total_ns += now - started

    def invalid(self, kind: Kind) -> None:
        """A request was refused before it was tried."""
        self._counters[kind].invalid += 1
        if self.account_invalid:
            self._used_ns = _now()

    def counted_read(self, fast: FastPath) -> FastPath:
        """``fast``, counting what it serves as reads. Hot."""
        return self._count(fast, Kind.READ)

    def counted_write(self, fast: FastPath) -> FastPath:
        """``fast``, counting what it serves as writes; its OSError becomes MISS, so that the slow path fails in its
        place and asks the error policy. Hot."""
        return self._count(fast, Kind.WRITE)

    def _count(self, fast: FastPath, kind: Kind) -> FastPath:
        counted, sums = _counted(fast)
        self._counters[kind].fast.append(sums)
        return counted

    def stats(self, wr_highest_offset: int = 0) -> BlockDeviceStats:
        """The sums in QEMU's shape. ``wr_highest_offset``: the node's, bytes."""
        values: dict[str, Any] = {
            "account_invalid": self.account_invalid,
            "account_failed": self.account_failed,
            "wr_highest_offset": wr_highest_offset,
        }
        for kind, counters in self._counters.items():
            fast = [sums() for sums in counters.fast]
            values[f"{kind}_operations"] = counters.operations + sum(sums[0] for sums in fast)
            values[f"{kind}_total_time_ns"] = counters.total_ns + sum(sums[2] for sums in fast)
            values[f"failed_{kind}_operations"] = counters.failed
            values[f"invalid_{kind}_operations"] = counters.invalid
            if kind is not Kind.FLUSH:
                values[f"{kind}_bytes"] = counters.bytes + sum(sums[1] for sums in fast)
        for of, histogram in self.histograms.items():
            values[f"{of}_latency_histogram"] = BlockLatencyHistogramInfo([*histogram.boundaries], [*histogram.bins])
        if self._used_ns:
            values["idle_time_ns"] = _now() - self._used_ns
        return BlockDeviceStats(**values)


def _counted(fast: FastPath) -> tuple[FastPath, Callable[[], tuple[int, int, int]]]:
    """``fast`` with its own sums, and a function that tells them: operations, bytes, nanoseconds."""
    # Cells of a closure rather than attributes: that is a quarter of what counting costs.
    operations = bytes_ = nanoseconds = 0
    others: Final = SAMPLE - 1

    def counted(offset: int, view: memoryview) -> int:
        nonlocal operations, bytes_, nanoseconds
        try:
            # Counted when it is tried and taken back when declined: that keeps the common way short.
            if (operations := operations + 1) & others:
                outcome = fast(offset, view)
            else:
                started = _now()
                outcome = fast(offset, view)
                nanoseconds += (_now() - started) * SAMPLE
        except OSError:
            outcome = MISS
        if outcome:
            bytes_ += len(view)
            return outcome
        operations -= 1
        return MISS

    return counted, lambda: (operations, bytes_, nanoseconds)
