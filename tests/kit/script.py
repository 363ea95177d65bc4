"""Scripts that run on QEMU's emulator and on livedisk, line by line, as one would type them.

    $ qemu-img create -q -f qcow2 a.qcow2 39M      the shell, in the script's folder; ``livedisk daemon`` starts the peer
    (QEMU) block-stream device=d job-id=job0       a command of QMP's, in qmp-shell's syntax
    (event) BLOCK_JOB_COMPLETED device=job0        wait for an event with these members
    (look)                                         ask for the jobs, the devices and the nodes

What stands below a command is what livedisk must answer. After a command of QMP's that no running job may race with, the
queries are asked as with ``(look)``. An ``nbd+unix`` URI is livedisk's export of the device, by which its guest writes; QEMU's
device is told to write by the human monitor.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kit import qemu
from kit.livedisk import executable
from kit.machine import Event, Machine, comparable, told
from kit.side_by_side import differences
from livedisk.emulator.qmp.shell_syntax import command_request, parse_arguments, split_words

STARTS_A_JOB: Final = re.compile(
    r"block-(stream|commit)|(drive|blockdev)-(mirror|backup)|(block-)?job-|transaction|blockdev-create|human"
)
PROMPT: Final = re.compile(r"\$ |\((QEMU|event|look)\)")


@dataclass
class Script:
    """A script that runs on one peer in ``folder``. ``steps``: each command with what it came to, for the comparison."""

    folder: Path
    ours: bool
    steps: list[tuple[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    machine: Machine | None = None
    calm: bool = True

    def run(self, lines: Sequence[str]) -> None:
        """Run a script's lines. Raises AssertionError where livedisk does not answer what the page says."""
        index = 0
        while index < len(lines):
            prompt, _, line = lines[index].partition(" ")
            index += 1
            printed = []
            while index < len(lines) and not PROMPT.match(lines[index]):
                printed.append(lines[index])
                index += 1
            match prompt:
                case "$":
                    self._shell(line, printed)
                case "(QEMU)":
                    self._command(line, printed)
                case "(event)":
                    name, *members = split_words(line)
                    assert self.machine is not None
                    self.machine.wait_event(name, **parse_arguments(members))
                    self.calm = True
                case "(look)":
                    self.look(f"look {line}")
                case _:
                    raise AssertionError(f"no prompt: {prompt} {line}")

    def _shell(self, line: str, printed: list[str]) -> None:
        if line.startswith("livedisk daemon "):
            # Held, as the page itself says: QEMU's firmware would turn the write cache off, at a moment of its own.
            held = [] if self.ours else ["-S"]
            self.machine = Machine(self.folder, [*line.split()[2:], *held], ours=self.ours)
            return
        if "nbd+unix" in line and not self.ours:
            self._guest(shlex.split(line))
            return
        path = f"{Path(executable()).parent}:/usr/bin:/bin:/usr/sbin"
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env={"PATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        output = done.stdout + done.stderr
        if printed:
            assert output.splitlines() == printed, line
            self.steps.append((line, output))
        else:
            assert done.returncode == 0, f"{line}: {output}"

    def _guest(self, words: list[str]) -> None:
        """QEMU's device does what ``qemu-io`` is told to do by way of our export."""
        assert self.machine is not None
        for option, command in itertools.pairwise(words):
            if option == "-c":
                told = self.machine.qmp.human(f'qemu-io -d /machine/peripheral/virtio0/virtio-backend "{command}"')
                assert "rror" not in told, told

    def _command(self, line: str, printed: list[str]) -> None:
        assert self.machine is not None
        if line.startswith("nbd-server") and not self.ours:
            return
        name, *words = split_words(line)
        message = command_request(name, parse_arguments(words)).message
        answer = self.machine.ask(name, message.get("arguments", {}))
        if printed and self.ours:
            assert json.loads(" ".join(printed)) == {"return": answer}, line
        if name.startswith("nbd-server"):
            assert answer == {}, answer
            return
        self.steps.append((line, comparable(answer, self.folder)))
        if name == "quit":
            self.machine.wait()
            self.events = told(self.machine.events)
            return
        self.calm = self.calm and not STARTS_A_JOB.match(name)
        if self.calm:
            self.look(f"after {line}")

    def look(self, name: str) -> None:
        """Note what the queries answer."""
        assert self.machine is not None
        self.steps.append((name, comparable(self.machine.look(), self.folder)))

    def end(self) -> None:
        """Let the peer go, and take the events that it told last."""
        if self.machine is not None and self.machine.running:
            self.machine.ask("quit", {})
            self.machine.wait()
            self.events = told(self.machine.events)

    def close(self) -> None:
        if self.machine is not None:
            self.machine.qmp.close()
            self.machine.__exit__(None, None, None)


def create_chain(folder: Path) -> None:
    """a.qcow2 <- b.qcow2 <- c.qcow2 <- d.qcow2 of 8 MiB, by relative names; each has written 2 MiB, half of it anew."""
    below: str | None = None
    for index, name in enumerate("abcd"):
        path = folder / f"{name}.qcow2"
        backing: list[str] = [] if below is None else ["-u", "-b", below, "-F", "qcow2"]
        qemu.qemu_img("create", "-q", "-f", "qcow2", *backing, path, "8M")
        qemu.qemu_io(path, f"write -P {index + 1} {index}M 2M")
        below = path.name


def play(folder: Path, lines: Sequence[str], *, ours: bool) -> Script:
    """Run a script in ``folder`` to its end."""
    script = Script(folder, ours)
    try:
        script.run(lines)
        script.end()
    finally:
        script.close()
    return script


def compare(theirs: Script, ours: Script) -> list[str]:
    """Where QEMU and livedisk answered differently, or told different events."""
    found = []
    for (line, one), (_, other) in zip(theirs.steps, ours.steps, strict=True):
        found += [f"{line}\n  {text}" for text in differences("", one, other)]
    return [*found, *differences("events", theirs.events, ours.events)]


def compare_chains(theirs: Script, ours: Script) -> list[str]:
    """Where the images that are left have other backing file names. Fails if one of ours is damaged."""
    found: list[str] = []
    for path in sorted(theirs.folder.glob("*.qcow2")):
        chains = [
            [one.get("backing-filename") for one in qemu.info(script.folder / path.name, "--backing-chain")]
            for script in (theirs, ours)
        ]
        found += differences(path.name, *chains)
        qemu.check(ours.folder / path.name)
    return found
