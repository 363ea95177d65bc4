"""query-block and query-named-block-nodes: what nodes, images and devices are, typed as QEMU types it.

Source: QEMU ``qapi/block-core.json`` (ImageInfo, BlockDeviceInfo, BlockInfo), ``block/qapi.c``; compared member by
member with QEMU 10.0.2. Throttling is a device's: nodes show 0, as in QEMU, also a throttle filter.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from livedisk.emulator.block import internal_snapshots
from livedisk.emulator.block.bitmaps import DirtyBitmap
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.throttle import Bucket, ThrottleGroup
from livedisk.emulator.block.types import DetectZeroes
from livedisk.emulator.device.drives import Drive
from livedisk.emulator.device.virtio_blk import VirtioBlk
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.filenames import Names
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UInt32, UnsetType
from livedisk.emulator.qmp.registry import command

if TYPE_CHECKING:
    pass


class SnapshotInfo(QapiStruct):
    """An internal snapshot. Times are seconds and nanoseconds; ``vm-state-size`` bytes."""

    id: str
    name: str
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_sec: int
    vm_clock_nsec: int
    icount: int | UnsetType = UNSET


class ImageInfo(QapiStruct, kw_only=True):
    """An image; sizes in bytes. ``backing-image`` is the image below, and so on down the chain."""

    filename: str
    format: str
    dirty_flag: bool | UnsetType = UNSET
    actual_size: int | UnsetType = UNSET
    virtual_size: int
    cluster_size: int | UnsetType = UNSET
    encrypted: bool | UnsetType = UNSET
    compressed: bool | UnsetType = UNSET
    backing_filename: str | UnsetType = UNSET
    full_backing_filename: str | UnsetType = UNSET
    backing_filename_format: str | UnsetType = UNSET
    snapshots: list[SnapshotInfo] | UnsetType = UNSET
    backing_image: ImageInfo | UnsetType = UNSET
    format_specific: dict[str, Any] | UnsetType = UNSET


class BlockdevCacheInfo(QapiStruct):
    """How a node caches."""

    writeback: bool
    direct: bool
    no_flush: bool


class BlockDirtyInfo(QapiStruct, kw_only=True):
    """A dirty bitmap; ``name`` is absent where it has none. ``count`` and ``granularity`` are bytes."""

    name: str | UnsetType = UNSET
    count: int
    granularity: UInt32
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool | UnsetType = UNSET


class BlockDeviceInfo(QapiStruct, kw_only=True):
    """A node in use: its image, its state, its throttling: bytes and requests a second, 0: no limit; lengths in seconds."""

    file: str
    node_name: str
    ro: bool
    drv: str
    backing_file: str | UnsetType = msgspec.field(default=UNSET, name="backing_file")
    backing_file_depth: int = msgspec.field(name="backing_file_depth")
    encrypted: bool
    detect_zeroes: DetectZeroes = msgspec.field(name="detect_zeroes")
    bps: int
    bps_rd: int = msgspec.field(name="bps_rd")
    bps_wr: int = msgspec.field(name="bps_wr")
    iops: int
    iops_rd: int = msgspec.field(name="iops_rd")
    iops_wr: int = msgspec.field(name="iops_wr")
    image: ImageInfo
    bps_max: int | UnsetType = msgspec.field(default=UNSET, name="bps_max")
    bps_rd_max: int | UnsetType = msgspec.field(default=UNSET, name="bps_rd_max")
    bps_wr_max: int | UnsetType = msgspec.field(default=UNSET, name="bps_wr_max")
    iops_max: int | UnsetType = msgspec.field(default=UNSET, name="iops_max")
    iops_rd_max: int | UnsetType = msgspec.field(default=UNSET, name="iops_rd_max")
    iops_wr_max: int | UnsetType = msgspec.field(default=UNSET, name="iops_wr_max")
    bps_max_length: int | UnsetType = msgspec.field(default=UNSET, name="bps_max_length")
    bps_rd_max_length: int | UnsetType = msgspec.field(default=UNSET, name="bps_rd_max_length")
    bps_wr_max_length: int | UnsetType = msgspec.field(default=UNSET, name="bps_wr_max_length")
    iops_max_length: int | UnsetType = msgspec.field(default=UNSET, name="iops_max_length")
    iops_rd_max_length: int | UnsetType = msgspec.field(default=UNSET, name="iops_rd_max_length")
    iops_wr_max_length: int | UnsetType = msgspec.field(default=UNSET, name="iops_wr_max_length")
    iops_size: int | UnsetType = msgspec.field(default=UNSET, name="iops_size")
    group: str | UnsetType = UNSET
    cache: BlockdevCacheInfo
    dirty_bitmaps: list[BlockDirtyInfo] | UnsetType = UNSET
    write_threshold: int = msgspec.field(name="write_threshold")
    active: bool


_BUCKETS = {
    "bps": Bucket.BPS_TOTAL,
    "bps_rd": Bucket.BPS_READ,
    "bps_wr": Bucket.BPS_WRITE,
    "iops": Bucket.IOPS_TOTAL,
    "iops_rd": Bucket.IOPS_READ,
    "iops_wr": Bucket.IOPS_WRITE,
}


def throttling(group: ThrottleGroup) -> dict[str, Any]:
    """The members of BlockDeviceInfo that a device's throttling fills."""
    found: dict[str, Any] = {"group": group.name}
    for name, bucket in _BUCKETS.items():
        limit = group.limits[bucket]
        found[name] = limit.average
        found[f"{name}_max"] = limit.maximum or UNSET
        found[f"{name}_max_length"] = limit.length if limit.maximum else UNSET
    found["iops_size"] = group.limits.iops_size or UNSET
    return found


class BlockDeviceIoStatus(enum.StrEnum):
    """The last I/O of a device: went well, or stopped the guest."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


class BlockInfo(QapiStruct, kw_only=True):
    """A device and what is in it."""

    device: str
    qdev: str | UnsetType = UNSET
    type: str
    removable: bool
    locked: bool
    inserted: BlockDeviceInfo | UnsetType = UNSET
    tray_open: bool | UnsetType = msgspec.field(default=UNSET, name="tray_open")
    io_status: BlockDeviceIoStatus | UnsetType = UNSET


class QueryNamedBlockNodes(QapiStruct):
    """``flat``: leave out the chain of backing images below each node."""

    flat: bool = False


@command("query-named-block-nodes", allow_preconfig=True)
async def query_named_block_nodes(ctx: Context, args: QueryNamedBlockNodes) -> list[BlockDeviceInfo]:
    """Every node, newest first."""
    survey = Survey(skip_implicit=False)
    return [await survey.device(node, deep=not args.flat) for node in reversed([*ctx.daemon.graph.nodes.values()])]


@command("query-block", allow_preconfig=True)
async def query_block(ctx: Context) -> list[BlockInfo]:
    """Every device."""
    return [await _block_info(one) for one in ctx.daemon.devices.blocks()]


async def _block_info(one: VirtioBlk | Drive) -> BlockInfo:
    if isinstance(one, VirtioBlk):
        return await one.block_info()
    inserted: BlockDeviceInfo | UnsetType = UNSET
    if one.node is not None:
        inserted = await node_info(one.node, deep=True, writeback=one.spec.write_cache, skip_implicit=True)
        if one.backend.throttle is not None:
            inserted = msgspec.structs.replace(inserted, **throttling(one.backend.throttle.group))
    return BlockInfo(device=one.name, type="unknown", removable=True, locked=False, inserted=inserted)


async def node_info(node: Node, *, deep: bool, writeback: bool = True, skip_implicit: bool = False) -> BlockDeviceInfo:
    """What is known of one node. ``skip_implicit``: without jobs' hidden filters."""
    return await Survey(skip_implicit=skip_implicit).device(node, deep=deep, writeback=writeback)


class Survey:
    """What is known of nodes at one moment: what several of them share below is asked once.

    ``skip_implicit``: hidden filters are left out. Made for one query and dropped with it.
    """

    def __init__(self, *, skip_implicit: bool) -> None:
        self._skip_implicit = skip_implicit
        self._names = Names()
        self._images: dict[Node, ImageInfo] = {}
        self._chains: dict[Node, tuple[ImageInfo, int]] = {}

    async def device(self, node: Node, *, deep: bool, writeback: bool = True) -> BlockDeviceInfo:
        """A node. ``deep``: with the images below it; ``writeback``: the write cache of the device on it."""
        node = self._shown(node)
        image, depth = await self._chain(node) if deep else (await self._image(node), 0)
        backing = node.backing.node if node.backing is not None and node.filtered is None else None
        return BlockDeviceInfo(
            file=self._names[node],
            node_name=node.name,
            ro=node.read_only,
            drv=node.options.driver,
            backing_file=self._names[backing] if backing is not None else UNSET,
            backing_file_depth=depth,
            encrypted=False,
            detect_zeroes=node.detect_zeroes,
            bps=0,
            bps_rd=0,
            bps_wr=0,
            iops=0,
            iops_rd=0,
            iops_wr=0,
            image=image,
            cache=BlockdevCacheInfo(writeback=writeback, direct=node.cache_direct, no_flush=node.cache_no_flush),
            dirty_bitmaps=[*map(_bitmap, node.bitmaps), *map(_own_bitmap, node.driver.own_bitmaps())] or UNSET,
            write_threshold=_signed(node.write_threshold),
            active=node.active,
        )

    def _shown(self, node: Node) -> Node:
        """The node, or what shows through it if users are not to see it."""
        while self._skip_implicit and node.implicit and node.filtered is not None:
            node = node.filtered.node
        return node

    async def _chain(self, node: Node) -> tuple[ImageInfo, int]:
        """A node's image with those that show through it, and how many those are."""
        path = [node]
        while path[-1] not in self._chains:
            edge = path[-1].filtered or path[-1].backing
            if edge is None:
                self._chains[path[-1]] = await self._image(path[-1]), 0
            else:
                path.append(self._shown(edge.node))
        for upper, lower in zip(reversed(path[:-1]), reversed(path), strict=False):
            image, depth = self._chains[lower]
            own = await self._image(upper)
            self._chains[upper] = msgspec.structs.replace(own, backing_image=image), depth + 1
        return self._chains[node]

    async def _image(self, node: Node) -> ImageInfo:
        """A node's own image."""
        if node not in self._images:
            self._images[node] = await self._ask(node)
        return self._images[node]

    async def _ask(self, node: Node) -> ImageInfo:
        driver = node.driver
        allocated = await driver.allocated_size()
        specific = driver.specific_info()
        dirty = driver.dirty_flag()
        keeper = internal_snapshots.keeper(node)
        return ImageInfo(
            filename=self._names[node],
            format=node.options.driver,
            dirty_flag=UNSET if dirty is None else dirty,
            actual_size=UNSET if allocated is None else allocated,
            virtual_size=node.size,
            cluster_size=driver.cluster_size() or UNSET,
            backing_filename=driver.backing_filename() or UNSET,
            full_backing_filename=self._names.full_backing(node) or UNSET,
            backing_filename_format=driver.backing_format() or UNSET,
            snapshots=[_snapshot(entry) for entry in (keeper.driver.snapshots() if keeper else ())] or UNSET,
            format_specific=UNSET if specific is None else dict(specific),
        )


def _signed(number: int) -> int:
    """A number of 64 bits as QEMU shows it where the schema says ``int``."""
    return number - (1 << 64) if number >> 63 else number


def _bitmap(bitmap: DirtyBitmap) -> BlockDirtyInfo:
    return BlockDirtyInfo(
        name=bitmap.name if bitmap.name is not None else UNSET,
        count=bitmap.count,
        granularity=bitmap.granularity,
        recording=bitmap.recording,
        busy=bitmap.busy,
        persistent=bitmap.persistent,
        inconsistent=bitmap.inconsistent or UNSET,
    )


def _own_bitmap(one: tuple[int, int]) -> BlockDirtyInfo:
    granularity, count = one
    return BlockDirtyInfo(granularity=granularity, count=count, recording=False, busy=False, persistent=False)


def _snapshot(entry: Mapping[str, Any]) -> SnapshotInfo:
    return msgspec.convert(entry, SnapshotInfo)
