"""One daemon's migrations: the parameters, the one that goes out, the one that comes in. The state that commands look at."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from livedisk.emulator.block.sockets import FdAddress, InetAddress, UnixAddress
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.context import Daemon
from livedisk.jobs.migration.events import BUSY, MigrationEvent, MigrationStatus
from livedisk.jobs.migration.inactive import Inactive
from livedisk.jobs.migration.parameters import MigrationCapability, Parameters
from livedisk.jobs.migration.wire import MigrationError

log = logging.getLogger(__name__)

Address = InetAddress | UnixAddress | FdAddress
TLS_SECONDS: Final = 10.0


@dataclass
class Progress:
    """A migration in one direction. Times are seconds of the monotonic clock."""

    status: MigrationStatus = MigrationStatus.NONE
    error: str = ""
    started: float = 0.0
    set_up: float = 0.0
    ended: float = 0.0
    downtime: float | None = None

    def begin(self) -> None:
        """A new one: forget the last."""
        self.status, self.error = MigrationStatus.NONE, ""
        self.started, self.set_up, self.ended, self.downtime = now(), 0.0, 0.0, None

    @property
    def busy(self) -> bool:
        """Whether it is under way."""
        return self.status in BUSY


class Migration:
    """See the module. An extension of the daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.parameters = Parameters(tls_creds="", tls_hostname="", tls_authz="")
        self.capabilities: set[MigrationCapability] = set()
        self.outgoing = Progress()
        self.incoming = Progress()
        self.addresses: list[Address] = []
        """Where an incoming migration is listened for."""
        self.inactive = Inactive(daemon)
        self.gone = False
        """The guest was given up: another process has it."""
        self.outgoing_task: asyncio.Task[None] | None = None
        self.incoming_task: asyncio.Task[None] | None = None
        self.may_continue = asyncio.Event()
        # First: while Go is on its way nothing may be activated.
        daemon.run_state.before_run.insert(0, self._take_back)

    def on(self, capability: MigrationCapability) -> bool:
        """Whether a capability is switched on."""
        return capability in self.capabilities

    def move(self, progress: Progress, status: MigrationStatus) -> None:
        """Enter a phase, and tell it."""
        progress.status = status
        if self.on(MigrationCapability.EVENTS):
            self.daemon.events.emit(MigrationEvent(status=status))

    async def _take_back(self) -> None:
        task = self.outgoing_task
        if self.gone and task is not None:
            if self.outgoing.busy:  # Go is on its way: the destination is about to run
                raise LiveDiskError("Migration is not finalized yet")
            await asyncio.wait({task})  # it may still be giving the images up
        try:
            await self.inactive.take_back()
        except OSError as error:
            raise LiveDiskError(f"The images cannot be taken back: {error.strerror or error}") from None
        self.gone = False

    async def close(self) -> None:
        """The daemon ends."""
        for task in (self.outgoing_task, self.incoming_task):
            if task is not None and not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    # -- TLS -----------------------------------------------------------------------------------------------------------
    def client_context(self, address: Address) -> tuple[ssl.SSLContext | None, str | None]:
        """TLS for the source: the context, and whom the destination's certificate must be for. Raises LiveDiskError."""
        if not self.parameters.tls_creds:
            return None, None
        # Imported here: most migrations have none, and TLS needs much.
        from livedisk.emulator.tls.credentials import client_tls

        hostname = self.parameters.tls_hostname or (address.host if isinstance(address, InetAddress) else "")
        tls = client_tls(self.daemon.objects, self.parameters.tls_creds, hostname or None)
        return tls.context, tls.hostname

    def server_context(self) -> tuple[ssl.SSLContext | None, Callable[[bytes | None], None] | None]:
        """TLS for the destination, and who may come. Raises LiveDiskError."""
        if not self.parameters.tls_creds:
            return None, None
        from livedisk.emulator.tls.credentials import server_tls

        tls = server_tls(self.daemon.objects, self.parameters.tls_creds, self.parameters.tls_authz or None)
        return tls.context, tls.admit


def migration_of(daemon: Daemon) -> Migration:
    """The daemon's; made when first asked for."""
    found = daemon.extensions.get(Migration)
    if found is None:
        found = daemon.extensions[Migration] = Migration(daemon)
    assert isinstance(found, Migration)
    return found


# -- addresses ---------------------------------------------------------------------------------------------------------


def parse_uri(uri: str) -> Address:
    """``tcp:HOST:PORT``, ``unix:PATH`` or ``fd:NAME`` (a connected socket that getfd gave). Raises MigrationError."""
    kind, _, rest = uri.partition(":")
    if kind == "unix" and rest:
        return UnixAddress(path=rest)
    if kind == "tcp":
        host, colon, port = rest.rpartition(":")
        if colon and port.isdigit():
            return InetAddress(host=host.strip("[]"), port=port)
        raise MigrationError(f"error parsing address '{rest}'")
    if kind == "fd":
        return FdAddress(str=rest)
    if kind in ("exec", "file", "rdma", "vsock"):
        raise MigrationError(f"migration protocol '{kind}' is not supported; use tcp:HOST:PORT, unix:PATH or fd:NAME")
    raise MigrationError(f"unknown migration protocol: {uri}")


async def listen(address: InetAddress | UnixAddress) -> tuple[socket.socket, Address]:
    """A listening socket on the address, and where it really is. Raises MigrationError in QEMU's words."""
    if isinstance(address, UnixAddress):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address.path)
            sock.bind(address.path)
            sock.listen(1)
        except OSError as error:
            sock.close()
            raise MigrationError(f"Failed to bind socket to {address.path}: {error.strerror or error}") from None
        return sock, address
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(
            address.host or None, int(address.port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, OverflowError) as error:
        raise MigrationError(f"address resolution failed for {address.host}:{address.port}: {error}") from None
    family, kind, proto, _, where = found[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, where[0] != "::")
        sock.bind(where)
        sock.listen(1)
    except OSError as error:
        sock.close()
        raise MigrationError(f"Failed to bind socket: {error.strerror}") from None
    return sock, InetAddress(host=sock.getsockname()[0], port=str(sock.getsockname()[1]))


def now() -> float:
    """Seconds of the clock that durations are measured with."""
    return time.monotonic()
