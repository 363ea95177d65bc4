"""The options every node has, typed once: QMP, the command line and introspection read these same classes.

A driver's options class derives from `BlockdevOptions` and adds its own members; member names are spelled in Python
with
underscores and on the wire with dashes (``rename="kebab"``). Source: QEMU ``qapi/block-core.json`` (BlockdevOptions).
"""

from __future__ import annotations

import enum
from typing import Annotated, Any

import msgspec

from livedisk.emulator.block.types import DetectZeroes, Discard

BlockdevRef = Annotated[Any, msgspec.Meta(extra={"qapi": "BlockdevRef"})]
"""A child: the name of an existing node (str), or the options of a new one (a `BlockdevOptions`)."""

BlockdevRefOrNull = Annotated[Any, msgspec.Meta(extra={"qapi": "BlockdevRefOrNull"})]
"""A child as `BlockdevRef`, or None: explicitly no child (``"backing": null``). Absent is `msgspec.UNSET`: the
default."""

Natural = Annotated[int, msgspec.Meta(ge=0, lt=1 << 63, extra={"qapi": "natural"})]
"""Bytes or seconds: QAPI's ``int``, which takes no suffix, and below zero is out of range."""

Size = Annotated[int, msgspec.Meta(ge=0, extra={"qapi": "size"})]
"""Bytes; on the command line with an optional suffix k, M, G, T, P, E."""


class OnOffAuto(enum.StrEnum):
    """QEMU's OnOffAuto."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class CacheOptions(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """QEMU's BlockdevCacheOptions. UNSET inherits from the parent node, otherwise false."""

    direct: bool | msgspec.UnsetType = msgspec.UNSET
    """Bypass the host page cache (O_DIRECT)."""
    no_flush: bool | msgspec.UnsetType = msgspec.UNSET
    """Ignore flush requests: fast and unsafe."""


class BlockdevOptions(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """What every node takes, whatever its driver. UNSET means: not given, inherit or default."""

    driver: str
    node_name: str | msgspec.UnsetType = msgspec.UNSET
    discard: Discard | msgspec.UnsetType = msgspec.UNSET
    cache: CacheOptions | msgspec.UnsetType = msgspec.UNSET
    read_only: bool | msgspec.UnsetType = msgspec.UNSET
    auto_read_only: bool | msgspec.UnsetType = msgspec.UNSET
    force_share: bool | msgspec.UnsetType = msgspec.UNSET
    active: bool | msgspec.UnsetType = msgspec.UNSET
    """False: another process may have the image (`activity.py`); cannot be changed by a reopen."""
    detect_zeroes: DetectZeroes | msgspec.UnsetType = msgspec.UNSET
