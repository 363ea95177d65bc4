"""The first cluster: what qemu-img writes is read and written back byte for byte; what qemu refuses is refused in its words."""

from __future__ import annotations

import asyncio
import errno
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.peers import run
from kit.plain_file import PlainFile
from kit.qcow2_corpus import CORPUS, Variant
from kit.qemu import qemu_img
from livedisk.emulator.drivers.qcow2.header import (
    Autoclear,
    Extension,
    Header,
    Incompatible,
    Purpose,
    parse_header,
    probe,
    read_header,
)
from livedisk.emulator.errors import ImageError

FEATURE_NAMES = 0x6803F857


def first_cluster(path: Path) -> bytes:
    raw = path.read_bytes()
    bits = int.from_bytes(raw[20:24], "big")
    return raw[: 1 << bits].ljust(1 << bits, b"\0")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A version 3 image, 64 KiB clusters, 4 MiB."""
    path = tmp_path_factory.mktemp("plain") / "plain.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", str(path), "4M")
    return path.read_bytes()


@pytest.mark.parametrize("variant", [v for v in CORPUS if not v.backing], ids=str)
def test_what_qemu_img_wrote_is_written_back_byte_for_byte(variant: Variant, tmp_path: Path) -> None:
    options = [variant.options] if variant.options else []
    if variant.data_file:
        options.append(f"data_file={tmp_path / 'data'}")
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", ",".join(options)] if options else []), path, str(variant.size))
    raw = first_cluster(path)
    assert parse_header(raw).cluster() == raw


def test_backing_file_and_format_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "näme.raw", "-F", "raw", path, "1M")
    raw = first_cluster(path)
    header = parse_header(raw)
    assert (header.backing_file, header.backing_format) == ("näme.raw", "raw")
    assert header.cluster() == raw


def test_names_that_are_not_utf8_survive(plain: bytes) -> None:
    header = parse_header(plain[:65536])
    header.backing_file = b"\xff\xfe.raw".decode("utf-8", "surrogateescape")
    assert parse_header(header.cluster()).backing_file == header.backing_file
    assert b"\xff\xfe.raw" in header.cluster()


def test_a_backing_file_name_ends_at_a_zero_byte(plain: bytes) -> None:
    """As QEMU reads it: no file of the host has one in its name."""
    header = parse_header(plain[:65536])
    header.backing_file = "base.raw"
    raw = header.cluster().replace(b"base.raw", b"base\0raw")
    assert parse_header(raw).backing_file == "base"


def test_unknown_extensions_and_fields_survive(plain: bytes) -> None:
    header = parse_header(plain[:65536])
    header.extensions = [Extension(0x12345678, b"abc"), Extension(0x9ABCDEF0, bytes(range(100)))]
    header.unknown_fields = bytes(range(16))
    header.backing_file = "base"
    again = parse_header(header.cluster())
    assert again == header
    assert again.cluster() == header.cluster()


def test_qemu_reads_a_header_that_we_rewrote(plain: bytes, tmp_path: Path) -> None:
    header = parse_header(plain[:65536])
    header.extensions = [Extension(0x12345678, b"abc")]
    header.backing_file, header.backing_format = "base.raw", "raw"
    path = tmp_path / "a.qcow2"
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    path.write_bytes(header.cluster() + plain[65536:])
    assert "base.raw" in qemu_img("info", path)
    qemu_img("check", path)


def test_a_header_that_does_not_fit_is_enospc_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    header = parse_header(first_cluster(path))
    header.backing_file = "x" * 500
    with pytest.raises(OSError, match="No space left on device") as caught:
        header.cluster()
    assert caught.value.errno == errno.ENOSPC


def test_sector_changes_fixed_fields_only(tmp_path: Path) -> None:
    """An old image with a header of 104 bytes keeps its extensions where they stand."""
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "base", "-F", "raw", path, "1M")
    raw = bytearray(first_cluster(path))
    raw[100:104] = (104).to_bytes(4, "big")
    raw[104:] = raw[112:] + bytes(8)
    place = int.from_bytes(raw[8:16], "big") - 8
    raw[8:16] = place.to_bytes(8, "big")
    header = parse_header(bytes(raw))
    assert header.backing_file == "base"
    header.incompatible |= Incompatible.DIRTY
    header.size += 512
    changed = header.sector(bytes(raw[:512])) + bytes(raw[512:])
    again = parse_header(changed)
    assert again.backing_file == "base"
    assert again.backing_format == "raw"
    assert again.dirty
    assert again.size == header.size
    different = [at for at in range(len(raw)) if raw[at] != changed[at]]
    assert all(24 <= at < 32 or 72 <= at < 80 for at in different)


def test_unknown_autoclear_bits_go_with_the_first_writer(plain: bytes) -> None:
    raw = bytearray(plain[:65536])
    raw[88:96] = (1 << 40 | Autoclear.BITMAPS).to_bytes(8, "big")
    header = parse_header(bytes(raw), Purpose.READ)
    assert header.autoclear >> 40 == 1
    assert header.prepare_for_writing()
    assert header.autoclear == Autoclear.BITMAPS
    assert not header.prepare_for_writing()


def test_bitmaps_that_are_not_vouched_for_are_dropped_by_the_first_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_img("bitmap", "--add", path, "b0")
    raw = bytearray(first_cluster(path))
    assert parse_header(bytes(raw)).bitmaps is not None
    raw[88:96] = bytes(8)
    header = parse_header(bytes(raw))
    assert header.bitmaps is None
    assert header.prepare_for_writing()
    assert b"\x23\x85\x28\x75" not in header.cluster()


def test_features_are_named_from_the_images_own_table(plain: bytes) -> None:
    raw = bytearray(plain[:65536])
    raw[72:80] = (1 << 63 | 1 << 9).to_bytes(8, "big")
    at = raw.index(struct.pack(">I", FEATURE_NAMES)) + 8
    raw[at : at + 48] = bytes([0, 63]) + b"time travel".ljust(46, b"\0")
    with pytest.raises(
        ImageError, match=r"^Unsupported qcow2 feature\(s\): time travel, Unknown incompatible feature: 200$"
    ):
        parse_header(bytes(raw))


def field(at: int, size: int, value: int) -> tuple[int, bytes]:
    return at, (value & (1 << 8 * size) - 1).to_bytes(size, "big")


DAMAGE = {
    "magic": field(0, 4, 0x514649FA),
    "version 0": field(4, 4, 0),
    "version 1": field(4, 4, 1),
    "version 4": field(4, 4, 4),
    "version huge": field(4, 4, 0xFFFFFFFF),
    "backing offset beyond cluster": field(8, 8, 65537),
    "backing offset huge": field(8, 8, 1 << 63),
    "backing offset in fixed header": field(8, 8, 8),
    "cluster_bits 0": field(20, 4, 0),
    "cluster_bits 8": field(20, 4, 8),
    "cluster_bits 9": field(20, 4, 9),
    "cluster_bits 22": field(20, 4, 22),
    "cluster_bits huge": field(20, 4, 0xFFFFFFFF),
    "size beyond L1": field(24, 8, 1 << 40),
    "size huge": field(24, 8, 0x7FFFFFFFFFFFFFFF),
    "size not in sectors": field(24, 8, 4 * 1024 * 1024 - 100),
    "l1_size 0": field(36, 4, 0),
    "l1_size too large": field(36, 4, 4 * 1024 * 1024 + 1),
    "l1_size huge": field(36, 4, 0xFFFFFFFF),
    "l1 unaligned": field(40, 8, 0x30200),
    "l1 negative": field(40, 8, 0xFFFFFFFFFFFF0000),
    "refcount table unaligned": field(48, 8, 0x10001),
    "refcount table negative": field(48, 8, 0x8000000000000000),
    "refcount table without clusters": field(56, 4, 0),
    "refcount table too large": field(56, 4, 129),
    "snapshots too many": field(60, 4, 65537),
    "snapshots unaligned": (60, struct.pack(">IQ", 1, 0x30001)),
    "snapshots negative": (60, struct.pack(">IQ", 1, 0xFFFFFFFFFFFF0000)),
    "corrupt bit": field(72, 8, 2),
    "data file bit alone": field(72, 8, 4),
    "compression bit alone": field(72, 8, 8),
    "extended L2 bit": field(72, 8, 16),
    "unknown incompatible bit": field(72, 8, 32),
    "unknown compatible bit": field(80, 8, 1 << 50),
    "unknown autoclear bit": field(88, 8, 1 << 50),
    "raw data file bit alone": field(88, 8, 2),
    "refcount_order 7": field(96, 4, 7),
    "refcount_order huge": field(96, 4, 0xFFFFFFFF),
    "header_length 72": field(100, 4, 72),
    "header_length 103": field(100, 4, 103),
    "header_length 104": field(100, 4, 104),
    "header_length whole cluster": field(100, 4, 65536),
    "header_length beyond cluster": field(100, 4, 65544),
    "compression_type zstd without bit": field(104, 1, 1),
    "compression_type unknown": field(104, 1, 2),
    "extension too long": field(116, 4, 65536),
    "extension length huge": field(116, 4, 0xFFFFFFFF),
    "backing format too long": (112, struct.pack(">II", 0xE2792ACA, 16)),
    "crypto extension": (112, struct.pack(">II", 0x0537BE77, 16)),
    "bitmaps extension of wrong length": (88, struct.pack(">QIIQII", 1, 4, 112, 0, 0x23852875, 8)),
    "bitmaps extension without bitmaps": (88, struct.pack(">QIIQIIIIQQ", 1, 4, 112, 0, 0x23852875, 24, 0, 0, 0, 0)),
    "too many bitmaps": (88, struct.pack(">QIIQIIIIQQ", 1, 4, 112, 0, 0x23852875, 24, 65536, 0, 24, 65536)),
    "bitmap directory unaligned": (88, struct.pack(">QIIQIIIIQQ", 1, 4, 112, 0, 0x23852875, 24, 1, 0, 24, 512)),
    "bitmap directory too large": (
        88, struct.pack(">QIIQIIIIQQ", 1, 4, 112, 0, 0x23852875, 24, 1, 0, 1 << 40, 65536)),
    "bitmaps reserved field": (88, struct.pack(">QIIQIIIIQQ", 1, 4, 112, 0, 0x23852875, 24, 1, 7, 24, 65536)),
}  # fmt: skip

# Where the image is refused later than at its header, or only for what the header points to: not this module's to say.
LATER = {"data file bit alone", "cluster_bits 9"}


def qemu_says(path: Path, *, write: bool) -> str | None:
    """Why QEMU refuses to open the image, or None."""
    done = run(["qemu-io", *([] if write else ["-r"]), "-f", "qcow2", "-c", "quit", path], expect=None)
    lines = [line for line in done.stderr.splitlines() if "can't open" in line]
    return lines[0] if lines else None


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@pytest.mark.parametrize("name", [name for name in DAMAGE if name not in LATER])
def test_refuses_what_qemu_refuses_in_its_words(name: str, write: bool, plain: bytes, tmp_path: Path) -> None:
    at, value = DAMAGE[name]
    raw = bytearray(plain)
    raw[at : at + len(value)] = value
    path = tmp_path / "damaged.qcow2"
    path.write_bytes(raw)
    theirs = qemu_says(path, write=write)
    ours = refusal(bytes(raw), Purpose.WRITE if write else Purpose.READ)
    if theirs is None:
        assert ours is None
    else:
        assert ours is not None
        assert ours in theirs


def refusal(raw: bytes, purpose: Purpose) -> str | None:
    """Why we refuse the header, or None."""
    try:
        parse_header(raw, purpose)
    except ImageError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("method", "words"), [(1, "AES"), (2, "LUKS"), (3, "method 3")])
def test_encrypted_images_are_refused_with_what_is_missing(method: int, words: str, plain: bytes) -> None:
    raw = bytearray(plain[:65536])
    raw[32:36] = method.to_bytes(4, "big")
    with pytest.raises(ImageError, match=words) as caught:
        parse_header(bytes(raw))
    assert "encrypt" in str(caught.value)


def test_check_opens_what_a_guest_may_not(plain: bytes) -> None:
    raw = bytearray(plain[:65536])
    raw[72:80] = (2).to_bytes(8, "big")
    raw[60:64] = (1 << 20).to_bytes(4, "big")
    raw[56:60] = bytes(4)
    with pytest.raises(ImageError):
        parse_header(bytes(raw))
    assert parse_header(bytes(raw), Purpose.CHECK).corrupt


@pytest.mark.parametrize("length", [0, 3, 4, 23, 71, 72, 104, 111, 112, 511, 512, 4096])
def test_truncated_files_are_refused_or_read_as_zeroes(length: int, plain: bytes, tmp_path: Path) -> None:
    path = tmp_path / "short.qcow2"
    path.write_bytes(plain[:length])
    with PlainFile(path) as file:
        if length < 72:
            with pytest.raises(ImageError):
                asyncio.run(read_header(file, Purpose.READ))
        else:
            try:
                header = asyncio.run(read_header(file, Purpose.READ))
            except ImageError:
                assert length < 112
            else:
                assert header.size == 4 << 20


def test_probe_wants_magic_and_version() -> None:
    assert probe(b"QFI\xfb\0\0\0\3".ljust(512, b"\0"))
    assert not probe(b"QFI\xfb\0\0\0\1".ljust(512, b"\0"))
    assert not probe(b"QFI\xfb\0\0\0\3")
    assert not probe(bytes(512))


@given(data=st.data())
def test_any_damage_is_an_image_error_or_a_header_that_obeys_the_limits(data: st.DataObject, plain: bytes) -> None:
    raw = bytearray(plain[:65536])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 130))
        value = data.draw(st.binary(min_size=1, max_size=8))
        raw[at : at + len(value)] = value
    try:
        header = parse_header(bytes(raw[: data.draw(st.sampled_from([112, 512, 65536]))]))
    except ImageError:
        return
    geometry = header.geometry
    assert header.l1_size * 8 <= 32 << 20
    assert header.l1_size >= geometry.l1_entries(header.size)
    assert header.l1_table_offset % geometry.cluster_size == 0
    assert 0 < header.refcount_table_clusters * geometry.cluster_size <= 8 << 20
    assert len(header.unknown_fields) < geometry.cluster_size
    try:
        cluster = header.cluster()
    except OSError:  # extensions that overlapped in the original may not fit side by side
        return
    header.stale_bitmaps = False
    assert parse_header(cluster) == _without_alias(header)


def _without_alias(header: Header) -> Header:
    """A data file name without the bit that gives it meaning is not written back; an empty backing name is none."""
    if not header.has_data_file:
        header.data_file = None
    if not header.backing_file:
        header.backing_file = None
    return header
