"""One client in the transmission phase: the thin shell between a socket and the fast and slow paths.

    socket --recv--> buffer --fast loop--> replies --send--> socket
                       |  (SLOW)                      ^
                       '--judge--> task: answer() ----'  (out of order)

The socket is non-blocking (a `tls.TlsStream` behaves as one) and read and written directly: a transport would keep a
reference to a reply buffer that it could not send at once, which forbids to reuse it. The event loop only tells when to go
on (`settle`), and the `Poller` tries on its own before that.

Invariants:

* Reading stops while replies wait to be sent, while the limits of `buffers.Limits` are reached, while the export is paused,
  and for good once the client disconnected or broke the framing. What was received meanwhile stays in the buffer.
* The receive buffer is the server's shared one for as long as no incomplete request remains in it; a small rest is put aside
  (``_rest``), a large one keeps the buffer. A payload that exceeds a buffer is received straight into memory of its own.
* Requests under way are never cancelled: half a write must not be. Whether the client vanished or an export is removed
  by force, ``finished`` is only called when the last one ended; the socket is closed at once.

Source: proto.md, "Transmission phase"; for the last reply before a disconnect on broken framing: QEMU.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final

from .buffers import BUFFER_SIZE, Account, Budget, BufferPool, fresh
from .constants import Command, CommandFlag, ErrorCode
from .export import Export, Start
from .fastpath import DECLINED, FULL, fast_loop
from .handshake import Session
from .poller import Poller
from .slowpath import Buffer, Reply, answer, failed, read_reply
from .tls import TlsStream
from .transmission import BadFrame, Framing, Refusal, Replies, Request, judge, status_filter

log = logging.getLogger(__name__)

_BATCH: Final = 64 << 10
"""Bytes read or written after which the replies are sent, so that the client works on them while the next are made."""
_SMALL: Final = 4096 + 64
"""Bytes of an incomplete request that are put aside by copying."""
_LARGE: Final = 64 << 10
"""Bytes from which on an incomplete request is completed before more is received."""
_LONG: Final = 64 << 10
"""Bytes from which on a payload that is passed on is received in place, and data that is passed on gets pooled memory."""
_PIECES: Final = 64
"""Buffers given to one sendmsg."""
_NOTHING: Final = memoryview(b"")
_UNUSUAL: Final = ~int(CommandFlag.PAYLOAD_LEN)
"""Flags of requests that are not passed on. A number: operations on an `IntFlag` take longer than all else here."""


class Shared:
    """What the connections of one server share: buffers, budget, poller, and the server's state."""

    def __init__(self, loop: asyncio.AbstractEventLoop, budget: Budget, poll_max_ns: int) -> None:
        self.loop = loop
        self.pool = BufferPool()
        self.budget = budget
        self.received = self.pool.take()
        self.replies = self.pool.take()
        self.slow_requests = 0
        self.stopping = False
        self.paused: set[int] = set()
        self.starved: dict[Connection, None] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.poller = Poller(loop, poll_max_ns, lambda: self.slow_requests > 0)
        self._relief: asyncio.Handle | None = None

    def relieve(self) -> None:
        """Budget came free: let those who wait for it try again, soon (not from within one of them)."""
        if self._relief is None:
            self._relief = self.loop.call_soon(self._resume_starved)

    def _resume_starved(self) -> None:
        self._relief = None
        starved, self.starved = self.starved, {}
        for connection in starved:
            connection.resume()


@dataclass(slots=True)
class _Incoming:
    """A payload too large for a buffer, on its way in. With a refusal it is thrown away and then answered with it."""

    request: Request
    refusal: Refusal | None
    target: memoryview
    missing: int


@dataclass(slots=True)
class _Piece:
    """A buffer waiting to be sent. ``cost`` is given back to the account afterwards (None: it was never charged),
    ``pooled`` to the pool."""

    data: memoryview
    cost: int | None = None
    pooled: memoryview | None = None


class Connection:
    """Serves one client on ``sock`` until it goes; ``finished`` is called once, when nothing of it remains.

    ``last_active`` belongs to the poller.
    """

    def __init__(
        self,
        shared: Shared,
        sock: socket.socket | TlsStream,
        session: Session,
        finished: Callable[[Connection], None],
    ) -> None:
        self.session = session
        self.last_active = 0
        self._shared = shared
        self._sock = sock
        self._tls = sock if isinstance(sock, TlsStream) else None
        self._fileno = sock.fileno()
        self._recv_into = sock.recv_into
        self._send = sock.send
        self._finished: Callable[[Connection], None] | None = finished
        self._framing = Framing(session.mode)
        self._replies = Replies(session.mode)
        self._fast = fast_loop(session)
        self._start_read: Start | None = getattr(session.export, "start_read", None)
        self._start_write: Start | None = getattr(session.export, "start_write", None)
        self._passes_on = False  # the last plain write that did not go the fast path
        self._expects_long = False
        self._relays = self._start_read is not None or self._start_write is not None
        self._account = Account(shared.budget)
        self._own: memoryview | None = None  # the receive buffer, while it holds self._at:self._end
        self._at = 0
        self._end = 0
        self._need = 0  # bytes from self._at that the incomplete request there has, when it is large
        self._rest = b""
        self._incoming: _Incoming | None = None
        self._queue: deque[_Piece] = deque()
        self._flush_soon: asyncio.Handle | None = None
        self._blocked = False
        self._saturated = False
        self._leaving = False
        self._closed = False
        self._reader = False
        self._writer = False

    @property
    def export(self) -> Export:
        """The export that the client chose."""
        return self.session.export

    @property
    def in_flight(self) -> int:
        """Requests in the slow path whose reply is not yet sent."""
        return self._account.requests

    def start(self, leftover: bytes) -> None:
        """Begin to serve; ``leftover`` is what the client sent behind its last option (less than a buffer)."""
        if leftover:
            self._rest = leftover
            self._serve_kept()
        self.settle()

    # What the event loop, the poller and the server call.

    def poll(self) -> bool:
        """Try once to send what waits, or to receive and serve. Whether anything moved."""
        if self._queue:
            return self._flush()
        if self._saturated or self._leaving or self._is_paused():
            return False
        if self._incoming is not None:
            return self._receive_payload(self._incoming)
        return self._receive()

    def settle(self) -> None:
        """Register with the event loop for what this connection waits for."""
        if self._closed:
            return
        loop, woken = self._shared.loop, self._shared.poller.woken
        writes = self._blocked
        reads = not (writes or self._saturated or self._leaving or self._is_paused())
        if reads and self._tls is not None and self._tls.more:
            loop.call_soon(woken, self)  # it holds data that the socket will not report again
        if reads != self._reader:
            self._reader = reads
            if reads:
                loop.add_reader(self._fileno, woken, self)
            else:
                loop.remove_reader(self._fileno)
        if writes != self._writer:
            self._writer = writes
            if writes:
                loop.add_writer(self._fileno, woken, self)
            else:
                loop.remove_writer(self._fileno)

    def resume(self) -> None:
        """The export is no longer paused, or budget came free: go on with what was received, then with the socket."""
        self._saturated = False
        if not (self._closed or self._is_paused()):
            self._serve_kept()
            self.settle()

    def leave(self) -> None:
        """Take no more requests; close when those under way are answered."""
        self._leaving = True
        self._drop_incoming()
        self._end_if_idle()
        self.settle()

    def close(self) -> None:
        """Drop the connection now. Requests under way end in their own time; then ``finished`` is called."""
        if self._closed:
            return
        self._closed = self._leaving = True
        shared = self._shared
        shared.poller.forget(self)
        shared.starved.pop(self, None)
        if self._reader:
            shared.loop.remove_reader(self._fileno)
        if self._writer:
            shared.loop.remove_writer(self._fileno)
        if self._flush_soon is not None:
            self._flush_soon.cancel()
        self._sock.close()
        self._drop_incoming()
        self._rest = b""
        if self._own is not None:
            shared.pool.give(self._own)
            self._own = None
        while self._queue:
            self._sent(self._queue.popleft())
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if not self._leaving or self._account.requests or self._queue:
            return
        self.close()
        finished, self._finished = self._finished, None
        if finished is not None:
            finished(self)

    def _is_paused(self) -> bool:
        paused = self._shared.paused
        return bool(paused) and id(self.session.export) in paused

    # Receiving.

    def _receive(self) -> bool:
        own, need = self._own, self._need
        if own is None:
            view, at, end = self._shared.received, 0, len(self._rest)
            if end:
                view[:end] = self._rest
        else:
            view, at, end = own, self._at, self._end
            if at + need > BUFFER_SIZE or BUFFER_SIZE - end < _LARGE:
                view[: end - at] = view[at:end]
                self._at, self._end = at, end = 0, end - at
        if self._expects_long and end == at == 0:
            # The head only: what it announces is then received in place.
            self._expects_long = False
            room = view[: self._framing.header.size]
        else:
            # No more than a large request lacks: the next one then starts at the front of a buffer that is in the cache.
            room = view[end : at + need] if need else view[end:] if end else view
        try:
            count = self._recv_into(room)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            log.debug("receiving from a client of '%s' failed: %s", self.export.name, error)
            self.close()
            return True
        if count == 0:
            self.leave()
            return True
        end += count
        if end - at < need and own is not None:
            self._end = end
            return True
        self._rest = b""
        self._serve(view, at, end)
        return True

    def _serve_kept(self) -> None:
        """Go on with requests that were received but could not be started."""
        if self._own is not None:
            self._serve(self._own, self._at, self._end)
        elif self._rest:
            rest, self._rest = self._rest, b""
            view = self._shared.received
            view[: len(rest)] = rest
            self._serve(view, 0, len(rest))

    def _serve(self, view: memoryview, at: int, end: int) -> None:
        """Serve what can be served of ``view[at:end]``, send the replies, keep the rest."""
        shared = self._shared
        size = self.session.export.size
        self._need = 0
        filled = 0
        while at < end and not (self._blocked or self._saturated or self._leaving or self._is_paused()):
            if not shared.stopping:
                at, filled, why = self._fast(view, at, end, shared.replies, filled, _BATCH, size)
                if why == FULL:
                    self._send_replies(filled)
                    filled = 0
                    continue
                if at == end:
                    break
                if why == DECLINED and self._relays and (after := self._pass_on(view, at)) > at:
                    at = after
                    continue
            after = self._start(view, at, end)
            if after == at:
                break
            at = after
        if filled:
            self._send_replies(filled)
        if self._queue and not self._blocked:
            self._flush()
        if self._leaving:
            self._end_if_idle()
        else:
            self._keep(view, at, end)

    def _keep(self, view: memoryview, at: int, end: int) -> None:
        """Remember the unserved ``view[at:end]`` in the cheapest way."""
        own, shared = self._own, self._shared
        if end - at <= _SMALL:
            if at < end:
                self._rest = bytes(view[at:end])
            if own is not None:
                # Prefer the buffer that was used last.
                self._own = None
                shared.pool.give(shared.received)
                shared.received = own
            return
        if own is None:
            self._own = view
            shared.received = shared.pool.take()
        self._at, self._end = at, end

    # Starting slow requests.

    def _start(self, view: memoryview, at: int, end: int) -> int:
        """Start or refuse the request at ``at``. Where the next one begins; ``at`` itself if this one has to wait."""
        body = at + self._framing.header.size
        if body > end:
            return at
        try:
            request = self._framing.parse(view, at)
        except BadFrame as bad:
            log.info("client of '%s' disconnected: %s", self.export.name, bad)
            self._enqueue([self._replies.failure(bad.request, bad.refusal)], None)
            self._leaving = True
            return end
        if request.command == Command.DISCONNECT:
            self._leaving = True
            return end
        stop = body + request.payload
        if stop > end:
            if stop - at > BUFFER_SIZE or (self._passes_on and request.payload >= _LONG):
                return end if self._begin_large(request, view[body:end]) else at
            if stop - at > _LARGE:
                self._need = stop - at
            return at
        refusal = self._judge(request, view[body:stop])
        if refusal is not None:
            self._enqueue([self._replies.failure(request, refusal)], None)
            return stop
        if not self._admit(request):
            return at
        self._run(request, memoryview(bytes(view[body:stop])) if stop > body else _NOTHING)
        return stop

    # Requests that the export passes on, without a coroutine.

    def _pass_on(self, view: memoryview, at: int) -> int:
        """Let the export start the request at ``at``, which the fast loop has judged. Where the next one begins; ``at`` itself if
        it was not started."""
        _, flags, command, cookie, offset, length = self._framing.header.unpack_from(view, at)
        if not self._account.admit(length):
            return at
        body = at + self._framing.header.size
        stop = body + length if command == Command.WRITE else body
        payload = memoryview(bytes(view[body:stop])) if stop > body else _NOTHING
        if self._relayed(Request(flags, command, cookie, offset, length), payload):
            return stop
        self._release(length)
        return at

    def _relayed(self, request: Request, payload: memoryview) -> bool:
        """Let the export start the request, if it can."""
        if request.flags & _UNUSUAL or not request.length:
            return False
        if request.command == Command.READ:
            if self._start_read is None:
                return False
            target = self._room(request.length)
            if self._start_read(request.offset, target, partial(self._relay_ended, request, target)):
                return True
            self._shared.pool.give_part(target)
        elif request.command == Command.WRITE and self._start_write is not None:
            ended = partial(self._relay_ended, request, payload)
            self._passes_on = self._start_write(request.offset, payload, ended)
            self._expects_long = self._passes_on and request.payload >= _LONG
            return self._passes_on
        return False

    def _room(self, size: int) -> memoryview:
        """Memory for the data of one request."""
        return self._shared.pool.take_part(size) if size >= _LONG and self._relays else fresh(size)

    def _relay_ended(
        self, request: Request, data: memoryview, error: OSError | None, holes: Sequence[tuple[int, int]]
    ) -> None:
        cost, writes = request.length, request.command == Command.WRITE
        if self._closed or error is not None or writes:
            self._shared.pool.give_part(data)
        if self._closed:
            self._release(cost)
            self._end_if_idle()
            return
        if error is not None:
            self._enqueue([failed(self._replies, request, error)], cost)
        elif writes:
            self._enqueue([self._replies.success(request)], cost)
        else:
            self._enqueue(read_reply(self._replies, request, data, holes), cost, pooled=data)
        self._flush_at_the_end_of_the_turn()

    def _judge(self, request: Request, payload: memoryview | None) -> Refusal | None:
        """`judge`, for a request whose payload is here, or (None) too large to be."""
        if self._shared.stopping:
            return Refusal(ErrorCode.ESHUTDOWN, "server is shutting down")
        if request.command == Command.BLOCK_STATUS and request.payload:
            wanted = None if payload is None else status_filter(self.session, bytes(payload))
            if wanted is None:
                return Refusal(ErrorCode.EINVAL, "CMD_BLOCK_STATUS payload not valid")
            request = request._replace(length=wanted[0])
        return judge(self.session, request)

    def _admit(self, request: Request) -> bool:
        """Charge the request to the limits; if they are reached, wait until somebody's request ended."""
        if self._account.admit(_cost(request)):
            return True
        self._saturated = True
        self._shared.starved[self] = None
        return False

    def _begin_large(self, request: Request, begun: memoryview) -> bool:
        """Receive a payload into memory of its own. False if the limits do not allow it yet."""
        refusal = self._judge(request, None)
        if refusal is not None:
            self._incoming = _Incoming(request, refusal, _NOTHING, request.payload - len(begun))
            return True
        if not self._admit(request):
            return False
        target = self._room(request.payload)
        target[: len(begun)] = begun
        self._incoming = _Incoming(request, None, target, request.payload - len(begun))
        return True

    def _receive_payload(self, incoming: _Incoming) -> bool:
        missing = incoming.missing
        wanted = incoming.refusal is None
        room = incoming.target[-missing:] if wanted else self._shared.received[:missing]
        try:
            count = self._recv_into(room)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            log.debug("receiving from a client of '%s' failed: %s", self.export.name, error)
            self.close()
            return True
        if count == 0:
            self.leave()
            return True
        incoming.missing -= count
        if not incoming.missing:
            self._incoming = None
            if incoming.refusal is None:
                self._run(incoming.request, incoming.target)
            else:
                self._enqueue([self._replies.failure(incoming.request, incoming.refusal)], None)
                self._flush()
        return True

    def _drop_incoming(self) -> None:
        incoming, self._incoming = self._incoming, None
        if incoming is not None and incoming.refusal is None:
            self._release(_cost(incoming.request))

    def _run(self, request: Request, payload: memoryview) -> None:
        if self._relays and self._relayed(request, payload):
            return
        self._shared.slow_requests += 1
        task = self._shared.loop.create_task(self._answer(request, payload))
        self._shared.tasks.add(task)
        task.add_done_callback(self._shared.tasks.discard)

    async def _answer(self, request: Request, payload: memoryview) -> None:
        try:
            reply = await answer(self.session, self._replies, request, payload)
        finally:
            self._shared.slow_requests -= 1
        if self._closed:
            self._release(_cost(request))
            self._end_if_idle()
            return
        self._enqueue(reply, _cost(request))
        self._flush_at_the_end_of_the_turn()

    def _flush_at_the_end_of_the_turn(self) -> None:
        """Requests that end together are answered by one system call."""
        if self._flush_soon is None and not self._blocked:
            self._flush_soon = self._shared.loop.call_soon(self._flush_queue)

    def _release(self, cost: int) -> None:
        self._account.release(cost)
        if self._shared.starved:
            self._shared.relieve()

    # Sending.

    def _send_replies(self, filled: int) -> None:
        """Send the first ``filled`` bytes of the shared reply buffer; what the socket does not take keeps the buffer."""
        shared = self._shared
        replies = shared.replies
        if self._queue:
            self._enqueue([bytes(replies[:filled])], None)
            self._flush()
            return
        try:
            sent = self._send(replies[:filled])
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            log.debug("sending to a client of '%s' failed: %s", self.export.name, error)
            self.close()
            return
        if sent < filled:
            self._blocked = True
            self._queue.append(_Piece(replies[sent:filled], pooled=replies))
            shared.replies = shared.pool.take()

    def _enqueue(self, reply: Reply, cost: int | None, pooled: memoryview | None = None) -> None:
        """Put a reply in line; ``cost`` and ``pooled`` are given back when the last of it is sent."""
        *others, last = reply
        for data in others:
            self._queue.append(_Piece(memoryview(data)))
        self._queue.append(_Piece(memoryview(last), cost, pooled))
        if len(self._queue) >= _PIECES and not self._blocked:
            self._flush()

    def _flush_queue(self) -> None:
        self._flush_soon = None
        self._flush()
        self.settle()

    def _flush(self) -> bool:
        """Send from the queue; when it is empty, go on with kept requests. Whether anything was sent."""
        moved = False
        while self._queue:
            pieces: list[Buffer] = [piece.data for piece in islice(self._queue, _PIECES)]
            try:
                sent = self._sock.sendmsg(pieces)
            except (BlockingIOError, InterruptedError):
                self._blocked = True
                return moved
            except OSError as error:
                log.debug("sending to a client of '%s' failed: %s", self.export.name, error)
                self.close()
                return True
            moved = True
            self._advance(sent)
        was_blocked, self._blocked = self._blocked, False
        if self._leaving:
            self._end_if_idle()
        elif was_blocked:
            self._serve_kept()
        return moved

    def _advance(self, sent: int) -> None:
        queue = self._queue
        while queue:
            piece = queue[0]
            size = len(piece.data)
            if size > sent:
                piece.data = piece.data[sent:]
                return
            sent -= size
            self._sent(queue.popleft())

    def _sent(self, piece: _Piece) -> None:
        if piece.pooled is not None:
            self._shared.pool.give_part(piece.pooled)
        if piece.cost is not None:
            self._release(piece.cost)


_STATUS_COST: Final = 16 << 20


def _cost(request: Request) -> int:
    """Bytes that a slow request holds: its payload or data; for block status what a full list of extents takes."""
    if request.command in (Command.READ, Command.WRITE):
        return request.length
    if request.command == Command.BLOCK_STATUS and not request.flags & CommandFlag.REQ_ONE:
        return _STATUS_COST
    return 0
