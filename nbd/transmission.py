"""The transmission phase without sockets: taking requests apart, judging them, building replies.

Shared by the fast loop (which only looks at the commonest two requests) and the slow path; the client's role uses the same
structs and modes. Three parts:

* `Framing` reads a request header from a buffer, in the form that was negotiated (compact or extended).
* `judge` says whether a request may run: a table of rules a command, then the export's limits. What it refuses
  is a `Refusal` with the error and the text to send.
* `Replies` builds simple, structured or extended replies. Every method returns one ``bytes``; bulk data follows its header
  as a separate buffer, so that it is never copied into one.

Source: proto.md, "Transmission phase", "Error values", "Extended headers". Texts and the order of checks are those of
QEMU 10.0.2. Error numbers are the specification's where QEMU sends EINVAL for everything: EPERM for a write to a read-only
export, ENOSPC for a write beyond the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final, NamedTuple

from .constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    MAX_STRING,
    REPLY_DONE,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    CommandFlag,
    ErrorCode,
    ReplyMode,
    spoken,
)
from .export import Extent
from .handshake import Session
from .messages import (
    CHUNK,
    ERROR,
    EXTENDED_CHUNK,
    EXTENDED_EXTENT,
    EXTENDED_REQUEST,
    EXTENT,
    HOLE,
    REQUEST,
    SIMPLE_REPLY,
    STATUS_EXT,
    U32,
    U64,
)

MAX_EXTENTS: Final = (1 << 20) // 8
"""Extents in one answer to BLOCK_STATUS: a mebibyte of them, as QEMU."""

_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)
"""A number: operations on an `IntFlag` are slow."""


class Request(NamedTuple):
    """One request header. ``length`` is what the header says: the effect's, or with PAYLOAD_LEN the payload's."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int

    @property
    def payload(self) -> int:
        """Bytes that follow the header on the wire."""
        if self.command == Command.WRITE or self.flags & _PAYLOAD_LEN:
            return self.length
        return 0


class Refusal(NamedTuple):
    """Why a request does not run: the wire's error and the text that goes with it."""

    error: ErrorCode
    text: str


class BadFrame(Exception):
    """The stream of requests cannot be followed any more. ``request`` and ``refusal`` make the last reply."""

    def __init__(self, request: Request, text: str) -> None:
        super().__init__(text)
        self.request = request
        self.refusal = Refusal(ErrorCode.EINVAL, text)


class Framing:
    """Request headers of one connection: ``header`` is their struct, ``magic`` how they begin."""

    def __init__(self, mode: ReplyMode) -> None:
        self._extended = mode == ReplyMode.EXTENDED
        self.header: Struct = EXTENDED_REQUEST if self._extended else REQUEST
        self.magic = EXTENDED_REQUEST_MAGIC if self._extended else REQUEST_MAGIC

    def parse(self, buffer: bytearray | bytes | memoryview, at: int) -> Request:
        """The request whose whole header stands at ``at``.

        Raises `BadFrame` for a wrong magic, and for a payload that is larger than may be skipped: after either, nobody
        knows where the next request begins.
        """
        magic, flags, command, cookie, offset, length = self.header.unpack_from(buffer, at)
        if not self._extended and command != Command.WRITE:
            # A payload can only be announced in extended headers; elsewhere the bit is merely an unknown flag.
            request: Request = _NoPayload(flags, command, cookie, offset, length)
        else:
            request = Request(flags, command, cookie, offset, length)
        if magic != self.magic:
            raise BadFrame(request, f"invalid magic (got 0x{magic:x}, expected 0x{self.magic:x})")
        if request.payload > MAX_PAYLOAD:
            raise BadFrame(request, f"len ({length}) is larger than max len ({MAX_PAYLOAD})")
        return request


class _NoPayload(Request):
    """A request in compact framing that carries nothing, whatever its flags say."""

    __slots__ = ()

    @property
    def payload(self) -> int:
        return 0


class _Rule(NamedTuple):
    """What one command allows. ``flags`` is a plain number: the complement of an `IntFlag` forgets unknown bits."""

    flags: int
    writes: bool = False
    bounded: bool = False
    """Whether the export's maximum payload limits the length."""


_FUA: Final = int(CommandFlag.FUA)
_RULES: Final[dict[int, _Rule]] = {
    Command.READ: _Rule(_FUA | int(CommandFlag.DF), bounded=True),
    Command.WRITE: _Rule(_FUA | int(CommandFlag.PAYLOAD_LEN), writes=True, bounded=True),
    Command.FLUSH: _Rule(_FUA),
    Command.TRIM: _Rule(_FUA, writes=True),
    Command.CACHE: _Rule(_FUA, bounded=True),
    Command.WRITE_ZEROES: _Rule(_FUA | int(CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO), writes=True),
    Command.BLOCK_STATUS: _Rule(_FUA | int(CommandFlag.REQ_ONE | CommandFlag.PAYLOAD_LEN)),
}
_GROWS: Final = (Command.WRITE, Command.WRITE_ZEROES)
"""Beyond the end these lack space (ENOSPC); any other request is merely wrong (EINVAL)."""


def judge(session: Session, request: Request) -> Refusal | None:
    """Why ``request`` may not run on this session's export, or None. The order of the checks is QEMU's.

    For BLOCK_STATUS with a payload, ``length`` must already be the one that the payload named (see `status_filter`).
    """
    export = session.export
    rule = _RULES.get(request.command)
    if rule is None:
        if request.flags & ~_FUA:
            return _bad_flags(request)
        return Refusal(ErrorCode.EINVAL, f"invalid request type ({request.command}) received")
    if rule.bounded and request.length > min(export.max_payload, MAX_PAYLOAD):
        limit = min(export.max_payload, MAX_PAYLOAD)
        return Refusal(ErrorCode.EINVAL, f"len ({request.length}) is larger than max len ({limit})")
    if rule.writes and export.read_only:
        return Refusal(ErrorCode.EPERM, "Export is read-only")
    size = export.size
    if request.offset > size or request.length > size - request.offset:
        error = ErrorCode.ENOSPC if request.command in _GROWS else ErrorCode.EINVAL
        place = f"From: {request.offset}, Len: {request.length}, Size: {size}"
        return Refusal(error, f"operation past EOF; {place}")
    if request.flags & ~_allowed(rule, session, request.command):
        return _bad_flags(request)
    if request.command == Command.BLOCK_STATUS:
        if not session.contexts:
            return Refusal(ErrorCode.EINVAL, "CMD_BLOCK_STATUS not negotiated")
        if request.length == 0:
            return Refusal(ErrorCode.EINVAL, "need non-zero length")
    return None


def _allowed(rule: _Rule, session: Session, command: int) -> int:
    """A command's flags, less those that this session did not negotiate."""
    allowed = rule.flags
    if session.mode < ReplyMode.STRUCTURED:
        allowed &= ~int(CommandFlag.DF)
    if session.mode < ReplyMode.EXTENDED:
        allowed &= ~int(CommandFlag.PAYLOAD_LEN)
    if command == Command.WRITE_ZEROES and not session.export.can_fast_zero:
        allowed &= ~int(CommandFlag.FAST_ZERO)
    return allowed


def _bad_flags(request: Request) -> Refusal:
    command = spoken(Command, request.command)
    return Refusal(ErrorCode.EINVAL, f"unsupported flags for command {command} (got 0x{request.flags:x})")


def status_filter(session: Session, payload: bytes) -> tuple[int, list[int]] | None:
    """The effect length and context ids that a BLOCK_STATUS payload asks for; None when it is not valid.

    Valid is: at least one id, each negotiated, none twice (proto.md, "NBD_CMD_BLOCK_STATUS", extended headers).
    """
    count, surplus = divmod(len(payload) - U64.size, U32.size)
    if surplus or not 0 < count <= len(session.contexts):
        return None
    length = int(U64.unpack_from(payload)[0])
    ids = [int(U32.unpack_from(payload, U64.size + i * U32.size)[0]) for i in range(count)]
    if len(set(ids)) != count or not set(ids) <= {context.id for context in session.contexts}:
        return None
    return length, ids


class Replies:
    """Replies in the form that one connection negotiated. Offsets and lengths are bytes."""

    def __init__(self, mode: ReplyMode) -> None:
        self.mode = mode
        self.read_header = (SIMPLE_REPLY.size, CHUNK.size + U64.size, EXTENDED_CHUNK.size + U64.size)[mode]
        """Bytes in front of a read's data."""

    def chunk(self, request: Request, kind: Chunk, length: int, flags: int) -> bytes:
        """The header of one chunk whose payload is ``length`` bytes (not in simple mode)."""
        if self.mode == ReplyMode.EXTENDED:
            return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, length)
        return CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, length)

    def success(self, request: Request) -> bytes:
        """Done, nothing to say. A simple reply, which structured mode allows for all but READ; extended does not."""
        if self.mode == ReplyMode.EXTENDED or (self.mode and request.command == Command.READ):
            return self.chunk(request, Chunk.NONE, 0, REPLY_DONE)
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, ErrorCode.OK, request.cookie)

    def failure(self, request: Request, refusal: Refusal) -> bytes:
        """An error, with its text where the mode has room for one."""
        if self.mode == ReplyMode.SIMPLE:
            return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, refusal.error, request.cookie)
        text = refusal.text.encode(errors="replace")[:MAX_STRING]
        payload = ERROR.pack(refusal.error, len(text)) + text
        return self.chunk(request, Chunk.ERROR, len(payload), REPLY_DONE) + payload

    def data_header(self, request: Request, offset: int, length: int, flags: int) -> bytes:
        """What goes in front of ``length`` bytes of data that were read at ``offset``."""
        if self.mode == ReplyMode.SIMPLE:
            return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, ErrorCode.OK, request.cookie)
        return self.chunk(request, Chunk.OFFSET_DATA, U64.size + length, flags) + U64.pack(offset)

    def hole(self, request: Request, offset: int, length: int, flags: int) -> bytes:
        """``length`` bytes at ``offset`` read as zeroes (not in simple mode)."""
        return self.chunk(request, Chunk.OFFSET_HOLE, HOLE.size, flags) + HOLE.pack(offset, length)

    def block_status(self, request: Request, context: int, extents: Sequence[Extent], flags: int) -> bytes:
        """One context's extents (not in simple mode)."""
        if self.mode == ReplyMode.EXTENDED:
            body = b"".join(EXTENDED_EXTENT.pack(extent.length, extent.flags) for extent in extents)
            payload = STATUS_EXT.pack(context, len(extents)) + body
            return self.chunk(request, Chunk.BLOCK_STATUS_EXT, len(payload), flags) + payload
        body = b"".join(EXTENT.pack(extent.length, extent.flags) for extent in extents)
        payload = U32.pack(context) + body
        return self.chunk(request, Chunk.BLOCK_STATUS, len(payload), flags) + payload
