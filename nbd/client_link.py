"""A client's way to an export through all reconnects, over one connection or several.

                 lost, reconnect_delay > 0                 the delay is over
    CONNECTED ------------------------------> HOLDING ------------------------> FAILING
      |   ^  ^                                   |                               |   ^
      |   |  '-------------- reconnected --------'                               |   |
      |   '------------------ reconnected ---------------------------------------'   |
      '---------------------- lost, reconnect_delay = 0 -----------------------------'
    any state -- the server broke the protocol, or `cut` --> ENDED

In HOLDING, requests wait and are sent (again) when the connection is back: each NBD request may be done twice. In FAILING they
fail, but each makes the next attempt start at once, and if that takes no longer than a blink, gets its outcome. The delay is
counted from the first request that has to wait, so that an outage that nobody noticed takes nothing from it. In ENDED all fails
for good: a server that does not keep to the protocol is not asked again.

Several connections: where the server says that a flush on one covers what was acknowledged on all (CAN_MULTI_CONN), more are
opened while much is under way, for servers that work on different connections at the same time, and closed again. If one is
lost, its requests go to the others.

Source: QEMU ``block/nbd.c`` (NBDClientState, nbd_channel_error, nbd_reconnect_attempt); ``qapi/block-core.json``
(BlockdevOptionsNbd, reconnect-delay, open-timeout). Where we differ: reconnecting goes on without waiting for a request, and
tries more often (QEMU: after 1, 2, 4, 8 and then every 16 seconds).
"""

from __future__ import annotations

import asyncio
import enum
import errno
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final

from .client_connection import Buffer, ClientConnection, lost
from .client_handshake import ExportInfo, NegotiationFailed
from .client_transmission import NO_FLAGS, Pending, ProtocolError
from .constants import Command, CommandFlag, TransmissionFlag
from .export import Ended
from .file_payload import FilePayload

log = logging.getLogger(__name__)

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0
"""Seconds between two attempts to connect: doubled from the one to the other."""
_ATTEMPT: Final = 10.0
"""Seconds after which an attempt to reconnect is given up, and another one made."""
_BLINK: Final = 0.25
"""Seconds that a request waits in FAILING for the attempt that it started."""
MAX_CONNECTIONS: Final = 4
_WIDE: Final = 2 << 20
"""Bytes under way on every connection for which another one is worth while."""
_IDLE: Final = 5.0
"""Seconds after which a further connection that was not needed is closed."""


class State(enum.Enum):
    """See the module's docstring."""

    CONNECTED = enum.auto()
    HOLDING = enum.auto()
    FAILING = enum.auto()
    ENDED = enum.auto()


class Link:
    """Requests to one export.

    ``connect`` makes a negotiated connection, or raises OSError or `NegotiationFailed`. ``check`` looks at the export of every
    new connection but the first and raises `NegotiationFailed` where it cannot take the place of the one there was.
    ``reconnect_delay``: seconds. ``where`` names server and export in messages.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[ClientConnection]],
        check: Callable[[ExportInfo], None],
        *,
        reconnect_delay: float,
        where: str,
    ) -> None:
        self.state = State.FAILING
        self.info = ExportInfo()
        self._connect = connect
        self._check = check
        self._delay = reconnect_delay
        self._where = where
        self._connections: list[ClientConnection] = []
        self._cause: Exception = ConnectionError("not connected yet")
        self._changed: asyncio.Future[None] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._attempt: asyncio.Future[ClientConnection] | None = None
        self._attempt_began = 0.0
        self._reconnecting: asyncio.Task[None] | None = None
        self._kick = asyncio.Event()
        self._widening: asyncio.Task[None] | None = None
        self._narrowing: asyncio.TimerHandle | None = None
        self._widest = MAX_CONNECTIONS
        self._used = 1
        self._failures = 0
        self._tasks: set[asyncio.Task[None]] = set()

    # Life.

    async def open(self, timeout: float) -> None:
        """Connect; with ``timeout`` (seconds) again and again until then. Raises OSError or `NegotiationFailed`: what the last
        attempt raised."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout if timeout else None
        pause = _FIRST_PAUSE
        while True:
            try:
                connection = await self._try(deadline)
                break
            except (OSError, NegotiationFailed) as error:
                if self.state is State.ENDED or deadline is None or loop.time() + pause >= deadline:
                    raise
                log.debug("%s: %s; trying again", self._where, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self.info = connection.info
        self._adopt(connection)

    async def _try(self, deadline: float | None) -> ClientConnection:
        """One attempt to connect. Raises OSError or `NegotiationFailed`."""
        if self._ended:
            raise lost(self._cause)
        loop = asyncio.get_running_loop()
        self._attempt = attempt = asyncio.ensure_future(self._connect())
        self._attempt_began = loop.time()
        try:
            async with asyncio.timeout_at(deadline):
                return await attempt
        except TimeoutError:
            raise TimeoutError(errno.ETIMEDOUT, "the server did not answer in time") from None
        except asyncio.CancelledError:
            if self._ended:
                raise lost(self._cause) from None
            raise
        finally:
            self._attempt = None

    @property
    def _ended(self) -> bool:
        return self.state is State.ENDED

    async def close(self) -> None:
        """Say goodbye on every connection. Nothing is under way."""
        self._end(ConnectionAbortedError(errno.ECONNABORTED, "the node is closed"))
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.on_lost = None
            await connection.disconnect()

    def cut(self) -> None:
        """Drop everything at once, for good: what is under way fails, now and forever (yank)."""
        self._end(ConnectionAbortedError(errno.ECONNABORTED, "the connection was cut (yank)"))
        for connection in list(self._connections):
            connection.abort()

    def drop(self, why: str) -> None:
        """Drop the connections: what is under way fails, or waits to be sent again, as after any loss."""
        for connection in list(self._connections):
            connection.abort(why)

    def stop_holding(self) -> None:
        """Let requests fail that wait for a reconnect."""
        if self.state is State.HOLDING:
            self._move(State.FAILING)

    def no_more_holding(self) -> None:
        """Let requests fail that would wait for a reconnect, from now on."""
        self._delay = 0
        self.stop_holding()

    def _end(self, cause: Exception) -> None:
        self._cause = cause
        self._move(State.ENDED)
        for task in (self._attempt, self._reconnecting, self._widening):
            if task is not None:
                task.cancel()
        for timer in (self._expiry, self._narrowing):
            if timer is not None:
                timer.cancel()

    def _move(self, state: State) -> None:
        self.state = state
        if state is not State.HOLDING and self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None

    async def _change(self) -> None:
        """Wait until the state changes."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)

    # Requests.

    async def request(
        self,
        command: Command,
        offset: int,
        length: int,
        *,
        flags: CommandFlag = NO_FLAGS,
        target: memoryview | None = None,
        payload: Buffer | FilePayload = b"",
    ) -> Pending:
        """A request's outcome, sent again after every reconnect that the state allows to wait for. Raises OSError: the server's
        error, or EIO where there is no server."""
        while True:
            connections = self._connections
            connection = connections[0] if len(connections) == 1 else None
            if connection is None or connection.bytes >= _WIDE:
                connection = await self._choose()
            try:
                pending = await connection.request(command, offset, length, flags=flags, target=target, payload=payload)
            except ConnectionError:
                # `_lost` has been told, and has decided. Other connections may be there, or the state says to wait.
                if self.state in (State.CONNECTED, State.HOLDING):
                    continue
                raise self._failed() from None
            if pending.error is not None:
                raise pending.error
            return pending

    def start(
        self,
        command: Command,
        offset: int,
        length: int,
        ended: Ended,
        *,
        target: memoryview | None = None,
        payload: Buffer = b"",
    ) -> bool:
        """Send a request if there is a connection now, and have ``ended`` told of its outcome, reconnects included; False:
        nothing happened. For what cannot afford a coroutine a request."""
        connections = self._connections
        if not connections:
            return False
        connection = connections[0]
        if connection.bytes >= _WIDE or len(connections) > 1:
            connection = self._least_busy()
        ask = partial(self.request, command, offset, length, target=target, payload=payload)
        connection.start(command, offset, length, partial(self._started, ended, ask), target=target, payload=payload)
        return True

    def _started(self, ended: Ended, ask: Callable[[], Awaitable[Pending]], pending: Pending | None) -> None:
        if pending is not None:
            ended(pending.error, pending.holes)
        else:
            task = asyncio.get_running_loop().create_task(self._ask_again(ended, ask))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask_again(self, ended: Ended, ask: Callable[[], Awaitable[Pending]]) -> None:
        try:
            if self.state not in (State.CONNECTED, State.HOLDING):
                raise self._failed()
            pending = await ask()
        except OSError as error:
            ended(error, ())
        else:
            ended(None, pending.holes)

    def _failed(self) -> OSError:
        return OSError(errno.EIO, f"{os.strerror(errno.EIO)}: {self._where}: {_words(self._cause)}")

    async def _choose(self) -> ClientConnection:
        """The connection with the least under way, once there is one. Raises OSError where the state does not allow to wait."""
        if not self._connections:
            await self._wait_for_connection()
        return self._least_busy()

    def _least_busy(self) -> ClientConnection:
        connection = min(self._connections, key=lambda one: one.bytes)
        if connection.bytes >= _WIDE:
            self._widen()
        self._used = max(self._used, sum(1 for one in self._connections if one.in_flight) + 1)
        return connection

    async def _wait_for_connection(self) -> None:
        loop = asyncio.get_running_loop()
        until, failures = loop.time() + _BLINK, self._failures
        while not self._connections:
            if self.state is State.HOLDING:
                if self._expiry is None:
                    self._expiry = loop.call_later(self._delay, self._expire)
                await self._change()
            elif self.state is State.FAILING and self._failures == failures and loop.time() < until:
                self._kick.set()
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        await self._change()
            else:
                raise self._failed()

    def _expire(self) -> None:
        log.warning("%s: not reconnected within %g seconds: requests fail", self._where, self._delay)
        self._expiry = None
        self._move(State.FAILING)

    # Connections that come and go.

    def _adopt(self, connection: ClientConnection) -> None:
        connection.on_lost = self._lost
        self._connections.append(connection)
        if connection.error is not None:  # lost before anybody listened
            connection.on_lost = None
            self._lost(connection)
        elif self.state is not State.CONNECTED:
            self._move(State.CONNECTED)

    def _lost(self, connection: ClientConnection) -> None:
        self._connections.remove(connection)
        error = connection.error
        assert error is not None
        if self.state is State.ENDED:
            return
        log.warning("%s: %s", self._where, _words(error))
        if isinstance(error, ProtocolError):
            self._end(error)
            for other in list(self._connections):
                other.abort()
        elif not self._connections:
            self._cause = error
            self._move(State.HOLDING if self._delay else State.FAILING)
            self._reconnecting = asyncio.get_running_loop().create_task(self._reconnect())

    async def _reconnect(self) -> None:
        """Try until it works, or the state is ENDED."""
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE
        while True:
            self._kick.clear()
            try:
                connection = await self._accepted(loop.time() + _ATTEMPT)
                break
            except (OSError, NegotiationFailed) as error:
                if self.state is State.ENDED:
                    return
                self._cause = error
                self._failures += 1
                if self.state is State.FAILING:
                    self._move(State.FAILING)  # tells those who wait for the outcome
                log.debug("%s: reconnecting: %s", self._where, error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._kick.wait(), pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        log.warning("%s: reconnected", self._where)
        self._reconnecting = None
        self.info = connection.info
        self._widest = MAX_CONNECTIONS
        self._adopt(connection)

    async def _accepted(self, deadline: float) -> ClientConnection:
        """A new connection whose export is as the one there was. Raises OSError or `NegotiationFailed`."""
        connection = await self._try(deadline)
        try:
            self._check(connection.info)
        except BaseException:
            connection.abort()
            raise
        return connection

    def _widen(self) -> None:
        """Open another connection, in the background, where that is allowed and was not refused before."""
        if (
            self._widening is None
            and self.state is State.CONNECTED
            and self.info.flags & TransmissionFlag.CAN_MULTI_CONN
            and len(self._connections) < self._widest
        ):
            self._widening = asyncio.get_running_loop().create_task(self._add_connection())

    async def _add_connection(self) -> None:
        try:
            connection = await self._accepted(asyncio.get_running_loop().time() + _ATTEMPT)
        except (OSError, NegotiationFailed) as error:
            log.debug("%s: no further connection: %s", self._where, error)
            self._widest = len(self._connections)
        else:
            if self.state is State.CONNECTED and connection.info.flags & TransmissionFlag.CAN_MULTI_CONN:
                self._adopt(connection)
                if self._narrowing is None:
                    self._narrowing = asyncio.get_running_loop().call_later(_IDLE, self._narrow)
            else:
                connection.abort()
        finally:
            self._widening = None

    def _narrow(self) -> None:
        """Close a further connection that was not needed for a while; look again later while there are any."""
        self._narrowing = None
        used, self._used = self._used, 1
        if len(self._connections) > max(used, 1) and not self._connections[-1].in_flight:
            self._connections[-1].on_lost = None
            connection = self._connections.pop()
            self._tasks.add(task := asyncio.get_running_loop().create_task(connection.disconnect()))
            task.add_done_callback(self._tasks.discard)
        if len(self._connections) > 1:
            self._narrowing = asyncio.get_running_loop().call_later(_IDLE, self._narrow)


def _words(error: Exception) -> str:
    """Why, without the number that Python puts before a failed system call's words."""
    return getattr(error, "strerror", None) or str(error)
