"""One client of the server over its whole life: greeting, negotiation (in TLS) with a deadline, then a `Connection`.

The shell around `ServerHandshake`. The deadline counts from the beginning, so that a client that stalls in the TLS handshake is
dropped with those that stall elsewhere. A client that does not read our replies is not read from (so it cannot make us store
replies without end), and one that did not choose an export before the deadline is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from .connection import Connection, Shared
from .export import Export
from .handshake import Aborted, Chosen, ServerHandshake, StartTls, Violation
from .tls import ServerTls, TlsStream, Want, reason_of

log = logging.getLogger(__name__)

_PIECE: Final = 64 << 10


class Owner(Protocol):
    """What a client needs of its server."""

    @property
    def stopping(self) -> bool: ...

    def find(self, name: str) -> Export | None: ...

    def listing(self) -> Iterable[Export]: ...


class Client:
    """A connected client; what exports see in ``client_connected`` and ``client_gone``.

    ``peer`` describes the other end for logs. ``export`` is the export it is attached to, or None.
    """

    def __init__(
        self,
        shared: Shared,
        owner: Owner,
        sock: socket.socket,
        deadline: float,
        tls: ServerTls | None,
        changed: Callable[[Client], None],
        gone: Callable[[Client, Export | None], None],
    ) -> None:
        self.peer = _describe(sock)
        self.export: Export | None = None
        self.connection: Connection | None = None
        self._shared = shared
        self._owner = owner
        self._sock: socket.socket | TlsStream = sock
        self._tls = tls
        self._changed = changed
        self._gone = gone
        self._handshake = ServerHandshake(self, tls=tls is not None)
        self._plain = sock
        self._starttls = False
        self._securing: TlsStream | None = None
        self._output = b""
        self._final = False
        self._chosen: Chosen | None = None
        self._timer: asyncio.TimerHandle | None = None
        if deadline:
            self._timer = shared.loop.call_later(deadline, self._too_late)
        shared.loop.add_reader(sock.fileno(), self._readable)
        self._send()

    @property
    def connected(self) -> bool:
        """Whether the socket is still open."""
        return self._sock.fileno() >= 0

    # What the handshake asks (handshake.Exports).

    @property
    def stopping(self) -> bool:
        return self._owner.stopping

    def find(self, name: str) -> Export | None:
        return self._owner.find(name)

    def listing(self) -> Iterable[Export]:
        return self._owner.listing()

    def admit(self, export: Export) -> None:
        export.client_connected(self)
        self.export = export
        self._changed(self)

    # Negotiation.

    def _too_late(self) -> None:
        log.info("client %s: no export chosen in time, disconnecting", self.peer)
        self._timer = None
        self.close()

    def _readable(self) -> None:
        if self._securing is not None:
            self._go_on_securing(self._securing)
            return
        try:
            data = self._sock.recv(_PIECE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            log.debug("client %s: %s", self.peer, error)
            self.close()
            return
        if not data:
            self.close()
            return
        self._negotiate(data)
        self._read_more()

    def _read_more(self) -> None:
        """Go on with data that TLS holds, and that the socket will not report again."""
        stream = self._sock
        if isinstance(stream, TlsStream) and stream.more and self._may_read():
            self._shared.loop.call_soon(self._read_held)

    def _read_held(self) -> None:
        if self._may_read():
            self._readable()

    def _may_read(self) -> bool:
        return self.connection is None and self.connected and not self._output

    def _negotiate(self, data: bytes) -> None:
        """Feed the handshake, send what it says, and again for as long as it is held up by its own output."""
        more = True
        while more:
            for event in self._handshake.receive(data):
                if isinstance(event, Violation):
                    log.info("client %s: option negotiation failed: %s", self.peer, event.reason)
                    self._final = True
                elif isinstance(event, Aborted):
                    self._final = True
                elif isinstance(event, StartTls):
                    self._starttls = True
                else:
                    self._chosen = event
            data = b""
            more = self._handshake.held_up
            if not self._send():
                return

    def _send(self) -> bool:
        """Send the output. False if that ended the negotiation, or if the client has to read first."""
        self._output += self._handshake.take_output()
        try:
            while self._output:
                self._output = self._output[self._sock.send(self._output) :]
        except (BlockingIOError, InterruptedError):
            # Read no more before this is read.
            self._shared.loop.remove_reader(self._sock.fileno())
            self._shared.loop.add_writer(self._sock.fileno(), self._writable)
            return False
        except OSError as error:
            log.debug("client %s: %s", self.peer, error)
            self.close()
            return False
        if self._final:
            self.close()
            return False
        if self._starttls:
            self._start_tls()
            return False
        if self._chosen is not None:
            self._begin(self._chosen)
            return False
        return True

    def _writable(self) -> None:
        self._shared.loop.remove_writer(self._sock.fileno())
        self._shared.loop.add_reader(self._sock.fileno(), self._readable)
        if self._securing is not None:
            self._go_on_securing(self._securing)
        elif self._send():
            self._negotiate(b"")
            self._read_more()

    # TLS.

    def _start_tls(self) -> None:
        """The client was told to go ahead: its next bytes, those that came early included, are TLS."""
        assert self._tls is not None
        self._starttls = False
        received = self._handshake.leftover
        stream = TlsStream(self._plain, self._tls.context, server_side=True, received=received)
        self._sock = self._securing = stream
        self._go_on_securing(stream)

    def _go_on_securing(self, stream: TlsStream) -> None:
        assert self._tls is not None
        try:
            want = stream.handshake()
            if want is Want.NOTHING and self._tls.admit is not None:
                self._tls.admit(stream.peer_certificate())
        except OSError as error:
            log.info("client %s: TLS handshake failed: %s", self.peer, reason_of(error))
            self.close()
            return
        if want is Want.WRITE:
            self._shared.loop.remove_reader(stream.fileno())
            self._shared.loop.add_writer(stream.fileno(), self._writable)
        elif want is Want.NOTHING:
            log.debug("client %s: %s", self.peer, stream.version())
            self._securing = None
            self._handshake.secured()
            self._readable()

    def _begin(self, chosen: Chosen) -> None:
        """Hand the socket over to the transmission phase."""
        self._stop_timer()
        self._shared.loop.remove_reader(self._sock.fileno())
        self.connection = Connection(self._shared, self._sock, chosen.session, self._ended)
        self.connection.start(self._handshake.leftover)

    # The end.

    def close(self) -> None:
        """Disconnect now. Requests under way end in their own time before the server counts the client as gone."""
        if self.connection is not None:
            self.connection.close()
            return
        self._stop_timer()
        if self._sock.fileno() >= 0:
            self._shared.loop.remove_reader(self._sock.fileno())
            self._shared.loop.remove_writer(self._sock.fileno())
            self._sock.close()
            self._ended(None)

    def leave(self) -> None:
        """Disconnect once the requests under way are answered."""
        if self.connection is not None:
            self.connection.leave()
        else:
            self.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ended(self, _connection: Connection | None) -> None:
        export, self.export = self.export, None
        if export is not None:
            export.client_gone(self)
        self._gone(self, export)


def _describe(sock: socket.socket) -> str:
    try:
        peer = sock.getpeername()
    except OSError:
        return "(gone)"
    if isinstance(peer, tuple):
        return f"[{peer[0]}]:{peer[1]}" if ":" in str(peer[0]) else f"{peer[0]}:{peer[1]}"
    return f"on unix socket {sock.getsockname()!s}"
