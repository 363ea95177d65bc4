"""A synchronous QMP client for tests.

It is deliberately not built on our own client: it is the other side. It speaks one JSON value a line, as every QMP
server answers, keeps the events that come between replies, and can show the raw text of what came.
"""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class QmpError(Exception):
    """The server answered with an error."""

    def __init__(self, command: str, error: dict[str, Any]) -> None:
        self.kind: str = error["class"]
        self.desc: str = error["desc"]
        super().__init__(f"{command}: {self.kind}: {self.desc}")


class Qmp:
    """One connection to a monitor.

    ``address`` is a Unix socket's path or ``(host, port)``. Capabilities are negotiated at once unless ``negotiate``
    is false; ``oob`` asks for out-of-band execution. ``timeout`` (seconds) bounds every wait.
    """

    def __init__(
        self,
        address: Path | str | tuple[str, int],
        *,
        negotiate: bool = True,
        oob: bool = False,
        timeout: float = 30,
    ) -> None:
        self.address = address
        self.timeout = timeout
        self.events: deque[dict[str, Any]] = deque()
        self._ids = itertools.count(1)
        self._received = b""
        if isinstance(address, tuple):
            self._socket = socket.create_connection(address, timeout=timeout)
        else:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(timeout)
        try:
            if not isinstance(address, tuple):
                self._socket.connect(str(address))
            self.greeting: dict[str, Any] = self._greeting()
            if negotiate:
                self.execute("qmp_capabilities", **({"enable": ["oob"]} if oob else {}))
        except BaseException:
            self._socket.close()
            raise

    def _greeting(self) -> dict[str, Any]:
        """What a server says first. QEMU may tell an event before it, of a moment when its monitor's thread has accepted a
        client and not yet greeted it (RESUME, where it has just started); ours must not."""
        while "QMP" not in (first := self.receive()):
            self.events.append(first)
        greeting: dict[str, Any] = first["QMP"]
        assert not self.events or "livedisk" not in greeting["version"]["package"], (
            f"before the greeting: {self.events}"
        )
        return greeting

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """Run a command and return what it returns. In names ``_`` stands for ``-`` (``node_name=...``); for the few
        names that really have an underscore use `call`. Raises `QmpError`."""
        return self.call(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    def call(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command with its arguments as they stand. Raises `QmpError`."""
        number = next(self._ids)
        message: dict[str, Any] = {"execute": command, "id": number}
        if arguments:
            message["arguments"] = arguments
        self.send(message)
        return self._answer(command, number)

    def _answer(self, command: str, number: int) -> Any:
        while True:
            reply = self.receive()
            if "event" in reply:
                self.events.append(reply)
                continue
            if reply.get("id") != number:
                raise AssertionError(f"reply to somebody else while {command} ran: {reply}")
            if "error" in reply:
                raise QmpError(command, reply["error"])
            return reply["return"]

    def call_with(self, fds: Sequence[int], command: str, /, **arguments: Any) -> Any:
        """`execute`, with descriptors sent along (SCM_RIGHTS). They stay the caller's."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        number = next(self._ids)
        message = json.dumps({"execute": command, "id": number, "arguments": named}).encode() + b"\n"
        socket.send_fds(self._socket, [message], list(fds))
        return self._answer(command, number)

    def human(self, line: str) -> str:
        """Run a line of the human monitor."""
        text: str = self.call("human-monitor-command", {"command-line": line})
        return text

    def send(self, message: Any) -> None:
        """Send one JSON value as it stands."""
        self.send_raw(json.dumps(message).encode() + b"\n")

    def send_raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self) -> dict[str, Any]:
        """The next JSON value of the server, be it a reply or an event that came in its place."""
        message: dict[str, Any] = json.loads(self.receive_line())
        return message

    def receive_line(self) -> bytes:
        """The next line of the server, without its end. Raises `EOFError` when the server closed the connection."""
        while b"\n" not in self._received:
            part = self._socket.recv(65536)
            if not part:
                raise EOFError("the monitor closed the connection")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return line.rstrip(b"\r")

    def wait_event(
        self,
        name: str,
        matches: Callable[[dict[str, Any]], bool] = lambda data: True,
        *,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """The ``data`` of the next event of that name for which ``matches(data)`` holds. Other events before it stay
        in `events`."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        looked_at: deque[dict[str, Any]] = deque()
        try:
            while True:
                event = self.events.popleft() if self.events else self.next_event(name, deadline)
                if event["event"] == name and matches(event.get("data", {})):
                    data: dict[str, Any] = event.get("data", {})
                    return data
                looked_at.append(event)
        finally:
            self.events.extendleft(reversed(looked_at))

    def next_event(self, awaited: str, deadline: float) -> dict[str, Any]:
        """The next event that the server sends, none of those in `events`. ``deadline``: of `time.monotonic`. Raises
        TimeoutError, which says what was ``awaited``."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no event {awaited}")
        self._socket.settimeout(left)
        try:
            message = self.receive()
        except TimeoutError:
            raise TimeoutError(f"no event {awaited}") from None
        finally:
            self._socket.settimeout(self.timeout)
        if "event" not in message:
            raise AssertionError(f"a reply to nothing while waiting for {awaited}: {message}")
        return message

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
