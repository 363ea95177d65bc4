"""The qcow2 driver: the face of an image towards the block layer.

Opening: the file, the header, the data file, the tables, and (through `gate`) the backing file. Everything at run time is
`image.py`'s. An image that was not closed with lazy refcounts is repaired when it is opened for writing; one that is marked
corrupt is only opened read-only.

Source: QEMU ``docs/interop/qcow2.rst``; messages and defaults from ``block/qcow2.c``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from livedisk.emulator.block import gate
from livedisk.emulator.block.driver import Driver, Moment, register
from livedisk.emulator.block.extents import Extents
from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.block.permissions import Role
from livedisk.emulator.block.types import Preallocation, Segment, ZeroFlags
from livedisk.emulator.drivers.qcow2 import options as opts
from livedisk.emulator.drivers.qcow2.bitmap_directory import AUTO, IN_USE, BitmapEntry
from livedisk.emulator.drivers.qcow2.header import Header, Purpose, read_header
from livedisk.emulator.drivers.qcow2.image import Image
from livedisk.emulator.drivers.qcow2.options import Qcow2Options
from livedisk.emulator.drivers.qcow2.resize import resize
from livedisk.emulator.drivers.qcow2.snapshots import Snapshot
from livedisk.emulator.errors import BlockError, ImageError

if TYPE_CHECKING:
    from livedisk.emulator.block.creation import BlockdevAmendOptions, BlockdevCreateOptions
    from livedisk.emulator.block.graph import Graph

log = logging.getLogger(__name__)


class _Prepared(msgspec.Struct):
    """What a reopen will switch to."""

    options: Qcow2Options
    image_settings: tuple[Any, ...]


class Qcow2(Driver):
    """An image in qcow2 format, version 2 or 3."""

    name: ClassVar[str] = "qcow2"
    Options: ClassVar[type[BlockdevOptions]] = Qcow2Options
    is_format: ClassVar[bool] = True
    supports_backing: ClassVar[bool] = True
    copies_in = True

    def __init__(self, node: Node, options: Qcow2Options) -> None:
        super().__init__(node, options)
        self.image: Image
        self._cleaner: asyncio.TimerHandle | None = None
        self._prepared: _Prepared | None = None
        self._inactive = False

    # -- making images ---------------------------------------------------------------------------------------------------
    @classmethod
    def create_options(cls) -> type[BlockdevCreateOptions]:
        from livedisk.emulator.drivers.qcow2.create_node import BlockdevCreateOptionsQcow2

        return BlockdevCreateOptionsQcow2

    @classmethod
    async def create(cls, graph: Graph, options: Any) -> None:
        from livedisk.emulator.drivers.qcow2 import create_node

        await create_node.create_in_nodes(graph, options)

    @classmethod
    def amend_options(cls) -> type[BlockdevAmendOptions]:
        from livedisk.emulator.drivers.qcow2.create_node import BlockdevAmendOptionsQcow2

        return BlockdevAmendOptionsQcow2

    async def amend_prepare(self, options: Any) -> None:
        """Whatever the options say, the job says what is wrong with it, as in QEMU."""

    async def amend(self, options: Any, *, force: bool) -> None:
        """All that QEMU amends in a running image is its encryption, and no image here has any."""
        if options.encrypt is not msgspec.UNSET:
            raise BlockError("image is not encrypted, can't amend")

    # -- life ------------------------------------------------------------------------------------------------------------
    async def open(self) -> None:
        """Open the image and what it stands on. Raises BlockError (ImageError for a bad image) or OSError."""
        edge = await self.node.graph.open_child(self.node, self.options.file, "file", Role.IMAGE)
        header = await read_header(edge.node, self._purpose())
        self._inactive = not self.node.active
        if header.dirty and not (self.node.read_only or self._inactive):
            # Imported here: few images need it, and start-up counts.
            from livedisk.emulator.drivers.qcow2.repair import repair_dirty

            log.warning("qcow2: node '%s' was not closed; repairing its image", self.node.name)
            await repair_dirty(edge.node, log.info)
            header = await read_header(edge.node, self._purpose())
        if self.options.encrypt is not msgspec.UNSET:
            raise BlockError(
                f"No encryption in image header, but options specified format '{self.options.encrypt.format.value}'"
            )
        await self._open_data_file(header)
        await self._load(header)
        interval = opts.clean_interval(self.options)
        await gate.open_backing(self.node, self.options.backing, header.backing_file, header.backing_format)
        self._clean_later(interval)

    def _purpose(self) -> Purpose:
        return Purpose.READ if self.node.read_only or not self.node.active else Purpose.WRITE

    async def _open_data_file(self, header: Header) -> None:
        if not header.has_data_file:
            if self.options.data_file is not msgspec.UNSET:
                raise BlockError("'data-file' can only be set for images with an external data file")
            return
        await gate.open_data_file(self.node, self.options.data_file, header.data_file)
        self.node.file.role &= ~Role.DATA
        self.node.graph.refresh_permissions()

    async def _load(self, header: Header) -> None:
        """Make the run time of the image, repairing what its header asks for."""
        given = self.options
        image = Image(
            self.node,
            header,
            opts.cache_sizes(given, header),
            opts.overlap_sections(given),
            opts.discard_policy(given, self.node, header),
        )
        image.lazy = opts.lazy_refcounts(given, header)
        self.image = image
        await image.load()
        self.map_granularity = image.geometry.subcluster_size
        if not self.node.active:
            return  # the image is another process's: nothing is written, and its bitmaps are not ours
        if not self.node.read_only and header.prepare_for_writing():
            await image.write_header()
        await image.bitmaps.load()

    def _clean_later(self, interval: int) -> None:
        if self._cleaner is not None:
            self._cleaner.cancel()
            self._cleaner = None
        if interval:
            self._cleaner = asyncio.get_running_loop().call_later(interval, self._clean, interval)

    def _clean(self, interval: int) -> None:
        """Drop metadata that was not used for a whole interval."""
        self.image.tables.slices.drop_unused()
        self.image.refcounts.blocks.drop_unused()
        self._clean_later(interval)

    async def close(self) -> None:
        """Put everything on the disk; the image is clean afterwards."""
        self._clean_later(0)
        try:
            if not self._inactive and not self.node.read_only:
                await self.image.finish()
        finally:
            self.image.bitmaps.forget()

    async def inactivate(self) -> None:
        """Put everything on the disk and forget it: another process may open the image now."""
        if not self.node.read_only:
            await self.image.finish()
        await self.flush()
        self.image.bitmaps.forget()
        self._inactive = True

    async def activate(self) -> None:
        """Read the image anew: another process may have changed it."""
        self._clean_later(0)
        await self._load(await read_header(self.node.file.node, self._purpose()))
        self._clean_later(opts.clean_interval(self.options))
        self._inactive = False
        self.node.mapping_changed()

    # -- where -------------------------------------------------------------------------------------------------------------
    @property
    def size(self) -> int:
        return self.image.size

    def map(self, offset: int, length: int) -> Segment:
        return self.image.map(offset, length)

    def sift(self, shift: int, granules: list[int], found: dict[int, int]) -> tuple[list[int], Edge] | None:
        return self.image.sift(shift, granules, found)

    async def load(self, offset: int, length: int) -> None:
        await self.image.tables.load(offset)

    # -- moving bytes --------------------------------------------------------------------------------------------------------
    async def read(self, offset: int, view: memoryview) -> None:
        self.image.storage.check_alive()
        await self.image.read_guest(offset, view)

    async def write(self, offset: int, data: memoryview) -> None:
        self._check_usable()
        if self.image.bitmaps.guard is not None:
            await self.image.bitmaps.before_change(offset, len(data))
        await self.image.writer.write(offset, data)

    async def copy_in(self, offset: int, extents: Extents) -> None:
        await self._before_change(offset, len(extents))
        await self.image.writer.write(offset, extents)

    def write_now(self, offset: int, data: memoryview) -> bool:
        return not (self._inactive or self.image.storage.dead) and self.image.writer.write_now(offset, data)

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        await self._before_change(offset, length)
        await self.image.zeroer.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self._before_change(offset, length)
        await self.image.zeroer.discard(offset, length)

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        await self._before_change(offset, len(data))
        await self.image.writer.write_compressed(offset, data)

    async def _before_change(self, offset: int, length: int) -> None:
        self._check_usable()
        await self.image.bitmaps.before_change(offset, length)

    def _check_usable(self) -> None:
        self.image.storage.check_alive()
        if self._inactive:
            raise PermissionError(errno.EPERM, f"node '{self.node.name}' is inactive")

    async def flush_metadata(self) -> None:
        if not self._inactive:
            await self.image.bitmaps.tidy()
            await self.image.writeback.run()

    async def make_empty(self) -> None:
        await self._before_change(0, self.size)
        await self.image.zeroer.drop(0, self.image.geometry.round_up(self.size))
        await self.image.writeback.run()
        self.node.mapping_changed()

    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        self._check_usable()
        await resize(self.image, size, exact=exact, prealloc=prealloc)

    # -- persistent bitmaps ----------------------------------------------------------------------------------------------
    def check_bitmap_storable(self, name: str, granularity: int) -> None:
        self.image.bitmaps.check_storable(name, granularity)

    def bitmaps_changed(self) -> None:
        self.image.bitmaps.changed()

    async def sync_bitmaps(self) -> None:
        if not self._inactive:
            await self.image.bitmaps.sync()

    # -- reopen --------------------------------------------------------------------------------------------------------------
    async def reopen_prepare(self, options: Any, *, read_only: bool) -> None:
        """Everything but ``encrypt`` and ``data-file`` may change."""
        image, header = self.image, self.image.header
        for name in ("encrypt", "data_file"):
            if getattr(options, name) != getattr(self.options, name):
                raise BlockError(f"Cannot change the option '{name.replace('_', '-')}'")
        settings = (
            opts.cache_sizes(options, header),
            opts.overlap_sections(options),
            opts.discard_policy(options, self.node.reopening or self.node, header),
            opts.lazy_refcounts(options, header),
            opts.clean_interval(options),
        )
        if self.node.read_only and not read_only:
            self._check_may_write(header)
        elif not self.node.read_only:
            # Whatever comes, it starts from a clean image: the caches may be replaced, the dirty bit is not left behind.
            await image.finish()
            await self.flush()
        self._prepared = _Prepared(options, settings)

    def _check_may_write(self, header: Header) -> None:
        if header.corrupt:
            raise ImageError("qcow2: Image is corrupt; cannot be opened read/write")
        if header.dirty or header.stale_bitmaps or header.has_unknown_autoclear:
            raise BlockError(
                f"Node '{self.node.name}' must be closed and opened for writing: its image needs a repair that only "
                "opening does"
            )

    def reopen_commit(self) -> None:
        prepared, self._prepared = self._prepared, None
        assert prepared is not None
        self.options = prepared.options
        image = self.image
        sizes, checked, image.discards, image.lazy, interval = prepared.image_settings
        image.storage.guard.checked = checked
        if not image.tables.slices.dirty:
            image.tables.resize_cache(sizes.l2, sizes.l2_slice)
        image.refcounts.resize_cache(sizes.refcount)
        self._clean_later(interval)
        image.bitmaps.reopened()
        self.node.mapping_changed()

    def reopen_abort(self) -> None:
        self._prepared = None

    # -- words ---------------------------------------------------------------------------------------------------------------
    def backing_filename(self) -> str | None:
        return self.image.header.backing_file

    def backing_format(self) -> str | None:
        return self.image.header.backing_format

    async def change_backing_file(self, filename: str | None, fmt: str | None) -> None:
        """Rewrite the header with these. Raises OSError: EINVAL where the name is too long or the data file is raw, ENOSPC where
        it does not fit."""
        header = self.image.header
        if filename and header.data_file_raw:
            raise OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: a raw data file cannot have a backing file")
        before = header.backing_file, header.backing_format
        header.backing_file, header.backing_format = filename or None, (fmt or None) if filename else None
        try:
            await self.image.write_header()
        except BaseException:
            header.backing_file, header.backing_format = before
            raise

    def cluster_size(self) -> int:
        return self.image.geometry.cluster_size

    def vm_state_offset(self) -> int:
        geometry = self.image.geometry
        return geometry.l1_entries(self.size) << geometry.l2_span_bits

    def dirty_flag(self) -> bool:
        return self.image.header.dirty

    def specific_info(self) -> Mapping[str, Any]:
        """QEMU's ImageInfoSpecificQCow2."""
        header = self.image.header
        data: dict[str, Any] = {"compat": header.compat, "compression-type": header.compression_type.name.lower()}
        if header.version >= 3:
            data["lazy-refcounts"] = header.lazy_refcounts
            if header.bitmaps is not None:
                data["bitmaps"] = [_bitmap_info(entry) for entry in self.image.bitmaps.entries()]
        data["refcount-bits"] = self.image.geometry.refcount_bits
        if header.version >= 3:
            data["corrupt"] = header.corrupt
            data["extended-l2"] = header.extended_l2
            if header.has_data_file:
                if header.data_file is not None:
                    data["data-file"] = header.data_file
                data["data-file-raw"] = header.data_file_raw
        return {"type": "qcow2", "data": data}

    def snapshots(self) -> Sequence[Mapping[str, Any]]:
        return [snapshot.info() for snapshot in self.image.snapshots]

    @property
    def has_snapshots(self) -> bool:
        return True

    async def snapshot_create(self, name: str, moment: Moment) -> Mapping[str, Any]:
        from livedisk.emulator.drivers.qcow2 import snapshot_change

        self._check_usable()
        return (await snapshot_change.create(self.image, name, moment)).info()

    async def snapshot_delete(self, id: str) -> None:
        from livedisk.emulator.drivers.qcow2 import snapshot_change

        self._check_usable()
        await snapshot_change.delete(self.image, self._snapshot(id))

    async def snapshot_show(self, id: str) -> None:
        from livedisk.emulator.drivers.qcow2 import snapshot_change

        assert self.node.read_only
        await snapshot_change.show(self.image, self._snapshot(id))
        self.node.graph.resized(self.node)

    async def snapshot_apply(self, id: str) -> None:
        from livedisk.emulator.drivers.qcow2 import snapshot_change

        self._check_usable()
        if self.node.bitmaps:
            # All of the disk changes, and its size too: they would have to say so. QEMU refuses as well.
            raise BlockError("Device has active dirty bitmaps")
        before = self.size
        await snapshot_change.apply(self.image, self._snapshot(id))
        self.node.written(0, max(before, self.size))
        if self.size != before:
            self.node.graph.resized(self.node)

    def _snapshot(self, id: str) -> Snapshot:
        for one in self.image.snapshots:
            if one.id.decode(errors="replace") == id:
                return one
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    async def allocated_size(self) -> int | None:
        """Of the file, and of the data file."""
        total: int | None = None
        for name in ("file", "data-file"):
            edge = self.node.children.get(name)
            with contextlib.suppress(OSError):
                size = await edge.node.driver.allocated_size() if edge is not None else None
                if size is not None:
                    total = (total or 0) + size
        return total


def _bitmap_info(entry: BitmapEntry) -> dict[str, Any]:
    """QEMU's Qcow2BitmapInfo."""
    flags = [name for bit, name in ((IN_USE, "in-use"), (AUTO, "auto")) if entry.flags & bit]
    return {"flags": flags, "name": entry.title, "granularity": 1 << entry.granularity_bits}


register(Qcow2)
