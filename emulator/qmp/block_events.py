"""Events of images. Source: QEMU ``qapi/block-core.json``."""

from __future__ import annotations

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
