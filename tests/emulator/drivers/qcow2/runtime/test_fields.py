"""Refcount entries of every width against a plain list, and metadata caches against their promises."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livedisk.emulator.drivers.qcow2.cache import Table, TableCache
from livedisk.emulator.drivers.qcow2.fields import RefcountFields
from livedisk.emulator.drivers.qcow2.tables import count_run

WIDTHS = [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("bits", WIDTHS)
@given(data=st.data())
def test_entries_are_a_list_of_numbers(bits: int, data: st.DataObject) -> None:
    fields = RefcountFields(bits)
    raw = bytearray(64)
    entries = 64 * 8 // bits
    model = [0] * entries
    for _ in range(data.draw(st.integers(0, 6))):
        start = data.draw(st.integers(0, entries - 1))
        count = data.draw(st.integers(1, entries - start))
        value = data.draw(st.integers(0, fields.limit))
        fields.fill(raw, start, count, value)
        model[start : start + count] = [value] * count
    assert [fields.get(raw, at) for at in range(entries)] == model
    at = data.draw(st.integers(0, entries - 1))
    assert fields.find_free(raw, at) == next((n for n in range(at, entries) if model[n] == 0), -1)
    assert fields.find_used(raw, at) == next((n for n in range(at, entries) if model[n]), entries)
    low, high = fields.dirty_bytes(at, 1)
    changed = bytearray(raw)
    fields.set(changed, at, fields.limit - model[at])
    assert changed[:low] == raw[:low]
    assert changed[high:] == raw[high:]


@given(st.integers(0, 300), st.integers(1, 400), st.integers(0, 400), st.sampled_from([0, 512, 65536]))
def test_runs_are_counted_to_the_first_difference(index: int, limit: int, broken: int, step: int) -> None:
    data = array("Q", ((1 << 63) + number * step for number in range(index + limit)))
    if broken and index + broken < len(data):
        data[index + broken] = 7
        wanted = broken
    else:
        wanted = limit
    assert count_run(data, index, limit, step) == min(wanted, limit)


def test_a_cache_keeps_what_the_disk_does_not_have() -> None:
    cache: TableCache[bytearray] = TableCache(2)
    dirty = cache.insert(Table(0, bytearray(512)))
    cache.mark(dirty, 8, 16)
    for number in range(1, 10):
        cache.insert(Table(number * 512, bytearray(512)))
    assert cache.get(0) is dirty
    assert len(cache) == 2
    [(table, low, high, raw)] = cache.take_dirty()
    assert (table, low, high, raw) == (dirty, 0, 512, bytes(512))
    for number in range(10, 20):
        cache.insert(Table(number * 512, bytearray(512)))
    assert cache.get(0) is dirty, "it is on its way to the disk: a reload would read the old content"
    cache.written()
    for number in range(20, 30):
        cache.insert(Table(number * 512, bytearray(512)))
    assert cache.get(0) is None
