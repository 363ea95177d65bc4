"""qemu-io's commands at a node or a device of a running daemon: what the human monitor's ``qemu-io`` runs.

    qemu-io NODE "write -P 0x11 0 64k"

This module has the table, reads the command line and prints; `qemu_io_requests` has the commands. A command prints what qemu-io
prints, and what it refuses it refuses in qemu-io's words. QEMU sends most of that to its own standard output, and to the monitor
only what the block layer says; clients of human-monitor-command rely on the empty answer. So `Target.print` and `Target.tell`
are kept apart, and `hmp_io` decides who sees what.

A node is used through a block device of the command's own, with the permissions that the command needs and no more; a device
through its own. A request that a breakpoint holds stays under way after its command; ``aio_flush`` waits for it.

Source: QEMU ``qemu-io-cmds.c``; every line of output was asked from QEMU 10.0.2.
"""

from __future__ import annotations

import asyncio
import enum
import getopt
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.device.accounting import Accounting
from livedisk.emulator.qmp.visit import parse_size

log = logging.getLogger(__name__)

MAX_REQUEST: Final = 2147483136
"""Bytes in one request at most (QEMU's BDRV_REQUEST_MAX_BYTES)."""
_POLL: Final = 0.005
"""Seconds between two looks at whether a breakpoint holds a request: nothing tells when one does."""


class Refused(Exception):
    """A command was not carried out; the text, without its line end, is what is printed."""


class Usage(Exception):
    """The options cannot be understood: the command's usage line is printed."""


class Channel(enum.Enum):
    """Where QEMU sends a line."""

    OUTPUT = "standard output"
    MONITOR = "monitor"


@dataclass(eq=False)
class Target:
    """What the commands work on. ``accounting``: of the device, which counts what ``aio_*`` do; None for a node."""

    backend: BlockBackend
    accounting: Accounting | None = None
    granted: Perm = Perm.NONE
    """What it may do without asking for permissions: what the device may."""
    output: list[tuple[Channel, str]] = field(default_factory=list)
    """Lines so far, and where QEMU sends each."""
    pending: set[asyncio.Task[None]] = field(default_factory=set)
    """Requests that outlive the command that made them."""
    tags: set[str] = field(default_factory=set)
    """Under which breakpoints may hold requests."""

    @property
    def node(self) -> Node:
        return self.backend.node

    def print(self, text: str) -> None:
        """A line of output."""
        self.output.append((Channel.OUTPUT, f"{text}\n"))

    def tell(self, text: str) -> None:
        """A line for the monitor."""
        self.output.append((Channel.MONITOR, f"{text}\n"))

    async def start(self, work: Awaitable[None], *, held: Callable[[], bool]) -> None:
        """Let a request run; return when it is done, or when a breakpoint holds it."""

        async def run() -> None:
            await work

        task = asyncio.ensure_future(run())
        self.pending.add(task)
        task.add_done_callback(self.pending.discard)
        while not task.done() and not held():
            await asyncio.wait([task], timeout=_POLL if self.tags else None)
        if task.done():
            await task


Run = Callable[[Target, list[str]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Command:
    """``least``, ``most``: arguments, options among them (most -1: any number). ``needs``: permissions on the node."""

    name: str
    run: Run
    args: str | None
    oneline: str
    least: int
    most: int
    needs: Perm

    @property
    def usage(self) -> str:
        return f"{self.name}{'' if self.args is None else f' {self.args}'} -- {self.oneline}"


COMMANDS: Final[dict[str, Command]] = {}


def io_command(
    name: str,
    oneline: str,
    *,
    args: str | None = None,
    least: int = 0,
    most: int = 0,
    needs: Perm = Perm.NONE,
    text: str = "",
) -> Callable[[Run], Run]:
    """Decorator that registers a command."""

    def register(run: Run) -> Run:
        COMMANDS[name] = Command(name, run, args, oneline, least, most, needs)
        return run

    return register


def _load() -> None:
    from livedisk.emulator.qmp import qemu_io_requests

    assert qemu_io_requests


async def execute(target: Target, line: str) -> None:
    """Run one command line; what it prints is added to ``target.output``. Raises LiveDiskError or OSError where the permissions
    that it needs cannot be had."""
    _load()
    words = [word for word in line.split(" ") if word]
    if not words:
        return
    command = COMMANDS.get(words[0])
    if command is None:
        target.print(f'command "{words[0]}" not found')
        return
    arguments = words[1:]
    if len(arguments) < command.least or (command.most >= 0 and len(arguments) > command.most):
        target.print(f"bad argument count {len(arguments)} to {command.name}, {_expected(command)}")
        return
    try:
        await _with_permissions(target, command, arguments)
    except Refused as refusal:
        target.print(str(refusal))
    except Usage:
        target.print(command.usage)


def _expected(command: Command) -> str:
    if command.most < 0:
        return f"expected at least {command.least} arguments"
    if command.most == command.least:
        return f"expected {command.least} arguments"
    return f"expected between {command.least} and {command.most} arguments"


async def _with_permissions(target: Target, command: Command, arguments: list[str]) -> None:
    edge, graph = target.backend.root, target.node.graph
    assert edge is not None
    before = edge.perm, edge.shared
    missing = command.needs & ~(before[0] | target.granted)
    if missing:
        graph.set_root_permissions(target.backend, before[0] | missing, before[1])
    try:
        await command.run(target, arguments)
    finally:
        if missing and target.backend.root is not None and not target.pending:
            graph.set_root_permissions(target.backend, *before)


# -- reading -----------------------------------------------------------------------------------------------------------
def options(arguments: list[str], short: str) -> tuple[dict[str, str], list[str]]:
    """Options by letter and the rest, as getopt(3) gives them. Raises Usage."""
    try:
        found, rest = getopt.gnu_getopt(arguments, short)
    except getopt.GetoptError as error:
        raise Usage from error
    return {name[1:]: value for name, value in found}, rest


def number(text: str) -> int:
    """Bytes, with an optional suffix. Raises Refused in qemu-io's words."""
    value = parse_size(text)
    if value is not None and value < 1 << 63:
        return value
    if value is not None or re.fullmatch(r"(0[xX][0-9a-fA-F]+|\d+)(\.\d*)?[bBkKmMgGtTpPeE]?", text):
        raise Refused(f"Parsing error: argument too large -- {text}")
    raise Refused(f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}")


def pattern(text: str) -> int:
    """A byte. Raises Refused."""
    try:
        value = int(text, 0) if not re.fullmatch(r"0[0-7]+", text) else int(text, 8)
    except ValueError:
        value = -1
    if not 0 <= value <= 255:
        raise Refused(f"{text} is not a valid pattern byte")
    return value


# -- printing ----------------------------------------------------------------------------------------------------------
_UNITS: Final = (
    (1 << 60, " EiB"),
    (1 << 50, " PiB"),
    (1 << 40, " TiB"),
    (1 << 30, " GiB"),
    (1 << 20, " MiB"),
    (1 << 10, " KiB"),
)


def amount(value: float) -> str:
    """Bytes in the largest unit that leaves one before the point, with three digits behind it unless they are zeroes."""
    unit, suffix = next((one for one in _UNITS if value >= one[0]), (1, " bytes"))
    text = f"{value / unit:.3f}" if unit > 1 else f"{value:f}"
    return text.partition(".000")[0] + suffix if ".000" in text else text + suffix


def _duration(seconds: float, *, fixed: bool) -> str:
    whole = int(seconds)
    hundredths = int((seconds - whole) * 100)
    if fixed or whole >= 60:
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}.{hundredths:02d}"
    return f"{whole:02d}.{hundredths:02d} sec"


def report(target: Target, what: str, started: float, offset: int, count: int, total: int, *, machine: bool) -> None:
    """The two lines (or, for machines, the one) that tell what a request did; ``started``: `time.perf_counter`."""
    seconds = max(time.perf_counter() - started, 1e-9)
    if machine:
        spent = _duration(seconds, fixed=True)
        target.print(f"{total},1,{spent},{total / seconds:.3f},{1 / seconds:.3f}")
        return
    target.print(f"{what} {total}/{count} bytes at offset {offset}")
    rate = f"{amount(total / seconds)}/sec and {1 / seconds:.4f} ops/sec"
    target.print(f"{amount(total)}, 1 ops; {_duration(seconds, fixed=False)} ({rate})")


def dump(target: Target, data: bytes | bytearray, offset: int) -> None:
    """Bytes in hexadecimal and as characters, sixteen a line."""
    for start in range(0, len(data), 16):
        part = data[start : start + 16]
        shown = "".join(chr(byte) if byte < 128 and chr(byte).isalnum() else "." for byte in part)
        target.print(f"{offset + start:08x}:  {''.join(f'{byte:02x} ' for byte in part)} {shown}")
