"""Making a qcow2 image: the options, the checks, and the whole of its first metadata.

The layout, in clusters, with everything contiguous::

    header | refcount table | refcount blocks | L1 table | L2 tables | data
                                                          `---- only with preallocation ----'

For an image without preallocation this is qemu-img's own layout byte for byte; a larger one differs in where its tables
stand, not in what they say. The header is written last, behind a barrier: a creation that was cut short leaves no qcow2 image.

Preallocated clusters have L2 entries that point into the data area (or at the same offset of the data file). With extended L2
entries no sub-cluster is marked allocated, so that a backing file shows through.

Source: QEMU ``qapi/block-core.json`` (BlockdevCreateOptionsQcow2), ``block/qcow2.c`` (qcow2_co_create) for the order and wording
of refusals. Better than QEMU: options are checked before an existing file is touched.
"""

from __future__ import annotations

import errno
import os
import stat
from array import array
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

import msgspec

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.descriptors import PREFIX
from livedisk.emulator.block.driver import driver_class
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.options import Size
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.types import Preallocation, ZeroFlags
from livedisk.emulator.drivers.file_create import set_nocow
from livedisk.emulator.drivers.qcow2.geometry import (
    COPIED,
    ENTRY,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
    SECTOR,
    SUBCLUSTERS,
    Geometry,
    table_to_bytes,
)
from livedisk.emulator.drivers.qcow2.header import (
    MAX_BACKING_NAME,
    Autoclear,
    Compatible,
    Compression,
    Header,
    Incompatible,
)
from livedisk.emulator.errors import BlockError

UNSET = msgspec.UNSET
_NEEDS_V3: Final = "with compatibility level 1.1 and above (use version=v3 or greater)"


class Version(StrEnum):
    """QEMU's BlockdevQcow2Version."""

    V2 = "v2"
    V3 = "v3"


class CompressionType(StrEnum):
    """QEMU's Qcow2CompressionType."""

    ZLIB = "zlib"
    ZSTD = "zstd"


class CreateOptions(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """BlockdevCreateOptionsQcow2 without its references to nodes; ``data_file`` is the name to record ("": none)."""

    size: Size
    """Virtual size in bytes, a multiple of 512."""
    data_file: str | msgspec.UnsetType = UNSET
    data_file_raw: bool = False
    """Whether the data file must stay valid as a raw image."""
    extended_l2: bool = False
    version: Version = Version.V3
    backing_file: str | msgspec.UnsetType = UNSET
    backing_fmt: str | msgspec.UnsetType = UNSET
    cluster_size: Size = 65536
    preallocation: Preallocation = Preallocation.OFF
    lazy_refcounts: bool = False
    refcount_bits: int = 16
    compression_type: CompressionType = CompressionType.ZLIB


class Target(Protocol):
    """What an image is written to: an opened protocol node, or anything like it."""

    @property
    def size(self) -> int: ...

    async def write(self, offset: int, data: memoryview) -> None: ...

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags = ...) -> None: ...

    async def flush(self) -> None: ...

    async def truncate(self, size: int, *, exact: bool = ..., prealloc: Preallocation = ...) -> None: ...


# -- checks ------------------------------------------------------------------------------------------------------------
def check_options(options: CreateOptions) -> None:
    """Raise BlockError, in QEMU's words and order, if no image can be made with these options."""
    if options.size % SECTOR:
        raise BlockError(f"Image size must be a multiple of {SECTOR} bytes")
    _check_cluster_size(options)
    backing = options.backing_file is not UNSET
    if options.preallocation is not Preallocation.OFF and backing and not options.extended_l2:
        raise BlockError("Backing file and preallocation can only be used at the same time if extended_l2 is on")
    if options.backing_fmt is not UNSET and not backing:
        raise BlockError("Backing format cannot be used without backing file")
    _check_version(options)
    if options.data_file_raw and options.data_file is UNSET:
        raise BlockError("data-file-raw requires data-file")
    if options.data_file_raw and backing:
        raise BlockError("Backing file and data-file-raw cannot be used at the same time")
    if isinstance(options.backing_file, str) and len(os.fsencode(options.backing_file)) > MAX_BACKING_NAME:
        raise BlockError(_not_assigned(options, errno.EINVAL))
    if header_geometry(options).l1_entries(options.size) * ENTRY > MAX_L1_BYTES:
        raise BlockError("The image size is too large for file format 'qcow2' (try using a larger cluster size)")


def _check_cluster_size(options: CreateOptions) -> None:
    size = options.cluster_size
    if size & (size - 1) or not 1 << MIN_CLUSTER_BITS <= size <= 1 << MAX_CLUSTER_BITS:
        raise BlockError(
            f"Cluster size must be a power of two between {1 << MIN_CLUSTER_BITS} and {(1 << MAX_CLUSTER_BITS) >> 10}k"
        )
    if options.extended_l2:
        if options.version is Version.V2:
            raise BlockError(f"Extended L2 entries are only supported {_NEEDS_V3}")
        least = SUBCLUSTERS << MIN_CLUSTER_BITS
        if size < least:
            raise BlockError(f"Extended L2 entries are only supported with cluster sizes of at least {least} bytes")


def _check_version(options: CreateOptions) -> None:
    v2 = options.version is Version.V2
    if options.lazy_refcounts and v2:
        raise BlockError(f"Lazy refcounts only supported {_NEEDS_V3}")
    bits = options.refcount_bits
    if not 1 <= bits <= 64 or bits & (bits - 1):
        raise BlockError("Refcount width must be a power of two and may not exceed 64 bits")
    if bits != 16 and v2:
        raise BlockError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)"
        )
    if options.data_file is not UNSET and v2:
        raise BlockError(f"External data files are only supported {_NEEDS_V3}")
    if options.compression_type is not CompressionType.ZLIB and v2:
        raise BlockError(f"Non-zlib compression type is only supported {_NEEDS_V3}")


def _not_assigned(options: CreateOptions, number: int) -> str:
    fmt = options.backing_fmt if isinstance(options.backing_fmt, str) else "raw"
    return f"Could not assign backing file '{options.backing_file}' with format '{fmt}': {os.strerror(number)}"


# -- layout ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything stands in a new image: counts and indices of clusters, offsets by `Geometry.cluster_size`."""

    table_clusters: int
    """Of the refcount table, from cluster 1 on."""
    blocks: int
    l1_entries: int
    l1_clusters: int
    l2_tables: int
    data_clusters: int

    @property
    def block_at(self) -> int:
        return 1 + self.table_clusters

    @property
    def l1_at(self) -> int:
        return self.block_at + self.blocks

    @property
    def l2_at(self) -> int:
        return self.l1_at + self.l1_clusters

    @property
    def data_at(self) -> int:
        return self.l2_at + self.l2_tables

    @property
    def total(self) -> int:
        return self.data_at + self.data_clusters


def header_geometry(options: CreateOptions) -> Geometry:
    """The arithmetic of the image to be made. The cluster size and the refcount width have been checked."""
    return Geometry(
        options.cluster_size.bit_length() - 1,
        options.refcount_bits.bit_length() - 1,
        options.extended_l2,
        options.data_file is not UNSET,
    )


def plan(geometry: Geometry, size: int, preallocation: Preallocation) -> Layout:
    """Raises BlockError where the refcount table would be larger than QEMU's limit."""
    l1_entries = geometry.l1_entries(size)
    filled = preallocation is not Preallocation.OFF
    l2_tables = l1_entries if filled else 0
    data = geometry.clusters(size) if filled and not geometry.has_data_file else 0
    l1_clusters = geometry.clusters(l1_entries * ENTRY)
    table_clusters = blocks = 1
    while True:  # grows only; a refcount block describes many clusters, so it settles at once
        total = 1 + table_clusters + blocks + l1_clusters + l2_tables + data
        need_blocks = _ceil(total, geometry)
        need_table = geometry.clusters(need_blocks * ENTRY)
        if need_blocks <= blocks and need_table <= table_clusters:
            break
        blocks, table_clusters = max(blocks, need_blocks), max(table_clusters, need_table)
    if table_clusters * geometry.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
        raise BlockError("The image size is too large for file format 'qcow2' (try using a larger cluster size)")
    return Layout(table_clusters, blocks, l1_entries, l1_clusters, l2_tables, data)


def _ceil(clusters: int, geometry: Geometry) -> int:
    return (clusters + geometry.refcount_block_entries - 1) >> geometry.refcount_block_bits


def refcount_block_of_ones(geometry: Geometry, count: int) -> bytes:
    """A refcount block whose first ``count`` entries are 1 and whose others are 0."""
    bits = geometry.refcount_bits
    if bits >= 8:
        return ((1).to_bytes(bits // 8, "big") * count).ljust(geometry.cluster_size, b"\0")
    per_byte = 8 // bits
    full = sum(1 << at * bits for at in range(per_byte))
    rest = sum(1 << at * bits for at in range(count % per_byte))
    return (bytes((full,)) * (count // per_byte) + bytes((rest,))).ljust(geometry.cluster_size, b"\0")[
        : geometry.cluster_size
    ]


# -- writing -----------------------------------------------------------------------------------------------------------
class _Writer:
    """Writes the metadata of one new image in the order of the layout."""

    def __init__(
        self, file: Target, geometry: Geometry, layout: Layout, options: CreateOptions, *, emptied: bool
    ) -> None:
        self.file = file
        self.emptied = emptied
        self.geometry = geometry
        self.layout = layout
        self.options = options
        self.clusters = geometry.cluster_size

    async def put(self, cluster: int, raw: bytes) -> None:
        await self.file.write(cluster * self.clusters, memoryview(raw))

    async def refcounts(self) -> None:
        """The refcount table, and blocks that count every cluster of the layout once."""
        layout, entries = self.layout, self.geometry.refcount_block_entries
        table = array("Q", ((layout.block_at + index) * self.clusters for index in range(layout.blocks)))
        await self.put(1, table_to_bytes(table).ljust(layout.table_clusters * self.clusters, b"\0"))
        for index in range(layout.blocks):
            used = min(layout.total - index * entries, entries)
            await self.put(layout.block_at + index, refcount_block_of_ones(self.geometry, max(used, 0)))

    async def l1(self) -> None:
        """The L1 table: empty, or pointing to all L2 tables."""
        layout = self.layout
        if layout.l2_tables:
            table = array("Q", ((layout.l2_at + i) * self.clusters | COPIED for i in range(layout.l2_tables)))
            await self.put(layout.l1_at, table_to_bytes(table))
        else:
            start = layout.l1_at * self.clusters
            await _reserve(self.file, start, start + layout.l1_entries * ENTRY, Preallocation.OFF, emptied=self.emptied)

    async def l2(self) -> None:
        """L2 tables that map every guest cluster to its preallocated place."""
        layout, per_table = self.layout, self.geometry.l2_entries
        base = 0 if self.geometry.has_data_file else layout.data_at
        clusters = self.geometry.clusters(self.options.size)
        bits = self.geometry.cluster_bits
        for index in range(layout.l2_tables):
            first = index * per_table
            run = range(base + first, base + min(first + per_table, clusters))
            if self.geometry.extended_l2:
                table = array("Q", (word for at in run for word in (at << bits | COPIED, 0)))
            else:
                table = array("Q", (at << bits | COPIED for at in run))
            await self.put(layout.l2_at + index, table_to_bytes(table).ljust(self.clusters, b"\0"))


async def create(file: Target, options: CreateOptions, data_file: Target | None = None) -> None:
    """Write a new image into ``file``, whatever it held. With ``options.data_file``, ``data_file`` takes the guest's data.

    Raises BlockError in QEMU's words, or OSError; then ``file`` holds no qcow2 image.
    """
    check_options(options)
    if options.data_file_raw and options.preallocation is Preallocation.OFF:
        # The data file must read right without the metadata, but the metadata is what we read: it must say "allocated".
        options = msgspec.structs.replace(options, preallocation=Preallocation.METADATA)
    geometry = header_geometry(options)
    layout = plan(geometry, options.size, options.preallocation)
    header = _header(geometry, layout, options)
    try:
        first = header.cluster()
    except OSError as error:
        if options.backing_file is UNSET:
            raise
        raise BlockError(_not_assigned(options, error.errno or errno.ENOSPC)) from None
    emptied = await _empty(file)
    writer = _Writer(file, geometry, layout, options, emptied=emptied)
    await writer.refcounts()
    await writer.l1()
    await writer.l2()
    if data_file is not None:
        filled = options.preallocation is not Preallocation.OFF
        step = geometry.subcluster_size
        length = -(-options.size // step) * step if filled else options.size
        await data_file.truncate(length, exact=True, prealloc=_storage_mode(options.preallocation))
        await data_file.flush()
    if layout.data_clusters:
        await _reserve(file, layout.data_at << geometry.cluster_bits, layout.total << geometry.cluster_bits,
                       _storage_mode(options.preallocation), emptied=emptied)  # fmt: skip
    await file.flush()
    await file.write(0, memoryview(first))
    await file.flush()


def _storage_mode(mode: Preallocation) -> Preallocation:
    """What the file below does for the mode: "metadata" is ours alone."""
    return Preallocation.OFF if mode is Preallocation.METADATA else mode


async def _empty(file: Target) -> bool:
    """Drop what the file held. False where it cannot shrink (a device): then only its header is wiped."""
    try:
        await file.truncate(0, exact=True)
    except (BlockError, OSError):
        await file.write_zeroes(0, min(file.size, 1 << MAX_CLUSTER_BITS))
        return False
    return True


async def _reserve(file: Target, start: int, end: int, mode: Preallocation, *, emptied: bool) -> None:
    """Make ``[start, end)`` of the file exist and read as zeroes, allocated as ``mode`` says."""
    if emptied:
        if end > file.size:
            try:
                await file.truncate(end, exact=False, prealloc=mode)
            except BlockError:
                if end % SECTOR == 0:
                    raise
                # The image is to stand inside another, and formats are as long as whole sectors.
                await file.truncate(end + -end % SECTOR, exact=False, prealloc=mode)
    elif end > start:
        await file.write_zeroes(start, end - start)


def _header(geometry: Geometry, layout: Layout, options: CreateOptions) -> Header:
    size = geometry.cluster_size
    zstd = options.compression_type is CompressionType.ZSTD
    features = [
        (Incompatible.DATA_FILE, geometry.has_data_file),
        (Incompatible.COMPRESSION, zstd),
        (Incompatible.EXTENDED_L2, geometry.extended_l2),
    ]
    return Header(
        version=2 if options.version is Version.V2 else 3,
        cluster_bits=geometry.cluster_bits,
        size=options.size,
        l1_size=layout.l1_entries,
        l1_table_offset=layout.l1_at * size if layout.l1_entries else 0,
        refcount_table_offset=size,
        refcount_table_clusters=layout.table_clusters,
        incompatible=sum(bit for bit, on in features if on),
        compatible=Compatible.LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        autoclear=Autoclear.DATA_FILE_RAW if options.data_file_raw else 0,
        refcount_order=geometry.refcount_order,
        compression_type=Compression.ZSTD if zstd else Compression.ZLIB,
        backing_file=options.backing_file if isinstance(options.backing_file, str) else None,
        backing_format=options.backing_fmt if isinstance(options.backing_fmt, str) else None,
        data_file=(options.data_file or None) if isinstance(options.data_file, str) else None,
    )


# -- by path -----------------------------------------------------------------------------------------------------------
async def create_file(path: str, options: CreateOptions, *, nocow: bool = False) -> None:
    """Make the image at ``path`` (an existing file is overwritten), and the data file that the options name.

    The files are locked as QEMU locks them while they are written. ``nocow`` asks the file system not to copy on write
    (btrfs); where it cannot, nothing happens, as with qemu-img. Raises BlockError or OSError; files that this call made are
    removed then.
    """
    check_options(options)
    graph = Graph()
    made: list[str] = []
    try:
        file = await _open_new(graph, path, made, nocow=nocow)
        data = None
        if isinstance(options.data_file, str):
            data = await _open_new(graph, options.data_file, made, nocow=nocow)
            await _empty(data.node)
        await create(file.node, options, data.node if data is not None else None)
    except BaseException:
        for name in made:
            with suppress(OSError):
                os.unlink(name)
        raise
    finally:
        for backend in list(graph.backends):
            await graph.detach_root(backend)
        await graph.close()


async def _open_new(graph: Graph, path: str, made: list[str], *, nocow: bool) -> BlockBackend:
    """Make the file if it is not there, and open it for writing, sharing all but its size."""
    kind = "file"
    try:
        if path.startswith(PREFIX):
            fd = -1  # there already, if it is anywhere
        else:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            made.append(path)
    except FileExistsError:
        fd = -1
        if stat.S_ISBLK(os.stat(path).st_mode):
            kind = "host_device"
    except OSError as error:
        raise BlockError(f"Could not create '{path}': {os.strerror(error.errno or errno.EIO)}") from None
    if fd >= 0:
        if nocow:
            set_nocow(fd)
        os.close(fd)
    settings: dict[str, Any] = {"driver": kind, "filename": path}
    node = await graph.open(driver_class(kind).Options(**settings))
    backend = BlockBackend(graph)
    perms = Perm.WRITE | Perm.RESIZE | Perm.CONSISTENT_READ
    try:
        graph.attach_root(backend, node, perms, Perm.ALL & ~Perm.RESIZE)
    except BaseException:
        await graph.release(node)
        raise
    return backend
