"""The hot loop: many reads and writes from one buffer into another, without an object a request. No sockets.

`fast_loop` makes the loop of one connection. Called with the received bytes and room for replies, it serves whole requests
in order for as long as each is a plain READ or WRITE (no flags) inside the export that ``try_read`` or ``try_write`` does at
once, then says why it stopped. Everything else -- flags, other commands, errors, misses -- stays in place for the slow path,
which judges it with all care.

This is the one place where speed decides: one long flat function with all it touches in local variables. Magic, flags and
command are compared as one 64-bit number; a read lands behind its header in the reply buffer; a write leaves from the receive
buffer. Nothing is copied, and nothing allocated but two `memoryview` slices.

Invariants: a stop changes nothing for the request it stopped at, so that may be tried again; a reply is in the buffer if and
only if its request was consumed; the replies never pass the end of their buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from struct import Struct
from typing import Final

from .buffers import BUFFER_SIZE
from .constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    REPLY_DONE,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    CommandFlag,
    ReplyMode,
)
from .export import DATA, HOLE, MISS, Export
from .handshake import Session

log = logging.getLogger(__name__)

MORE: Final = 0
"""The rest of the buffer is not a whole request."""
FULL: Final = 1
"""The next reply does not fit behind those already there."""
SLOW: Final = 2
"""The next request is not for the fast path."""
DECLINED: Final = 3
"""The next request is a plain read or write that may run, all of it is here, and only the export's fast path will not do it."""

Loop = Callable[[memoryview, int, int, memoryview, int, int, int], tuple[int, int, int]]
"""``(received, at, end, replies, filled, limit, size) -> (at, filled, MORE | FULL | SLOW | DECLINED)``"""

_ZEROES: Final = memoryview(bytes(BUFFER_SIZE))
"""Never written, so the kernel backs it with its one page of zeroes."""


def _report(export: Export, error: Exception) -> None:
    """An `OSError` is the export's right; anything else is a mistake in it, which must not go unseen."""
    if not isinstance(error, OSError):
        log.error("fast path of export '%s' raised", export.name, exc_info=error)


def fast_loop(session: Session) -> Loop:
    """The loop for one connection.

    It takes requests from ``received[at:end]``, puts replies into ``replies`` from ``filled`` on, and starts no further
    request once its reply would pass ``limit``, against which written bytes count too; ``size`` is the export's size now. All
    are bytes. The first reply in the buffer may pass ``limit`` up to the end of ``replies``; one that cannot fit there at all
    is SLOW. Whatever ``try_read`` or ``try_write`` raises makes the request SLOW too: there it fails again, with a proper reply.
    """
    export, mode = session.export, session.mode
    extended, structured = mode == ReplyMode.EXTENDED, mode == ReplyMode.STRUCTURED
    # In all of these, the first number is magic, flags and command or type in one.
    request = Struct(">QQQQ" if extended else ">QQQI")
    simple, chunk, extended_chunk = Struct(">QQ"), Struct(">QQIQ"), Struct(">QQQQQ")
    hole, extended_hole, none = Struct(">QQIQI"), Struct(">QQQQQI"), Struct(">QQQQ")

    unpack, header = request.unpack_from, request.size
    magic = (EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC) << 32
    read_head = magic | Command.READ
    write_head = magic | Command.WRITE | (CommandFlag.PAYLOAD_LEN << 16 if extended else 0)
    ahead = (simple.size, chunk.size, extended_chunk.size)[mode]
    hole_size = extended_hole.size if extended else hole.size
    done_size = none.size if extended else simple.size
    reply_magic = (EXTENDED_REPLY_MAGIC if extended else STRUCTURED_REPLY_MAGIC) << 32 | REPLY_DONE << 16
    data_head, hole_head = reply_magic | Chunk.OFFSET_DATA, reply_magic | Chunk.OFFSET_HOLE
    none_head, simple_head = reply_magic | Chunk.NONE, SIMPLE_REPLY_MAGIC << 32
    pack_simple, pack_chunk, pack_extended = simple.pack_into, chunk.pack_into, extended_chunk.pack_into
    pack_hole, pack_extended_hole, pack_none = hole.pack_into, extended_hole.pack_into, none.pack_into
    longest, may_write, unaligned = export.max_payload, not export.read_only, export.min_block - 1

    def serve(
        received: memoryview, at: int, end: int, replies: memoryview, filled: int, limit: int, size: int
    ) -> tuple[int, int, int]:
        try_read, try_write = export.try_read, export.try_write
        while True:
            body = at + header
            if body > end:
                return at, filled, MORE
            head, cookie, offset, length = unpack(received, at)
            if head == read_head:
                start = filled + ahead
                stop = start + length
                if stop > limit:
                    if filled:
                        return at, filled, FULL
                    if stop > len(replies):
                        return at, filled, SLOW
                if offset + length > size or not 0 < length <= longest or (offset | length) & unaligned:
                    return at, filled, SLOW
                try:
                    outcome = try_read(offset, replies[start:stop])
                except Exception as error:
                    _report(export, error)
                    return at, filled, SLOW
                if outcome == DATA:
                    if structured:
                        pack_chunk(replies, filled, data_head, cookie, length + 8, offset)
                    elif extended:
                        pack_extended(replies, filled, data_head, cookie, offset, length + 8, offset)
                    else:
                        pack_simple(replies, filled, simple_head, cookie)
                    filled = stop
                elif outcome == HOLE:
                    if structured or extended:
                        if filled + hole_size > limit and filled:
                            return at, filled, FULL
                        if structured:
                            pack_hole(replies, filled, hole_head, cookie, 12, offset, length)
                        else:
                            pack_extended_hole(replies, filled, hole_head, cookie, offset, 12, offset, length)
                        filled += hole_size
                    else:
                        pack_simple(replies, filled, simple_head, cookie)
                        replies[start:stop] = _ZEROES[:length]
                        filled = stop
                else:
                    return at, filled, DECLINED
                at = body
            elif head == write_head:
                stop = body + length
                if stop > end:
                    return at, filled, MORE
                if filled + done_size > limit and filled:
                    return at, filled, FULL
                if (
                    offset + length > size
                    or not 0 < length <= longest
                    or not may_write
                    or (offset | length) & unaligned
                ):
                    return at, filled, SLOW
                try:
                    if try_write(offset, received[body:stop]) == MISS:
                        return at, filled, DECLINED
                except Exception as error:
                    _report(export, error)
                    return at, filled, SLOW
                if extended:
                    pack_none(replies, filled, none_head, cookie, offset, 0)
                else:
                    pack_simple(replies, filled, simple_head, cookie)
                filled += done_size
                limit -= length  # so that replies to writes, which are tiny, do not wait for all of them
                at = stop
            else:
                return at, filled, SLOW

    return serve
