"""The protocol's messages as precompiled `Struct`s, and the functions that pack them. No state and no I/O.

Shared by the server's and the client's role. Everything is in network byte order. Layouts: proto.md, "Fixed newstyle
negotiation", "Request message", "Simple reply message", "Structured reply chunk message", "Extended headers".
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import Final

from .constants import OPTION_MAGIC, OPTION_REPLY_MAGIC, ErrorCode

GREETING: Final = Struct(">QQH")
"""INIT_MAGIC, OPTION_MAGIC, handshake flags."""
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">QII")
"""OPTION_MAGIC, option, length of its data."""
OPTION_REPLY: Final = Struct(">QIII")
"""OPTION_REPLY_MAGIC, option, reply type, length of its data."""
EXPORT_NAME_REPLY: Final = Struct(">QH")
"""Size of the export in bytes, transmission flags."""
EXPORT_NAME_PADDING: Final = bytes(124)
"""What follows `EXPORT_NAME_REPLY` unless NO_ZEROES was agreed."""
U16: Final = Struct(">H")
U32: Final = Struct(">I")
U64: Final = Struct(">Q")
INFO_EXPORT: Final = Struct(">HQH")
"""Info type, size in bytes, transmission flags."""
INFO_BLOCK_SIZE: Final = Struct(">HIII")
"""Info type, minimum, preferred and maximum block size, bytes."""

REQUEST: Final = Struct(">IHHQQI")
"""Magic, flags, command, cookie, offset, length."""
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")
"""As `REQUEST`; the length is either the effect's or, with PAYLOAD_LEN, the payload's."""
SIMPLE_REPLY: Final = Struct(">IIQ")
"""Magic, error, cookie."""
CHUNK: Final = Struct(">IHHQI")
"""Magic, flags, type, cookie, length of the payload."""
EXTENDED_CHUNK: Final = Struct(">IHHQQQ")
"""Magic, flags, type, cookie, the request's offset, length of the payload."""
HOLE: Final = Struct(">QI")
"""Payload of OFFSET_HOLE: offset, length."""
ERROR: Final = Struct(">IH")
"""Start of an error chunk's payload: error, length of the message that follows."""
EXTENT: Final = Struct(">II")
"""One extent of BLOCK_STATUS: length, flags."""
EXTENDED_EXTENT: Final = Struct(">QQ")
"""One extent of BLOCK_STATUS_EXT: length, flags."""
STATUS_EXT: Final = Struct(">II")
"""Start of BLOCK_STATUS_EXT's payload: context id, number of extents."""


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """One reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def option(number: int, data: bytes = b"") -> bytes:
    """One option, as a client sends it."""
    return OPTION.pack(OPTION_MAGIC, number, len(data)) + data


def counted(data: bytes) -> bytes:
    """A string behind its 32-bit length."""
    return U32.pack(len(data)) + data


_WIRE_ERRORS: Final = {
    errno.EPERM: ErrorCode.EPERM,
    errno.EACCES: ErrorCode.EPERM,
    errno.EROFS: ErrorCode.EPERM,
    errno.EIO: ErrorCode.EIO,
    errno.ENOMEM: ErrorCode.ENOMEM,
    errno.EDQUOT: ErrorCode.ENOSPC,
    errno.EFBIG: ErrorCode.ENOSPC,
    errno.ENOSPC: ErrorCode.ENOSPC,
    errno.EOVERFLOW: ErrorCode.EOVERFLOW,
    errno.EOPNOTSUPP: ErrorCode.ENOTSUP,
    errno.ESHUTDOWN: ErrorCode.ESHUTDOWN,
    errno.EINVAL: ErrorCode.EINVAL,
}


def wire_error(number: int | None) -> ErrorCode:
    """The protocol's error for a system's errno (proto.md, "Error values").

    What has no counterpart becomes EIO when it is unknown (QEMU says EINVAL, which tells a guest that its request was
    wrong when it was the storage that failed: guests retry or stop on EIO, and give up on EINVAL).
    """
    if number is None:
        return ErrorCode.EIO
    return _WIRE_ERRORS.get(number, ErrorCode.EIO)
