"""block-latency-histogram-set: how long a device's requests take, counted in bins that the user draws.

query-blockstats shows the bins. While a device has a histogram none of its requests takes the fast path, which does not
look at the clock for each of them; without boundaries the command ends that. Source: QEMU ``block/qapi-system.c``
(qmp_block_latency_histogram_set), ``block/accounting.c``; messages asked from QEMU 10.0.2.

Where we differ: ``id`` may be a device's own id; QEMU 10 wants the path of its backend, /machine/peripheral/ID/virtio-backend.
``boundaries-zap`` alone sets that histogram; QEMU 10.0.2 takes it for no boundaries at all.
"""

from __future__ import annotations

from livedisk.emulator.device.accounting import Timed
from livedisk.emulator.errors import BlockError, DeviceNotFound
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UInt64, UnsetType
from livedisk.emulator.qmp.registry import command


class LatencyHistogramBoundaries(QapiStruct, kw_only=True):
    """Nanoseconds, ascending, for each kind of request; ``boundaries`` for those that have none of their own."""

    id: str
    boundaries: list[UInt64] | UnsetType = UNSET
    boundaries_read: list[UInt64] | UnsetType = UNSET
    boundaries_write: list[UInt64] | UnsetType = UNSET
    boundaries_zap: list[UInt64] | UnsetType = UNSET
    boundaries_flush: list[UInt64] | UnsetType = UNSET


@command("block-latency-histogram-set", allow_preconfig=True)
async def block_latency_histogram_set(ctx: Context, args: LatencyHistogramBoundaries) -> None:
    """Begin new histograms, or end all of a device's. Raises DeviceNotFound, BlockError for boundaries that do not ascend:
    what came before them in the order of the members is set then."""
    devices = ctx.daemon.devices
    device = devices.drives.find(args.id) or devices.find(args.id)
    if device is None:
        raise DeviceNotFound(f"Device '{args.id}' not found")
    given = {
        ("read", Timed.READ): args.boundaries_read,
        ("write", Timed.WRITE): args.boundaries_write,
        ("append write", Timed.ZONE_APPEND): args.boundaries_zap,
        ("flush", Timed.FLUSH): args.boundaries_flush,
    }
    histograms = device.accounting.histograms
    if args.boundaries is UNSET and all(own is UNSET for own in given.values()):
        histograms.clear()
    try:
        for (name, kind), own in given.items():
            chosen = args.boundaries if own is UNSET else own
            if not isinstance(chosen, UnsetType):
                try:
                    device.accounting.set_histogram(kind, chosen)
                except ValueError:
                    raise BlockError(f"Device '{args.id}' set {name} boundaries fail") from None
    finally:
        device.backend.time_each_request(bool(histograms))
