"""query-block and query-named-block-nodes: what nodes, images and devices are, typed as QEMU types it.

Source: QEMU ``qapi/block-core.json`` (ImageInfo, BlockDeviceInfo, BlockInfo), ``block/qapi.c``; compared member by
member with QEMU 10.0.2. The throttling members are there and 0, as QEMU has them for devices without throttling.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from livedisk.emulator.block.node import Node
from livedisk.emulator.block.types import DetectZeroes
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.filenames import filename, full_backing_filename
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.emulator.qmp.registry import command

if TYPE_CHECKING:
    from livedisk.emulator.block.graph import Graph


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


class BlockDeviceInfo(QapiStruct, kw_only=True):
    """A node in use: its image, its state, its (absent) throttling."""

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
    cache: BlockdevCacheInfo
    write_threshold: int = msgspec.field(name="write_threshold")
    active: bool


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
    nodes = list(reversed(creation_order(ctx.daemon.graph)))
    return [await node_info(node, deep=not args.flat) for node in nodes]


@command("query-block", allow_preconfig=True)
async def query_block(ctx: Context) -> list[BlockInfo]:
    """Every device."""
    return [await device.block_info() for device in ctx.daemon.devices]


async def node_info(node: Node, *, deep: bool, writeback: bool = True, skip_implicit: bool = False) -> BlockDeviceInfo:
    """What is known of a node.

    ``deep``: with the images below it; ``skip_implicit``: without jobs' hidden filters.
    """
    first = _below_implicit(node) if skip_implicit else node
    image = await image_info(first)
    depth, last, current = 0, image, first
    while deep:
        lower = _shown_below(current)
        if lower is None:
            break
        current = _below_implicit(lower) if skip_implicit else lower
        depth += 1
        last.backing_image = await image_info(current)
        last = last.backing_image
    backing = node.backing.node if node.backing is not None else None
    return BlockDeviceInfo(
        file=filename(node),
        node_name=node.name,
        ro=node.read_only,
        drv=node.options.driver,
        backing_file=filename(backing) if backing is not None else UNSET,
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
        write_threshold=node.write_threshold,
        active=True,
    )


async def image_info(node: Node) -> ImageInfo:
    """What is known of one image, without those below it."""
    driver = node.driver
    allocated = await driver.allocated_size()
    backing = driver.backing_filename()
    specific = driver.specific_info()
    dirty = driver.dirty_flag()
    return ImageInfo(
        filename=filename(node),
        format=node.options.driver,
        dirty_flag=UNSET if dirty is None else dirty,
        actual_size=UNSET if allocated is None else allocated,
        virtual_size=node.size,
        cluster_size=driver.cluster_size() or UNSET,
        backing_filename=backing or UNSET,
        full_backing_filename=full_backing_filename(node) or UNSET,
        backing_filename_format=driver.backing_format() or UNSET,
        snapshots=[_snapshot(entry) for entry in driver.snapshots()] or UNSET,
        format_specific=UNSET if specific is None else dict(specific),
    )


def _snapshot(entry: Mapping[str, Any]) -> SnapshotInfo:
    return msgspec.convert(entry, SnapshotInfo)


def _shown_below(node: Node) -> Node | None:
    """What shows through a node: a filter's child, or the backing file."""
    edge = node.filtered or node.backing
    return edge.node if edge is not None else None


def _below_implicit(node: Node) -> Node:
    while node.implicit and node.filtered is not None:
        node = node.filtered.node
    return node


def creation_order(graph: Graph) -> list[Node]:
    """All nodes in the order in which QEMU would have made them: a file before its format, other children after."""
    order = list(graph.nodes.values())
    position = {node: place for place, node in enumerate(order)}
    done: dict[Node, None] = {}

    def visit(node: Node) -> Iterator[Node]:
        for edge in node.children.values():
            child = edge.node
            if edge.name == "file" and child not in done and position[child] > position[node]:
                yield from visit(child)
        if node not in done:
            done[node] = None
            yield node

    return [made for node in order for made in visit(node)]
