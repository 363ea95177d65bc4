"""The qcow2 driver's options: QEMU's BlockdevOptionsQcow2, typed once, and what follows from them for one image.

Source: QEMU ``qapi/block-core.json``; the sizes of the caches: ``docs/qcow2-cache.txt``, ``block/qcow2.c`` (read_cache_sizes).
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, Final

import msgspec

from livedisk.emulator.block.node import Node
from livedisk.emulator.block.options import BlockdevOptions, BlockdevRef, BlockdevRefOrNull, Natural
from livedisk.emulator.block.settings import Settings
from livedisk.emulator.block.types import Discard
from livedisk.emulator.drivers.qcow2.geometry import MIN_CLUSTER_BITS
from livedisk.emulator.drivers.qcow2.header import Header
from livedisk.emulator.drivers.qcow2.image import CacheSizes, DiscardPolicy
from livedisk.emulator.drivers.qcow2.overlap import TEMPLATES, Section
from livedisk.emulator.errors import BlockError

UNSET = msgspec.UNSET
Unset = msgspec.UnsetType
DEFAULT_L2_CACHE: Final = 32 << 20
"""Bytes (QEMU's DEFAULT_L2_CACHE_MAX_SIZE on Linux); less where the disk needs less."""
DEFAULT_SLICE: Final = 64 << 10
"""Bytes at most. QEMU's default is the cluster size, which for 2 MiB clusters reads 2 MiB to answer for one 4 KiB request."""
MIN_REFCOUNT_CLUSTERS: Final = 4
MIN_REFCOUNT_CACHE: Final = 256 << 10
"""Bytes: what QEMU's default of four clusters comes to with clusters of 64 KiB; smaller clusters get as much."""
DEFAULT_CLEAN_INTERVAL: Final = 600
"""Seconds."""


class OverlapMode(enum.StrEnum):
    """QEMU's Qcow2OverlapCheckMode."""

    NONE = "none"
    CONSTANT = "constant"
    CACHED = "cached"
    ALL = "all"


class OverlapFlags(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """QEMU's Qcow2OverlapCheckFlags: a template, and single sections that differ from it."""

    template: OverlapMode | Unset = UNSET
    main_header: bool | Unset = UNSET
    active_l1: bool | Unset = UNSET
    active_l2: bool | Unset = UNSET
    refcount_table: bool | Unset = UNSET
    refcount_block: bool | Unset = UNSET
    snapshot_table: bool | Unset = UNSET
    inactive_l1: bool | Unset = UNSET
    inactive_l2: bool | Unset = UNSET
    bitmap_directory: bool | Unset = UNSET


class EncryptionFormat(enum.StrEnum):
    """QEMU's BlockdevQcow2EncryptionFormat."""

    AES = "aes"
    LUKS = "luks"


class Encryption(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """QEMU's BlockdevQcow2Encryption. Read so that it can be refused with a reason: encryption is not supported."""

    format: EncryptionFormat
    key_secret: str | Unset = UNSET


OverlapChecks = Annotated[OverlapMode | OverlapFlags | Unset, msgspec.Meta(extra={"qapi": "Qcow2OverlapChecks"})]


class Qcow2Options(BlockdevOptions, kw_only=True):
    """QEMU's BlockdevOptionsQcow2. Sizes are bytes, ``cache_clean_interval`` seconds (0: never)."""

    file: BlockdevRef
    backing: BlockdevRefOrNull = UNSET
    lazy_refcounts: bool | Unset = UNSET
    pass_discard_request: bool | Unset = UNSET
    pass_discard_snapshot: bool | Unset = UNSET
    pass_discard_other: bool | Unset = UNSET
    discard_no_unref: bool | Unset = UNSET
    overlap_check: OverlapChecks = UNSET
    cache_size: Natural | Unset = UNSET
    l2_cache_size: Natural | Unset = UNSET
    l2_cache_entry_size: Natural | Unset = UNSET
    refcount_cache_size: Natural | Unset = UNSET
    cache_clean_interval: int | Unset = UNSET
    encrypt: Encryption | Unset = UNSET
    data_file: BlockdevRef = UNSET


def pick(given: Any, default: Any) -> Any:
    """What was given, else the default."""
    return default if given is UNSET else given


def lazy_refcounts(options: Qcow2Options, header: Header) -> bool:
    """Whether refcounts may fall behind. Raises BlockError on version 2, in QEMU's words."""
    lazy = bool(pick(options.lazy_refcounts, header.lazy_refcounts))
    if lazy and header.version < 3:
        raise BlockError("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
    return lazy


def discard_policy(options: Qcow2Options, node: Node | Settings, header: Header) -> DiscardPolicy:
    """Which discards are passed on. Raises BlockError on version 2 with ``discard-no-unref``."""
    no_unref = bool(pick(options.discard_no_unref, False))
    if no_unref and header.version < 3:
        raise BlockError("discard-no-unref is only supported since qcow2 version 3")
    return DiscardPolicy(
        request=bool(pick(options.pass_discard_request, node.discard_mode is Discard.UNMAP)),
        snapshot=bool(pick(options.pass_discard_snapshot, True)),
        other=bool(pick(options.pass_discard_other, False)),
        no_unref=no_unref,
    )


def overlap_sections(options: Qcow2Options) -> Section:
    """The sections that writes are checked against."""
    given = options.overlap_check
    if isinstance(given, OverlapFlags):
        sections = TEMPLATES[str(pick(given.template, OverlapMode.CACHED).value)]
        for section in Section(511):
            flag = (
                getattr(given, str(section.name).lower(), UNSET)
                if section is not Section.MAIN_HEADER
                else given.main_header
            )
            if flag is not UNSET:
                sections = sections | section if flag else sections & ~section
        return sections
    return TEMPLATES[OverlapMode.CACHED.value if given is UNSET else given.value]


def clean_interval(options: Qcow2Options) -> int:
    """Seconds between two drops of unused cache entries; 0: never."""
    interval = int(pick(options.cache_clean_interval, DEFAULT_CLEAN_INTERVAL))
    if not 0 <= interval < 1 << 32:
        raise BlockError("Cache clean interval too big")
    return interval


def cache_sizes(options: Qcow2Options, header: Header) -> CacheSizes:
    """How much metadata to cache. Raises BlockError, in QEMU's words, where the options contradict each other."""
    geometry = header.geometry
    cluster = geometry.cluster_size
    slice_bytes = int(pick(options.l2_cache_entry_size, min(DEFAULT_SLICE, cluster)))
    if not 1 << MIN_CLUSTER_BITS <= slice_bytes <= cluster or slice_bytes & (slice_bytes - 1):
        raise BlockError(
            f"L2 cache entry size must be a power of two between {1 << MIN_CLUSTER_BITS} and the cluster size ({cluster})"
        )
    useful = geometry.round_up(geometry.clusters(header.virtual_size) * geometry.l2_entry_size)
    least = (
        max(MIN_REFCOUNT_CLUSTERS * cluster, MIN_REFCOUNT_CACHE)
        if options.refcount_cache_size is UNSET
        else 2 * cluster
    )
    l2 = min(useful, int(pick(options.l2_cache_size, DEFAULT_L2_CACHE)))
    refcount = int(pick(options.refcount_cache_size, least))
    if options.cache_size is not UNSET:
        l2, refcount = _share(options, int(options.cache_size), useful, least)
    if l2 // slice_bytes > 0x7FFFFFFF:
        raise BlockError("L2 cache size too big")
    if refcount // cluster > 0x7FFFFFFF:
        raise BlockError("Refcount cache size too big")
    return CacheSizes(l2=l2, l2_slice=slice_bytes, refcount=max(refcount, least))


def _share(options: Qcow2Options, total: int, useful: int, least: int) -> tuple[int, int]:
    """Divide ``cache-size`` between L2 tables and refcounts."""
    l2, refcount = options.l2_cache_size, options.refcount_cache_size
    if l2 is not UNSET and refcount is not UNSET:
        raise BlockError("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
    if l2 is not UNSET:
        if int(l2) > total:
            raise BlockError("l2-cache-size may not exceed cache-size")
        return min(useful, int(l2)), total - min(useful, int(l2))
    if refcount is not UNSET:
        if int(refcount) > total:
            raise BlockError("refcount-cache-size may not exceed cache-size")
        return total - int(refcount), int(refcount)
    if total >= useful + least:
        return useful, total - useful
    return total - min(total, least), min(total, least)
