"""What one request that is not for the fast path does: a coroutine from request to reply buffers. No sockets.

`answer` runs a request that `transmission.judge` let pass and returns the reply as a list of buffers to be sent in order.
It never raises for what the export does: an `OSError` becomes the error reply that the protocol has for it, anything else
is logged with its traceback and becomes EIO, so that one faulty request costs neither the connection nor its neighbours.

Source: proto.md, "Request types"; the split of structured reads into data and holes, and the error texts, are QEMU's.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from .buffers import fresh
from .constants import (
    BASE_ALLOCATION,
    REPLY_DONE,
    STATE_ZERO,
    Command,
    CommandFlag,
    ErrorCode,
    ReplyMode,
)
from .handshake import Session
from .messages import wire_error
from .transmission import MAX_EXTENTS, Refusal, Replies, Request, status_filter

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview
Reply = list[Buffer]

_MANY_HOLES: Final = 64
"""Holes in one read from which on they are sent as the zeroes that they are."""
_NOTHING: Final = memoryview(b"")


async def answer(session: Session, replies: Replies, request: Request, payload: memoryview = _NOTHING) -> Reply:
    """The reply to ``request``, which was judged fit to run. ``payload`` stays valid until this returns."""
    run, trouble = _COMMANDS[request.command]
    try:
        return await run(session, replies, request, payload)
    except OSError as error:
        return [failed(replies, request, error)]
    except Exception:
        log.exception("request %r on export '%s' raised", request, session.export.name)
        return [replies.failure(request, Refusal(ErrorCode.EIO, f"{trouble}: internal error"))]


def failed(replies: Replies, request: Request, error: OSError) -> bytes:
    """The reply to a request that the export failed with ``error``."""
    text = f"{_COMMANDS[request.command][1]}: {error.strerror or error}"
    return replies.failure(request, Refusal(wire_error(error.errno), text))


def read_reply(replies: Replies, request: Request, data: memoryview, holes: Sequence[tuple[int, int]]) -> Reply:
    """The reply to a READ of which ``holes``, as (start, length) in ``data``, are known to be zeroes."""
    if not holes or len(holes) > _MANY_HOLES or replies.mode == ReplyMode.SIMPLE:
        return [replies.data_header(request, request.offset, request.length, REPLY_DONE), data]
    parts: Reply = []
    at, end = 0, request.length
    for start, length in [*sorted(holes), (end, 0)]:
        if start > at:
            done = REPLY_DONE if start == end else 0
            parts += (replies.data_header(request, request.offset + at, start - at, done), data[at:start])
        if length:
            parts.append(
                replies.hole(request, request.offset + start, length, REPLY_DONE if start + length == end else 0)
            )
        at = start + length
    return parts


async def _read(session: Session, replies: Replies, request: Request, _payload: memoryview) -> Reply:
    if request.length == 0:
        return [replies.success(request)]
    whole = replies.mode == ReplyMode.SIMPLE or request.flags & CommandFlag.DF
    if not whole and BASE_ALLOCATION in session.export.contexts:
        return await _read_sparse(session, replies, request)
    data = fresh(request.length)
    await session.export.read(request.offset, data)
    return [replies.data_header(request, request.offset, request.length, REPLY_DONE), data]


async def _read_sparse(session: Session, replies: Replies, request: Request) -> Reply:
    """One chunk for each run of data or zeroes, as base:allocation tells them."""
    export = session.export
    parts: Reply = []
    at, end = request.offset, request.offset + request.length
    while at < end:
        extent = (await export.block_status(BASE_ALLOCATION, at, end - at, 1))[0]
        length = min(extent.length, end - at)
        if length <= 0:
            raise OSError(f"block status of export '{export.name}' at {at} made no progress")
        done = REPLY_DONE if at + length == end else 0
        if extent.flags & STATE_ZERO:
            parts.append(replies.hole(request, at, length, done))
        else:
            data = fresh(length)
            await export.read(at, data)
            parts += (replies.data_header(request, at, length, done), data)
        at += length
    return parts


async def _write(session: Session, replies: Replies, request: Request, payload: memoryview) -> Reply:
    if request.length:
        await session.export.write(request.offset, payload, fua=bool(request.flags & CommandFlag.FUA))
    return [replies.success(request)]


async def _flush(session: Session, replies: Replies, request: Request, _payload: memoryview) -> Reply:
    await session.export.flush()
    return [replies.success(request)]


async def _trim(session: Session, replies: Replies, request: Request, _payload: memoryview) -> Reply:
    if request.length:
        fua = bool(request.flags & CommandFlag.FUA)
        await session.export.trim(request.offset, request.length, fua=fua)
    return [replies.success(request)]


async def _cache(session: Session, replies: Replies, request: Request, _payload: memoryview) -> Reply:
    if request.length:
        await session.export.cache(request.offset, request.length)
    return [replies.success(request)]


async def _write_zeroes(session: Session, replies: Replies, request: Request, _payload: memoryview) -> Reply:
    if request.length:
        await session.export.write_zeroes(
            request.offset,
            request.length,
            fua=bool(request.flags & CommandFlag.FUA),
            may_unmap=not request.flags & CommandFlag.NO_HOLE,
            fast=bool(request.flags & CommandFlag.FAST_ZERO),
        )
    return [replies.success(request)]


async def _block_status(session: Session, replies: Replies, request: Request, payload: memoryview) -> Reply:
    contexts = session.contexts
    length = request.length
    if request.flags & CommandFlag.PAYLOAD_LEN:
        wanted = status_filter(session, bytes(payload))
        assert wanted is not None  # judged before
        length, ids = wanted
        contexts = tuple(context for context in contexts if context.id in ids)
    limit = 1 if request.flags & CommandFlag.REQ_ONE else MAX_EXTENTS
    reply: Reply = []
    for context in contexts:
        extents = await session.export.block_status(context.name, request.offset, length, limit)
        flags = REPLY_DONE if context is contexts[-1] else 0
        reply.append(replies.block_status(request, context.id, extents[:limit], flags))
    return reply


_Run = Callable[[Session, Replies, Request, memoryview], Awaitable[Reply]]
_COMMANDS: Final[dict[int, tuple[_Run, str]]] = {
    Command.READ: (_read, "reading from file failed"),
    Command.WRITE: (_write, "writing to file failed"),
    Command.FLUSH: (_flush, "flush failed"),
    Command.TRIM: (_trim, "discard failed"),
    Command.CACHE: (_cache, "caching data failed"),
    Command.WRITE_ZEROES: (_write_zeroes, "writing to file failed"),
    Command.BLOCK_STATUS: (_block_status, "can't get block status"),
}
