"""The flat map: a lazily filled cache of the fully resolved chain, which makes depth free, and the fast path on it.

One entry a granule (the smallest cluster size of the chain, 4 KiB to 2 MiB) says in which host file and where the
granule's bytes stand, or that it
reads as zeroes, or that it must take the slow path. Entries are 64-bit words in ``array('Q')`` regions of `REGION`
granules:

    bits 63..9  host offset (bytes; a multiple of 512)         bits 8..0  code
    code 0      unknown: resolve                                code 1     reads as zeroes
    code 2      slow path always (mixed, compressed, opaque)    code 2f+w  file f (2..255); w: may be written in place

It is only a cache of `Driver.map`: whatever changes a mapping ends in `invalidate`. The number of regions is bounded;
the oldest is dropped.
Where the whole disk is one straight run of one host file (a raw image) there is no table at all, only a base offset.

`try_read` and `try_write` are hot: flat on purpose, no object made, atomic towards the event loop. They decline
(MISS) while the backend is
quiesced, and whenever anything must be awaited.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from typing import TYPE_CHECKING, Final

from livedisk.emulator.block.driver import SLOW_GRANULE, ZERO_GRANULE, Driver
from livedisk.emulator.block.hostfile import HostFile
from livedisk.emulator.block.node import fill_zeroes
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.types import DetectZeroes, Kind, NotMapped

if TYPE_CHECKING:
    from livedisk.emulator.block.backend import BlockBackend
    from livedisk.emulator.block.node import DirtyTracker, Edge, Node

MISS: Final = 0
DATA: Final = 1
HOLE: Final = 2
"""The fast path's answers; the values are those of `livedisk.nbd.export`."""

REGION_BITS: Final = 12
REGION: Final = 1 << REGION_BITS
"""Granules a region: 4096 entries, 32 KiB."""
MAX_REGIONS: Final = 1024
"""At most 32 MiB a map, whatever the disk's size."""
FILL_AHEAD: Final = 16
"""Granules resolved at once where the chain answers for them in one segment."""
SIFT: Final = 64
"""Granules sifted at once (a divisor of `REGION`)."""
MAX_INDEX: Final = 255
"""Files a map can tell apart (less 2); granules of further ones take the slow path."""

_ZERO: Final = 1
_SLOW: Final = 2
_CODE: Final = 511
_OFFSET: Final = ~511

_UNKNOWN: Final = array("Q", bytes(8 * REGION))
"""A region of which nothing is known."""

_preadv = os.preadv
_pwrite = os.pwrite


class FlatMap:
    """The resolved chain below one `BlockBackend`.

    ``enabled`` is false while the backend is quiesced, held, or has no node; then everything misses.
    """

    def __init__(self, backend: BlockBackend) -> None:
        self._backend = backend
        self.enabled = False
        self._reset_tables()

    def _reset_tables(self) -> None:
        self._regions: dict[int, array[int]] = {}
        self._index: dict[HostFile, int] = {}
        self._fds: list[int] = [-1, -1]  # indices 0 and 1 would collide with the codes below 4
        self._files: list[HostFile | None] = [None, None]
        self._read_flags: list[int] = [0, 0]
        self._shift = 16
        self._size = 0
        self._straight: HostFile | None = None
        self._straight_fd = -1
        self._straight_flags = 0
        self._straight_base = 0
        self._straight_writable = False
        self._may_write = False
        self._allocates = False  # whether the root's driver may do so without awaiting
        self._root: Node | None = None
        self._trackers: list[DirtyTracker] = []
        self._ready = False

    # -- invalidation ------------------------------------------------------------------------------------------------
    def reset(self) -> None:
        """Forget everything: the graph, a node's options or a size changed."""
        self._reset_tables()

    def invalidate(self, offset: int, length: int) -> None:
        """Forget a range of the disk (bytes)."""
        if self._straight is not None:
            self.reset()
            return
        first, end = offset >> self._shift, (min(offset + length, self._size) - 1 >> self._shift) + 1
        if first >= end:
            return
        regions = self._regions
        low, high = first >> REGION_BITS, end - 1 >> REGION_BITS
        for key in range(low, high + 1) if high - low < len(regions) else [*regions]:
            region = regions.get(key)
            if region is not None and low <= key <= high:
                start = max(first - (key << REGION_BITS), 0)
                stop = min(end - (key << REGION_BITS), REGION)
                region[start:stop] = _UNKNOWN[: stop - start]

    # -- filling ---------------------------------------------------------------------------------------------------
    def _prepare(self) -> bool:
        """Learn the chain's shape after a reset. False where there is nothing to map."""
        edge = self._backend.root
        if edge is None or not self.enabled:
            return False
        root = edge.node
        self._root = root
        self._trackers = root.trackers
        self._size = root.size
        self._may_write = bool(edge.perm & Perm.WRITE) and not root.read_only
        self._allocates = type(root.driver).write_now is not Driver.write_now
        granularity = chain_granularity(root)
        self._shift = (min(max(granularity, 4096), 1 << 21) if granularity else 1 << 21).bit_length() - 1
        self._ready = True
        if granularity == 0 and self._size:
            entry = self._resolve(0, self._size)
            if entry is not None and entry[2] == self._size:
                file, base, _, in_place = entry
                if file is not None and file.inline_flags is not None:
                    self._straight, self._straight_fd, self._straight_flags = file, file.fd, file.inline_flags
                    self._straight_base = base
                    self._straight_writable = in_place and file.inline_writes and self._may_write
        return True

    def _resolve(self, offset: int, length: int) -> tuple[HostFile | None, int, int, bool] | None:
        """Follow the chain: ``(file, host offset, length, in place)``, with file None and host offset 1 for zeroes, 2
        for slow.

        None where that cannot be kept: metadata is not in memory; or the bytes are past the end of the file below, which
        can grow without a word.
        """
        node = self._root
        assert node is not None
        in_place = self._may_write
        while True:
            if node.detect_zeroes is not DetectZeroes.OFF or (node.trackers and node is not self._root):
                in_place = False
            length = min(length, node.size - offset)
            if length <= 0:
                return None
            try:
                segment = node.driver.map(offset, length)
            except NotMapped:
                return None
            length = segment.length
            if segment.kind is Kind.DATA:
                in_place = in_place and segment.in_place and not node.read_only
                if isinstance(segment.source, HostFile):
                    return segment.source, segment.offset, length, in_place
                assert segment.source is not None
                node, offset = segment.source.node, segment.offset
            elif segment.kind is Kind.UNALLOCATED:
                in_place = False
                backing = node.backing
                if backing is None or offset >= backing.node.size:
                    return None, _ZERO, length, False
                node = backing.node
            elif segment.kind is Kind.ZERO:
                return None, _ZERO, length, False
            else:
                return None, _SLOW, length, False

    def _fill(self, granule: int) -> int:
        """Resolve a granule and, where one segment covers them, some after it. Returns its entry, or 0 where it is
        not in memory."""
        if not self._ready and not self._prepare():
            return 0
        shift = self._shift
        entry = self._sift(granule)
        if entry:
            return entry
        start = granule << shift
        limit = min(self._size, ((granule | (REGION - 1)) + 1) << shift, start + (FILL_AHEAD << shift))
        found = self._resolve(start, limit - start)
        if found is None:
            return 0
        file, host, length, in_place = found
        whole = start + length >= self._size
        count = -(-length >> shift) if whole else length >> shift
        if count == 0:
            entry, count = self._mixed(start, min(1 << shift, self._size - start)), 1
        elif file is None:
            entry = host
        else:
            entry = self._file_entry(file, host, in_place=in_place)
        self._store(granule, entry, count, 1 << shift if entry & _CODE > _SLOW else 0)
        return entry

    def _sift(self, granule: int) -> int:
        """Resolve a granule and those around it, layer by layer, where the drivers can (`Driver.sift`): a deep chain costs a
        table look-up a layer, not a request's path. Filters that show their child as it is are passed. Returns its
        entry, or 0 where that is to be found out otherwise."""
        node, shift = self._root, self._shift
        assert node is not None
        first = granule & -SIFT
        left = list(range(first, min(first + SIFT, -(-self._size >> shift))))
        region = self._regions.get(granule >> REGION_BITS)
        if region is not None:
            base = granule & -REGION
            left = [number for number in left if not region[number - base]]
        in_place = self._may_write and node.detect_zeroes is DetectZeroes.OFF
        while left:
            found: dict[int, int] = {}
            below = node.driver.sift(shift, left, found)
            if below is None:
                passed = self._pass_filter(node, granule, left)
                if passed is None:
                    break
                left, child, straight_down = passed
                in_place = in_place and straight_down and not node.read_only
                node = child
                continue
            left, edge = below
            if found:
                self._keep(found, edge, in_place=in_place and not node.read_only)
            backing = node.backing
            if backing is None:
                self._keep(dict.fromkeys(left, ZERO_GRANULE), edge, in_place=False)
                break
            ended = [number for number in left if number << shift >= backing.node.size]
            self._keep(dict.fromkeys(ended, ZERO_GRANULE), edge, in_place=False)
            left = [
                n for n in left if min((n + 1) << shift, self._size) <= backing.node.size
            ]  # not what straddles its end
            node, in_place = backing.node, False
        region = self._regions.get(granule >> REGION_BITS)
        return 0 if region is None else region[granule & (REGION - 1)]

    def _pass_filter(self, node: Node, granule: int, left: list[int]) -> tuple[list[int], Node, bool] | None:
        """Where a node shows its child's bytes in their own place: the granules, with ``granule`` if it is among them, of which
        that is so, the child, and whether they may be written past both. None: it does not."""
        shift = self._shift
        start = (granule if granule in left else left[0]) << shift
        end = min(left[-1] + 1 << shift, self._size)
        try:
            segment = node.driver.map(start, end - start)
        except NotMapped:
            return None
        source = segment.source
        if segment.kind is not Kind.DATA or source is None or isinstance(source, HostFile) or segment.offset != start:
            return None
        child = source.node
        if child.size < node.size:
            return None
        end = start + segment.length
        stop = -(-end >> shift) if end >= self._size else end >> shift
        inside = left[bisect_left(left, start >> shift) : bisect_left(left, stop)]
        plain = child.detect_zeroes is DetectZeroes.OFF and not child.trackers
        return inside, child, segment.in_place and plain

    def _keep(self, found: dict[int, int], edge: Edge, *, in_place: bool) -> None:
        """Store what a driver sifted, with host offsets behind ``edge``, which must lead straight to a host file."""
        file, base, size, direct = straight(edge)
        for granule, where in found.items():
            if where == ZERO_GRANULE:
                entry = _ZERO
            elif where == SLOW_GRANULE:
                entry = _SLOW
            else:
                host = where & ~1
                # Past the file's end: not kept, it can grow without a word. No host file: `_resolve` knows what to do.
                if file is None or host + (1 << self._shift) > size:
                    continue
                entry = self._file_entry(file, base + host, in_place=in_place and direct and bool(where & 1))
            self._store(granule, entry, 1, 0)

    def _mixed(self, start: int, length: int) -> int:
        """The entry of a granule that several segments make up: zero if all are, else slow; 0 if one cannot be kept."""
        position = 0
        while position < length:
            found = self._resolve(start + position, length - position)
            if found is None:
                return 0
            if found[0] is not None or found[1] != _ZERO:
                return _SLOW
            position += found[2]
        return _ZERO

    def _file_entry(self, file: HostFile, host: int, *, in_place: bool) -> int:
        if host & 511 or file.inline_flags is None:
            return _SLOW
        index = self._index.get(file)
        if index is None:
            index = len(self._fds)
            if index > MAX_INDEX:
                return _SLOW
            self._index[file] = index
            self._fds.append(file.fd)
            self._files.append(file)
            self._read_flags.append(file.inline_flags)
        return host | 2 * index | (in_place and file.inline_writes)

    def _store(self, granule: int, entry: int, count: int, step: int) -> None:
        regions = self._regions
        key = granule >> REGION_BITS
        region = regions.get(key)
        if region is None:
            if len(regions) >= MAX_REGIONS:
                del regions[next(iter(regions))]
            region = regions[key] = _UNKNOWN[:]
        first = granule & (REGION - 1)
        for index in range(count):
            region[first + index] = entry + index * step

    # -- the fast path -------------------------------------------------------------------------------------------------
    def try_read(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from ``offset`` without blocking: DATA; or HOLE (all zeroes, the view untouched); or MISS
        (retry slowly)."""
        length = len(view)
        if self._straight is not None:
            try:
                done = _preadv(self._straight_fd, (view,), offset + self._straight_base, self._straight_flags)
            except OSError:  # EAGAIN: cold, an ordinary answer. Anything else happens again on the slow path.
                return MISS
            return DATA if done == length else MISS
        if not self.enabled:
            return MISS
        shift = self._shift
        granule = offset >> shift
        inside = offset - (granule << shift)
        if inside + length > 1 << shift or not self._ready:
            return self._read_run(offset, view)
        try:
            entry = self._regions[granule >> REGION_BITS][granule & (REGION - 1)]
        except KeyError:
            entry = 0
        if not entry:
            entry = self._fill(granule)
        code = entry & _CODE
        if code < 4:
            return HOLE if code == _ZERO else MISS
        index = code >> 1
        try:
            done = _preadv(self._fds[index], (view,), (entry & _OFFSET) + inside, self._read_flags[index])
        except OSError:
            return MISS
        return DATA if done == length else MISS

    def _runs(self, offset: int, length: int) -> list[tuple[int, int, int]] | None:
        """The range as merged runs ``(code, host offset, length)``; None if any part must go slowly."""
        shift, runs = self._shift, list[tuple[int, int, int]]()
        last_code, last_host, last_length, expected = 0, 0, 0, -1
        while length:
            granule = offset >> shift
            region = self._regions.get(granule >> REGION_BITS)
            entry = region[granule & (REGION - 1)] if region is not None else 0
            if not entry:
                entry = self._fill(granule)
            code = entry & _CODE
            if code < 4 and code != _ZERO:
                return None
            inside = offset - (granule << shift)
            step = min((1 << shift) - inside, length)
            host = (entry & _OFFSET) + inside
            if code == last_code and (host == expected or code == _ZERO):
                last_length += step
            else:
                if last_length:
                    runs.append((last_code, last_host, last_length))
                last_code, last_host, last_length = code, host, step
            expected = host + step
            offset += step
            length -= step
        runs.append((last_code, last_host, last_length))
        return runs

    def _read_run(self, offset: int, view: memoryview) -> int:
        if not self._ready:
            return self.try_read(offset, view) if self._prepare() else MISS
        runs = self._runs(offset, len(view))
        if runs is None:
            return MISS
        if len(runs) == 1 and runs[0][0] == _ZERO:
            return HOLE
        position = 0
        for code, host, length in runs:
            part = view[position : position + length]
            position += length
            if code == _ZERO:
                fill_zeroes(part)
                continue
            index = code >> 1
            try:
                if _preadv(self._fds[index], (part,), host, self._read_flags[index]) != length:
                    return MISS
            except OSError:  # EAGAIN: cold, an ordinary answer. Anything else happens again on the slow path.
                return MISS
        return DATA

    def try_write(self, offset: int, view: memoryview) -> int:
        """Write ``view`` in place without blocking: DATA; or MISS: nothing, or only a part, is written: write again
        slowly, also where the host refused (it says so again there)."""
        length = len(view)
        file = self._straight
        if file is not None:
            if not self._straight_writable:
                return MISS
            host = offset + self._straight_base
        else:
            if not self.enabled:
                return MISS
            shift = self._shift
            granule = offset >> shift
            inside = offset - (granule << shift)
            if inside + length > 1 << shift or not self._ready:
                return self._write_run(offset, view)
            try:
                entry = self._regions[granule >> REGION_BITS][granule & (REGION - 1)]
            except KeyError:
                entry = 0
            if not entry:
                entry = self._fill(granule)
            code = entry & _CODE
            if code < 4 or not code & 1:
                return self._write_now(offset, view)
            file = self._files[code >> 1]
            host = (entry & _OFFSET) + inside
        try:
            if _pwrite(file.fd, view, host) != length:  # type: ignore[union-attr]  # codes from 4 on have a file
                return MISS
        except OSError:
            return MISS
        if host + length > file.highest:  # type: ignore[union-attr]
            file.highest = host + length  # type: ignore[union-attr]
        root = self._root
        if offset + length > root.own_highest:  # type: ignore[union-attr]  # a prepared map has a root
            root.own_highest = offset + length  # type: ignore[union-attr]
        for tracker in self._trackers:
            tracker.mark(offset, length)
        return DATA

    def _write_run(self, offset: int, view: memoryview) -> int:
        if not self._ready:
            return self.try_write(offset, view) if self._prepare() else MISS
        runs = self._runs(offset, len(view))
        if runs is None or any(not code & 1 or code < 4 for code, _, _ in runs):
            return self._write_now(offset, view)
        position = 0
        for code, host, length in runs:
            file = self._files[code >> 1]
            assert file is not None
            try:
                if _pwrite(file.fd, view[position : position + length], host) != length:
                    return MISS
            except OSError:
                return MISS
            file.highest = max(file.highest, host + length)
            position += length
        assert self._root is not None
        self._root.written(offset, len(view))
        return DATA

    def _write_now(self, offset: int, view: memoryview) -> int:
        """Ask the node's driver to allocate and write at once, while no slow request touches the range."""
        root = self._root
        if root is None or not self._may_write or not self._allocates or root.detect_zeroes is not DetectZeroes.OFF:
            return MISS
        if root.busy and root.overlapped(offset, len(view)):
            return MISS
        try:
            if not root.driver.write_now(offset, view):
                return MISS
        except OSError:
            return MISS
        root.written(offset, len(view))
        return DATA


def straight(edge: Edge) -> tuple[HostFile | None, int, int, bool]:
    """The host file that a node's bytes stand in, all in one run: file, host offset of the first byte, bytes, and whether
    they may be written past the nodes between. File None: it is not so."""
    node, base, in_place = edge.node, 0, True
    size = node.size
    while size:
        try:
            segment = node.driver.map(base, size)
        except NotMapped:  # an image inside an image
            break
        if segment.kind is not Kind.DATA or segment.length != size:
            break
        in_place = (
            in_place
            and segment.in_place
            and not (node.read_only or node.trackers or node.detect_zeroes is not DetectZeroes.OFF)
        )
        if isinstance(segment.source, HostFile):
            return segment.source, segment.offset, size, in_place
        assert segment.source is not None
        node, base = segment.source.node, segment.offset
    return None, 0, 0, False


def chain_granularity(root: Node) -> int:
    """The smallest mapping granularity (bytes) of all nodes below; 0 where every one is a straight line."""
    smallest, todo, seen = 0, [root], set[int]()
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        own = node.driver.map_granularity
        if own and (not smallest or own < smallest):
            smallest = own
        todo.extend(edge.node for edge in node.children.values())
    return smallest
