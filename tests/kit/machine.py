"""The same command line for QEMU's emulator and for ``livedisk daemon``, and what can be compared of the two.

`Machine` starts one of them in a folder of its own, where all names are relative, so that both answer with the same
names. `Machine.look` asks for everything that shows the graph and the jobs. `comparable` takes out what cannot be equal,
`told` orders the events.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from kit.livedisk import executable
from kit.peers import peer
from kit.process import Process
from kit.qmp import Qmp, QmpError
from kit.side_by_side import comparable as plain

Event = tuple[str, dict[str, Any]]

LOOKS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("query-jobs", {}),
    ("query-block-jobs", {}),
    ("query-block", {}),
    ("query-named-block-nodes", {"flat": True}),
)


class Machine(Process):
    """``ours``: livedisk, else QEMU. ``arguments``: the command line, which makes a QMP socket ``socket`` in ``folder``."""

    def __init__(self, folder: Path, arguments: Sequence[str], *, ours: bool, socket: str = "qmp-sock") -> None:
        self.folder = folder
        self.ours = ours
        program = [executable(), "daemon"] if ours else [peer("qemu-system-x86_64")]
        super().__init__([*program, *arguments], log=folder / f"{socket}.log", cwd=folder)
        self.events: list[Event] = []
        self._waited: dict[tuple[str, str], int] = {}
        try:
            self.wait_for_socket(folder / socket)
            self.qmp = Qmp(folder / socket, timeout=20)
        except BaseException:
            self.kill()
            raise

    def ask(self, command: str, arguments: dict[str, Any]) -> Any:
        """What a command answers: what it returns, or its error as ``{"error": ...}``."""
        try:
            return self.qmp.call(command, arguments)
        except QmpError as error:
            return {"error": {"class": error.kind, "desc": error.desc}}
        finally:
            self._collect()

    def wait(self, *arguments: Any, **how: Any) -> int:
        code = super().wait(*arguments, **how)
        try:
            while True:
                event = self.qmp.receive()
                self.events.append((event["event"], event.get("data", {})))
        except (EOFError, OSError):
            pass
        return code

    def wait_event(self, name: str, **data: Any) -> None:
        """Wait for an event that has these members, other than those waited for with the same words."""
        key = name, json.dumps(data)
        skip = self._waited.get(key, 0)

        def found() -> int:
            return sum(one == name and data.items() <= members.items() for one, members in self.events)

        while found() <= skip:
            self.qmp.events.append(self.qmp.next_event(name, time.monotonic() + self.qmp.timeout))
            self._collect()
        self._waited[key] = found()

    def look(self) -> dict[str, Any]:
        """Jobs, devices and nodes as the queries tell them."""
        return {command: self.ask(command, arguments) for command, arguments in LOOKS}

    def _collect(self) -> None:
        while self.qmp.events:
            event = self.qmp.events.popleft()
            self.events.append((event["event"], event.get("data", {})))


def comparable(value: Any, folder: Path) -> Any:
    """Without what cannot be equal: generated names, times, space on the host, whether a job works at this very moment and
    how far it is while it runs, and the length of files whose last table is written out whole or not."""
    return _without_chance(plain(value, folder, lambda text: re.sub(r'"busy": \w+', '"busy": 0', text)))


def _without_chance(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_chance(one) for one in value]
    if not isinstance(value, dict):
        return value
    # Members of ours, which QEMU has not, begin with x-.
    value = {key: _without_chance(one) for key, one in value.items() if not key.startswith("x-")}
    if value.get("format") == "file":
        value["virtual-size"] = 0
    if value.get("status") in ("running", "paused"):
        for progress in ("offset", "len", "current-progress", "total-progress"):
            value.pop(progress, None)
    return value


def told(events: Sequence[Event], ignored: Sequence[str] = ("BLOCK_EXPORT_DELETED",)) -> list[Event]:
    """The events, in order for each job (how those of several interleave is a matter of speed), without the pauses that nobody
    asked for: how often QEMU drains is its own affair. What a cancelled job had done by then is a matter of speed, too.
    Exports, by which only livedisk's guest comes, are left out."""
    kept: list[Event] = []
    for name, data in events:
        if name in ignored:
            continue
        left_out = ("offset", "len") if name == "BLOCK_JOB_CANCELLED" else ()
        kept.append((name, {key: value for key, value in data.items() if key not in left_out}))
    order: dict[Any, list[Event]] = {}
    for one in kept:
        order.setdefault(one[1].get("device", one[1].get("id")), []).append(one)
    return [one for events in order.values() for one in _without_short_pauses(events)]


def _without_short_pauses(events: list[Event]) -> Iterator[Event]:
    skip = False
    for index, (name, data) in enumerate(events):
        if skip:
            skip = False
            continue
        following = events[index + 1] if index + 1 < len(events) else ("", {})
        back = {"paused": "running", "standby": "ready"}.get(data.get("status", ""))
        if name == "JOB_STATUS_CHANGE" and following == (name, {**data, "status": back}):
            skip = True
            continue
        yield name, data
