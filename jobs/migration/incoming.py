"""The destination's side of a hand-over: listen, check, prepare, and run on Go."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import suppress
from typing import Final

from livedisk.emulator.block.descriptors import take_socket
from livedisk.emulator.block.sockets import FdAddress, UnixAddress
from livedisk.emulator.device.runstate import State
from livedisk.emulator.errors import LiveDiskError
from livedisk.jobs.migration import state
from livedisk.jobs.migration.events import MigrationStatus
from livedisk.jobs.migration.migration import TLS_SECONDS, Address, Migration, listen, now
from livedisk.jobs.migration.wire import (
    MAGIC,
    QEMU_MAGIC,
    VERSION,
    Activated,
    Channel,
    Go,
    Hello,
    Message,
    MigrationError,
    Refusal,
    Running,
    Switch,
    Welcome,
)
from livedisk.nbd.tls import reason_of

log = logging.getLogger(__name__)

_GREETING: Final = 10.0
"""Seconds for the magic and the first message."""
_GO: Final = 60.0
"""Seconds between Activated and Go."""
_S = MigrationStatus


class Incoming:
    """Waits for one migration. ``exit_on_error``: the daemon ends if it fails (QEMU's default)."""

    def __init__(self, migration: Migration, *, exit_on_error: bool) -> None:
        self._migration = migration
        self._daemon = migration.daemon
        self._progress = migration.incoming
        self._exit_on_error = exit_on_error
        self._listeners: list[socket.socket] = []
        self._path = ""
        self._passed: socket.socket | None = None

    async def open(self, address: Address) -> None:
        """Listen, or take the socket that is connected already. Raises LiveDiskError in QEMU's words."""
        self._context, self._admit = self._migration.server_context()
        if isinstance(address, FdAddress):
            self._passed = take_socket(address.str)
            self._migration.addresses = []
        else:
            listener, where = await listen(address)
            self._listeners, self._migration.addresses = [listener], [where]
        self._path = address.path if isinstance(address, UnixAddress) else ""
        self._progress.started = now()
        self._migration.move(self._progress, _S.SETUP)

    async def run(self) -> None:
        """Take the first migration that comes, to its end."""
        try:
            channel = await self._first_migration()
            await self._take(channel)
        except asyncio.CancelledError:
            self._stop_listening()
            raise
        except (MigrationError, LiveDiskError, OSError) as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("incoming migration")
            self._fail(f"internal error: {error}")

    async def _first_migration(self) -> Channel:
        """Somebody who speaks our protocol. Others, who only look whether the port is open, are let go."""
        if self._passed is not None:
            channel = await self._greeted(self._passed)
            if channel is None:
                raise MigrationError("the passed socket's other end went before it said anything of use")
            return channel
        loop = asyncio.get_running_loop()
        listener = self._listeners[0]
        listener.setblocking(False)
        try:
            while True:
                client, _ = await loop.sock_accept(listener)
                channel = await self._greeted(client)
                if channel is not None:
                    return channel
        finally:
            self._stop_listening()

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        if self._path:
            with suppress(FileNotFoundError):
                os.unlink(self._path)

    async def _greeted(self, client: socket.socket) -> Channel | None:
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(_GREETING):
                reader, writer = await self._wrapped(client)
                first = await reader.readexactly(len(QEMU_MAGIC))
                rest = await reader.readexactly(len(MAGIC) - len(first)) if first != QEMU_MAGIC else b""
        except (OSError, TimeoutError, asyncio.IncompleteReadError, PermissionError) as error:
            why = reason_of(error) if isinstance(error, OSError) else str(error) or "no greeting in time"
            log.info("incoming migration: a client went before it said anything of use: %s", why)
            # The event loop must hear that a socket of its own is closed, or it is deaf for the next one of that number.
            (client.close if writer is None else writer.transport.abort)()
            return None
        if first == QEMU_MAGIC:
            writer.transport.abort()
            raise MigrationError(
                "this is QEMU's migration stream, which carries a whole machine; only livedisk can migrate here"
            )
        if first + rest != MAGIC:
            log.info("incoming migration: a client that does not speak the protocol")
            writer.transport.abort()
            return None
        return Channel(reader, writer, "source")

    async def _wrapped(self, client: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The client's streams, through TLS where that is wanted."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        client.setblocking(False)
        more = {} if self._context is None else {"ssl": self._context, "ssl_handshake_timeout": TLS_SECONDS}
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, client, **more)  # type: ignore[arg-type]
        if self._admit is not None:
            try:
                self._admit(transport.get_extra_info("ssl_object").getpeercert(binary_form=True))
            except PermissionError:
                transport.abort()
                raise
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _take(self, channel: Channel) -> None:
        progress = self._progress
        hello = await self._hello(channel)
        arrival = state.Arrival(self._daemon, hello)
        try:
            try:
                await channel.send(Welcome())
                self._migration.move(progress, _S.ACTIVE)
                message: Message = await channel.receive()
                while not isinstance(message, Switch):
                    arrival.take(message)
                    message = await channel.receive()
                await arrival.activate(message.ends)
            except (LiveDiskError, OSError) as error:
                await self._refuse(channel, error)
                raise
            await channel.send(Activated())
            async with channel.within(_GO):
                go = await channel.expect(Go)
        except BaseException:
            await arrival.undo()
            channel.abort()
            raise
        # The guest is ours.
        arrival.start()
        runs = go.running and self._daemon.run_state.start_after_migration
        self._daemon.run_state.end_migration(State.RUNNING if runs else State.PAUSED)
        progress.ended = now()
        self._migration.move(progress, _S.COMPLETED)
        with suppress(MigrationError):
            await channel.send(Running())
        await channel.close()

    async def _hello(self, channel: Channel) -> Hello:
        async with channel.within(_GREETING):
            hello = await channel.expect(Hello)
        try:
            if hello.version != VERSION:
                raise MigrationError(f"the source speaks version {hello.version} of the protocol, we speak {VERSION}")
            state.check(self._daemon, hello)
        except MigrationError as error:
            await self._refuse(channel, error)
            raise
        return hello

    async def _refuse(self, channel: Channel, error: Exception) -> None:
        """Say no, and why. Closes in order: an abort could take the word away."""
        hint = getattr(error, "hint", "")
        with suppress(MigrationError):
            await channel.send(Refusal(f"{error} ({hint})" if hint else str(error)))
        await channel.close()

    def _fail(self, reason: str) -> None:
        self._progress.error = reason
        self._progress.ended = now()
        log.error("load of migration failed: %s", reason)
        self._migration.move(self._progress, _S.FAILED)
        if self._exit_on_error:
            self._daemon.quit("host-error")
