"""Where a qcow2 image lives: its file, its data file, and the only way in which metadata is written.

`put` writes metadata and names the write; `barrier` makes all that was written before durable before anything that is
written after. Nothing else in the driver writes metadata. `put` refuses to overwrite other metadata, whatever a damaged table
says (`OverlapGuard`).

Damage found at run time goes through `Storage.corrupt`: the image is marked, the graph is told (QMP's BLOCK_IMAGE_CORRUPTED),
and a fatally damaged image refuses everything thereafter. Source: QEMU ``block/qcow2-refcount.c`` (qcow2_signal_corruption).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from livedisk.emulator.block.debug import Event, tell
from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.drivers.qcow2.overlap import OverlapGuard, Section
from livedisk.emulator.drivers.qcow2.points import Point

log = logging.getLogger(__name__)

_EVENTS: Final = {
    Point.REFCOUNT_BLOCK: Event.REFBLOCK_UPDATE_PART,
    Point.REFCOUNT_TABLE: Event.REFBLOCK_ALLOC_HOOKUP,
    Point.REFCOUNT_TABLE_GROW: Event.REFBLOCK_ALLOC_WRITE_TABLE,
    Point.REFCOUNT_TABLE_SWITCH: Event.REFBLOCK_ALLOC_SWITCH_TABLE,
    Point.L2_TABLE: Event.L2_UPDATE,
    Point.L1_TABLE: Event.L1_UPDATE,
    Point.L1_GROW: Event.L1_GROW_WRITE_TABLE,
    Point.L1_SWITCH: Event.L1_GROW_ACTIVATE_TABLE,
}
"""What QEMU calls these writes."""
_NEW_BLOCK: Final = Event.REFBLOCK_ALLOC_WRITE_BLOCKS
"""And a refcount block that nothing refers to yet."""


def c_hex(number: int) -> str:
    """A number as C's ``%#x`` prints it, for messages that are QEMU's word by word: 0 has no prefix."""
    return f"{number:#x}" if number else "0"


class Damage(Exception):
    """A table entry cannot be right. ``offset`` and ``size`` (bytes in the file) say what would have been overwritten, or are
    None; ``fatal`` damage stops the image."""

    def __init__(self, text: str, *, offset: int | None = None, size: int | None = None, fatal: bool = True) -> None:
        super().__init__(text)
        self.text = text
        self.offset = offset
        self.size = size
        self.fatal = fatal


class Observer(Protocol):
    """Told of every step that matters for a power cut, before it is made (the crash tests)."""

    def __call__(self, point: Point | None) -> None:
        """``point`` is about to be written; None: a barrier is about to begin."""


class Storage:
    """The image's file and data file.

    ``mark_corrupt`` is set by the driver: it sets the corrupt bit in the header. ``has_data_file``: the
    guest's data stands in a file of its own. ``dead``: fatally damaged. ``observer``: see
    `Observer`.
    """

    def __init__(self, node: Node, guard: OverlapGuard) -> None:
        self.node = node
        self.guard = guard
        self.observer: Observer | None = None
        self.mark_corrupt: Callable[[], Awaitable[None]] | None = None
        self.has_data_file = False
        self.dead = False
        self._told = False

    @property
    def file(self) -> Edge:
        """Holds the metadata, and the data unless there is a data file."""
        return self.node.children["file"]

    @property
    def data(self) -> Edge:
        """Holds the guest's data."""
        return self.node.children["data-file" if self.has_data_file else "file"]

    @property
    def is_watched(self) -> bool:
        """Whether somebody below listens to debug events."""
        return self.file.node.driver.debugger is not None

    async def tell(self, event: Event) -> None:
        """It is about to happen, for whoever injects errors below."""
        await tell(self.file, event)

    async def read(self, offset: int, length: int, event: Event | None = None) -> bytearray:
        """``length`` bytes of the file; what lies past its end reads as zeroes. ``event``: what they are read for."""
        raw = bytearray(length)
        if event is not None:
            await tell(self.file, event)
        await self.file.read(offset, memoryview(raw))
        return raw

    async def put(self, point: Point, section: Section, offset: int, data: bytes) -> None:
        """Write metadata of that section. Raises EIO, having marked the image, if other metadata stands there."""
        self.check_alive()
        await self.check_overlap(offset, len(data), but=section)
        event = _NEW_BLOCK if section is Section.NONE and point is Point.REFCOUNT_BLOCK else _EVENTS.get(point)
        if event is not None:
            await tell(self.file, event)
        if self.observer is not None:
            self.observer(point)
        await self.file.write(offset, memoryview(data))

    async def barrier(self) -> None:
        """All that was written so far is on stable storage when this returns (unless ``cache.no-flush``)."""
        if self.observer is not None:
            self.observer(None)
        if self.has_data_file:
            await self.data.node.flush()
        await self.file.node.flush()

    # -- damage ------------------------------------------------------------------------------------------------------
    def check_alive(self) -> None:
        """Raise ENOMEDIUM, as QEMU does, if the image was found fatally damaged."""
        if self.dead:
            raise OSError(
                errno.ENOMEDIUM,
                f"{os.strerror(errno.ENOMEDIUM)}: the image of node '{self.node.name}' is corrupt; "
                "close it and run 'qemu-img check -r all' on it",
            )

    async def check_overlap(self, offset: int, length: int, *, but: Section = Section.NONE) -> None:
        """Raise EIO, having marked the image, if a write to this range of the file would hit metadata other than ``but``."""
        hit = self.guard.hit(offset, length, but)
        if hit is not None:
            raise await self.corrupt(
                Damage(f"Preventing invalid write on metadata (overlaps with {hit})", offset=offset, size=length)
            )

    async def corrupt(self, damage: Damage) -> OSError:
        """Tell of the damage, mark the image if it is fatal and the image writable, and give the error to raise."""
        fatal = damage.fatal and not self.node.read_only
        error = OSError(errno.EIO, f"{os.strerror(errno.EIO)}: node '{self.node.name}': {damage.text}")
        if self.dead or (self._told and not fatal):
            return error
        self._told = True
        if fatal:
            log.error("qcow2: Marking image as corrupt: %s; further corruption events will be suppressed", damage.text)
        else:
            log.error(
                "qcow2: Image is corrupt: %s; further non-fatal corruption events will be suppressed", damage.text
            )
        for told in list(self.node.graph.on_corruption):
            told(self.node, damage.text, damage.offset, damage.size, fatal)
        if fatal:
            self.dead = True
            self.node.mapping_changed()
            if self.mark_corrupt is not None:
                await self.mark_corrupt()
        return error
