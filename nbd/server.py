"""The NBD server: listening sockets, exports and clients. A thin asyncio shell; the protocol is in the modules below it.

Use::

    server = NbdServer(max_connections=100)
    server.add(export)                        # an `export.Export`; served under export.name ("" is the default)
    path = server.listen_unix("/run/disk.sock")
    addresses = await server.listen_tcp("::", 0)
    ...
    server.pause(export); ...; server.resume(export)       # for a drain; see also in_flight()
    server.remove("name")                     # refused with ExportInUse while clients are attached
    await server.remove_now("name")           # disconnects them
    await server.close()

Everything is to be called from the event loop's thread. ``on_clients_changed(export, clients)`` is called when the number of
clients of an export changed; the same number is ``server.clients(export)``.

Answers to what the specification leaves open are QEMU's: beyond ``max_connections`` clients wait unaccepted in the
listening socket's queue; a stale socket file is replaced; a client must choose an export within ``handshake_seconds``.
Better than QEMU: a unix socket on which somebody still listens is not taken away from them, it is "address in use".
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Final

from .buffers import Budget, Limits
from .client_session import Client
from .connection import Shared
from .constants import MAX_STRING
from .export import Export
from .poller import DEFAULT_MAX_NS
from .tls import ServerTls

log = logging.getLogger(__name__)

_BACKLOG: Final = 128
_SEND_BUFFER: Final = 4 << 20
"""Bytes asked for a client's socket, so that a whole large reply can be sent at once where the kernel allows it."""


class ExportInUse(Exception):
    """An export that still has clients was to be removed. ``clients`` is their number."""

    def __init__(self, name: str, clients: int) -> None:
        super().__init__(f"export '{name}' still in use by {clients} client(s)")
        self.name = name
        self.clients = clients


class NbdServer:
    """Serves exports to clients on any number of listening sockets. Must be made inside a running event loop.

    ``max_connections``: clients at one time, 0 for no limit. ``handshake_seconds``: the time to choose an export, 0 for no
    limit. ``poll_max_ns``: see `poller`; 0 turns polling off. ``limits``: see `buffers`. ``tls``: required of every client.
    """

    def __init__(
        self,
        *,
        max_connections: int = 0,
        handshake_seconds: float = 10,
        poll_max_ns: int = DEFAULT_MAX_NS,
        limits: Limits | None = None,
        tls: ServerTls | None = None,
        on_clients_changed: Callable[[Export, int], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._shared = Shared(self._loop, Budget(limits or Limits()), poll_max_ns)
        self._max_connections = max_connections
        self._handshake_seconds = handshake_seconds
        self._tls = tls
        self._on_clients_changed = on_clients_changed
        self._exports: dict[str, Export] = {}
        self._clients: dict[Client, None] = {}
        self._listeners: list[socket.socket] = []
        self._accepting = False
        self._paths: dict[str, tuple[int, int]] = {}
        self._pauses: dict[int, tuple[Export, int]] = {}
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self.exports: Mapping[str, Export] = MappingProxyType(self._exports)
        """The exports by name (read only; see `add`, `remove`)."""

    # Exports.

    @property
    def stopping(self) -> bool:
        """Whether `close` was called: requests get ESHUTDOWN, options NBD_REP_ERR_SHUTDOWN."""
        return self._shared.stopping

    @property
    def requires_tls(self) -> bool:
        """Whether clients must start TLS."""
        return self._tls is not None

    def find(self, name: str) -> Export | None:
        """The export of that name."""
        return self._exports.get(name)

    def listing(self) -> Iterable[Export]:
        """All exports, oldest first."""
        return list(self._exports.values())

    def add(self, export: Export) -> None:
        """Offer ``export`` under its name. Raises ValueError if the name is taken, or a name or description too long."""
        if export.name in self._exports:
            raise ValueError(f"NBD server already has export named '{export.name}'")
        if len(export.name.encode(errors="surrogateescape")) > MAX_STRING:
            raise ValueError("export name too long")
        if len(export.description.encode(errors="surrogateescape")) > MAX_STRING:
            raise ValueError(f"description of export '{export.name}' too long")
        self._exports[export.name] = export

    def remove(self, name: str) -> None:
        """Withdraw an export without clients. Raises KeyError if there is none of that name, `ExportInUse` if it has any."""
        count = self.clients(self._exports[name])
        if count:
            raise ExportInUse(name, count)
        del self._exports[name]

    async def remove_now(self, name: str) -> None:
        """Withdraw an export and disconnect its clients; returns when none of their requests is under way any more.

        Raises KeyError if there is none of that name.
        """
        export = self._exports.pop(name)
        for client in self._attached(export):
            client.close()
        await self._wait_until(lambda: not self.clients(export))

    def clients(self, export: Export | None = None) -> int:
        """How many clients are attached to ``export``; without one, how many are connected at all."""
        return len(self._clients) if export is None else len(self._attached(export))

    def _attached(self, export: Export) -> list[Client]:
        return [client for client in self._clients if client.export is export]

    # Pausing.

    def pause(self, export: Export) -> None:
        """Start no more requests of this export's clients, until `resume` was called as often as this."""
        _, depth = self._pauses.get(id(export), (export, 0))
        self._pauses[id(export)] = (export, depth + 1)
        self._shared.paused.add(id(export))
        if depth == 0:
            for client in self._attached(export):
                if client.connection is not None:
                    client.connection.settle()

    def resume(self, export: Export) -> None:
        """Undo one `pause`. Raises ValueError if there was none."""
        if id(export) not in self._pauses:
            raise ValueError(f"export '{export.name}' is not paused")
        _, depth = self._pauses.pop(id(export))
        if depth > 1:
            self._pauses[id(export)] = (export, depth - 1)
            return
        self._shared.paused.discard(id(export))
        for client in self._attached(export):
            if client.connection is not None:
                client.connection.resume()

    def in_flight(self, export: Export) -> int:
        """Requests of this export's clients that were started and have not been answered."""
        return sum(c.connection.in_flight for c in self._attached(export) if c.connection is not None)

    # Listening.

    def listen_unix(self, path: str) -> str:
        """Listen on a unix socket at ``path`` and return it. A stale socket file is replaced.

        Raises OSError: EADDRINUSE if somebody listens there or if something that is no socket is in the way.
        """
        if len(os.fsencode(path)) > 107:
            raise OSError(errno.ENAMETOOLONG, f"UNIX socket path '{path}' is too long: it must be less than 108 bytes")
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(path)
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"Failed to bind socket to {path}: {error.strerror}") from error
        info = os.stat(path)
        self._paths[path] = (info.st_dev, info.st_ino)
        self.listen_socket(sock)
        return path

    @property
    def addresses(self) -> list[Any]:
        """Where it listens, as ``getsockname`` tells: a path, or (address, port) and more for IPv6."""
        return [sock.getsockname() for sock in self._listeners]

    async def listen_tcp(self, host: str, port: int) -> list[tuple[str, int]]:
        """Listen on every address of ``host`` ("" or "::" for all, IPv4 included) and return (address, port) of each.

        With port 0 the kernel chooses one, the same for all addresses. Raises OSError.
        """
        found = await self._loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # IPv6 first: "::" then serves IPv4 as well, and 0.0.0.0 behind it is not needed.
        found.sort(key=lambda entry: entry[0] != socket.AF_INET6)
        bound: list[socket.socket] = []
        try:
            for family, kind, proto, _, address in found:
                if host in ("", "::") and family == socket.AF_INET and bound:
                    continue
                if bound and not port:
                    port = bound[0].getsockname()[1]
                bound.append(_bind_tcp(family, kind, proto, (*address[:1], port, *address[2:]), host))
        except OSError:
            for sock in bound:
                sock.close()
            raise
        for sock in bound:
            self.listen_socket(sock)
        return [sock.getsockname()[:2] for sock in bound]

    def listen_fd(self, fd: int) -> None:
        """Listen on an inherited descriptor of a listening stream socket, which the server then owns.

        Raises OSError (ENOTSOCK, EINVAL) if it is something else.
        """
        sock = socket.socket(fileno=fd)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.detach()
            raise OSError(errno.EINVAL, f"file descriptor {fd} is not a listening socket")
        self.listen_socket(sock)

    def listen_socket(self, sock: socket.socket) -> None:
        """Accept clients on a listening socket, which the server then owns."""
        sock.setblocking(False)
        self._listeners.append(sock)
        if self._accepting:
            self._loop.add_reader(sock.fileno(), self._accept, sock)
        else:
            self._update_accepting()

    def _update_accepting(self) -> None:
        """Accept while there is room for another client."""
        room = not self._max_connections or len(self._clients) < self._max_connections
        accepting = room and not self.stopping
        if accepting == self._accepting:
            return
        self._accepting = accepting
        for sock in self._listeners:
            if accepting:
                self._loop.add_reader(sock.fileno(), self._accept, sock)
            else:
                self._loop.remove_reader(sock.fileno())

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors, most likely: waiting is all that helps, and the loop must not spin meanwhile.
            log.warning("accepting a client failed: %s", error)
            self._loop.remove_reader(listener.fileno())
            self._loop.call_later(1.0, self._accept_again, listener)
            return
        _tune(sock)
        client = Client(
            self._shared, self, sock, self._handshake_seconds, self._tls, self._client_changed, self._client_gone
        )
        if client.connected:
            self._clients[client] = None
            self._update_accepting()

    def _accept_again(self, listener: socket.socket) -> None:
        if self._accepting and listener in self._listeners:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def stop_listening(self) -> None:
        """Close the listening sockets and remove their files; clients stay."""
        for sock in self._listeners:
            if self._accepting:
                self._loop.remove_reader(sock.fileno())
            sock.close()
        self._listeners.clear()
        for path, identity in self._paths.items():
            with suppress(FileNotFoundError):
                info = os.stat(path)
                if (info.st_dev, info.st_ino) == identity:
                    os.unlink(path)
        self._paths.clear()

    # Clients.

    def _client_changed(self, client: Client) -> None:
        export = client.export
        if export is not None and self._on_clients_changed is not None:
            self._on_clients_changed(export, self.clients(export))

    def _client_gone(self, client: Client, export: Export | None) -> None:
        self._clients.pop(client, None)
        self._update_accepting()
        if export is not None and self._on_clients_changed is not None:
            self._on_clients_changed(export, self.clients(export))
        self._check_waiters()

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        if not condition():
            future: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append((condition, future))
            await future

    def _check_waiters(self) -> None:
        waiting, self._waiters = self._waiters, []
        for condition, future in waiting:
            if future.done():
                continue
            if condition():
                future.set_result(None)
            else:
                self._waiters.append((condition, future))

    async def close(self, grace_seconds: float = 5.0) -> None:
        """Stop: no new clients, ESHUTDOWN for new requests, then disconnect everybody.

        Requests under way are waited for and answered; clients that do not take their answers within ``grace_seconds``
        are dropped. Returns when no request is under way any more. The exports are withdrawn.
        """
        self._shared.stopping = True
        self.stop_listening()
        self._pauses.clear()
        self._shared.paused.clear()
        for client in list(self._clients):
            client.leave()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wait_until(lambda: not self._clients), grace_seconds)
        for client in list(self._clients):
            client.close()
        await self._wait_until(lambda: not self._clients)
        self._exports.clear()


def _remove_stale(path: str) -> None:
    """Unlink a socket that nobody listens on."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(errno.EADDRINUSE, f"Failed to bind socket to {path}: a file that is no socket is there")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its queue is full: somebody is there
    raise OSError(errno.EADDRINUSE, f"Failed to bind socket to {path}: another process listens there")


def _bind_tcp(family: int, kind: int, proto: int, address: Any, host: str) -> socket.socket:
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # "::" is for everybody, as with QEMU; any other address is its own family's.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host not in ("", "::"))
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        text = f"Failed to bind socket to {address[0]}:{address[1]}: {error.strerror}"
        raise OSError(error.errno, text) from error
    return sock


def _tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return
    # TCP tunes its buffers itself; a unix socket's default is less than one request of 256 KiB.
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
