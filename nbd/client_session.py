"""One client of the server over its whole life: greeting, negotiation with a deadline, then a `Connection`.

The shell around `ServerHandshake`. A client that does not read our replies is not read from (so it cannot make us store
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
from .handshake import Aborted, Chosen, ServerHandshake, Violation

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
        changed: Callable[[Client], None],
        gone: Callable[[Client, Export | None], None],
    ) -> None:
        self.peer = _describe(sock)
        self.export: Export | None = None
        self.connection: Connection | None = None
        self._shared = shared
        self._owner = owner
        self._sock = sock
        self._changed = changed
        self._gone = gone
        self._handshake = ServerHandshake(self)
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
        if self._chosen is not None:
            self._begin(self._chosen)
            return False
        return True

    def _writable(self) -> None:
        self._shared.loop.remove_writer(self._sock.fileno())
        self._shared.loop.add_reader(self._sock.fileno(), self._readable)
        if self._send():
            self._negotiate(b"")

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
