"""The numbers of the NBD protocol, under the specification's names (``doc/proto.md``, sections "Values" and "Extended headers").

Shared by the server's and the client's role. Plain enums without behaviour but for `spoken`, which gives the words
that error texts use (QEMU's: ``NBD_OPT_LIST_META_CONTEXT`` is "list meta context").
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

INIT_MAGIC: Final = 0x4E42444D41474943
"""``NBDMAGIC``, the first eight bytes a server sends."""
OPTION_MAGIC: Final = 0x49484156454F5054
"""``IHAVEOPT``: newstyle, and the start of every option."""
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

MAX_STRING: Final = 4096
"""Bytes in a name, a description or a message (proto.md, "Conventions")."""
MAX_PAYLOAD: Final = 32 << 20
"""Bytes: the payload that every implementation accepts, and what QEMU refuses to pass."""
DEFAULT_PORT: Final = 10809


class HandshakeFlag(IntFlag):
    """Server's handshake flags (16 bits) and client's flags (32 bits): the two known bits are the same."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """What an export can do, sent at the end of the handshake (16 bits)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(IntEnum):
    """Options of the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


REP_ERROR: Final = 1 << 31
"""Set in every option reply type that is an error."""


class OptionReply(IntEnum):
    """Types of a reply to an option."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = REP_ERROR + 1
    ERR_POLICY = REP_ERROR + 2
    ERR_INVALID = REP_ERROR + 3
    ERR_PLATFORM = REP_ERROR + 4
    ERR_TLS_REQD = REP_ERROR + 5
    ERR_UNKNOWN = REP_ERROR + 6
    ERR_SHUTDOWN = REP_ERROR + 7
    ERR_BLOCK_SIZE_REQD = REP_ERROR + 8
    ERR_TOO_BIG = REP_ERROR + 9
    ERR_EXT_HEADER_REQD = REP_ERROR + 10


class Info(IntEnum):
    """Items of NBD_OPT_INFO and NBD_OPT_GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """Requests of the transmission phase."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of a request (16 bits)."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


REPLY_DONE: Final = 1
"""NBD_REPLY_FLAG_DONE: the last chunk of a structured reply."""
CHUNK_ERROR: Final = 1 << 15
"""Set in every chunk type that is an error."""


class Chunk(IntEnum):
    """Types of a structured reply chunk."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = CHUNK_ERROR + 1
    ERROR_OFFSET = CHUNK_ERROR + 2


class ErrorCode(IntEnum):
    """The errors that may cross the wire; they equal Linux's errno on x86 but are the protocol's own."""

    OK = 0
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


STATE_HOLE: Final = 1 << 0
"""base:allocation: nothing is allocated here."""
STATE_ZERO: Final = 1 << 1
"""base:allocation: reads as zeroes."""

BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"


class ReplyMode(IntEnum):
    """Which form of header and reply a connection negotiated; each one includes the abilities of those before it."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


def spoken(kind: type[IntEnum], number: int) -> str:
    """The name of ``number`` in words, as QEMU writes it in its messages; ``<unknown>`` when it has none."""
    try:
        return kind(number).name.lower().replace("_", " ")
    except ValueError:
        return "<unknown>"
