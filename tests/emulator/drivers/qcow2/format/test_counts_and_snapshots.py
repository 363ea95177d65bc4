"""Refcount blocks as numbers and back, the count of references, and the snapshot table byte for byte."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.plain_file import PlainFile
from kit.qcow2_corpus import Image
from livedisk.emulator.drivers.qcow2.counts import ClusterCounts, pack, unpack
from livedisk.emulator.drivers.qcow2.fields import RefcountFields
from livedisk.emulator.drivers.qcow2.geometry import Geometry
from livedisk.emulator.drivers.qcow2.header import Purpose, read_header
from livedisk.emulator.drivers.qcow2.snapshots import read_snapshots
from livedisk.emulator.errors import ImageError

WIDTHS = [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("bits", WIDTHS)
@given(data=st.data())
def test_blocks_are_what_the_entrywise_reading_says(bits: int, data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=64, max_size=64))
    fields = RefcountFields(bits)
    values = unpack(raw, bits)
    assert list(values) == [fields.get(bytearray(raw), at) for at in range(512 // bits)]
    assert pack(values, bits) == raw


@given(st.lists(st.tuples(st.sampled_from([0, 1, 65535, 65536, 200_000]), st.integers(1, 200)), max_size=20))
def test_counts_are_sums_and_stop_at_the_limit(additions: list[tuple[int, int]]) -> None:
    counts = ClusterCounts(10, 255)
    model: dict[int, int] = {}
    over = 0
    for cluster, times in additions:
        over += counts.add(cluster, times)
        model[cluster] = model.get(cluster, 0) + times
    assert all(counts.get(cluster) == times for cluster, times in model.items())
    assert over == sum(max(times - 255, 0) for times in model.values())
    assert list(counts.values(65530, 10)) == [min(model.get(at, 0), 255) for at in range(65530, 65540)]
    assert counts.length == max([10, *(cluster + 1 for cluster in model)])


def test_find_free_finds_a_run_and_avoids() -> None:
    counts = ClusterCounts(8, 1)
    for cluster in (0, 1, 4):
        counts.add(cluster)
    assert counts.find_free(0) == 2
    assert counts.find_free(0, 2) == 2
    assert counts.find_free(0, 3) == 5
    assert counts.find_free(0, 1, {2, 3}) == 5


@pytest.mark.parametrize("bits", range(9, 22))
@given(data=st.data())
def test_compressed_entries_say_where_the_data_is(bits: int, data: st.DataObject) -> None:
    geometry = Geometry(bits)
    offset = data.draw(st.integers(0, min(geometry.compressed_offset_mask, (1 << 55) - 1)))
    length = data.draw(st.integers(1, geometry.cluster_size - 512 or 512))
    extent = geometry.compressed_extent(geometry.compressed_entry(offset, length))
    assert extent.offset == offset
    assert length <= extent.length < length + 512
    assert (extent.offset + extent.length) % 512 == 0


@pytest.mark.parametrize("name", ["v2", "v3-snapshots", "zstd", "extended"])
def test_the_snapshot_table_is_written_back_byte_for_byte(name: str, corpus: Callable[[str], Image]) -> None:
    path = corpus(name).path
    with PlainFile(path) as file:
        header = asyncio.run(read_header(file, Purpose.READ))
        table = asyncio.run(read_snapshots(file, header))
    raw = path.read_bytes()
    assert table.to_bytes() == raw[header.snapshots_offset : header.snapshots_offset + table.length]
    assert [(s.id, s.name) for s in table.snapshots] == [(b"1", b"first"), (b"2", b"second snapshot")]
    assert all(s.disk_size == 4 << 20 and s.vm_state_size == 0 for s in table.snapshots)
    assert table.snapshots[0].info()["name"] == "first"


def test_too_much_extra_data_is_refused_but_can_be_cut(corpus: Callable[[str], Image], tmp_path: Path) -> None:
    raw = bytearray(corpus("v3-snapshots").path.read_bytes())
    path = tmp_path / "a.qcow2"
    at = int.from_bytes(raw[64:72], "big")
    raw[at + 36 : at + 40] = (2000).to_bytes(4, "big")
    path.write_bytes(raw)
    with PlainFile(path) as file:
        header = asyncio.run(read_header(file, Purpose.READ))
        with pytest.raises(ImageError, match=r"^Too much extra metadata in snapshot table entry 0$"):
            asyncio.run(read_snapshots(file, header))
        table = asyncio.run(read_snapshots(file, header, repair=True))
    assert table.trimmed == 1
    assert len(table.snapshots[0].extra) == 1024
