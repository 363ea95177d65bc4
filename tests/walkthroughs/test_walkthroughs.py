"""The walkthroughs of docs/walkthroughs.md, run on QEMU and on livedisk: the same replies, events, graphs and images.

A section of that page is a script. Commands of the shell are run in a folder of the peer's own, ``livedisk daemon`` is
``qemu-system-x86_64`` for QEMU, and what the page prints below a command must be what livedisk answers. The guest writes by
way of livedisk's export of the device; QEMU, which exports nodes only, is told to write by its human monitor. After each command
that no running job may race with, the jobs, the devices and the nodes are asked for, and compared.

Differences that remain, each with its reason, stand in `MEANT`. Not compared besides (`kit.machine`): times, names that were
generated, the space that images take on the host, and pauses that nobody asked for.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from kit import qemu
from kit.livedisk import executable
from kit.machine import Event, Machine, comparable, differences, told
from kit.peers import ROOT
from livedisk.emulator.qmp.shell_syntax import command_request, parse_arguments, split_words

PAGE: Final = ROOT / "docs" / "walkthroughs.md"
STARTS_A_JOB: Final = re.compile(r"block-(stream|commit)|(drive|blockdev)-(mirror|backup)|block-job-(complete|cancel)")

MEANT: Final[dict[str, str]] = {
    r"dirty-bitmaps: theirs .*persistent.*, ours ..absent": "a mirror's dirty map is no bitmap of the filter here",
}
"""Differences that are meant: a pattern of the text that `differences` gives, and the reason."""
UNEQUAL: Final = {"A mirror cancelled before it is ready": "e.qcow2"}
"""Images whose content depends on who is faster."""


def scripts() -> dict[str, list[str]]:
    """The page's sections by title: the lines of their code."""
    found: dict[str, list[str]] = {}
    title = ""
    inside = False
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        elif line == "```":
            inside = not inside
        elif inside:
            found.setdefault(title, []).append(line)
    return found


SCRIPTS: Final = scripts()
CHAIN: Final = "The chain"


@dataclass
class Played:
    """What a script came to on one peer. ``steps``: each command with what it came to, for the comparison."""

    folder: Path
    ours: bool
    steps: list[tuple[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    machine: Machine | None = None
    calm: bool = True

    def run(self, lines: list[str]) -> None:
        """Run a script's lines. Raises AssertionError where livedisk does not answer what the page says."""
        index = 0
        while index < len(lines):
            prompt, _, line = lines[index].partition(" ")
            index += 1
            printed = []
            while index < len(lines) and not re.match(r"\$ |\(QEMU\) |\(event\) ", lines[index]):
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
        assert done.returncode == 0 or line.endswith("backing"), f"{line}: {done.stdout}{done.stderr}"
        if printed:
            assert done.stdout.splitlines() == printed, line
            self.steps.append((line, done.stdout))

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
            self.steps.append((f"after {line}", comparable(self.machine.look(), self.folder)))

    def close(self) -> None:
        if self.machine is not None:
            self.machine.qmp.close()
            self.machine.__exit__(None, None, None)


def images(folder: Path, scratch: Path) -> dict[str, Any]:
    """Every image: sound, its chain, what it reads as."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.qcow2")):
        qemu.check(path)
        chain = qemu.info(path, "--backing-chain")
        found[path.name] = {
            "chain": [[one["filename"].replace(str(folder), ""), one.get("backing-filename-format")] for one in chain],
            "size": chain[0]["virtual-size"],
            "bytes": qemu.read_all(path, scratch),
        }
    return found


@pytest.mark.parametrize("title", [title for title in SCRIPTS if title != CHAIN])
def test_walkthrough_is_as_on_qemu(title: str, short_path: Path, tmp_path: Path) -> None:
    played = []
    for name, ours in (("theirs", False), ("ours", True)):
        folder = short_path / name
        folder.mkdir()
        one = Played(folder, ours)
        try:
            one.run(SCRIPTS[CHAIN])
            one.run(SCRIPTS[title])
        finally:
            one.close()
        played.append(one)
    theirs, ours_ = played
    found = []
    for (line, one), (_, other) in zip(theirs.steps, ours_.steps, strict=True):
        found += [f"{line}\n  {text}" for text in differences("", one, other)]
    found += differences("events", theirs.events, ours_.events)
    for (name, one), (_, other) in zip(
        images(theirs.folder, tmp_path).items(), images(ours_.folder, tmp_path).items(), strict=True
    ):
        if one.pop("bytes") != other.pop("bytes") and UNEQUAL.get(title) != name:
            found.append(f"{name} reads differently")
        found += differences(name, one, other)
    found = [text for text in found if not any(re.search(pattern, text) for pattern in MEANT)]
    assert not found, "\n".join(found)
