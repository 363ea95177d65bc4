"""Bit arrays that look before they write: the same answers as from plain ones, and memory only for what is dirty."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from bitarray import bitarray, util
from hypothesis import given
from hypothesis import strategies as st

from livedisk.emulator.block import bits as module

HUGE = 1 << 30
"""Bits: 128 MiB."""


def resident() -> int:
    """Bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def plain(length: int, dirty: list[int]) -> bitarray:
    made = util.zeros(length, "little")
    for at in dirty:
        made[at % length] = 1
    return made


@st.composite
def arrays(draw: st.DrawFn, least: int = 1) -> bitarray:
    """Around multiples of pages, and mostly clean. Mapped ones among them."""
    length = draw(st.one_of(st.integers(least, 700), st.sampled_from([256, 512, 640])))
    made = module.zeros(length)
    made |= plain(length, draw(st.lists(st.integers(0, length - 1), max_size=8)))
    for start in draw(st.lists(st.integers(0, length - 1), max_size=2)):
        made[start : start + draw(st.integers(1, 200))] = 1
    return made


@pytest.fixture(scope="module", autouse=True)
def small_pages() -> object:
    """Pages of 64 bits, mappings from one byte on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PAGE", 64)
        patch.setattr(module, "MAPPED", 8)
        yield


@given(arrays(), arrays(), st.integers(0, 300))
def test_what_is_added_is_dirty_in_both(target: bitarray, source: bitarray, at: int) -> None:
    expected = bitarray(target)
    for place in source.search(1):
        if at + place < len(expected):
            expected[at + place] = 1
    module.add(target, source, at)
    assert target == expected


@given(arrays(), st.integers(1, 900))
def test_another_length_keeps_what_both_have(bits: bitarray, length: int) -> None:
    made = module.resized(bits, length)
    assert made == bits[:length] + util.zeros(max(length - len(bits), 0), "little")
    assert module.copied(bits) == bits


@given(arrays(100), arrays(), st.integers(0, 100))
def test_putting_replaces(target: bitarray, source: bitarray, at: int) -> None:
    source = source[: len(target) - at]
    expected = target[:at] + source + target[at + len(source) :]
    module.put(target, at, source)
    assert target == expected


@given(arrays())
def test_wiping_leaves_nothing(bits: bitarray) -> None:
    module.wipe(bits)
    assert not bits.any()


@given(arrays(), st.integers(1, 11), st.booleans())
def test_coarser_bits_cover_finer_ones(source: bitarray, steps: int, all_at_once: bool) -> None:
    target = module.zeros(-(-len(source) >> steps))
    expected = bitarray((source[at << steps : at + 1 << steps].any() for at in range(len(target))), "little")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEW", 0 if all_at_once and steps < 6 else 256)
        module.add_coarser(target, source, steps)
    assert target == expected


@given(arrays(), st.integers(1, 11), st.integers(0, 40), st.booleans())
def test_finer_bits_are_those_of_the_coarser_one(source: bitarray, steps: int, short: int, all_at_once: bool) -> None:
    target = module.zeros(max((len(source) << steps) - short, 1))
    expected = util.zeros(len(source) << steps, "little")
    for at in source.search(1):
        expected[at << steps : at + 1 << steps] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEW", 0 if all_at_once else 256)
        module.add_finer(target, source, steps)
    assert target == expected[: len(target)]


def test_only_what_is_dirty_takes_memory_and_it_is_given_back() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PAGE", 4096 * 8)
        patch.setattr(module, "MAPPED", 16 * 4096 * 8)
        before = resident()
        bits = module.zeros(HUGE)
        bits[HUGE // 3] = bits[HUGE - 1] = 1
        other = module.copied(bits)
        module.add(bits, other)
        module.put(other, 0, bits)
        assert other == bits
        assert list(module.dirty_pages(other))[-1] == (HUGE - module.PAGE, HUGE)
        assert bits.count() == 2
        assert resident() - before < 4 << 20
        bits.setall(1)
        assert resident() - before > 100 << 20
        del bits
        assert resident() - before < 4 << 20
