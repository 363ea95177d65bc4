"""The client's half of the transmission phase: requests out, replies in. No sockets.

`ClientTransmission.request` packs a request and remembers what its reply may look like; `receive` takes what arrived, in
pieces of any size, and returns the requests that ended. Data goes straight from the received piece into the buffer that
the caller gave with the request; `wanted` says where the next bytes of a long piece of data go, so that the caller can receive
them there and save even that copy (`arrived`).

Small replies come many at a time, each whole: `_whole` takes those at little cost. Whatever is not such a reply goes
through the state machine behind it, which takes any.

The server is not trusted: a reply to nobody, data outside the request or twice, success with data missing, a chunk
longer than it may be -- each is a `ProtocolError`, after which the connection is useless.

Source: proto.md, "Transmission phase", "Structured reply types", "Extended headers".
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from struct import Struct
from typing import TYPE_CHECKING, Final

from .client_handshake import ExportInfo
from .constants import (
    CHUNK_ERROR,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
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
)
from .export import Extent
from .file_payload import FilePayload
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

if TYPE_CHECKING:
    import asyncio

NO_FLAGS: Final = CommandFlag(0)
_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)
_MAX_SMALL: Final = (1 << 20) * 16 + 64
"""Bytes of a chunk that is collected before it is looked at: a very full answer to BLOCK_STATUS."""
MAX_EXTENTS: Final = 1 << 16
"""Extents of one answer that are kept."""
_FEW_CHUNKS: Final = 1 << 10
SECTOR: Final = 512
"""Bytes. No server has a reason to answer in more chunks than sectors and a few; one that does is stopped."""


_HEAD: Final = Struct(">QQ")
"""A simple reply's magic and error, or a chunk's magic, flags and type, in one number; and the cookie."""
_DATA_HEAD: Final = Struct(">QQIQ")
"""The same, the chunk's length, and the offset that a data chunk begins with."""
_EXTENDED_HEAD: Final = Struct(">QQQQ")
_SIMPLE_OK: Final = SIMPLE_REPLY_MAGIC << 32
_ONLY_DATA: Final = STRUCTURED_REPLY_MAGIC << 32 | REPLY_DONE << 16 | Chunk.OFFSET_DATA
_EXTENDED_ONLY_DATA: Final = EXTENDED_REPLY_MAGIC << 32 | REPLY_DONE << 16 | Chunk.OFFSET_DATA
_EXTENDED_NONE: Final = EXTENDED_REPLY_MAGIC << 32 | REPLY_DONE << 16 | Chunk.NONE
_ZEROES: Final = bytes(1 << 16)
_ERRORS: Final = frozenset(ErrorCode)


class ProtocolError(Exception):
    """The server broke the protocol; the connection must be dropped."""


@dataclass(slots=True)
class Pending:
    """A request under way and, at the end, its outcome.

    ``error`` is the error the server sent, or None; ``extents`` maps the names of contexts to their extents (of a very
    long answer the first `MAX_EXTENTS`). ``holes``: what a READ was told to be holes, as (start, length) behind its offset.
    ``ranges``: what it was answered so far, sorted, adjacent ones joined. ``payload``, ``sent_by``, ``waiter``, ``ended``:
    the shell's.
    """

    command: Command
    cookie: int
    offset: int
    length: int
    target: memoryview | None = None
    error: OSError | None = None
    extents: dict[str, list[Extent]] = field(default_factory=dict)
    covered: int = 0
    chunks: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)
    holes: list[tuple[int, int]] = field(default_factory=list)
    payload: bytes | bytearray | memoryview | FilePayload | None = None
    sent_by: int = 0
    waiter: asyncio.Future[Pending] | None = None
    ended: Callable[[Pending | None], None] | None = None


class ClientTransmission:
    """Requests and replies of one connection to the export that ``info`` describes."""

    def __init__(self, info: ExportInfo) -> None:
        self._info = info
        self._pending: dict[int, Pending] = {}
        self._last_cookie = 0
        self._finished: list[Pending] = []
        self._collected = bytearray()
        self._between = True  # no reply has begun
        self._wanted = U32.size
        self._then: Callable[[bytes], None] = self._on_magic
        self._current: Pending | None = None
        self._streaming: memoryview | None = None
        self._last_chunk = False
        self._whole = self._whole_extended if info.mode == ReplyMode.EXTENDED else self._whole_reply

    @property
    def in_flight(self) -> int:
        """Requests without a complete reply."""
        return len(self._pending)

    def abandon(self) -> list[Pending]:
        """The connection is gone: forget all requests under way and return them."""
        pending = list(self._pending.values())
        self._pending.clear()
        return pending

    def request(
        self,
        command: Command,
        offset: int,
        length: int,
        *,
        flags: CommandFlag = NO_FLAGS,
        target: memoryview | None = None,
    ) -> tuple[bytes, Pending]:
        """A request's header and its place in the books.

        ``target`` is where a READ's data goes; the payload of a WRITE has to be sent right behind the header. Offsets and
        lengths are bytes. Raises ValueError for a length that the header cannot carry.
        """
        extended = self._info.mode == ReplyMode.EXTENDED
        if length >> (64 if extended else 32):
            raise ValueError(f"a request of {length} bytes does not fit the protocol's header")
        self._last_cookie = cookie = self._last_cookie + 1
        pending = Pending(command, cookie, offset, length, target)
        if command != Command.DISCONNECT:
            self._pending[cookie] = pending
        if extended:
            wire = int(flags) | _PAYLOAD_LEN if command == Command.WRITE else flags
            header = EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, wire, command, cookie, offset, length)
        else:
            header = REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
        return header, pending

    @property
    def wanted(self) -> memoryview | None:
        """Where the next bytes go, where they are data of a READ: received there (`arrived`), or given to `receive` as any."""
        return self._streaming

    def arrived(self, count: int) -> list[Pending]:
        """The first ``count`` bytes of `wanted` were received in place; the requests that they completed."""
        streaming = self._streaming
        assert streaming is not None
        self._streamed(streaming, count)
        finished, self._finished = self._finished, []
        return finished

    def receive(self, data: memoryview | bytes) -> list[Pending]:
        """Take what arrived; the requests that it completed. Raises `ProtocolError`."""
        view = memoryview(data)
        at, end = 0, len(view)
        while at < end:
            streaming = self._streaming
            if streaming is not None:
                count = min(len(streaming), end - at)
                streaming[:count] = view[at : at + count]
                self._streamed(streaming, count)
                at += count
                continue
            collected = self._collected
            if self._between and not collected:
                after = self._whole(view, at, end)
                if after != at:
                    at = after
                    continue
            count = min(self._wanted - len(collected), end - at)
            collected += view[at : at + count]
            at += count
            if len(collected) == self._wanted:
                whole = bytes(collected)
                collected.clear()
                self._then(whole)
        finished, self._finished = self._finished, []
        return finished

    def _whole_reply(self, view: memoryview, at: int, end: int) -> int:
        """Take a simple or structured reply that is all there, in one chunk and without an error: where the next one begins,
        or ``at`` where it is none such, and nothing happened."""
        if end - at < SIMPLE_REPLY.size:
            return at
        head, cookie = _HEAD.unpack_from(view, at)
        pending = self._pending.get(cookie)
        if pending is None:
            return at
        if head == _SIMPLE_OK:
            body = at + SIMPLE_REPLY.size
            if pending.command == Command.READ:
                return at if self._info.mode else self._whole_data(pending, view, body, at, end)
            if pending.command == Command.BLOCK_STATUS or pending.extents:
                return at
            self._end(pending)
            return body
        if head == _ONLY_DATA and self._info.mode and end - at >= _DATA_HEAD.size:
            _, _, length, offset = _DATA_HEAD.unpack_from(view, at)
            if offset == pending.offset and length == pending.length + U64.size and pending.command == Command.READ:
                return self._whole_data(pending, view, at + _DATA_HEAD.size, at, end)
        return at

    def _whole_extended(self, view: memoryview, at: int, end: int) -> int:
        """As `_whole_reply`, with extended headers."""
        body = at + EXTENDED_CHUNK.size
        if body > end:
            return at
        head, cookie, _, length = _EXTENDED_HEAD.unpack_from(view, at)
        pending = self._pending.get(cookie)
        if pending is None:
            return at
        if head == _EXTENDED_NONE and length == 0:
            if pending.command == Command.READ or pending.error is not None:
                return at
            self._end(pending)
            return body
        if head == _EXTENDED_ONLY_DATA and pending.command == Command.READ and length == pending.length + U64.size:
            data = body + U64.size
            if data <= end and U64.unpack_from(view, body)[0] == pending.offset:
                return self._whole_data(pending, view, data, at, end)
        return at

    def _whole_data(self, pending: Pending, view: memoryview, start: int, at: int, end: int) -> int:
        """Take the data of a read that is answered in one piece, if all of it is there; ``at`` if not."""
        stop = start + pending.length
        if stop > end or pending.covered or pending.error is not None or not pending.length:
            return at
        assert pending.target is not None
        pending.target[:] = view[start:stop]
        pending.covered = pending.length
        self._end(pending)
        return stop

    def _end(self, pending: Pending) -> None:
        del self._pending[pending.cookie]
        self._finished.append(pending)

    def _streamed(self, streaming: memoryview, count: int) -> None:
        """``count`` bytes of the data that is being received are in place."""
        if count < len(streaming):
            self._streaming = streaming[count:]
        else:
            self._streaming = None
            self._end_of_chunk()

    def _expect(self, size: int, then: Callable[[bytes], None]) -> None:
        self._between, self._wanted, self._then = False, size, then

    def _expect_reply(self) -> None:
        self._between, self._wanted, self._then = True, U32.size, self._on_magic

    def _on_magic(self, collected: bytes) -> None:
        magic = U32.unpack(collected)[0]
        forms = {
            SIMPLE_REPLY_MAGIC: (ReplyMode.SIMPLE, SIMPLE_REPLY.size, self._on_simple),
            STRUCTURED_REPLY_MAGIC: (ReplyMode.STRUCTURED, CHUNK.size, self._on_chunk),
            EXTENDED_REPLY_MAGIC: (ReplyMode.EXTENDED, EXTENDED_CHUNK.size, self._on_chunk),
        }
        if magic not in forms:
            raise ProtocolError(f"reply with unknown magic 0x{magic:x}")
        form, size, then = forms[magic]
        mode = self._info.mode
        # Simple replies remain allowed in structured mode; nothing else may differ from what was agreed.
        if form != mode and not (form == ReplyMode.SIMPLE and mode == ReplyMode.STRUCTURED):
            raise ProtocolError(f"{form.name.lower()} reply where {mode.name.lower()} headers were agreed")
        # The magic counts as part of the header that is collected next.
        self._collected += collected
        self._expect(size, then)

    def _find(self, cookie: int) -> Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise ProtocolError(f"reply to unknown request {cookie}")
        return pending

    def _finish(self, pending: Pending) -> None:
        if pending.error is None and pending.command == Command.READ and pending.covered != pending.length:
            raise ProtocolError(
                f"server claims success but sent {pending.covered} of {pending.length} bytes at {pending.offset}"
            )
        self._end(pending)

    def _on_simple(self, collected: bytes) -> None:
        _, error, cookie = SIMPLE_REPLY.unpack(collected)
        pending = self._find(cookie)
        self._expect_reply()
        if error:
            pending.error = _error(error)
        elif pending.command in (Command.READ, Command.BLOCK_STATUS) and self._info.mode != ReplyMode.SIMPLE:
            raise ProtocolError("simple reply where a structured one is required")
        elif pending.command == Command.READ and pending.length:
            self._current, self._last_chunk = pending, True
            pending.covered = pending.length
            self._streaming = pending.target
            return
        self._finish(pending)

    def _on_chunk(self, collected: bytes) -> None:
        if self._info.mode == ReplyMode.EXTENDED:
            _, flags, kind, cookie, _offset, length = EXTENDED_CHUNK.unpack(collected)
        else:
            _, flags, kind, cookie, length = CHUNK.unpack(collected)
        pending = self._current = self._find(cookie)
        pending.chunks += 1
        if pending.chunks > _FEW_CHUNKS + pending.length // SECTOR:
            raise ProtocolError(f"more than {pending.chunks - 1} chunks in reply to {pending.command.name}")
        self._last_chunk = bool(flags & REPLY_DONE)
        if kind == Chunk.OFFSET_DATA and pending.command == Command.READ:
            if not U64.size < length <= U64.size + pending.length:
                raise ProtocolError(f"data chunk of {length} bytes for a read of {pending.length}")
            self._expect(U64.size, lambda offset: self._on_data(pending, U64.unpack(offset)[0], length - U64.size))
            return
        if length > _MAX_SMALL:
            raise ProtocolError(f"chunk of type {kind} with {length} bytes")
        if length:
            self._expect(length, lambda payload: self._on_payload(pending, kind, payload))
        else:
            self._on_payload(pending, kind, b"")

    def _cover(self, pending: Pending, offset: int, length: int) -> memoryview:
        """Where a content chunk goes, having checked that it may."""
        start = offset - pending.offset
        stop = start + length
        if length == 0 or start < 0 or stop > pending.length:
            raise ProtocolError(f"content of {length} bytes at {offset} outside its request")
        ranges = pending.ranges
        place = bisect_left(ranges, (start, stop))
        if (place and ranges[place - 1][1] > start) or (place < len(ranges) and ranges[place][0] < stop):
            raise ProtocolError(f"content of {length} bytes at {offset} sent twice")
        if place < len(ranges) and ranges[place][0] == stop:
            ranges[place] = (start, ranges[place][1])
        else:
            ranges.insert(place, (start, stop))
        if place and ranges[place - 1][1] == start:
            ranges[place - 1 : place + 1] = [(ranges[place - 1][0], ranges[place][1])]
        pending.covered += length
        assert pending.target is not None
        return pending.target[start:stop]

    def _on_data(self, pending: Pending, offset: int, length: int) -> None:
        self._streaming = self._cover(pending, offset, length)

    def _on_payload(self, pending: Pending, kind: int, payload: bytes) -> None:
        if kind & CHUNK_ERROR:
            self._on_error(pending, payload)
        elif kind == Chunk.NONE:
            if payload or not self._last_chunk:
                raise ProtocolError("empty chunk that is not empty or not the last")
        elif kind == Chunk.OFFSET_HOLE and pending.command == Command.READ and len(payload) == HOLE.size:
            offset, length = HOLE.unpack(payload)
            _fill_zeroes(self._cover(pending, offset, length))
            pending.holes.append((offset - pending.offset, length))
        elif kind in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT) and pending.command == Command.BLOCK_STATUS:
            self._on_status(pending, kind, payload)
        else:
            raise ProtocolError(f"chunk of type {kind} with {len(payload)} bytes in reply to {pending.command.name}")
        self._end_of_chunk()

    def _on_error(self, pending: Pending, payload: bytes) -> None:
        if len(payload) < ERROR.size:
            raise ProtocolError("error chunk without an error")
        error, length = ERROR.unpack_from(payload)
        if error == 0 or length > min(len(payload) - ERROR.size, MAX_STRING):
            raise ProtocolError("malformed error chunk")
        text = payload[ERROR.size : ERROR.size + length].decode(errors="replace")
        if pending.error is None:
            pending.error = _error(error, text)

    def _on_status(self, pending: Pending, kind: int, payload: bytes) -> None:
        wide = kind == Chunk.BLOCK_STATUS_EXT
        head, extent = (STATUS_EXT, EXTENDED_EXTENT) if wide else (U32, EXTENT)
        if wide != (self._info.mode == ReplyMode.EXTENDED) or len(payload) < head.size + extent.size:
            raise ProtocolError("malformed block status chunk")
        context, *count = head.unpack_from(payload)
        body = payload[head.size :]
        name = self._info.contexts.get(context)
        if len(body) % extent.size or (count and count[0] * extent.size != len(body)) or name is None:
            raise ProtocolError("malformed block status chunk")
        if name in pending.extents:
            raise ProtocolError(f"context {name} reported twice")
        pending.extents[name] = [
            Extent(length, flags) for length, flags in islice(extent.iter_unpack(body), MAX_EXTENTS)
        ]
        if any(extent.length == 0 for extent in pending.extents[name]):
            raise ProtocolError("empty extent")

    def _end_of_chunk(self) -> None:
        pending, self._current = self._current, None
        assert pending is not None
        self._expect_reply()
        if self._last_chunk:
            self._finish(pending)


def _error(number: int, text: str = "") -> OSError:
    """The server's error. A number that the protocol does not have is EINVAL (proto.md, "Error values")."""
    if number not in _ERRORS:
        text, number = text or f"server sent the unknown error {number}", ErrorCode.EINVAL
    return OSError(int(number), text or os.strerror(number))


def _fill_zeroes(view: memoryview) -> None:
    for start in range(0, len(view), len(_ZEROES)):
        part = view[start : start + len(_ZEROES)]
        part[:] = _ZEROES[: len(part)]
