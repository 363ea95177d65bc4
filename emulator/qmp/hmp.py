"""The human monitor: a prompt, lines, commands that answer with text. Also what ``human-monitor-command`` runs.

    @hmp_command("stop|s", help="stop emulation")
    async def stop(ctx: Context, args: dict[str, Any]) -> str: ...

A row says what a command takes in QEMU's notation (``-v`` for a flag; ``device:B?``), and its parser, its help and
its messages come from that. Kinds: ``s``, ``B``, ``F`` a word; ``S`` the rest of the line; ``i``, ``l`` an integer;
``o`` a size; ``b`` on or off. ``?`` makes it optional. Commands show what QMP commands answer: they run them through
the registry, never around it. ``info X`` is a command named ``info X``.

Lines end in CR LF towards character devices (the monitors' way) and in ``human-monitor-command``'s result. Source:
QEMU ``monitor/hmp.c``, ``hmp-commands.hx``; words and layout asked from QEMU 10.0.2.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from livedisk.emulator.block import descriptors
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.context import Context, Daemon
from livedisk.emulator.qmp.monitor import Dispatcher, Port
from livedisk.emulator.qmp.readline import LineEditor
from livedisk.emulator.qmp.version import QEMU_VERSION
from livedisk.emulator.qmp.visit import parse_integer, parse_size

PROMPT: Final = "(qemu) "

Handler = Callable[[Context, dict[str, Any]], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class HmpCommand:
    """A row of the table: ``names`` are spellings; ``args`` what it takes in QEMU's notation; ``params`` the same for
    people."""

    names: tuple[str, ...]
    handler: Handler
    args: str
    params: str
    help: str
    is_last: bool = False
    """Nothing is prompted for after it."""

    @property
    def group(self) -> str:
        """ "info" for ``info X``, else ""."""
        return "info" if self.names[0].startswith("info ") else ""

    @property
    def name(self) -> str:
        """As messages name it: all spellings, without the group."""
        return "|".join(self.names).removeprefix("info ")

    @property
    def usage(self) -> str:
        """The line that ``help`` prints."""
        return f"{self.group} {self.name} {self.params} -- {self.help}\n".lstrip()


COMMANDS: dict[str, HmpCommand] = {}
"""Every spelling of every command."""


def hmp_command(
    names: str, *, help: str, args: str = "", params: str = "", is_last: bool = False
) -> Callable[[Handler], Handler]:
    """Decorator that registers a command of the human monitor. ``names``: spellings, separated by ``|``."""

    def register(handler: Handler) -> Handler:
        row = HmpCommand(tuple(names.split("|")), handler, args, params, help, is_last)
        for name in row.names:
            if name in COMMANDS:
                raise ValueError(f"human monitor command {name!r} is registered twice")
            COMMANDS[name] = row
        return handler

    return register


# -- lines
# -------------------------------------------------------------------------------------------------------------


class HmpError(Exception):
    """A line that cannot be understood; the text is what is printed."""


async def run_line(ctx: Context, line: str) -> str:
    """What a line of the human monitor prints, with CR LF ends. Errors of commands are text too: ``Error: ...``."""
    _load_commands()
    try:
        command, rest = _find(line)
        if command is None:
            return ""
        output = await command.handler(ctx, _arguments(command, rest))
    except HmpError as error:
        output = str(error)
    except LiveDiskError as error:
        output = f"Error: {error}\n" + (f"{error.hint}\n" if error.hint else "")
    except OSError as error:
        output = f"Error: {error.strerror or error}\n"
    return output.replace("\n", "\r\n")


_commands_loaded = False


def _load_commands() -> None:
    """The built-in commands register while their module is imported, which needs this one first."""
    global _commands_loaded
    if not _commands_loaded:
        from livedisk.emulator.qmp import hmp_commands, hmp_drives, hmp_io, hmp_migration, hmp_objects

        assert hmp_commands
        assert hmp_drives
        assert hmp_io
        assert hmp_migration
        assert hmp_objects
        _commands_loaded = True


def _is_last(line: str) -> bool:
    command = _find(line)[0]
    return command is not None and command.is_last


_WORD: Final = re.compile(r"\s*(?:\"((?:[^\"\\]|\\.)*)\"|(\S+))")


def _find(line: str) -> tuple[HmpCommand | None, str]:
    """The command and the rest of the line. None for an empty line."""
    text = line.strip()
    if not text:
        return None, ""
    name, _, rest = text.partition(" ")
    if name == "info":
        topic, _, after = rest.strip().partition(" ")
        if not topic:
            return COMMANDS["help"], "info"
        name, rest = f"info {topic}", after
    if name not in COMMANDS:
        raise HmpError(f"unknown command: '{name}'\n")
    return COMMANDS[name], rest.strip()


def _arguments(command: HmpCommand, text: str) -> dict[str, Any]:
    """The rest of a line, as the command's notation asks. Raises HmpError in QEMU's words."""
    values: dict[str, Any] = {}
    specs = [tuple(spec.split(":", 1)) for spec in command.args.split(",") if spec]
    flags = {kind[1:]: name for name, kind in specs if kind.startswith("-")}
    text = _flags(command, text, flags, values)
    for name, kind in specs:
        if kind.startswith("-"):
            continue
        if not text:
            if kind.endswith("?"):
                continue
            wanted = _NOTHING_THERE.get(kind[0]) or f"{command.name}: {_WANTED[kind[0]]} expected"
            raise HmpError(f"{wanted}\n{_hint(command)}")
        if kind[0] == "S":
            values[name], text = text, ""
            continue
        word, text = _word(command, text, _WANTED[kind[0]])
        values[name] = _READERS[kind[0]](command, word)
    if text:
        raise HmpError(f"{command.name}: extraneous characters at the end of line\n{_hint(command)}")
    return values


def _flags(command: HmpCommand, text: str, flags: dict[str, str], values: dict[str, Any]) -> str:
    """Take flags off the front of the line."""
    while flags and (match := re.match(r"-(\S)\s*", text)):
        if match[1] not in flags:
            raise HmpError(f"{command.name}: unsupported option -{match[1]}\n{_hint(command)}")
        values[flags[match[1]]] = True
        text = text[match.end() :]
    return text


def _hint(command: HmpCommand) -> str:
    topic = f"{command.group} {command.names[0].removeprefix('info ')}".strip()
    return f'Try "help {topic}" for more information\n'


def _word(command: HmpCommand, text: str, wanted: str) -> tuple[str, str]:
    match = _WORD.match(text)
    if match is None or (match[1] is None and match[2].startswith('"')):
        raise HmpError(f"{command.name}: {wanted} expected\n{_hint(command)}")
    word = re.sub(r"\\(.)", lambda escape: {"n": "\n", "r": "\r"}.get(escape[1], escape[1]), match[1] or "")
    return match[2] or word, text[match.end() :].strip()


def _text(command: HmpCommand, word: str) -> str:
    return word


def _whole(command: HmpCommand, word: str) -> int:
    value = parse_integer(word)
    if value is None:
        raise HmpError(f"invalid char '{word.lstrip('+-')[:1]}' in expression\n{_hint(command)}")
    return value


def _bytes(command: HmpCommand, word: str) -> int:
    # A bare number counts megabytes, as in QEMU.
    value = parse_size(word if word[-1:].isalpha() else f"{word}M")
    if value is None:
        raise HmpError(f"invalid size\n{_hint(command)}")
    return value


def _on_or_off(command: HmpCommand, word: str) -> bool:
    if word not in ("on", "off"):
        raise HmpError(f"Expected 'on' or 'off'\n{_hint(command)}")
    return word == "on"


_READERS: Final[dict[str, Callable[[HmpCommand, str], Any]]] = {
    "s": _text,
    "B": _text,
    "F": _text,
    "i": _whole,
    "l": _whole,
    "o": _bytes,
    "b": _on_or_off,
}
_WANTED: Final = {
    "s": "string",
    "S": "string",
    "B": "block device name",
    "F": "filename",
    "i": "integer",
    "l": "integer",
    "o": "size",
    "b": "boolean",
}

_NOTHING_THERE: Final = {
    "i": "unexpected end of expression",
    "l": "unexpected end of expression",
    "o": "invalid size",
}
"""What a missing argument is told with, where that is not what was wanted."""


# -- the monitor
# -------------------------------------------------------------------------------------------------------


class HumanMonitor:
    """One human monitor (``-mon mode=readline``), with a line editor as QEMU's."""

    def __init__(self, daemon: Daemon, dispatcher: Dispatcher) -> None:
        self._context = Context(daemon)
        self._dispatcher = dispatcher
        self._port: Port | None = None
        self._names = descriptors.Names(lambda: self._port.take_descriptor() if self._port is not None else None)
        self._editor = LineEditor(PROMPT, self._echo, complete)
        self._keys = b""
        self._task: asyncio.Task[None] | None = None

    def opened(self, port: Port) -> None:
        self._port = port
        self._keys = b""
        version = ".".join(map(str, QEMU_VERSION))
        self._echo(f"QEMU {version} monitor - type 'help' for more information\n")
        self._editor.show_prompt()

    def received(self, data: bytes) -> None:
        """Keys are taken in while no command runs; a command's output comes before the echo of what follows it."""
        self._keys += data
        if self._port is not None:
            # Also keeps the end of the input from being noticed before its last line has run.
            self._port.set_reading(False)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work(), name="human-monitor")

    def closed(self) -> None:
        self._port = None

    async def close(self) -> None:
        """Stop the command in progress."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        try:
            while self._keys and self._port is not None:
                keys, self._keys = self._keys, b""
                for line in self._editor.feed(keys):
                    if not await self._execute(line):
                        return
        finally:
            self._task = None
        if self._port is not None:
            self._port.set_reading(True)

    async def _execute(self, line: str) -> bool:
        """Run a line. Returns whether more may follow."""
        # The editor counts bytes; what was typed is UTF-8.
        text = line.encode("latin-1").decode("utf-8", "surrogateescape")
        with descriptors.of_monitor(self._names):
            output = await self._dispatcher.exclusively(run_line(self._context, text))
        if self._port is not None:
            self._port.write(output.encode("utf-8", "surrogateescape"))
            if not output and _is_last(text):
                return False
            self._editor.show_prompt()
        return True

    def _echo(self, text: str) -> None:
        if self._port is not None:
            self._port.write(text.replace("\n", "\r\n").encode("latin-1", "replace"))


def complete(before: str) -> Sequence[str]:
    """Names of commands that go on with the last word before the cursor."""
    _load_commands()
    words = before.lstrip().split(" ")
    if words[0] == "help":
        words = words[1:] or [""]
    if len(words) == 1:
        names = {name.partition(" ")[0] for name in COMMANDS}
    elif len(words) == 2 and words[0] == "info":
        names = {name.partition(" ")[2] for name in COMMANDS if name.startswith("info ")}
    else:
        return []
    return sorted(name for name in names if name.startswith(words[-1]))
