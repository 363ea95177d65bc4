"""The same session on QEMU and on livedisk, and where the two differ.

A session is a list of steps: ``(command, arguments)`` for QMP (`step` writes one), a `Human` line for the human monitor, `Job`
to wait until a job has come to a status, `Host` to run something between two commands, `Passing` a command with descriptors.
Everything runs in a folder of its own,
by relative names, so that both answer with the same. What cannot be equal is evened out by `comparable`; a session adds its own.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from kit.livedisk import executable
from kit.peers import peer
from kit.process import Process
from kit.qmp import Qmp, QmpError

MACHINE = ("-M", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-S")
"""A whole machine, held from the start: its firmware would otherwise talk to the disk."""
NO_MACHINE = ("-M", "none", "-accel", "tcg", "-nodefaults", "-display", "none")


@dataclass(frozen=True)
class Human:
    """A line of the human monitor, by human-monitor-command."""

    line: str


@dataclass(frozen=True)
class Job:
    """Wait until JOB_STATUS_CHANGE says so of a job."""

    id: str
    status: str = "concluded"


@dataclass(frozen=True)
class Host:
    """Do something with the folder between two commands; what it returns is compared too."""

    act: Callable[[Path], Any]


@dataclass(frozen=True)
class Passing:
    """A command with descriptors: ``opened`` gives them, from the folder; they are closed after it."""

    opened: Callable[[Path], Sequence[int]]
    command: str
    arguments: dict[str, Any]


Step: TypeAlias = tuple[str, dict[str, Any]] | Human | Job | Host | Passing
EvenOut: TypeAlias = Callable[[str], str]


def step(command: str, /, **arguments: Any) -> Step:
    """One QMP command; ``_`` in names stands for ``-``."""
    return command, {name.replace("_", "-"): value for name, value in arguments.items()}


@contextmanager
def session(command: Sequence[str], folder: Path, options: Sequence[str] = MACHINE) -> Iterator[Qmp]:
    """A peer started in ``folder``, with a QMP connection."""
    arguments = [*command, *options, "-qmp", "unix:./qmp,server=on,wait=off"]
    with Process(arguments, log=folder / "log", cwd=folder) as process:
        process.wait_for_socket(folder / "qmp")
        with Qmp(folder / "qmp") as qmp:
            yield qmp


def comparable(value: Any, folder: Path, even_out: EvenOut = lambda text: text) -> Any:
    """A JSON value without what no two peers have in common."""
    text = json.dumps(value, sort_keys=True).replace(str(folder), "")
    text = re.sub(r"#block\d+", "#block", text)
    text = re.sub(r'"(actual-size|date-sec|date-nsec|thread-id)": \d+', r'"\1": 0', text)
    return json.loads(even_out(text))


class Played:
    """What one peer answered to a session: ``answers`` in order, ``events`` as (name, data)."""

    def __init__(self, qmp: Qmp, folder: Path, steps: Sequence[Step], even_out: EvenOut) -> None:
        self._qmp, self._folder, self._even_out = qmp, folder, even_out
        self.events: list[tuple[str, Any]] = []
        self.answers = [self._play(one) for one in steps]
        qmp.call("query-version")
        self._collect()

    def _play(self, one: Step) -> Any:
        if isinstance(one, Human):
            return comparable(self._qmp.human(one.line), self._folder, self._even_out)
        if isinstance(one, Host):
            return comparable(one.act(self._folder), self._folder, self._even_out)
        if isinstance(one, Job):
            self._wait(one)
            return None
        try:
            answer = self._pass(one) if isinstance(one, Passing) else self._qmp.call(*one)
        except QmpError as error:
            answer = {"error": {"class": error.kind, "desc": error.desc}}
        self._collect()
        return comparable(answer, self._folder, self._even_out)

    def _pass(self, one: Passing) -> Any:
        fds = one.opened(self._folder)
        try:
            return self._qmp.call_with(fds, one.command, **one.arguments)
        finally:
            for fd in fds:
                os.close(fd)

    def _wait(self, job: Job) -> None:
        deadline = time.monotonic() + 20
        while not self._has_come_to(job):
            assert time.monotonic() < deadline, f"{job}: {self.events}"
            self._qmp.call("query-version")
            self._collect()

    def _has_come_to(self, job: Job) -> bool:
        told = [data for name, data in self.events if name == "JOB_STATUS_CHANGE" and data["id"] == job.id]
        return bool(told) and told[-1]["status"] == job.status

    def _collect(self) -> None:
        while self._qmp.events:
            event = self._qmp.events.popleft()
            self.events.append((event["event"], comparable(event.get("data", {}), self._folder, self._even_out)))


def compare(
    folder: Path,
    steps: Sequence[Step],
    *,
    prepare: Callable[[Path], None] = lambda folder: None,
    options: Sequence[str] = MACHINE,
    even_out: EvenOut = lambda text: text,
    events: bool = True,
) -> None:
    """Play a session on both, each in a folder below ``folder`` that ``prepare`` fills; fail with every difference."""
    played = []
    for name, command in (("theirs", [peer("qemu-system-x86_64")]), ("ours", [executable(), "daemon"])):
        own = folder / name
        own.mkdir()
        prepare(own)
        with session(command, own, options) as qmp:
            played.append(Played(qmp, own, steps, even_out))
    theirs, ours = played
    different = []
    for one, expected, got in zip(steps, theirs.answers, ours.answers, strict=True):
        found = list(differences("", expected, got))
        if found:
            different.append("\n  ".join([str(one), *found]))
    if events:
        different += differences("events", theirs.events, ours.events)
    assert not different, "\n".join(different)


def differences(path: str, theirs: Any, ours: Any) -> Iterator[str]:
    """Where two JSON values differ, as deep down as they are alike."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            yield from differences(f"{path}.{key}", theirs.get(key, "(absent)"), ours.get(key, "(absent)"))
    elif isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)) and len(theirs) == len(ours):
        for index, pair in enumerate(zip(theirs, ours, strict=True)):
            yield from differences(f"{path}[{index}]", *pair)
    elif isinstance(theirs, list) and isinstance(ours, list) and all(isinstance(one, str) for one in [*theirs, *ours]):
        yield "\n".join([path, *difflib.unified_diff(theirs, ours, "theirs", "ours", lineterm="", n=1)])
    elif theirs != ours:
        yield f"{path}: theirs {json.dumps(theirs)[:1000]}, ours {json.dumps(ours)[:1000]}"
