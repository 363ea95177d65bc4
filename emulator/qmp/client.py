"""A small QMP client on asyncio: for `livedisk qmp`, the quickstart, and whoever scripts an emulator.

    async with await QmpClient.connect("/run/disk.qmp") as qmp:
        await qmp.execute("query-block")
        await qmp.call("block_resize", {"node-name": "disk", "size": 2**30})
        async for event in qmp.events(): ...

Replies are matched to commands by id, so several may be in flight. It speaks to QEMU and its storage daemon as well.
Source: QEMU ``docs/interop/qmp-spec.rst``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.wire import NOTHING, JsonError, Parser

MAX_EVENTS: Final = 10_000
"""Events kept for a reader that is behind; beyond that the oldest go."""
_CHUNK: Final = 64 << 10


class QmpError(LiveDiskError):
    """The server answered with an error. ``kind`` is its class; the text its description."""

    def __init__(self, kind: str, desc: str) -> None:
        super().__init__(desc)
        self.kind = kind


class ConnectionLost(LiveDiskError):
    """The server is not there, or went away, or does not speak QMP."""


class QmpClient:
    """One connection, negotiated. Make it with `connect`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._parser = Parser()
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self.greeting: dict[str, Any] = {}

    @classmethod
    async def connect(cls, address: str, *, timeout: float = 10, oob: bool = False) -> Self:
        """Connect and negotiate. ``address``: a Unix socket's path (also ``unix:PATH``), or ``tcp:HOST:PORT``, or
        ``HOST:PORT``.

        ``timeout``: seconds for both together. ``oob``: enable out-of-band execution. Raises ConnectionLost.
        """
        try:
            async with asyncio.timeout(timeout):
                client = cls(*await _open(address))
                try:
                    await client._negotiate(oob)
                except BaseException:
                    await client.close()
                    raise
                return client
        except JsonError as error:
            raise ConnectionLost(f"{address}: not a QMP monitor: {error}") from None
        except TimeoutError:
            raise ConnectionLost(
                f"{address}: no QMP greeting within {timeout:g} s: most likely another client is connected, and a QMP socket "
                "serves one at a time; end that client, or give the daemon a second -qmp"
            ) from None
        except OSError as error:
            raise ConnectionLost(f"Failed to connect to '{address}': {error.strerror or error}") from None

    async def execute(self, command: str, /, **arguments: Any) -> Any:
        """Run a command; ``node_name=`` stands for ``node-name``. Returns what it returns. Raises QmpError,
        ConnectionLost."""
        return await self.call(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    async def call(self, command: str, arguments: dict[str, Any] | None = None, *, oob: bool = False) -> Any:
        """Run a command with its arguments as they stand. Raises QmpError, ConnectionLost."""
        message: dict[str, Any] = {"exec-oob" if oob else "execute": command}
        if arguments:
            message["arguments"] = arguments
        return await self.send(message)

    async def send(self, message: dict[str, Any]) -> Any:
        """Send a whole request; its id, if it has one, is replaced. Raises QmpError, ConnectionLost."""
        if self._task is None or self._task.done():
            raise ConnectionLost("the connection to the monitor is closed")
        number = next(self._ids)
        self._waiting[number] = answer = asyncio.get_running_loop().create_future()
        self._writer.write(msgspec.json.encode({**message, "id": number}) + b"\n")
        try:
            with contextlib.suppress(ConnectionError):
                await self._writer.drain()
            return await answer
        finally:
            del self._waiting[number]

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Events as they come, also those that came before; ends when the connection does. For one reader."""
        while (event := await self._events.get()) is not None:
            yield event
        self._events.put_nowait(None)

    async def wait_event(self, name: str, **data: Any) -> dict[str, Any]:
        """The next event of that name whose data has these members; what comes before it is dropped. Raises
        ConnectionLost."""
        wanted = {key.replace("_", "-"): value for key, value in data.items()}
        async for event in self.events():
            members = event.get("data", {})
            if event["event"] == name and wanted.items() <= members.items():
                return event
        raise ConnectionLost(f"the monitor closed the connection before event {name}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- inside
    # -------------------------------------------------------------------------------------------------------

    async def _negotiate(self, oob: bool) -> None:
        first = await self._next()
        if not isinstance(first, dict) or "QMP" not in first:
            raise ConnectionLost("not a QMP monitor: it does not greet as one")
        self.greeting = first["QMP"]
        self._task = asyncio.get_running_loop().create_task(self._read(), name="qmp-client")
        await self.call("qmp_capabilities", {"enable": ["oob"]} if oob else None)

    async def _next(self) -> Any:
        """The next JSON value of the server."""
        while (value := self._parser.next()) is NOTHING:
            data = await self._reader.read(_CHUNK)
            if not data:
                raise ConnectionLost("the monitor closed the connection")
            self._parser.feed(data)
        return value

    async def _read(self) -> None:
        reason: LiveDiskError = ConnectionLost("the monitor closed the connection")
        try:
            while True:
                self._take(await self._next())
        except (ConnectionLost, JsonError) as error:
            reason = ConnectionLost(str(error))
        except OSError as error:
            reason = ConnectionLost(f"the connection to the monitor broke: {error}")
        finally:
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(reason)
            self._events.put_nowait(None)

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            if self._events.qsize() >= MAX_EVENTS:
                self._events.get_nowait()
            self._events.put_nowait(message)
            return
        answer = self._waiting.get(message.get("id", 0))
        if answer is None or answer.done():
            return
        if "error" in message:
            answer.set_exception(QmpError(message["error"]["class"], message["error"]["desc"]))
        else:
            answer.set_result(message["return"])


async def _open(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        return await asyncio.open_unix_connection(rest)
    if kind == "tcp":
        address = rest
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in address:
        return await asyncio.open_connection(host.strip("[]") or "localhost", int(port))
    return await asyncio.open_unix_connection(address)
