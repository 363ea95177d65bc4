"""A qcow2 image's first cluster: the header, its extensions, and the backing file name.

Bytes in, a `Header` out, and back. Nothing here does I/O but `read_header`, and nothing trusts a field: whatever
`parse_header` returns obeys the specification and QEMU's limits, so that code on top may compute with it. Whether tables
hold sense is for those who read them.

Layout of the first cluster, and the order in which `Header.cluster` writes it (QEMU's own order)::

    fixed header (72 bytes, v3: header_length) | backing format | data file name | feature names | bitmaps |
    extensions we do not know, byte for byte | end | backing file name

``parse_header(raw).cluster()`` keeps every byte that means something. Fields beyond those known, unknown extensions and
unknown compatible features survive; unknown autoclear bits go with the first opening for writing
(`Header.prepare_for_writing`), and with them the promises they stood for.

Wording of refusals: QEMU's ``block/qcow2.c``. Source: ``docs/interop/qcow2.txt``, sections "Header" to "Feature name table".
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass, field
from enum import Enum, IntEnum, IntFlag
from typing import Final, Protocol

from livedisk.emulator.drivers.qcow2.geometry import (
    ENTRY,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
    SECTOR,
    Geometry,
)
from livedisk.emulator.errors import ImageError

MAGIC: Final = b"QFI\xfb"
V2_LENGTH: Final = 72
V3_MIN_LENGTH: Final = 104
V3_LENGTH: Final = 112
"""With compression_type and its padding: what is written for version 3."""
MAX_BACKING_NAME: Final = 1023
MAX_BACKING_FORMAT: Final = 15
SNAPSHOT_ENTRY_MIN: Final = 40
"""Bytes in a snapshot table entry without extra data and names."""

_V2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
_EXTENSION: Final = struct.Struct(">II")
_BITMAPS: Final = struct.Struct(">IIQQ")
_FEATURE: Final = struct.Struct(">BB46s")

# Where single fields stand, for writes that change only them (all within the first 512-byte sector).
_BACKING_AT: Final = 8
_CLUSTER_BITS_AT: Final = 20
SIZE_AT: Final = 24
L1_AT: Final = 36
"""l1_size (4 bytes), l1_table_offset (8)."""
REFCOUNT_TABLE_AT: Final = 48
"""refcount_table_offset (8 bytes), refcount_table_clusters (4)."""
SNAPSHOTS_AT: Final = 60
"""nb_snapshots (4 bytes), snapshots_offset (8)."""
INCOMPATIBLE_AT: Final = 72
AUTOCLEAR_AT: Final = 88
_HEADER_LENGTH_AT: Final = 100


class Incompatible(IntFlag):
    """Features that a reader must know."""

    NONE = 0
    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION = 8
    EXTENDED_L2 = 16


class Compatible(IntFlag):
    """Features that a program may ignore."""

    NONE = 0
    LAZY_REFCOUNTS = 1


class Autoclear(IntFlag):
    """Features that a writer which does not know them clears."""

    NONE = 0
    BITMAPS = 1
    DATA_FILE_RAW = 2
    TRACKED = 1 << 63
    """Ours alone: bitmaps that are marked as in use miss no write (`bitmap_directory.py`)."""


class Compression(IntEnum):
    """compression_type."""

    ZLIB = 0
    ZSTD = 1


class ExtensionType(IntEnum):
    """Header extensions that are known."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    CRYPTO = 0x0537BE77
    DATA_FILE = 0x44415441
    TRACKING = 0x4C444254
    """Ours alone ("LDBT"); carried among `Header.extensions`."""


class Purpose(Enum):
    """Why an image is opened: what is refused depends on it."""

    READ = "read"
    WRITE = "write"
    CHECK = "check"
    """To find or repair damage: the corrupt bit, a missing refcount table and a bad snapshot table do not refuse the image."""


FEATURE_NAMES: Final[tuple[tuple[int, int, str], ...]] = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)
"""(bitmap, bit, name): the feature name table that is written, QEMU's."""

_FEATURE_NAMES_MIN_BITS: Final = 13
"""Smaller first clusters keep their room for the backing file name, as with QEMU."""
_KNOWN_INCOMPATIBLE: Final = 0x1F
_KNOWN_AUTOCLEAR: Final = 0x3 | Autoclear.TRACKED
_CRYPT_METHODS: Final = {1: "AES", 2: "LUKS"}


@dataclass(slots=True)
class Extension:
    """A header extension that is carried along unread."""

    type: int
    data: bytes


@dataclass(slots=True)
class BitmapsExtension:
    """Where the bitmap directory stands ("Bitmaps extension")."""

    nb_bitmaps: int
    directory_size: int
    """Bytes."""
    directory_offset: int

    def to_bytes(self) -> bytes:
        return _BITMAPS.pack(self.nb_bitmaps, 0, self.directory_size, self.directory_offset)


@dataclass(slots=True)
class Header:
    """All that the first cluster says. Offsets and sizes are bytes in the image file; names are as the file system has them.

    ``size`` is the virtual size as stored; `virtual_size` the one a guest sees. ``incompatible``, ``compatible`` and
    ``autoclear`` may carry bits without a name (but an unknown incompatible one never). ``stale_bitmaps``: the image had a
    bitmaps extension whose autoclear bit was off, which is not to be believed and is dropped when the header is rewritten.
    """

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    compression_type: Compression = Compression.ZLIB
    unknown_fields: bytes = b""
    """What stands between the known fixed fields and header_length."""
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    """External data file name."""
    bitmaps: BitmapsExtension | None = None
    stale_bitmaps: bool = False
    extensions: list[Extension] = field(default_factory=list)
    """Unknown ones, in order."""

    # -- words for the bits
    @property
    def dirty(self) -> bool:
        """Refcounts may be inconsistent (lazy refcounts, and the image was not closed)."""
        return bool(self.incompatible & Incompatible.DIRTY)

    @property
    def corrupt(self) -> bool:
        return bool(self.incompatible & Incompatible.CORRUPT)

    @property
    def has_data_file(self) -> bool:
        return bool(self.incompatible & Incompatible.DATA_FILE)

    @property
    def data_file_raw(self) -> bool:
        return bool(self.autoclear & Autoclear.DATA_FILE_RAW)

    @property
    def has_unknown_autoclear(self) -> bool:
        return bool(self.autoclear & ~_KNOWN_AUTOCLEAR)

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

    @property
    def lazy_refcounts(self) -> bool:
        return bool(self.compatible & Compatible.LAZY_REFCOUNTS)

    @property
    def geometry(self) -> Geometry:
        """The arithmetic of this image."""
        return Geometry(self.cluster_bits, self.refcount_order, self.extended_l2, self.has_data_file)

    @property
    def virtual_size(self) -> int:
        """What a guest sees: ``size`` down to whole 512-byte sectors, as QEMU shows it."""
        return self.size // SECTOR * SECTOR

    @property
    def compat(self) -> str:
        """ImageInfo's word for the version."""
        return "0.10" if self.version == 2 else "1.1"

    # -- opening for writing
    def prepare_for_writing(self) -> bool:
        """Clear the autoclear bits that are not known and drop what they vouched for.

        Returns whether the header must be rewritten before anything else is written.
        """
        unknown = self.autoclear & ~_KNOWN_AUTOCLEAR
        changed = bool(unknown) or self.stale_bitmaps
        self.autoclear &= _KNOWN_AUTOCLEAR
        self.stale_bitmaps = False
        return changed

    # -- to bytes
    @property
    def header_length(self) -> int:
        """Bytes in the fixed part when written."""
        return V2_LENGTH if self.version == 2 else V3_LENGTH + len(self.unknown_fields)

    def fixed(self, backing_at: int) -> bytes:
        """The fixed part, with the backing file name at ``backing_at``."""
        name = os.fsencode(self.backing_file) if self.backing_file is not None else b""
        raw = _V2.pack(
            MAGIC,
            self.version,
            backing_at if name else 0,
            len(name),
            self.cluster_bits,
            self.size,
            0,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        if self.version == 2:
            return raw
        raw += _V3.pack(self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.header_length)
        return raw + bytes((self.compression_type,)).ljust(V3_LENGTH - V3_MIN_LENGTH, b"\0") + self.unknown_fields

    def _extension_area(self) -> bytes:
        parts: list[bytes] = []
        if self.backing_format is not None:
            parts.append(_extension(ExtensionType.BACKING_FORMAT, os.fsencode(self.backing_format)))
        if self.has_data_file and self.data_file is not None:
            parts.append(_extension(ExtensionType.DATA_FILE, os.fsencode(self.data_file)))
        if self.version >= 3 and self.cluster_bits >= _FEATURE_NAMES_MIN_BITS:
            table = b"".join(_FEATURE.pack(kind, bit, name.encode()) for kind, bit, name in FEATURE_NAMES)
            parts.append(_extension(ExtensionType.FEATURE_NAMES, table))
        if self.bitmaps is not None:
            parts.append(_extension(ExtensionType.BITMAPS, self.bitmaps.to_bytes()))
        parts.extend(_extension(known.type, known.data) for known in self.extensions)
        parts.append(_extension(ExtensionType.END, b""))
        return b"".join(parts)

    def cluster(self) -> bytes:
        """The whole first cluster, to be written in one piece at offset 0.

        Raises OSError ENOSPC where extensions and names do not fit; nothing was changed then.
        """
        area = self._extension_area()
        name = os.fsencode(self.backing_file) if self.backing_file is not None else b""
        if len(name) > MAX_BACKING_NAME:
            raise OSError(errno.EINVAL, f"Backing file name too long: {len(name)} bytes, at most {MAX_BACKING_NAME}")
        at = self.header_length + len(area)
        space = 1 << self.cluster_bits
        if at + len(name) > space:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: the header with its names takes {at + len(name)} bytes, "
                f"the first cluster has {space}",
            )
        return (self.fixed(at) + area + name).ljust(space, b"\0")

    def fits(self) -> bool:
        """Whether `cluster` has room for everything."""
        name = len(os.fsencode(self.backing_file)) if self.backing_file is not None else 0
        return self.header_length + len(self._extension_area()) + name <= 1 << self.cluster_bits

    def sector(self, current: bytes) -> bytes:
        """``current`` (the image's first sector as it stands) with the fixed fields of this header.

        For changes of fixed fields alone (bits, tables, size): a sector is old or new whatever happens, the whole cluster
        is not. Where the backing file name and the extensions stand stays as it is in ``current``.
        """
        raw = self.fixed(0)
        end = V2_LENGTH if self.version == 2 else _HEADER_LENGTH_AT
        return raw[:_BACKING_AT] + current[_BACKING_AT:_CLUSTER_BITS_AT] + raw[_CLUSTER_BITS_AT:end] + current[end:]


def _extension(kind: int, data: bytes) -> bytes:
    return _EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)


# -- reading -----------------------------------------------------------------------------------------------------------
class Readable(Protocol):
    """A node or anything like it: bytes past the end read as zeroes."""

    @property
    def size(self) -> int: ...

    async def read(self, offset: int, view: memoryview) -> None: ...


def probe(raw: bytes) -> bool:
    """Whether the start of a file (at least 72 bytes) says that it is qcow2."""
    return len(raw) >= V2_LENGTH and raw[:4] == MAGIC and int.from_bytes(raw[4:8], "big") >= 2


async def read_header(file: Readable, purpose: Purpose) -> Header:
    """Read and check the first cluster. Raises ImageError, in QEMU's words, or OSError."""
    start = bytearray(V3_LENGTH)
    await file.read(0, memoryview(start))
    bits = _check_start(start)
    raw = bytearray(1 << bits)
    await file.read(0, memoryview(raw))
    return parse_header(bytes(raw), purpose)


def _check_start(raw: bytes | bytearray) -> int:
    """Magic, version, cluster size; returns cluster_bits."""
    if raw[:4] != MAGIC:
        raise ImageError("Image is not in qcow2 format")
    version = int.from_bytes(raw[4:8], "big")
    if version not in (2, 3):
        raise ImageError(f"Unsupported qcow2 version {version}")
    bits = int.from_bytes(raw[20:24], "big")
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        raise ImageError(f"Unsupported cluster size: 2^{bits}")
    return bits


def parse_header(raw: bytes, purpose: Purpose = Purpose.WRITE) -> Header:
    """``raw``: the whole first cluster (shorter input is taken to end in zeroes). Raises ImageError in QEMU's words."""
    raw = raw.ljust(V3_LENGTH, b"\0")
    raw = raw.ljust(1 << _check_start(raw), b"\0")
    (_, version, backing_at, backing_length, bits, size, crypt, l1_size, l1_at, table_at, table_clusters, snapshots,
     snapshots_at) = _V2.unpack_from(raw)  # fmt: skip
    header = Header(
        version=version,
        cluster_bits=bits,
        size=size,
        l1_size=l1_size,
        l1_table_offset=l1_at,
        refcount_table_offset=table_at,
        refcount_table_clusters=table_clusters,
        nb_snapshots=snapshots,
        snapshots_offset=snapshots_at,
    )
    length = _parse_v3(header, raw) if version >= 3 else V2_LENGTH
    if backing_at > 1 << bits:
        raise ImageError("Invalid backing file offset")
    area_end = backing_at or 1 << bits
    _check_compression(header, raw, length)
    _check_features(header, raw, length, area_end, purpose)
    _check_layout(header, purpose)
    _refuse_encrypted(crypt)
    _parse_extensions(header, raw, length, area_end)
    if backing_at:
        if backing_length > min(MAX_BACKING_NAME, (1 << bits) - backing_at):
            raise ImageError("Backing file name too long")
        header.backing_file = _c_string(raw[backing_at : backing_at + backing_length])
    if header.data_file_raw and not header.has_data_file:
        raise ImageError("data-file-raw requires a data file")
    return header


def _parse_v3(header: Header, raw: bytes) -> int:
    """The fields of version 3; returns header_length."""
    fields: tuple[int, int, int, int, int] = _V3.unpack_from(raw, V2_LENGTH)
    header.incompatible, header.compatible, header.autoclear, header.refcount_order, length = fields
    if length < V3_MIN_LENGTH:
        raise ImageError("qcow2 header too short")
    if length > 1 << header.cluster_bits:
        raise ImageError("qcow2 header exceeds cluster size")
    header.unknown_fields = raw[V3_LENGTH:length]
    return length


def _check_compression(header: Header, raw: bytes, length: int) -> None:
    kind = raw[V3_MIN_LENGTH] if length > V3_MIN_LENGTH else 0
    if kind not in Compression.__members__.values():
        raise ImageError(f"qcow2: unknown compression type: {kind}")
    header.compression_type = Compression(kind)
    flagged = bool(header.incompatible & Incompatible.COMPRESSION)
    if flagged != (kind != Compression.ZLIB):
        word = "must not be set" if flagged else "must be set"
        raise ImageError(f"qcow2: Compression type incompatible feature bit {word}")


def _check_features(header: Header, raw: bytes, length: int, area_end: int, purpose: Purpose) -> None:
    unknown = header.incompatible & ~_KNOWN_INCOMPATIBLE
    if unknown:
        names = _feature_names(raw, length, area_end)
        raise ImageError(f"Unsupported qcow2 feature(s): {_describe_features(unknown, names)}")
    if header.corrupt and purpose is Purpose.WRITE:
        raise ImageError(
            "qcow2: Image is corrupt; cannot be opened read/write",
            hint="Open it read-only, or repair it first with 'livedisk img check -r all' or 'qemu-img check -r all'.",
        )


def _feature_names(raw: bytes, start: int, end: int) -> list[tuple[int, int, str]]:
    """The image's own feature name table; empty where there is none that can be read."""
    try:
        areas = [extension.data for extension in split_extensions(raw, start, end)
                 if extension.type == ExtensionType.FEATURE_NAMES]  # fmt: skip
    except ImageError:
        return []
    found: list[tuple[int, int, str]] = []
    for data in areas[-1:]:
        for at in range(0, len(data) - _FEATURE.size + 1, _FEATURE.size):
            kind, bit, name = _FEATURE.unpack_from(data, at)
            text = name.split(b"\0", 1)[0].decode(errors="backslashreplace")
            if not text:
                break
            found.append((kind, bit, text))
    return found


def _describe_features(unknown: int, names: list[tuple[int, int, str]]) -> str:
    words: list[str] = []
    for kind, bit, name in names:
        if kind == 0 and bit < 64 and unknown >> bit & 1:
            words.append(name)
            unknown &= ~(1 << bit)
    if unknown:
        words.append(f"Unknown incompatible feature: {unknown:x}")
    return ", ".join(words)


def check_table(geometry: Geometry, offset: int, entries: int, entry_size: int, limit: int, name: str) -> None:
    """Raise ImageError if a table of that many entries cannot stand at ``offset``; ``limit`` is its largest size in bytes."""
    if entries > limit // entry_size:
        raise ImageError(f"{name} too large")
    if offset + entries * entry_size > (1 << 63) - 1 or geometry.into_cluster(offset):
        raise ImageError(f"{name} offset invalid")


def _check_layout(header: Header, purpose: Purpose) -> None:
    """The places and sizes of the tables that the header names."""
    # Before any geometry: a width of 2^refcount_order bits is a number too long to compute with.
    subcluster_bits = header.cluster_bits - (5 if header.extended_l2 else 0)
    if subcluster_bits < MIN_CLUSTER_BITS:
        raise ImageError(f"Unsupported subcluster size: {1 << subcluster_bits}")
    if header.refcount_order > 6:
        raise ImageError("Reference count entry width too large; may not exceed 64 bits")
    geometry = header.geometry
    if header.refcount_table_clusters == 0 and purpose is not Purpose.CHECK:
        raise ImageError("Image does not contain a reference count table")
    check_table(geometry, header.refcount_table_offset, header.refcount_table_clusters, geometry.cluster_size,
                MAX_REFCOUNT_TABLE_BYTES, "Reference count table")  # fmt: skip
    if purpose is not Purpose.CHECK:
        check_table(geometry, header.snapshots_offset, header.nb_snapshots, SNAPSHOT_ENTRY_MIN,
                    SNAPSHOT_ENTRY_MIN * MAX_SNAPSHOTS, "Snapshot table")  # fmt: skip
    check_table(geometry, header.l1_table_offset, header.l1_size, ENTRY, MAX_L1_BYTES, "Active L1 table")
    needed = geometry.l1_entries(header.size)
    if needed > 0x7FFF_FFFF:
        raise ImageError("Image is too big")
    if header.l1_size < needed:
        raise ImageError("L1 table is too small")


def _refuse_encrypted(method: int) -> None:
    if method:
        name = _CRYPT_METHODS.get(method)
        if name is None:
            raise ImageError(f"Unsupported encryption method {method}")
        raise ImageError(
            f"Image is encrypted with {name}: encryption of qcow2 images is not supported",
            hint="Decrypt it first: 'qemu-img convert' writes an unencrypted copy.",
        )


def split_extensions(raw: bytes, start: int, end: int) -> list[Extension]:
    """The header extensions in ``raw[start:end]``, without the end marker. Raises ImageError if one does not fit."""
    found: list[Extension] = []
    at = start
    while at < end:
        kind, length = _EXTENSION.unpack_from(raw.ljust(at + _EXTENSION.size, b"\0"), at)
        at += _EXTENSION.size
        if at > end or length > end - at:
            raise ImageError("Header extension too large")
        if kind == ExtensionType.END:
            break
        found.append(Extension(kind, raw[at : at + length]))
        at += (length + 7) & ~7
    return found


def _parse_extensions(header: Header, raw: bytes, start: int, end: int) -> None:
    for extension in split_extensions(raw, start, end):
        data = extension.data
        match extension.type:
            case ExtensionType.BACKING_FORMAT:
                if len(data) > MAX_BACKING_FORMAT:
                    raise ImageError(
                        f"ERROR: ext_backing_format: len={len(data)} too large (>={MAX_BACKING_FORMAT + 1})"
                    )
                header.backing_format = _c_string(data)
            case ExtensionType.DATA_FILE:
                header.data_file = _c_string(data)
            case ExtensionType.FEATURE_NAMES:
                pass  # written anew, with the names that are known now
            case ExtensionType.BITMAPS:
                _parse_bitmaps(header, data)
            case ExtensionType.CRYPTO:
                raise ImageError("CRYPTO header extension only expected with LUKS encryption method")
            case _:
                header.extensions.append(extension)


def _c_string(data: bytes) -> str:
    return os.fsdecode(data.split(b"\0", 1)[0])


def _parse_bitmaps(header: Header, data: bytes) -> None:
    if len(data) != _BITMAPS.size:
        raise ImageError("bitmaps_ext: Invalid extension length")
    if not header.autoclear & Autoclear.BITMAPS:
        header.stale_bitmaps = True
        return
    count, reserved, size, offset = _BITMAPS.unpack(data)
    if reserved:
        raise ImageError("bitmaps_ext: Reserved field is not zero")
    if count > MAX_BITMAPS:
        raise ImageError(
            f"bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
        )
    if count == 0:
        raise ImageError("found bitmaps extension with zero bitmaps")
    if header.geometry.into_cluster(offset):
        raise ImageError("bitmaps_ext: invalid bitmap directory offset")
    if size > MAX_BITMAP_DIRECTORY_BYTES:
        raise ImageError(
            f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size ({MAX_BITMAP_DIRECTORY_BYTES})"
        )
    header.bitmaps = BitmapsExtension(count, size, offset)
