"""Check: the same numbers as qemu-img's on sound and on damaged images, in bounded time and memory on hostile ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.plain_file import PlainFile
from kit.qcow2_corpus import CORPUS, Image
from kit.qcow2_damage import Anatomy, damage, put
from kit.qemu import qemu_img
from livedisk.emulator.drivers.qcow2.check import CheckFailed, check
from livedisk.emulator.errors import ImageError

Maker = Callable[[str], Image]
Ours = Callable[[Path], dict[str, Any]]
Theirs = Callable[..., dict[str, Any] | None]

COPIED = 1 << 63
DAMAGED = ["v2", "v3", "v3-snapshots", "zstd", "extended", "data-file", "cluster-512", "refcount-1", "refcount-64"]


@pytest.mark.parametrize("variant", CORPUS, ids=str)
def test_sound_images_have_qemus_numbers(variant: Any, corpus: Maker, ours: Ours, theirs: Theirs) -> None:
    image = corpus(variant.name)
    found = ours(image.path)
    assert found == theirs(image.path)
    assert not {"corruptions", "leaks"} & found.keys()
    assert found["check-errors"] == 0


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("block", range(3))
def test_random_damage_has_qemus_numbers(
    name: str, block: int, corpus: Maker, ours: Ours, theirs: Theirs, tmp_path: Path
) -> None:
    sound = bytearray(corpus(name).path.read_bytes())
    path = tmp_path / "damaged.qcow2"
    compared = 0
    for seed in range(block * 8, block * 8 + 8):
        path.write_bytes(damage(sound, seed))
        expected = theirs(path)
        if expected is None:
            continue  # QEMU does not open it: its bitmaps cannot be loaded, or its check cannot be finished
        try:
            found = ours(path)
        except ImageError as error:
            found = {"refused": str(error)}
        assert found == expected, f"seed {seed}"
        compared += 1
    assert compared >= 3


def test_leak_is_a_leak_and_a_missing_reference_a_corruption(
    corpus: Maker, ours: Ours, theirs: Theirs, tmp_path: Path
) -> None:
    raw = bytearray(corpus("v3-snapshots").path.read_bytes())
    anatomy = Anatomy(raw)
    block = anatomy.blocks[0]
    raw[block + 2 * 200 : block + 2 * 201] = (5).to_bytes(2, "big")
    used = (anatomy.l1 >> anatomy.header.cluster_bits) * 2
    raw[block + used : block + used + 2] = bytes(2)
    path = tmp_path / "a.qcow2"
    path.write_bytes(raw)
    found = ours(path)
    assert found == theirs(path)
    assert found["corruptions"] >= 1


def test_findings_are_told_in_qemus_words(corpus: Maker, tmp_path: Path) -> None:
    raw = bytearray(corpus("v3").path.read_bytes())
    table = Anatomy(raw).l2_tables[0]
    put(raw, table, 0x1234_5600 | COPIED)
    path = tmp_path / "a.qcow2"
    path.write_bytes(raw)
    told: list[str] = []
    with PlainFile(path) as file:
        asyncio.run(check(file, told.append))
    assert "ERROR offset=12345600: Data cluster is not properly aligned; L2 entry corrupted." in told
    assert any(line.startswith("ERROR: counting reference for region exceeding the end of the file") for line in told)


def test_no_read_leaves_the_image(corpus: Maker, tmp_path: Path) -> None:
    """Whatever the tables say, nothing is read from beyond the end of the file, and no read is larger than a cluster or
    1 MiB."""
    sound = bytearray(corpus("v3-snapshots").path.read_bytes())
    path = tmp_path / "damaged.qcow2"
    for seed in range(40):
        path.write_bytes(damage(sound, 1000 + seed))
        with PlainFile(path) as file:
            try:
                asyncio.run(check(file))
            except ImageError:
                pass
            assert all(offset <= file.size and length <= 1 << 20 for offset, length in file.reads)


def _hostile_l1(raw: bytearray) -> None:
    """An L1 table of 32 MiB whose entries all point to one full L2 table."""
    anatomy = Anatomy(raw)
    table = anatomy.l2_tables[0]
    for at in range(anatomy.cluster // 8):
        put(raw, table + 8 * at, 5 * anatomy.cluster | COPIED)
    start = (len(raw) + 65535) // 65536 * 65536
    raw.extend(bytes(start - len(raw)))
    raw.extend((table | COPIED).to_bytes(8, "big") * (4 << 20))
    raw[36:48] = (4 << 20).to_bytes(4, "big") + start.to_bytes(8, "big")


def _hostile_snapshots(raw: bytearray) -> None:
    """65536 snapshots, each with another L1 table over all of the file."""
    start = (len(raw) + 65535) // 65536 * 65536
    raw.extend(bytes(start - len(raw)))
    for at in range(65536):
        raw.extend(
            bytes(8) + (4 * 1024 * 1024 - at).to_bytes(4, "big") + bytes(24) + (16).to_bytes(4, "big") + bytes(16)
        )
    raw[60:72] = (65536).to_bytes(4, "big") + start.to_bytes(8, "big")


def _hostile_misaligned(raw: bytearray) -> None:
    """An L1 table that points to every sector of the file."""
    anatomy = Anatomy(raw)
    start = (len(raw) + 65535) // 65536 * 65536
    raw.extend(bytes(start - len(raw)))
    raw.extend(b"\x80\x00\x00\x00\x00\x05\x00\x00" * 65536)
    sectors = len(raw) // 512
    for at in range(sectors):
        raw.extend((at * 512 | COPIED).to_bytes(8, "big"))
    first = len(raw) - 8 * sectors
    assert first % anatomy.cluster == 0
    raw[36:48] = sectors.to_bytes(4, "big") + first.to_bytes(8, "big")


def _hostile_refcount_table(raw: bytearray) -> None:
    """A refcount table of 8 MiB of nonsense."""
    start = (len(raw) + 65535) // 65536 * 65536
    raw.extend(bytes(start - len(raw)))
    raw.extend(b"\x7f\xff\xff\xff\xff\x00\x00\x00" * (1 << 20))
    raw[48:60] = start.to_bytes(8, "big") + (128).to_bytes(4, "big")


@pytest.mark.parametrize(
    "spoil", [_hostile_l1, _hostile_snapshots, _hostile_misaligned, _hostile_refcount_table], ids=lambda f: f.__name__
)
def test_hostile_tables_take_bounded_time(spoil: Callable[[bytearray], None], corpus: Maker, tmp_path: Path) -> None:
    raw = bytearray(corpus("v3").path.read_bytes())
    spoil(raw)
    path = tmp_path / "hostile.qcow2"
    path.write_bytes(raw)
    started = time.monotonic()
    with PlainFile(path) as file:
        try:
            result = asyncio.run(check(file))
        except CheckFailed as error:
            result = error.result
    assert result.corruptions + result.check_errors
    assert time.monotonic() - started < 60


def test_a_huge_sparse_file_costs_little(corpus: Maker, ours: Ours, tmp_path: Path) -> None:
    path = tmp_path / "sparse.qcow2"
    path.write_bytes(corpus("v3").path.read_bytes())
    before = ours(path)
    with path.open("r+b") as file:
        file.truncate(15 << 40)
    started = time.monotonic()
    assert ours(path) == before
    assert time.monotonic() - started < 10


def test_a_file_beyond_all_bounds_is_refused(corpus: Maker, ours: Ours, tmp_path: Path) -> None:
    path = tmp_path / "sparse.qcow2"
    path.write_bytes(corpus("cluster-512").path.read_bytes())
    with path.open("r+b") as file:
        file.truncate(2 << 40)
    found = ours(path)
    assert found["failed"] == "File too large"
    assert found["check-errors"] == 1


def test_bitmaps_are_accounted_for(tmp_path: Path, ours: Ours, theirs: Theirs) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "64M")
    for name in ("one", "two"):
        qemu_img("bitmap", "--add", "-g", "512", path, name)
    found = ours(path)
    assert found == theirs(path)
    assert "leaks" not in found
