"""Character devices at work: sockets and stdio, one connection at a time, each handed to a frontend (a monitor).

A listening socket serves one client; the next waits in the backlog until that one has gone, as in QEMU. A connecting
socket may try again after a pause (``reconnect-ms``). A descriptor (``fd=N``) is a listening socket with
``server=on``, else a connected one.

Life: `open_chardev` opens and, with ``wait=on``, waits for the first connection; `Device.attach` plugs the frontend
in, which learns of a connection that is there already; `Device.close` hangs up and removes the socket's path.

Bounds: at most `CHUNK` bytes are taken in ahead of the frontend; a peer that leaves `UNREAD_LIMIT` bytes unread loses
its connection, and while more than the transport's high-water mark is unread, nothing more is read from it.

Source: QEMU ``chardev/char-socket.c``, ``chardev/char-stdio.c``, ``util/qemu-sockets.c`` (messages).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Protocol, cast

from livedisk.emulator.block.descriptors import refuse_socket, take_socket
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp import yank
from livedisk.emulator.qmp.chardev import (
    Chardev,
    FileChardev,
    NullChardev,
    PipeChardev,
    PtyChardev,
    SocketChardev,
    StdioChardev,
)
from livedisk.emulator.qmp.monitor import Frontend
from livedisk.emulator.qmp.object_commands import Objects
from livedisk.emulator.qmp.rights import RightsTransport
from livedisk.emulator.qmp.telnet import OFFERS, Telnet
from livedisk.nbd.tls import ClientTls, ServerTls, reason_of

log = logging.getLogger(__name__)

CHUNK: Final = 64 << 10
UNREAD_LIMIT: Final = 16 << 20
"""Bytes written but not read by the peer at which the connection is given up."""
_TLS_SECONDS: Final = 10.0
"""Time for the TLS handshake; the next client waits meanwhile."""

Info = Callable[[str], None]


class Device(Protocol):
    """An open character device."""

    label: str

    @property
    def options(self) -> Chardev:
        """What it was opened with."""

    @property
    def filename(self) -> str:
        """What it is, as queries show it."""

    def attach(self, frontend: Frontend) -> None:
        """Plug a frontend in; once."""

    async def close(self) -> None:
        """Hang up, and free the address."""


async def open_chardev(options: Chardev, info: Info = lambda message: None, objects: Objects | None = None) -> Device:
    """Open what the options describe. ``info`` is told that start-up waits for a client; TLS credentials are among
    ``objects``.

    Raises LiveDiskError in QEMU's words where the address cannot be used.
    """
    if isinstance(options, SocketChardev):
        device = SocketDevice(options, _tls(options, objects or Objects()))
        try:
            await device.open(info)
        except BaseException:
            # Also when a signal ends the wait for the first client: the path must not stay behind.
            await device.close()
            raise
        return device
    if isinstance(options, StdioChardev):
        # Imported here: only a terminal's user needs it.
        from livedisk.emulator.qmp.stdio import StdioDevice

        return StdioDevice(options)
    if isinstance(options, NullChardev):
        return NullDevice(options)
    if isinstance(options, PtyChardev):
        # Imported here: few daemons have one.
        from livedisk.emulator.qmp.pty import PtyDevice

        return PtyDevice(options)
    # Imported here: few daemons have one.
    from livedisk.emulator.qmp.chardev_files import FileDevice, PipeDevice, RingbufDevice

    if isinstance(options, FileChardev):
        return FileDevice(options)
    return PipeDevice(options) if isinstance(options, PipeChardev) else RingbufDevice(options)


def _tls(options: SocketChardev, objects: Objects) -> ServerTls | ClientTls | None:
    if options.tls_creds is None:
        return None
    # Imported here: monitors are mostly Unix sockets.
    from livedisk.emulator.tls.credentials import client_tls, server_tls

    if options.server:
        return server_tls(objects, options.tls_creds, options.tls_authz)
    return client_tls(objects, options.tls_creds, options.host)


class NullDevice:
    """Nobody there: what a frontend writes is gone, nothing comes."""

    filename = "null"

    def __init__(self, options: NullChardev) -> None:
        self.label = options.id
        self.options = options

    def attach(self, frontend: Frontend) -> None:
        """The frontend never hears of a connection."""

    async def close(self) -> None:
        """Nothing is held."""


class Connection(asyncio.Protocol):
    """One connection: asyncio's protocol on one side, the frontend's `Port` on the other.

    Reading needs three consents: the frontend's (``set_reading``), the peer's (it reads what it is sent), and a
    frontend being there.
    """

    def __init__(
        self, frontend: Frontend | None, tls: ServerTls | ClientTls | None = None, telnet: Telnet | None = None
    ) -> None:
        self._telnet = telnet
        self._admit = tls.admit if isinstance(tls, ServerTls) else None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._frontend = frontend
        self._transport: asyncio.Transport | None = None
        self._wanted = True
        self._drained = True
        self._reading = True

    # -- asyncio's side
    # -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, not an assertion: uvloop's transports do not derive from asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        if self._admit is not None:
            try:
                self._admit(transport.get_extra_info("ssl_object").getpeercert(binary_form=True))
            except PermissionError as error:
                log.warning("a monitor's client is turned away: %s", error)
                # Nothing was said, and nothing will be heard: the frontend never knew of it.
                self._frontend = None
                self._transport.abort()
                return
        self._update()
        if self._telnet is not None:
            self._transport.write(OFFERS)
        if self._frontend is not None:
            self._frontend.opened(self)

    def data_received(self, data: bytes) -> None:
        assert self._frontend is not None, "nothing is read before there is a frontend"
        plain = data if self._telnet is None else self._telnet.take(data)
        if plain:
            self._frontend.received(plain)

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._drained = False
        self._update()

    def resume_writing(self) -> None:
        self._drained = True
        self._update()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._frontend is not None:
            self._frontend.closed()
        if not self.closed.done():
            self.closed.set_result(None)

    # -- the frontend's side
    # ------------------------------------------------------------------------------------------

    def take_descriptor(self) -> int | None:
        taken: int | None = self._transport.take_descriptor() if isinstance(self._transport, RightsTransport) else None
        return taken

    def plug(self, frontend: Frontend) -> None:
        """The frontend came after the connection."""
        self._frontend = frontend
        if self._transport is not None:
            frontend.opened(self)
            self._update()

    def write(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > UNREAD_LIMIT:
            log.warning("a monitor's client leaves %d bytes unread: hanging up", UNREAD_LIMIT)
            self._transport.abort()

    def set_reading(self, on: bool) -> None:
        self._wanted = on
        self._update()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Cut the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _update(self) -> None:
        reading = self._wanted and self._drained and self._frontend is not None
        if self._transport is None or reading == self._reading:
            return
        self._reading = reading
        if reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()


class SocketDevice:
    """A ``socket`` character device in either role."""

    def __init__(self, options: SocketChardev, tls: ServerTls | ClientTls | None = None) -> None:
        self.label = options.id
        self._tls = tls
        self.options = options
        self._frontend: Frontend | None = None
        self._connection: Connection | None = None
        self._connected = asyncio.Event()
        self._listeners: list[socket.socket] = []
        self._paths: list[str] = []
        self._task: asyncio.Task[None] | None = None
        self._passed_name = f"fd:{options.fd}"

    async def open(self, info: Info) -> None:
        """Listen or connect. Raises LiveDiskError."""
        if self.options.server:
            self._listeners = await _listen(self.options, self._paths)
            self._name_passed(self._listeners[0])
            self._start(self._accept_forever())
        elif self._retry_after:
            self._start(self._connect_forever())
        else:
            client = await _connect(self.options)
            self._name_passed(client)
            self._start(self._serve_and_forget(client))
        yank.register("chardev", self.label, self._cut)
        if self.options.server and self.options.wait is not False:
            info(f"QEMU waiting for connection on: disconnected:{self.address},server=on")
            await self._connected.wait()

    def attach(self, frontend: Frontend) -> None:
        self._frontend = frontend
        if self._connection is not None:
            self._connection.plug(frontend)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._connection is not None:
            self._connection.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._connection.closed, 1)
        for listener in self._listeners:
            listener.close()
        for path in self._paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        with contextlib.suppress(KeyError):
            yank.unregister("chardev", self.label)

    @property
    def filename(self) -> str:
        shown = f"{self.address},server=on" if self.options.server else self.address
        return shown if self._connection is not None else f"disconnected:{shown}"

    @property
    def address(self) -> str:
        """As QEMU writes it: ``unix:PATH``, ``tcp:HOST:PORT`` with the port in use; of a descriptor what it is bound to."""
        options = self.options
        if options.path is not None:
            return f"unix:{options.path}"
        if options.host is None:
            return self._passed_name
        host = f"[{options.host}]" if ":" in options.host else options.host
        port = self._listeners[0].getsockname()[1] if self._listeners else options.port
        return f"{'telnet' if options.telnet else 'tcp'}:{host}:{port}"

    # -- inside
    # -------------------------------------------------------------------------------------------------------

    @property
    def _retry_after(self) -> float:
        """Seconds between attempts to connect; 0: one attempt."""
        return (self.options.reconnect or 0) + (self.options.reconnect_ms or 0) / 1000

    def _name_passed(self, passed: socket.socket) -> None:
        """A descriptor's own address, while it is there."""
        where = passed.getsockname()
        if passed.family == socket.AF_UNIX:
            path = where.decode(errors="replace") if isinstance(where, bytes) else where
            self._passed_name = f"unix:{path}"
        elif passed.family in (socket.AF_INET, socket.AF_INET6):
            host = f"[{where[0]}]" if passed.family == socket.AF_INET6 else where[0]
            self._passed_name = f"tcp:{host}:{where[1]}"

    def _start(self, work: Any) -> None:
        self._task = asyncio.get_running_loop().create_task(work, name=f"chardev-{self.label}")

    def _cut(self) -> None:
        if self._connection is not None:
            self._connection.abort()

    async def _accept_forever(self) -> None:
        while True:
            await self._serve(await _accept_any(self._listeners))

    async def _connect_forever(self) -> None:
        reported = False
        while True:
            try:
                client = await _connect(self.options)
            except LiveDiskError as error:
                if not reported:
                    log.warning("chardev %s: %s; trying again every %g s", self.label, error, self._retry_after)
                reported = True
            else:
                reported = False
                await self._serve(client)
            await asyncio.sleep(self._retry_after)

    async def _serve_and_forget(self, client: socket.socket) -> None:
        await self._serve(client)

    async def _serve(self, client: socket.socket) -> None:
        """Serve one connection until it is gone."""
        client.setblocking(False)
        if client.family != socket.AF_UNIX:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, int(self.options.nodelay))
        self._connection = connection = Connection(self._frontend, self._tls, Telnet() if self.options.telnet else None)
        try:
            await self._wrap(connection, client)
        except OSError as error:
            # The peer went while we accepted it, or TLS did not come about.
            log.info("chardev %s: %s", self.label, reason_of(error))
            client.close()
            self._connection = None
            return
        self._connected.set()
        await asyncio.shield(connection.closed)
        self._connection = None

    async def _wrap(self, connection: Connection, client: socket.socket) -> None:
        """Let ``connection`` speak on the socket, through TLS if that is wanted."""
        loop, tls = asyncio.get_running_loop(), self._tls
        if tls is None and client.family == socket.AF_UNIX:
            RightsTransport(client, connection)
        elif tls is None:
            await loop.connect_accepted_socket(lambda: connection, client)
        elif isinstance(tls, ServerTls):
            await loop.connect_accepted_socket(
                lambda: connection, client, ssl=tls.context, ssl_handshake_timeout=_TLS_SECONDS
            )
        else:
            await loop.create_connection(
                lambda: connection,
                sock=client,
                ssl=tls.context,
                server_hostname=tls.hostname,
                ssl_handshake_timeout=_TLS_SECONDS,
            )


# -- addresses
# ---------------------------------------------------------------------------------------------------------


async def _accept_any(listeners: list[socket.socket]) -> socket.socket:
    """The next client of any of the listeners."""
    loop = asyncio.get_running_loop()
    if len(listeners) == 1:
        return (await loop.sock_accept(listeners[0]))[0]
    ready: asyncio.Future[socket.socket] = loop.create_future()

    def readable(listener: socket.socket) -> None:
        if not ready.done():
            ready.set_result(listener)

    for listener in listeners:
        loop.add_reader(listener, readable, listener)
    try:
        listener = await ready
    finally:
        for each in listeners:
            loop.remove_reader(each)
    return (await loop.sock_accept(listener))[0]


async def _listen(options: SocketChardev, paths: list[str]) -> list[socket.socket]:
    """Listening sockets; ``paths`` is told of the file that must go in the end."""
    if options.path is not None:
        return [_listen_unix(options, options.path, paths)]
    if options.host is None:
        return [_passed(options, listening=True)]
    listeners: list[socket.socket] = []
    try:
        async for family, address in _resolve(options, passive=True):
            listeners.append(_listen_tcp(family, address))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listen_unix(options: SocketChardev, path: str, paths: list[str]) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if not options.abstract:
            # What stands there was left by a process that was killed, as QEMU assumes as well.
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.stat(path).st_mode):
                    os.unlink(path)
        listener.bind(_unix_address(options, path))
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise LiveDiskError(f"Failed to bind socket to {path}: {error.strerror or error}") from None
    except BaseException:
        listener.close()
        raise
    if not options.abstract:
        paths.append(path)
    return listener


_SUN_PATH: Final = 108
"""Bytes in a Unix socket's address."""


def _unix_address(options: SocketChardev, path: str) -> bytes:
    raw = os.fsencode(path)
    if len(raw) >= _SUN_PATH:
        raise LiveDiskError(f"UNIX socket path '{path}' is too long", hint=f"Path must be less than {_SUN_PATH} bytes")
    if not options.abstract:
        return raw
    return b"\0" + (raw if options.tight else raw.ljust(_SUN_PATH - 1, b"\0"))


def _listen_tcp(family: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise LiveDiskError(f"Failed to bind socket: {error.strerror or error}") from None
    return listener


def _passed(options: SocketChardev, *, listening: bool) -> socket.socket:
    """The socket behind ``fd=``. Raises LiveDiskError if it is none, or is in the other role."""
    name = options.fd or ""
    passed = take_socket(name)
    try:
        if listening:
            passed.listen(1)  # fails for one that is connected (QEMU: socket_listen)
        elif passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise LiveDiskError(f"File descriptor '{name}' is listening, but server=off")
    except OSError as error:
        refuse_socket(passed)
        raise LiveDiskError(f"Failed to listen on fd socket: {error.strerror}") from None
    except LiveDiskError:
        refuse_socket(passed)
        raise
    return passed


async def _connect(options: SocketChardev) -> socket.socket:
    """A connected socket. Raises LiveDiskError."""
    if options.path is not None:
        return await _connect_to(socket.AF_UNIX, _unix_address(options, options.path), options.path)
    if options.host is None:
        return _passed(options, listening=False)
    failure: LiveDiskError | None = None
    async for family, address in _resolve(options, passive=False):
        try:
            return await _connect_to(family, address, f"{options.host}:{options.port}")
        except LiveDiskError as error:
            failure = error
    assert failure is not None, "a name resolves to one address at least"
    raise failure


async def _connect_to(family: int, address: Any, name: str) -> socket.socket:
    client = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(client, address)
    except OSError as error:
        client.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise LiveDiskError(f"Failed to connect to '{name}': {reason}") from None
    except BaseException:
        client.close()
        raise
    return client


async def _resolve(options: SocketChardev, *, passive: bool) -> AsyncIterator[tuple[int, tuple[Any, ...]]]:
    """Addresses of ``host`` and ``port``. Raises LiveDiskError for names unknown."""
    flags = socket.AI_PASSIVE if passive else 0
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            options.host or None, options.port, family=_family(options), type=socket.SOCK_STREAM, flags=flags
        )
    except socket.gaierror as error:
        raise LiveDiskError(f"address resolution failed for {options.host}:{options.port}: {error.strerror}") from None
    except OverflowError:
        raise LiveDiskError(f"address resolution failed for {options.host}:{options.port}: no such port") from None
    for family, _, _, _, address in found:
        yield family, address
        if passive and options.port == "0":
            # Any port: a second address would choose another one.
            return


def _family(options: SocketChardev) -> int:
    """QEMU: inet_netfamily. Raises LiveDiskError if both families are ruled out."""
    if options.ipv4 is False and options.ipv6 is False:
        raise LiveDiskError("Cannot disable IPv4 and IPv6 at same time")
    if options.ipv6 is False or (options.ipv4 and not options.ipv6):
        return socket.AF_INET
    if options.ipv4 is False or (options.ipv6 and not options.ipv4):
        return socket.AF_INET6
    return socket.AF_UNSPEC
