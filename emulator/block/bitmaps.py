"""The dirty bitmaps of a node: which granules were written since when.

A bitmap is named (a user's) or not (a successor, a job's own). Its state, as in QEMU::

    disabled        writes are not recorded (``recording`` is the other way round, and looks at the successor too)
    busy            an operation uses it (a job, an export being made, a transaction that removes it): all else is refused
    persistent      the node's image stores it when it is closed, and keeps it through a crash (`drivers/qcow2`)
    read_only       its image may not be written: neither may the bitmap
    inconsistent    the image says that writes were missed: it can only be removed

A job that copies what a bitmap says *freezes* it: `DirtyBitmap.freeze` hands the recording to a successor, and the bitmap
itself stays as it is. In the end the successor takes its place (`abdicate`: everything was copied), or is merged back
(`reclaim`: nothing is lost).

Writes are cheap however many bitmaps there are: all recording bitmaps share one `_Recorder` among the node's trackers, which
sets one bit a write and granularity. What it gathered is folded into each of them only when one is looked at. Where a bitmap is
the only one of its granularity, its own bits are set, and nothing is ever folded.

Invariants
* A write is in every recording bitmap before it is acknowledged: the recorder is a ``DirtyTracker``.
* `DirtyBitmap.bits` is the one way to the bits; it folds first.
* What a bitmap says may be too dirty, never too clean. A node that shrinks and grows again is dirty where it had bytes
  before (QEMU: clean, so that a backup would miss the change); a change that is taken back keeps what was written since.

Source: QEMU ``block/dirty-bitmap.c``, ``util/hbitmap.c``; the texts of refusals are QEMU's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from bitarray import bitarray

from livedisk.emulator.block.bits import add, add_coarser, add_finer, copied, resized, wipe, zeros
from livedisk.emulator.errors import BlockError

if TYPE_CHECKING:
    from livedisk.emulator.block.node import DirtyTracker, Node

MIN_GRANULARITY: Final = 512
"""Bytes."""
MAX_NAME: Final = 1023
"""Bytes."""
_DEFAULT_LOW: Final = 4096
_DEFAULT_HIGH: Final = 65536


class DirtyBitmap:
    """One bitmap of ``granularity`` bytes a bit over the ``size`` bytes of ``node``. Made by `Bitmaps`.

    Offsets and lengths are bytes. Memory: a bit a granule, and no more than what was dirty takes (`bits.zeros`).
    """

    def __init__(self, node: Node, granularity: int, name: str | None) -> None:
        self.node = node
        self.name = name
        self.granularity = granularity
        self.shift = granularity.bit_length() - 1
        self.size = node.size
        self.disabled = False
        self.busy = False
        self.persistent = False
        self.read_only = False
        self.inconsistent = False
        self.successor: DirtyBitmap | None = None
        self.removing = False
        """A transaction under way is going to remove it: an image that is closed meanwhile does not store it."""
        self._bits = zeros(-(-self.size >> self.shift))
        self._widest = self.size
        self._recorder: _Recorder | None = None

    # -- what it says ------------------------------------------------------------------------------------------------
    @property
    def bits(self) -> bitarray:
        """One bit a granule, first to last. To be looked at, not kept: a change of size replaces it."""
        if self._recorder is not None:
            self._recorder.fold()
        return self._bits

    @property
    def recording(self) -> bool:
        """Whether writes are recorded, here or in the successor."""
        return not self.disabled or (self.successor is not None and not self.successor.disabled)

    @property
    def count(self) -> int:
        """Dirty bytes, in whole granules."""
        return self.bits.count() << self.shift

    def sha256(self) -> str:
        """Of the bits in 64-bit words, as QEMU's x-debug-block-dirty-bitmap-sha256 has it on a little-endian host."""
        raw = self.bits.tobytes()
        return hashlib.sha256(raw.ljust(max(-(-len(raw) // 8), 1) * 8, b"\0")).hexdigest()

    def any(self, offset: int, length: int) -> bool:
        """Whether a granule that the range touches is dirty."""
        return length > 0 and self.bits.find(1, offset >> self.shift, (offset + length - 1 >> self.shift) + 1) >= 0

    def next_dirty(self, start: int, end: int | None = None) -> int | None:
        """The first dirty byte in ``[start, end)``, or None."""
        stop = self.size if end is None else min(end, self.size)
        if start >= stop:
            return None
        found = self.bits.find(1, start >> self.shift, (stop - 1 >> self.shift) + 1)
        return None if found < 0 else max(found << self.shift, start)

    def next_clean(self, start: int, end: int | None = None) -> int | None:
        """The first clean byte in ``[start, end)``, or None."""
        stop = self.size if end is None else min(end, self.size)
        if start >= stop:
            return None
        found = self.bits.find(0, start >> self.shift, (stop - 1 >> self.shift) + 1)
        return None if found < 0 else max(found << self.shift, start)

    def next_run(self, start: int, end: int | None = None, limit: int = 1 << 62) -> tuple[int, int] | None:
        """The first dirty run in ``[start, end)``, of at most ``limit`` bytes: (offset, length); or None."""
        stop = self.size if end is None else min(end, self.size)
        offset = self.next_dirty(start, stop)
        if offset is None:
            return None
        most = min(offset + limit, stop)
        clean = self.next_clean(offset, most)
        return offset, (most if clean is None else clean) - offset

    def runs(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """All dirty runs of the range, first to last: (offset, length). The bitmap may change while one iterates: what lies
        behind the run given last is looked at when it is asked for."""
        run = self.next_run(start, end)
        while run is not None:
            yield run
            run = self.next_run(run[0] + run[1], end)

    # -- changing it -------------------------------------------------------------------------------------------------
    def mark(self, offset: int, length: int) -> None:
        """Set every granule that the range touches."""
        if length > 0:
            self.bits[offset >> self.shift : (offset + length - 1 >> self.shift) + 1] = 1

    def unmark(self, offset: int, length: int) -> None:
        """Clear every granule that lies whole in the range; the last one of the disk may be short."""
        first = -(-offset >> self.shift)
        bits = self.bits
        end = len(bits) if offset + length >= self.size else offset + length >> self.shift
        if first < end:
            bits[first:end] = 0

    def clear(self) -> None:
        """Clear every granule."""
        wipe(self.bits)
        self._widest = self.size

    def adopt(self, bits: bitarray) -> None:
        """Add ``bits`` of the same granularity; of another length, as far as both go."""
        add(self.bits, bits)

    def merge(self, source: DirtyBitmap) -> None:
        """Add what ``source``, of whatever granularity, says."""
        steps = self.shift - source.shift
        if steps > 0:
            add_coarser(self.bits, source.bits, steps)
        elif steps < 0:
            add_finer(self.bits, source.bits, -steps)
        else:
            self.adopt(source.bits)

    def enable(self) -> None:
        """Record writes from now on."""
        self.disabled = False
        self.node.bitmaps.regroup()

    def disable(self) -> None:
        """Record no writes."""
        self.disabled = True
        self.node.bitmaps.regroup()

    def resize(self, size: int) -> None:
        """Follow the node's new size: what is new is clean, unless the node had bytes there since the last `clear`. Its recorder
        is told afterwards (`Bitmaps.follow_size`)."""
        before, bits = self.size, self.bits
        self.size = size
        length = -(-size >> self.shift)
        if length != len(bits):
            self._bits = resized(bits, length)
        if size > before:
            self.mark(before, min(size, self._widest) - before)
        self._widest = max(self._widest, size)

    # -- whether it may be used --------------------------------------------------------------------------------------
    def check_usable(self, *, allow_read_only: bool = False) -> None:
        """Raise BlockError, in QEMU's words, if it may not be changed (or, ``allow_read_only``, looked at)."""
        if allow_read_only:
            self.check_not_busy()
        else:
            self.check_removable()
        if self.inconsistent:
            raise BlockError(
                f"Bitmap '{self.name}' is inconsistent and cannot be used",
                hint="Try block-dirty-bitmap-remove to delete this bitmap from disk",
            )

    def check_removable(self) -> None:
        """Raise BlockError, in QEMU's words, if it may not go: inconsistent ones may."""
        self.check_not_busy()
        if self.read_only:
            raise BlockError(f"Bitmap '{self.name}' is readonly and cannot be modified")

    def check_not_busy(self) -> None:
        """Raise BlockError, in QEMU's words, if an operation uses it."""
        if self.busy:
            raise BlockError(f"Bitmap '{self.name}' is currently in use by another operation and cannot be used")

    # -- the successor -----------------------------------------------------------------------------------------------
    def freeze(self) -> DirtyBitmap:
        """Keep what it says as it is; a successor without a name records from now on (if this one did). Raises BlockError."""
        self.check_not_busy()
        if self.successor is not None:
            raise BlockError("Cannot create a successor for a bitmap that already has one")
        successor = self.node.bitmaps.create(self.granularity, None)
        successor.disabled, self.disabled = self.disabled, True
        self.successor, self.busy = successor, True
        self.node.bitmaps.regroup()
        return successor

    def abdicate(self) -> DirtyBitmap:
        """The successor takes the name and the place; this one is gone. Returns the successor."""
        successor = self.successor
        assert successor is not None
        self.successor, self.busy = None, False
        successor.name, self.name = self.name, None
        successor.persistent, self.persistent = self.persistent, False
        successor.inconsistent, successor.read_only = self.inconsistent, self.read_only
        self.node.bitmaps.remove(self)
        return successor

    def reclaim(self) -> DirtyBitmap:
        """Take back what the successor recorded, and go on as it did. Returns this one."""
        successor = self.successor
        assert successor is not None
        self.adopt(successor.bits)
        self.disabled = successor.disabled
        self.successor, self.busy = None, False
        self.node.bitmaps.remove(successor)
        return self

    def __repr__(self) -> str:
        return f"<DirtyBitmap {self.name} of {self.node.name}>"


class _Recorder:
    """What records for all recording bitmaps of a node: a `DirtyTracker`.

    ``groups``: those of one granularity each. A group has one array: the lone member's own bits, or what was written since the
    last `fold`. ``_arrays``: each group's shift and array, for the loop that every write goes through.
    """

    def __init__(self, node: Node, groups: list[list[DirtyBitmap]]) -> None:
        self._node = node
        self._groups = groups
        self._gathered = False
        self._arrays: list[tuple[int, bitarray]] = []
        self.resized()

    def mark(self, offset: int, length: int) -> None:
        """Record a write. Hot: nearly every one lies in one granule of each array."""
        self._gathered = True
        end = offset + length - 1
        try:
            for shift, bits in self._arrays:
                first = offset >> shift
                if first == end >> shift:
                    bits[first] = 1
                else:
                    bits[first : (end >> shift) + 1] = 1
                    bits[end >> shift]  # raises IndexError where that was not all
        except IndexError:
            # A write that made the node longer (the file below an image): all its bitmaps follow, then it is recorded.
            self._node.bitmaps.follow_size()
            self._gathered = True  # following folds
            for shift, bits in self._arrays:
                bits[offset >> shift : (end >> shift) + 1] = 1

    def resized(self) -> None:
        """The members have other bits, and what was gathered (`fold`). Not a new recorder: the trackers may be walked through
        just now."""
        self._arrays = [
            (members[0].shift, members[0]._bits if len(members) == 1 else zeros(len(members[0]._bits)))
            for members in self._groups
        ]

    def fold(self) -> None:
        """Let every member have what was gathered."""
        if not self._gathered:
            return
        self._gathered = False
        for members, (_, bits) in zip(self._groups, self._arrays, strict=True):
            if len(members) > 1:
                for one in members:
                    add(one._bits, bits)
                wipe(bits)


class Undo:
    """How a change of what a bitmap says is taken back: made before the change, then `back` or `drop` once.

    What is written meanwhile is dirty in any case: a nameless bitmap records it.
    """

    def __init__(self, bitmap: DirtyBitmap) -> None:
        self._bitmap = bitmap
        self._before = copied(bitmap.bits)
        self._since = None if bitmap.disabled else bitmap.node.bitmaps.create(bitmap.granularity, None)

    def back(self) -> None:
        """The bitmap says what it said before, and what was written since."""
        wipe(self._bitmap.bits)
        self._bitmap.adopt(self._before)
        if self._since is not None:
            self._bitmap.adopt(self._since.bits)
        self.drop()

    def drop(self) -> None:
        """The change stands."""
        if self._since is not None:
            self._bitmap.node.bitmaps.remove(self._since)
            self._since = None


class Bitmaps:
    """All dirty bitmaps of one node. Iterates over them as QEMU lists them, the newest first, nameless ones included."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._all: list[DirtyBitmap] = []
        self._recorder: _Recorder | None = None

    def __iter__(self) -> Iterator[DirtyBitmap]:
        self.follow_size()
        return reversed(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def find(self, name: str) -> DirtyBitmap | None:
        """The bitmap of that name."""
        self.follow_size()
        return next((one for one in self._all if one.name == name), None)

    def get(self, name: str) -> DirtyBitmap:
        """The bitmap of that name. Raises BlockError in QEMU's words."""
        found = self.find(name)
        if found is None:
            raise BlockError(f"Dirty bitmap '{name}' not found")
        return found

    def create(
        self, granularity: int, name: str | None, *, disabled: bool = False, persistent: bool = False
    ) -> DirtyBitmap:
        """A new, clean one. For a persistent one `Driver.check_bitmap_storable` was asked. Raises BlockError, in QEMU's words,
        for a name that is taken or too long."""
        if name is not None:
            if self.find(name) is not None:
                raise BlockError(f"Bitmap already exists: {name}")
            if len(name.encode(errors="surrogateescape")) > MAX_NAME:
                raise BlockError(f"Bitmap name too long: {name}")
        made = DirtyBitmap(self._node, granularity, name)
        made.disabled, made.persistent = disabled, persistent
        self._all.append(made)
        self.regroup()
        return made

    def remove(self, bitmap: DirtyBitmap) -> None:
        """Forget it, and its successor."""
        if bitmap.successor is not None:
            self.remove(bitmap.successor)
        self._all.remove(bitmap)
        self.regroup()

    def forget(self) -> None:
        """The node is closed: its bitmaps' memory goes now, not when what refers to the node in a circle is collected."""
        if self._recorder is not None:
            self._node.trackers.remove(self._recorder)
            self._recorder = None
        self._all.clear()

    def default_granularity(self) -> int:
        """Bytes: the cluster size of the image that shows here, between 4 and 64 KiB; 64 KiB where there are no clusters."""
        node = self._node
        while not node.driver.cluster_size() and node.filtered is not None:
            node = node.filtered.node
        return min(max(node.driver.cluster_size() or _DEFAULT_HIGH, _DEFAULT_LOW), _DEFAULT_HIGH)

    def follow_size(self) -> None:
        """The node has another size: so have its bitmaps."""
        size = self._node.size
        if all(one.size == size for one in self._all):
            return
        for one in self._all:
            one.resize(size)
        if self._recorder is not None:
            self._recorder.resized()

    def others(self, trackers: list[DirtyTracker]) -> list[DirtyTracker]:
        """Those of the trackers that are not bitmaps."""
        return [one for one in trackers if not isinstance(one, _Recorder)]

    def regroup(self) -> None:
        """Which bitmaps record has changed: make the node's trackers anew."""
        before = self._recorder
        if before is not None:
            before.fold()
            self._node.trackers.remove(before)
        groups: dict[int, list[DirtyBitmap]] = {}
        for one in self._all:
            one._recorder = None
            if not one.disabled:
                groups.setdefault(one.shift, []).append(one)
        self._recorder = _Recorder(self._node, list(groups.values())) if groups else None
        if self._recorder is not None:
            for members in groups.values():
                for one in members:
                    one._recorder = self._recorder
            self._node.trackers.append(self._recorder)
        self._node.driver.bitmaps_changed()
        if (before is None) != (self._recorder is None):
            self._node.mapping_changed()  # a flat map from further up must not write past the trackers of this node
