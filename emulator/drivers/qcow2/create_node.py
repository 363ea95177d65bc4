"""blockdev-create with driver ``qcow2``: an image in a node, whatever the node is, and a data file in another.

The nodes' own content is gone where the metadata goes; the data file keeps its bytes but for its size, so that a raw disk can be
given metadata (``data-file-raw``). Source: QEMU ``block/qcow2.c`` (qcow2_co_create), ``qapi/block-core.json``
(BlockdevCreateOptionsQcow2).
"""

from __future__ import annotations

import enum
from contextlib import AsyncExitStack

import msgspec

from livedisk.emulator.block.creation import BlockdevAmendOptions, BlockdevCreateOptions, taken
from livedisk.emulator.block.driver import DRIVERS
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.options import BlockdevRef, Size
from livedisk.emulator.block.types import Preallocation
from livedisk.emulator.drivers.qcow2.create import CompressionType, CreateOptions, Version, check_options, create
from livedisk.emulator.errors import BlockError, ParameterError

UNSET = msgspec.UNSET
_Str = str | msgspec.UnsetType
MAGIC = b"QFI\xfb"
ENCRYPTION = "Encryption of qcow2 images is not supported: there is no cipher here that could write them"


class CreateEncryptionFormat(enum.StrEnum):
    """QEMU's QCryptoBlockFormat."""

    QCOW = "qcow"
    LUKS = "luks"


class CreateEncryption(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """QEMU's QCryptoBlockCreateOptions. Read so that it can be refused with a reason."""

    format: CreateEncryptionFormat
    key_secret: _Str = UNSET
    cipher_alg: _Str = UNSET
    cipher_mode: _Str = UNSET
    ivgen_alg: _Str = UNSET
    ivgen_hash_alg: _Str = UNSET
    hash_alg: _Str = UNSET
    iter_time: int | msgspec.UnsetType = UNSET


class BlockdevCreateOptionsQcow2(BlockdevCreateOptions, kw_only=True):
    """Sizes are bytes. ``file`` and ``data_file`` are nodes, by name or by options."""

    file: BlockdevRef
    data_file: BlockdevRef = UNSET
    data_file_raw: bool = False
    extended_l2: bool = False
    size: Size
    version: Version = Version.V3
    backing_file: _Str = UNSET
    backing_fmt: _Str = UNSET
    encrypt: CreateEncryption | msgspec.UnsetType = UNSET
    cluster_size: Size = 65536
    preallocation: Preallocation = Preallocation.OFF
    lazy_refcounts: bool = False
    refcount_bits: int = 16
    compression_type: CompressionType = CompressionType.ZLIB


class LuksKeyslotState(enum.StrEnum):
    """QEMU's QCryptoBlockLUKSKeyslotState."""

    ACTIVE = "active"
    INACTIVE = "inactive"


class AmendEncryption(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True, tag_field="format"):
    """QEMU's QCryptoBlockAmendOptions."""


class AmendEncryptionQcow(AmendEncryption, tag="qcow"):
    """The old cipher, of which nothing can be changed."""


class AmendEncryptionLuks(AmendEncryption, kw_only=True, tag="luks"):
    """A key slot of LUKS that is to be set or erased."""

    state: LuksKeyslotState
    new_secret: _Str = UNSET
    old_secret: _Str = UNSET
    keyslot: int | msgspec.UnsetType = UNSET
    iter_time: int | msgspec.UnsetType = UNSET
    secret: _Str = UNSET


class BlockdevAmendOptionsQcow2(BlockdevAmendOptions, kw_only=True):
    """QEMU's, of the same name."""

    encrypt: AmendEncryptionQcow | AmendEncryptionLuks | msgspec.UnsetType = UNSET


async def create_in_nodes(graph: Graph, options: BlockdevCreateOptionsQcow2) -> None:
    """Make the image. Raises BlockError, in QEMU's words, or OSError."""
    if isinstance(options.backing_fmt, str) and options.backing_fmt not in DRIVERS:
        raise ParameterError(f"Parameter 'backing-fmt' does not accept value '{options.backing_fmt}'")
    if options.encrypt is not UNSET:
        raise BlockError(ENCRYPTION)
    check_options(_plain(options, "" if options.data_file is not UNSET else UNSET))
    async with AsyncExitStack() as held:
        file = await held.enter_async_context(taken(graph, options.file))
        data = None
        if options.data_file is not UNSET:
            data = await held.enter_async_context(taken(graph, options.data_file))
        await create(file, _plain(options, UNSET if data is None else data.driver.filename), data)
        start = bytearray(4)
        await file.read(0, memoryview(start))
        if bytes(start) != MAGIC:
            raise BlockError(
                "Image is not in qcow2 format", hint=f"Node '{file.name}' does not keep what is written to it."
            )


def _plain(options: BlockdevCreateOptionsQcow2, data_file: _Str) -> CreateOptions:
    """The same without nodes; ``data_file``: the name to record."""
    return CreateOptions(
        size=options.size,
        data_file=data_file,
        data_file_raw=options.data_file_raw,
        extended_l2=options.extended_l2,
        version=options.version,
        backing_file=options.backing_file,
        backing_fmt=options.backing_fmt,
        cluster_size=options.cluster_size,
        preallocation=options.preallocation,
        lazy_refcounts=options.lazy_refcounts,
        refcount_bits=options.refcount_bits,
        compression_type=options.compression_type,
    )
