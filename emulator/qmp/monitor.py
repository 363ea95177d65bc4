"""The QMP monitor: greeting, negotiation, ids, the in-band queue, out-of-band execution. No sockets.

A monitor is a `Frontend`: a character device (`server`) tells it of each connection, hands it bytes, takes bytes from
it. Modes of one connection, as QEMU has them::

    opened --greeting--> NEGOTIATING --qmp_capabilities--> COMMANDS --closed--> (the next connection starts over)

* In-band commands of all monitors run one at a time, monitors taking turns (`Dispatcher`). Without the capability
  ``oob`` a monitor reads nothing more until its command is answered. With it, up to `QUEUE_LIMIT` commands wait; then
  reading stops as well, and with it the way in for out-of-band commands: a client that wants it open keeps fewer
  commands in flight.
* ``exec-oob`` runs at once, between any two steps of the command in progress. Such commands never wait
  (`Command.allow_oob`).
* Events go to every monitor that has negotiated.
* A client that does not read is not read from (`Port` stops it); what is owed to it is bounded by the port, which
  then hangs up.
* The reply to a command whose client has gone is dropped: it never reaches the next client (QEMU may send it there).

Source: QEMU ``monitor/qmp.c``, ``qapi/qmp-dispatch.c``, ``docs/interop/qmp-spec.rst``; messages asked from QEMU
10.0.2.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol, TypeVar

from livedisk.emulator.block import descriptors
from livedisk.emulator.errors import CommandNotFound, LiveDiskError
from livedisk.emulator.qmp import encode
from livedisk.emulator.qmp.context import Context, Daemon
from livedisk.emulator.qmp.registry import Command, Registry, to_wire
from livedisk.emulator.qmp.version import version_info
from livedisk.emulator.qmp.wire import NOTHING, JsonError, Parser

log = logging.getLogger(__name__)
T = TypeVar("T")

QUEUE_LIMIT: Final = 8
"""In-band commands that may wait in one monitor with out-of-band execution enabled (QEMU: QMP_REQ_QUEUE_LEN_MAX)."""


class Port(Protocol):
    """One connection of a character device, as its frontend sees it."""

    def write(self, data: bytes) -> None:
        """Send; never blocks. What a peer leaves unread is bounded; beyond that the port hangs up."""

    def set_reading(self, on: bool) -> None:
        """Stop or resume taking bytes in."""

    def take_descriptor(self) -> int | None:
        """The descriptor that came with the bytes taken in last, the taker's now; None: there was none."""


class Frontend(Protocol):
    """What is plugged into a character device."""

    def opened(self, port: Port) -> None: ...

    def received(self, data: bytes) -> None: ...

    def closed(self) -> None: ...


class Monitor(Protocol):
    """What a command may ask of the monitor it came by."""

    def negotiate(self, capabilities: list[Capability]) -> None:
        """Leave negotiation. Raises CommandNotFound if that is done already."""

    @property
    def negotiating(self) -> bool: ...


class Capability(enum.StrEnum):
    """QMPCapability."""

    OOB = "oob"


class Dispatcher:
    """Runs the in-band commands of all monitors one at a time, the monitors taking turns."""

    def __init__(self) -> None:
        self._waiting: deque[QmpMonitor] = deque()
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def kick(self, monitor: QmpMonitor) -> None:
        """``monitor`` has a command to run. Needs a running event loop."""
        if monitor not in self._waiting:
            self._waiting.append(monitor)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="qmp-dispatcher")

    async def exclusively(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something else in turn with the commands (a line of the human monitor)."""
        async with self._turn:
            return await work

    async def close(self) -> None:
        """Stop after the command in progress, which is cancelled."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while self._waiting:
                monitor = self._waiting.popleft()
                async with self._turn:
                    await monitor.run_next()
                if monitor.pending and monitor not in self._waiting:
                    self._waiting.append(monitor)
        finally:
            self._task = None


class QmpMonitor:
    """One QMP monitor (``-mon mode=control``): at most one connection at a time."""

    def __init__(self, daemon: Daemon, registry: Registry, dispatcher: Dispatcher, *, pretty: bool = False) -> None:
        self._context = Context(daemon, self)
        self._registry = registry
        self._dispatcher = dispatcher
        self._encode: Callable[[Any], bytes] = encode.encode_pretty if pretty else encode.encode
        self._port: Port | None = None
        self._names = descriptors.Names(lambda: self._port.take_descriptor() if self._port is not None else None)
        self._session = 0
        self._reset()
        daemon.events.attach(self._event)

    def _reset(self) -> None:
        self.negotiating = True
        self._oob = False
        self._suspended = False
        self._parser = Parser()
        self._queue: deque[dict[str, Any] | JsonError | Any] = deque()

    # -- the character device's side
    # ----------------------------------------------------------------------------------

    def opened(self, port: Port) -> None:
        self._reset()
        self._port = port
        self._session += 1
        self._send({"QMP": {"version": to_wire(version_info()), "capabilities": [str(item) for item in Capability]}})

    def received(self, data: bytes) -> None:
        self._parser.feed(data)
        self._pump()

    def closed(self) -> None:
        self._port = None
        self._session += 1
        self._reset()

    def detach(self) -> None:
        """Take the monitor out of service."""
        self._context.daemon.events.detach(self._event)

    # -- the commands' side
    # -------------------------------------------------------------------------------------------

    def negotiate(self, capabilities: list[Capability]) -> None:
        if not self.negotiating:
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        self._oob = Capability.OOB in capabilities
        self.negotiating = False

    # -- the dispatcher's side
    # ----------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        return bool(self._queue)

    async def run_next(self) -> None:
        """Run the oldest command that waits, if there is one, and answer it."""
        if not self._queue:
            return
        request, session, oob = self._queue.popleft(), self._session, self._oob
        if oob:
            # Read on at once, so that out-of-band commands get in while this one runs.
            self._resume()
        reply = await self._reply(request)
        if session != self._session:
            return
        if reply is not None:
            self._send(reply)
        if not oob:
            self._resume()

    # -- inside
    # -------------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Take in values while the queue has room."""
        while not self._suspended and self._port is not None:
            request: Any
            try:
                request = self._parser.next()
            except JsonError as error:
                request = error
            if request is NOTHING:
                return
            self._take(request)

    def _take(self, request: Any) -> None:
        if isinstance(request, dict) and "exec-oob" in request and "execute" not in request:
            reply = self._reply_at_once(request)
            if reply is not None:
                self._send(reply)
            return
        self._queue.append(request)
        if not self._oob or len(self._queue) == QUEUE_LIMIT:
            self._suspended = True
            if self._port is not None:
                self._port.set_reading(False)
        self._dispatcher.kick(self)

    def _resume(self) -> None:
        if not self._suspended:
            return
        self._suspended = False
        if self._port is not None:
            self._port.set_reading(True)
        self._pump()

    def _send(self, message: dict[str, Any]) -> None:
        if self._port is not None:
            self._port.write(self._encode(message))

    def _event(self, message: dict[str, Any]) -> None:
        if not self.negotiating:
            self._send(message)

    async def _reply(self, request: Any) -> dict[str, Any] | None:
        """The answer to an in-band request; None for a command that does not answer success."""
        command: Command | None = None
        try:
            command, arguments = self._resolve(request)
            with descriptors.of_monitor(self._names):
                result = to_wire(await command.run(self._context, arguments))
        except Exception as error:
            return _with_id(request, {"error": self._explain(error)})
        return _with_id(request, {"return": result}) if command.success_response else None

    def _reply_at_once(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to an out-of-band request, whose command must not wait."""
        try:
            command, arguments = self._resolve(request)
            running = command.run(self._context, arguments)
            try:
                with descriptors.of_monitor(self._names):
                    running.send(None)
            except StopIteration as done:
                result = to_wire(done.value)
            else:
                running.close()
                raise RuntimeError(f"command {command.name} may run out of band, but waits")
        except Exception as error:
            return _with_id(request, {"error": self._explain(error)})
        return _with_id(request, {"return": result}) if command.success_response else None

    def _resolve(self, request: Any) -> tuple[Command, dict[str, Any]]:
        """The command a request names, and its arguments as JSON. Raises LiveDiskError in QEMU's words."""
        if isinstance(request, JsonError):
            raise request
        verb = _check(request, allow_oob=self._oob)
        name = request[verb]
        if self.negotiating and name != "qmp_capabilities":
            raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
        command = self._registry.get(name)
        if verb == "exec-oob" and not command.allow_oob:
            raise LiveDiskError(f"The command {name} does not support OOB")
        return command, request.get("arguments", {})

    def _explain(self, error: Exception) -> dict[str, str]:
        if isinstance(error, LiveDiskError):
            return {"class": error.qmp_class, "desc": str(error)}
        if isinstance(error, OSError) and error.errno is not None:
            where = f"{error.filename}: " if error.filename else ""
            return {"class": "GenericError", "desc": f"{where}{error.strerror or os.strerror(error.errno)}"}
        log.error("a command failed in a way it should not", exc_info=error)
        return {"class": "GenericError", "desc": f"Internal error: {type(error).__name__}: {error}"}


def _with_id(request: Any, reply: dict[str, Any]) -> dict[str, Any]:
    if isinstance(request, dict) and "id" in request:
        reply["id"] = request["id"]
    return reply


def _check(request: Any, *, allow_oob: bool) -> str:
    """Which member names the command. Raises LiveDiskError for a request that is none (QEMU:
    qmp_dispatch_check_obj)."""
    if not isinstance(request, dict):
        raise LiveDiskError("QMP input must be a JSON object")
    verb = ""
    for name in encode.ordered(tuple(request)):
        value = request[name]
        if name == "execute" or (name == "exec-oob" and allow_oob):
            if not isinstance(value, str):
                raise LiveDiskError(f"QMP input member '{name}' must be a string")
            if verb:
                raise LiveDiskError(f"QMP input member '{name}' clashes with '{verb}'")
            verb = name
        elif name == "arguments":
            if not isinstance(value, dict):
                raise LiveDiskError("QMP input member 'arguments' must be an object")
        elif name != "id":
            raise LiveDiskError(f"QMP input member '{name}' is unexpected")
    if not verb:
        raise LiveDiskError("QMP input lacks member 'execute'")
    return verb
