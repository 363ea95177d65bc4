"""Repair: what qemu-img can make whole we make whole; content survives; so does a power cut in the middle of it."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.plain_file import PlainFile
from kit.qcow2_corpus import CORPUS, Image
from kit.qcow2_damage import Anatomy, damage, put
from kit.qemu import qemu_img, qemu_io, read_all
from livedisk.emulator.drivers.qcow2.check import CheckFailed, CheckResult, check
from livedisk.emulator.drivers.qcow2.geometry import COMPRESSED, OFFSET_MASK
from livedisk.emulator.drivers.qcow2.header import Incompatible, Purpose, read_header
from livedisk.emulator.drivers.qcow2.repair import Fix, repair, repair_dirty
from livedisk.emulator.drivers.qcow2.snapshots import read_snapshots
from livedisk.emulator.errors import ImageError

Maker = Callable[[str], Image]
Ours = Callable[[Path], dict[str, Any]]
Theirs = Callable[..., dict[str, Any] | None]

DAMAGED = ["v2", "v3-snapshots", "zstd", "extended", "data-file", "cluster-512", "refcount-1", "refcount-64"]
PROBLEMS = {"corruptions", "leaks"}


def mend(path: Path, fix: Fix = Fix.ALL) -> CheckResult:
    with PlainFile(path) as file:
        return asyncio.run(repair(file, fix))


def sound(found: dict[str, Any] | None) -> bool:
    return found is not None and not PROBLEMS & found.keys() and not found["check-errors"]


def forget_refcounts(raw: bytearray) -> None:
    block = Anatomy(raw).blocks[0]
    raw[block : block + 65536] = bytes(65536)


def forget_refcount_table(raw: bytearray) -> None:
    anatomy = Anatomy(raw)
    raw[anatomy.refcount_table : anatomy.refcount_table + 512] = bytes(512)


def no_refcount_table(raw: bytearray) -> None:
    raw[56:60] = bytes(4)


def refcount_table_of_nonsense(raw: bytearray) -> None:
    put(raw, Anatomy(raw).refcount_table, 0x1234_5678_9ABC_DEF0)


def refcount_block_is_an_l2_table(raw: bytearray) -> None:
    anatomy = Anatomy(raw)
    put(raw, anatomy.refcount_table, anatomy.l2_tables[0])


def refcounts_too_high(raw: bytearray) -> None:
    block = Anatomy(raw).blocks[0]
    for cluster in range(20):
        raw[block + 2 * cluster : block + 2 * cluster + 2] = (9).to_bytes(2, "big")


def refcounts_too_low(raw: bytearray) -> None:
    anatomy = Anatomy(raw)
    block = anatomy.blocks[0]
    for cluster in range(3, 12):
        old = int.from_bytes(raw[block + 2 * cluster : block + 2 * cluster + 2], "big")
        if old > 1:
            raw[block + 2 * cluster : block + 2 * cluster + 2] = (old - 1).to_bytes(2, "big")


def copied_flags_flipped(raw: bytearray) -> None:
    """Of data clusters and the L2 table; compressed entries never have one."""
    anatomy = Anatomy(raw)
    step = anatomy.header.geometry.l2_entry_size
    for place in anatomy.used_entries(anatomy.l2_tables[0], 65536):
        entry = int.from_bytes(raw[place : place + 8], "big")
        if place % step == 0 and entry & OFFSET_MASK and not entry & COMPRESSED:
            raw[place] ^= 0x80
    raw[anatomy.l1] ^= 0x80


def dirty_and_corrupt(raw: bytearray) -> None:
    raw[79] |= Incompatible.DIRTY | Incompatible.CORRUPT


SPOILERS = [
    forget_refcounts,
    forget_refcount_table,
    no_refcount_table,
    refcount_table_of_nonsense,
    refcount_block_is_an_l2_table,
    refcounts_too_high,
    refcounts_too_low,
    copied_flags_flipped,
    dirty_and_corrupt,
]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", ["v3", "v3-snapshots", "extended-backing"])
def test_damage_beside_the_data_is_repaired_without_loss(
    spoil: Callable[[bytearray], None], name: str, corpus: Maker, theirs: Theirs, tmp_path: Path
) -> None:
    image = corpus(name)
    raw = bytearray(image.path.read_bytes())
    spoil(raw)
    path = tmp_path / "a.qcow2"
    path.write_bytes(raw)
    result = mend(path)
    assert (result.corruptions, result.leaks) == (0, 0)
    assert sound(theirs(path))
    assert read_all(path, tmp_path, "-f", "qcow2") == bytes(image.content)
    with PlainFile(path) as file:
        header = asyncio.run(read_header(file, Purpose.WRITE))  # neither dirty nor corrupt any more
        assert header.incompatible & 3 == 0
        names = [snapshot.name for snapshot in asyncio.run(read_snapshots(file, header)).snapshots]
    assert names == ([b"first", b"second snapshot"] if image.variant.snapshots else [])


@pytest.mark.parametrize("variant", [v for v in CORPUS if v.cluster_size <= 65536], ids=str)
def test_lost_refcounts_are_rebuilt_in_every_variant(
    variant: Any, corpus: Maker, theirs: Theirs, tmp_path: Path
) -> None:
    image = corpus(variant.name)
    path = tmp_path / "a.qcow2"
    raw = bytearray(image.path.read_bytes())
    anatomy = Anatomy(raw)
    raw[anatomy.refcount_table : anatomy.refcount_table + anatomy.cluster] = bytes(anatomy.cluster)
    path.write_bytes(raw)
    result = mend(path)
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)
    assert sound(theirs(path))
    assert read_all(path, tmp_path, "-f", "qcow2") == bytes(image.content)


@pytest.mark.parametrize("name", DAMAGED)
def test_random_damage_is_repaired_wherever_qemu_can(name: str, corpus: Maker, theirs: Theirs, tmp_path: Path) -> None:
    intact = bytearray(corpus(name).path.read_bytes())
    path, other = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    both = 0
    for seed in range(2000, 2012):
        raw = damage(intact, seed)
        path.write_bytes(raw)
        other.write_bytes(raw)
        theirs(other, "-r", "all")
        try:
            mend(path)
        except CheckFailed:
            continue
        if sound(theirs(other)):
            # An L2 "table" in the middle of guest data is not ours to write into; QEMU does.
            assert sound(theirs(path)) or _table_in_data(raw), f"seed {seed}"
            both += 1
    assert both >= 3


def _table_in_data(raw: bytearray) -> bool:
    """Whether an L1 entry points at something that is no table."""
    anatomy = Anatomy(raw)
    return any(
        table % anatomy.cluster or any(entry & 0x3F00_0000_0000_01FE for entry in anatomy.words(table, 64))
        for table in anatomy.l2_tables
        if table + 512 <= len(raw)
    )


@pytest.mark.parametrize("fix", [Fix.LEAKS, Fix.ALL], ids=["leaks", "all"])
def test_counts_of_what_was_repaired_are_qemus(fix: Fix, corpus: Maker, theirs: Theirs, tmp_path: Path) -> None:
    path, other = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    raw = bytearray(corpus("v3-snapshots").path.read_bytes())
    refcounts_too_high(raw)
    refcounts_too_low(raw)
    path.write_bytes(raw)
    other.write_bytes(raw)
    found = mend(path, fix).to_json("")
    expected = theirs(other, "-r", "all" if fix is Fix.ALL else "leaks")
    assert expected is not None
    for key in ("leaks-fixed", "corruptions-fixed", "corruptions", "leaks"):
        assert found.get(key, 0) == expected.get(key, 0), key


def test_leaks_alone_do_not_touch_errors(corpus: Maker, tmp_path: Path) -> None:
    raw = bytearray(corpus("v3").path.read_bytes())
    forget_refcount_table(raw)
    path = tmp_path / "a.qcow2"
    path.write_bytes(raw)
    with pytest.raises(CheckFailed, match="must be rebuilt"):
        mend(path, Fix.LEAKS)
    assert path.read_bytes() == raw


def test_snapshots_survive_a_repair_of_an_image_with_bitmaps(tmp_path: Path, theirs: Theirs) -> None:
    """qemu-img 10.0 loses all snapshots here: loading the bitmaps makes it write the header before it has read the
    snapshot table."""
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -P 1 0 64k")
    qemu_img("snapshot", "-c", "kept", path)
    qemu_img("bitmap", "--add", path, "b0")
    raw = bytearray(path.read_bytes())
    refcounts_too_high(raw)
    path.write_bytes(raw)
    mend(path)
    assert "kept" in qemu_img("snapshot", "-l", path)
    assert sound(theirs(path))


def test_a_version_3_snapshot_table_gets_the_extra_data_it_lacks(
    corpus: Maker, ours: Ours, theirs: Theirs, tmp_path: Path
) -> None:
    """An image that was upgraded from version 2 by hand."""
    image = corpus("v3-snapshots")
    path = tmp_path / "a.qcow2"
    raw = bytearray(image.path.read_bytes())
    anatomy = Anatomy(raw)
    with PlainFile(image.path) as file:
        header = asyncio.run(read_header(file, Purpose.READ))
        table = asyncio.run(read_snapshots(file, header))
    short = b"".join(
        (entry := _without_extra(snapshot.to_bytes())) + bytes(-len(entry) % 8) for snapshot in table.snapshots
    )
    at = anatomy.header.snapshots_offset
    raw[at : at + len(short)] = short
    path.write_bytes(raw)
    assert ours(path) == theirs(path)
    assert ours(path)["corruptions"] == 2
    result = mend(path)
    assert (result.corruptions, result.corruptions_fixed) == (0, 2)
    assert sound(theirs(path))
    listing = qemu_img("snapshot", "-l", path)
    assert "first" in listing
    assert "second snapshot" in listing
    assert read_all(path, tmp_path, "-f", "qcow2") == bytes(image.content)


LENGTHS = ((12, 2), (14, 2), (36, 4))
"""Where a snapshot table entry says how long its id, its name and its extra data are, and in how many bytes."""


@pytest.mark.parametrize("field", range(3), ids=["id", "name", "extra data"])
def test_a_snapshot_table_that_ends_past_the_file_costs_the_clusters_behind_it_nothing(
    field: int, corpus: Maker, theirs: Theirs, tmp_path: Path
) -> None:
    """Such a table is not counted: a new one takes its place, and what stands where it would reach keeps its refcounts."""
    image = corpus("refcount-32")  # clusters of 4 KiB
    raw = bytearray(image.path.read_bytes())
    at = Anatomy(raw).header.snapshots_offset
    assert any(raw[at + 4096 :]), "nothing stands behind the table"
    place, size = LENGTHS[field]
    raw[at + place : at + place + size] = (0xFFF0).to_bytes(size, "big")
    path = tmp_path / "a.qcow2"
    path.write_bytes(raw)
    mend(path)
    assert sound(theirs(path))
    assert read_all(path, tmp_path, "-f", "qcow2") == bytes(image.content)


def _without_extra(entry: bytes) -> bytes:
    extra = int.from_bytes(entry[36:40], "big")
    return entry[:36] + bytes(4) + entry[40 + extra :]


def test_dirty_image_is_repaired_before_it_is_opened(tmp_path: Path, theirs: Theirs) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "4M")
    qemu_io(path, "write -P 3 0 200k", "abort", expect=-6)
    with PlainFile(path) as file:
        assert asyncio.run(read_header(file, Purpose.WRITE)).dirty
        asyncio.run(repair_dirty(file))
        assert not asyncio.run(read_header(file, Purpose.WRITE)).dirty
    assert sound(theirs(path))
    qemu_io(path, "read -P 3 0 200k")


@pytest.mark.parametrize("spoil", SPOILERS[:5] + SPOILERS[7:], ids=lambda spoil: spoil.__name__)
def test_a_power_cut_during_a_repair_loses_nothing(
    spoil: Callable[[bytearray], None], corpus: Maker, theirs: Theirs, tmp_path: Path
) -> None:
    """Cut at any write, with the writes since the last flush there or not: repairing again makes the image whole."""
    image = corpus("v3-snapshots")
    raw = bytearray(image.path.read_bytes())
    spoil(raw)
    path = tmp_path / "a.qcow2"
    path.write_bytes(raw)
    with PlainFile(path, record=True) as file:
        asyncio.run(repair(file, Fix.ALL))
        events = file.events
    assert events
    dice = random.Random(7)
    for cut in range(len(events)):
        path.write_bytes(_replay(raw, events[:cut], dice))
        result = mend(path)
        assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), f"cut before event {cut}"
        assert sound(theirs(path))
        assert read_all(path, tmp_path, "-f", "qcow2") == bytes(image.content)


def _replay(raw: bytearray, events: list[tuple[int, bytes] | None], dice: random.Random) -> bytes:
    """The file after these events; of what was not flushed each sector is there or not."""
    out = bytearray(raw)
    last_flush = max((at for at, event in enumerate(events) if event is None), default=-1)
    for at, event in enumerate(events):
        if event is None:
            continue
        offset, data = event
        if len(out) < offset + len(data):
            out.extend(bytes(offset + len(data) - len(out)))
        for start in range(0, len(data), 512):
            if at < last_flush or dice.random() < 0.5:
                sector = data[start : start + 512]
                out[offset + start : offset + start + len(sector)] = sector
    return bytes(out)


def test_an_image_beyond_repair_says_so(corpus: Maker, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    shutil.copy(corpus("v3").path, path)
    with path.open("r+b") as file:
        file.write(b"XXXX")
    with pytest.raises(ImageError, match="Image is not in qcow2 format"):
        mend(path)


def test_repairing_a_sound_image_writes_nothing(corpus: Maker, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    for name in ("v2", "v3", "extended", "data-file"):
        shutil.copy(corpus(name).path, path)
        with PlainFile(path, record=True) as file:
            asyncio.run(repair(file, Fix.ALL))
            assert [event for event in file.events if event is not None] == []
            assert asyncio.run(check(file)).corruptions == 0
