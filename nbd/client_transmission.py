"""The client's half of the transmission phase: requests out, replies in. No sockets.

`ClientTransmission.request` packs a request and remembers what its reply may look like; `receive` takes what arrived, in
pieces of any size, and returns the requests that ended. Data goes straight from the received piece into the buffer that
the caller gave with the request.

The server is not trusted: a reply to nobody, data outside the request or twice, success with data missing, a chunk
longer than it may be -- each is a `ProtocolError`, after which the connection is useless.

Source: proto.md, "Transmission phase", "Structured reply types", "Extended headers".
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

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
    ReplyMode,
)
from .export import Extent
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

NO_FLAGS: Final = CommandFlag(0)
_MAX_SMALL: Final = (1 << 20) * 16 + 64
"""Bytes of a chunk that is collected before it is looked at: a very full answer to BLOCK_STATUS."""


class ProtocolError(Exception):
    """The server broke the protocol; the connection must be dropped."""


@dataclass(slots=True)
class Pending:
    """A request under way and, at the end, its outcome.

    ``error`` is the error the server sent, or None; ``extents`` maps the names of contexts to their extents.
    """

    command: Command
    cookie: int
    offset: int
    length: int
    target: memoryview | None = None
    error: OSError | None = None
    extents: dict[str, list[Extent]] = field(default_factory=dict)
    covered: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)


class ClientTransmission:
    """Requests and replies of one connection to the export that ``info`` describes."""

    def __init__(self, info: ExportInfo) -> None:
        self._info = info
        self._pending: dict[int, Pending] = {}
        self._last_cookie = 0
        self._finished: list[Pending] = []
        self._collected = bytearray()
        self._wanted = U32.size
        self._then: Callable[[bytes], None] = self._on_magic
        self._current: Pending | None = None
        self._streaming: memoryview | None = None
        self._last_chunk = False

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
            if command == Command.WRITE:
                flags |= CommandFlag.PAYLOAD_LEN
            header = EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)
        else:
            header = REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
        return header, pending

    def receive(self, data: memoryview | bytes) -> list[Pending]:
        """Take what arrived; the requests that it completed. Raises `ProtocolError`."""
        view = memoryview(data)
        while len(view):
            if self._streaming is not None:
                view = self._stream(view)
                continue
            missing = self._wanted - len(self._collected)
            self._collected += view[:missing]
            view = view[missing:]
            if len(self._collected) == self._wanted:
                collected = bytes(self._collected)
                self._collected.clear()
                self._then(collected)
        finished, self._finished = self._finished, []
        return finished

    def _stream(self, view: memoryview) -> memoryview:
        """Move data into the request's buffer; what is left of ``view``."""
        streaming = self._streaming
        assert streaming is not None
        count = min(len(streaming), len(view))
        streaming[:count] = view[:count]
        if count < len(streaming):
            self._streaming = streaming[count:]
        else:
            self._streaming = None
            self._end_of_chunk()
        return view[count:]

    def _expect(self, size: int, then: Callable[[bytes], None]) -> None:
        self._wanted, self._then = size, then

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
        del self._pending[pending.cookie]
        self._finished.append(pending)

    def _on_simple(self, collected: bytes) -> None:
        _, error, cookie = SIMPLE_REPLY.unpack(collected)
        pending = self._find(cookie)
        self._expect(U32.size, self._on_magic)
        if error:
            pending.error = OSError(error, os.strerror(error))
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
        if any(start < other_stop and other_start < stop for other_start, other_stop in pending.ranges):
            raise ProtocolError(f"content of {length} bytes at {offset} sent twice")
        pending.ranges.append((start, stop))
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
            self._cover(pending, offset, length)[:] = bytes(length)
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
            pending.error = OSError(error, text or os.strerror(error))

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
        pending.extents[name] = [Extent(length, flags) for length, flags in extent.iter_unpack(body)]
        if any(extent.length == 0 for extent in pending.extents[name]):
            raise ProtocolError("empty extent")

    def _end_of_chunk(self) -> None:
        pending, self._current = self._current, None
        assert pending is not None
        self._expect(U32.size, self._on_magic)
        if self._last_chunk:
            self._finish(pending)
