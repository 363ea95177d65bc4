"""The dirty map against a set of granule numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from livedisk.jobs.dirty import DirtyMap

GRANULE = 512
SIZE = 40 * GRANULE + 100

ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE)).map(lambda r: (r[0], min(r[1], SIZE - r[0])))


@given(st.lists(st.tuples(st.sampled_from(["mark", "clear"]), ranges)))
def test_marks_and_clears(steps: list[tuple[str, tuple[int, int]]]) -> None:
    dirty, model = DirtyMap(SIZE, GRANULE), set[int]()
    for name, (offset, length) in steps:
        getattr(dirty, name)(offset, length)
        for granule in range(-(-SIZE // GRANULE)):
            low, high = granule * GRANULE, min((granule + 1) * GRANULE, SIZE)
            if name == "mark" and length and offset < high and low < offset + length:
                model.add(granule)
            elif name == "clear" and length and offset <= low and high <= offset + length:
                model.discard(granule)
        sizes = [min(GRANULE, SIZE - granule * GRANULE) for granule in model]
        assert dirty.dirty == sum(sizes)
        found, at = set[int](), 0
        while (run := dirty.next(at, 3 * GRANULE)) is not None:
            assert run[1] <= 3 * GRANULE
            found |= set(range(run[0] // GRANULE, -(-(run[0] + run[1]) // GRANULE)))
            at = -(-(run[0] + run[1]) // GRANULE) * GRANULE
            if at >= SIZE:
                break
        assert found == model
        assert dirty.any(offset, length) == any(
            offset < (granule + 1) * GRANULE and granule * GRANULE < offset + length for granule in model if length
        )
