"""Events of images. Source: QEMU ``qapi/block-core.json``."""

from __future__ import annotations

import enum

from livedisk.emulator.qmp.events import event
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType


@event("BLOCK_IMAGE_CORRUPTED")
class BlockImageCorrupted(QapiStruct, kw_only=True):
    """Damage was found in an image in use; ``offset`` and ``size`` are bytes in the image file. ``fatal``: it can be
    neither read nor written any more, else it was found and not used."""

    device: str
    node_name: str | UnsetType = UNSET
    msg: str
    offset: int | UnsetType = UNSET
    size: int | UnsetType = UNSET
    fatal: bool


class QuorumOpType(enum.StrEnum):
    """What was asked of the children."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"


@event("QUORUM_REPORT_BAD", rate=1.0, key="node-name")
class QuorumReportBad(QapiStruct, kw_only=True):
    """A child of a quorum failed (``error``), or differs from the others; sectors are of 512 bytes."""

    type: QuorumOpType
    error: str | UnsetType = UNSET
    node_name: str
    sector_num: int
    sectors_count: int


@event("QUORUM_FAILURE", rate=1.0)
class QuorumFailure(QapiStruct, kw_only=True):
    """There was no quorum. ``reference``: the node's name."""

    reference: str
    sector_num: int
    sectors_count: int
