"""Dirty bitmaps of one node against the simplest model: a set of bytes' sectors each, whatever records them behind the scenes."""

from __future__ import annotations

import hashlib
import random
from typing import Any, cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from livedisk.emulator.block import bits
from livedisk.emulator.block.bitmaps import Bitmaps, DirtyBitmap, Undo
from livedisk.emulator.block.node import DirtyTracker, Node
from livedisk.emulator.errors import BlockError

SIZE = 100 * 512
GRANULARITIES = st.sampled_from([512, 1024, 4096, 65536])
offsets = st.integers(0, SIZE - 1)
lengths = st.sampled_from([1, 512, 513, 4096, 10_000, SIZE])


class FakeNode:
    """What bitmaps ask of a node."""

    name = "n"

    def __init__(self) -> None:
        self.size = SIZE
        self.trackers: list[DirtyTracker] = []
        self.bitmaps = Bitmaps(cast(Node, self))
        self.remapped = 0
        self.driver = self

    def bitmaps_changed(self) -> None:
        """Nothing is stored."""

    def mapping_changed(self) -> None:
        self.remapped += 1

    def write(self, offset: int, length: int) -> None:
        for tracker in self.trackers:
            tracker.mark(offset, length)


class Model:
    """A bitmap as a set of granules. ``widest``: the bytes that the node had at most since the last clear."""

    def __init__(self, granularity: int, size: int, recording: bool) -> None:
        self.granularity = granularity
        self.size = self.widest = size
        self.recording = recording
        self.dirty: set[int] = set()

    def mark(self, offset: int, length: int) -> None:
        if length > 0:
            self.dirty |= set(range(offset // self.granularity, (offset + length - 1) // self.granularity + 1))

    def resize(self, size: int) -> None:
        old, self.size = self.size, size
        self.dirty = {one for one in self.dirty if one * self.granularity < size}
        if size > old:
            self.mark(old, min(size, self.widest) - old)
        self.widest = max(self.widest, size)


class Machine(RuleBasedStateMachine):
    """Every command of a bitmap, writes, and changes of size, in any order."""

    bitmaps = Bundle("bitmaps")
    frozen = Bundle("frozen")
    changes = Bundle("changes")

    def __init__(self) -> None:
        super().__init__()
        self.node = FakeNode()
        self.known: dict[DirtyBitmap, Model] = {}
        self.names = 0

    @rule(target=bitmaps, granularity=GRANULARITIES, disabled=st.booleans())
    def add(self, granularity: int, disabled: bool) -> DirtyBitmap:
        self.names += 1
        made = self.node.bitmaps.create(granularity, f"b{self.names}", disabled=disabled)
        self.known[made] = Model(granularity, self.node.size, not disabled)
        return made

    @rule(offset=offsets, length=lengths)
    def write(self, offset: int, length: int) -> None:
        offset = min(offset, self.node.size - 1)
        length = min(length, self.node.size - offset)
        self.node.write(offset, length)
        for model in self.known.values():
            if model.recording:
                model.mark(offset, length)

    @rule(bitmap=bitmaps)
    def clear(self, bitmap: DirtyBitmap) -> None:
        if bitmap in self.known and not bitmap.busy:
            bitmap.clear()
            model = self.known[bitmap]
            model.dirty, model.widest = set(), model.size

    @rule(bitmap=bitmaps, on=st.booleans())
    def switch(self, bitmap: DirtyBitmap, on: bool) -> None:
        if bitmap in self.known and not bitmap.busy:
            (bitmap.enable if on else bitmap.disable)()
            self.known[bitmap].recording = on

    @rule(target_=bitmaps, source=bitmaps)
    def merge(self, target_: DirtyBitmap, source: DirtyBitmap) -> None:
        if target_ in self.known and source in self.known and not target_.busy:
            target_.merge(source)
            model, other = self.known[target_], self.known[source]
            for granule in sorted(other.dirty):
                start = granule * other.granularity
                model.mark(start, min(other.granularity, other.size - start))

    @rule(bitmap=consumes(bitmaps))
    def remove(self, bitmap: DirtyBitmap) -> None:
        if bitmap in self.known:
            self.node.bitmaps.remove(bitmap)
            del self.known[bitmap]

    @rule(size=st.integers(1, SIZE // 512).map(lambda n: n * 512))
    def resize(self, size: int) -> None:
        self.node.size = size
        self.node.bitmaps.follow_size()
        for model in self.known.values():
            model.resize(size)

    @rule(more=st.sampled_from([512, 5000 // 512 * 512]))
    def write_past_the_end(self, more: int) -> None:
        """As it happens to the file below an image."""
        old = self.node.size
        self.node.size = old + more
        self.node.write(old, more)
        for model in self.known.values():
            model.resize(old + more)
            if model.recording:
                model.mark(old, more)

    @rule(bitmap=bitmaps, abdicate=st.booleans(), offset=offsets, length=lengths)
    def copied_by_a_job(self, bitmap: DirtyBitmap, abdicate: bool, offset: int, length: int) -> None:
        if bitmap not in self.known or bitmap.busy:
            return
        model = self.known[bitmap]
        before = set(model.dirty)
        successor = bitmap.freeze()
        assert bitmap.busy
        assert bitmap.recording == model.recording
        with pytest.raises(BlockError, match="in use by another operation"):
            bitmap.check_usable()
        assert next(iter(self.node.bitmaps)) is successor
        self.write(offset, length)
        after = model.dirty
        model.dirty = before
        assert [*bitmap.runs()] == runs(model)
        if abdicate:
            model.dirty = set()
            if model.recording:
                offset = min(offset, model.size - 1)
                model.mark(offset, min(length, model.size - offset))
            name = bitmap.name
            assert bitmap.abdicate() is successor
            assert successor.name == name
            del self.known[bitmap]
            model.widest = model.size
            self.known[successor] = model
        else:
            model.dirty = after
            assert bitmap.reclaim() is bitmap
        assert not successor.busy

    @rule(bitmap=bitmaps, source=bitmaps, cleared=st.booleans(), offset=offsets, length=lengths)
    def taken_back(self, bitmap: DirtyBitmap, source: DirtyBitmap, cleared: bool, offset: int, length: int) -> None:
        if bitmap not in self.known or source not in self.known or bitmap.busy:
            return
        undo = Undo(bitmap)
        bitmap.clear() if cleared else bitmap.merge(source)
        if cleared:
            self.known[bitmap].widest = self.known[bitmap].size
        self.write(offset, length)
        undo.back()

    @invariant()
    def each_says_what_its_model_says(self) -> None:
        assert {one for one in self.node.bitmaps if one.name is not None} == set(self.known)
        for bitmap, model in self.known.items():
            assert [*bitmap.runs()] == runs(model)
            assert bitmap.count == len(model.dirty) * model.granularity
            assert bitmap.recording == model.recording
            granules = -(-model.size // model.granularity)
            number = sum(1 << granule for granule in model.dirty)
            raw = number.to_bytes(-(-granules // 64) * 8, "little")
            assert bitmap.sha256() == hashlib.sha256(raw).hexdigest()

    @invariant()
    def one_recorder_for_all(self) -> None:
        assert len(self.node.trackers) == any(model.recording for model in self.known.values())


def runs(model: Model) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for granule in sorted(model.dirty):
        start = granule * model.granularity
        length = min(model.granularity, model.size - start)
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found


class MappedMachine(Machine):
    """The same on arrays that are mappings of many small pages, as those of huge disks are."""

    def __init__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(bits, "PAGE", 16)
        self.patch.setattr(bits, "MAPPED", 8)
        super().__init__()

    def teardown(self) -> None:
        self.patch.undo()


TestMachine = Machine.TestCase
TestMappedMachine = MappedMachine.TestCase


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_runs_and_clean_places_of_a_part(step: int) -> None:
    node = FakeNode()
    bitmap = node.bitmaps.create(4096, "x")
    assert node.remapped == 1
    for start, length in ((0, 1), (8192, 8192), (SIZE - 1, 1)):
        node.write(start, length)
    dirty = bytearray(SIZE)
    for start, length in bitmap.runs():
        dirty[start : start + length] = b"\1" * length
    for start in range(0, SIZE, 997 * step):
        for end in (start, start + 1, start + 5000, SIZE, SIZE + 5):
            part = dirty[start : min(end, SIZE)]
            assert bitmap.next_dirty(start, end) == (start + part.find(1) if 1 in part else None)
            assert bitmap.next_clean(start, end) == (start + part.find(0) if 0 in part else None)
            assert bitmap.any(start, end - start) == (1 in part)
            run = bitmap.next_run(start, end, 3000)
            if run is None:
                assert 1 not in part
            else:
                assert run[0] == start + part.find(1)
                assert 0 < run[1] <= 3000
                assert all(dirty[run[0] : sum(run)])


def test_unmark_keeps_granules_that_are_only_touched() -> None:
    bitmap = FakeNode().bitmaps.create(4096, "x")
    bitmap.mark(0, SIZE)
    bitmap.unmark(1, 8192)
    assert [*bitmap.runs()] == [(0, 4096), (8192, SIZE - 8192)]
    bitmap.unmark(SIZE - 4096 - SIZE % 4096, 4096 + SIZE % 4096)
    assert bitmap.next_dirty(SIZE - 1) is None


def test_a_name_is_there_once_and_not_too_long() -> None:
    bitmaps = FakeNode().bitmaps
    bitmaps.create(512, "x")
    with pytest.raises(BlockError, match="Bitmap already exists: x"):
        bitmaps.create(512, "x")
    with pytest.raises(BlockError, match="Bitmap name too long: é"):
        bitmaps.create(512, "é" * 512)
    bitmaps.create(512, None)
    bitmaps.create(512, None)
    assert len(bitmaps) == 3


def test_read_only_and_inconsistent_ones_are_refused() -> None:
    bitmap: Any = FakeNode().bitmaps.create(512, "x")
    bitmap.read_only = True
    bitmap.check_usable(allow_read_only=True)
    with pytest.raises(BlockError, match="Bitmap 'x' is readonly and cannot be modified"):
        bitmap.check_usable()
    bitmap.inconsistent = True
    with pytest.raises(BlockError, match="Bitmap 'x' is inconsistent and cannot be used"):
        bitmap.check_usable(allow_read_only=True)
    bitmap.successor = bitmap
    with pytest.raises(BlockError, match="already has one"):
        bitmap.freeze()


@pytest.mark.parametrize("number", [1, 7, 5000, 70_001])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 13])
def test_merging_across_granularities(number: int, steps: int) -> None:
    """Many bits and few take different ways."""
    node = FakeNode()
    node.size = number * 512 << steps
    fine, coarse = node.bitmaps.create(512, "f"), node.bitmaps.create(512 << steps, "c")
    chance = random.Random(number + steps)
    places = {chance.randrange(node.size // 512) for _ in range(300)}
    for place in places:
        fine.mark(place * 512, 512)
    coarse.merge(fine)
    assert set(coarse.bits.search(1)) == {place >> steps for place in places}
    again = node.bitmaps.create(512, "g")
    again.merge(coarse)
    assert again.count == coarse.count
    assert [*again.runs()] == [*coarse.runs()]
