"""The interactive shell of ``livedisk qmp``: a prompt with history and completion, or lines from a file or pipe."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from livedisk.emulator.qmp.client import ConnectionLost
from livedisk.emulator.qmp.introspect import Introspection
from livedisk.emulator.qmp.shell_syntax import LineReader, ShellSyntaxError, parse_arguments, split_words

if TYPE_CHECKING:
    from livedisk.emulator.cli.qmp import Session


async def run(session: Session, address: str) -> int:
    """Serve the user until the input ends. Returns the exit status."""
    if not sys.stdin.isatty():
        return await _run_lines(session)
    return await _run_terminal(session, address)


async def _run_lines(session: Session) -> int:
    """Lines of standard input, one after the other; the first that fails ends the run."""
    reader = LineReader()
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            request = reader.take(line)
        except ShellSyntaxError as error:
            click.echo(f"livedisk: {line.strip()}: {error}", err=True)
            return 2
        if request is not None and await session.run(request):
            return 1
    if reader.actions is not None:
        click.echo("livedisk: the input ends inside a transaction", err=True)
        return 2
    return 0


async def _run_terminal(session: Session, address: str) -> int:
    # Imported here: these take as long to load as all the rest.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.patch_stdout import patch_stdout

    version = session.client.greeting["version"]["qemu"]
    package = session.client.greeting["version"].get("package", "")
    triple = f"{version['major']}.{version['minor']}.{version['micro']}"
    click.echo(f"Connected to {package or 'QEMU'}, QMP {triple}, at {address}")
    click.echo("TAB completes, Ctrl-D ends.")
    prompt: PromptSession[str] = PromptSession(
        history=FileHistory(str(_history())), completer=_completer(await session.schema())
    )
    reader = LineReader()
    with patch_stdout():
        events = asyncio.get_running_loop().create_task(_print_events(session))
        try:
            while not events.done():
                line = await _next_line(prompt, "TRANS> " if reader.actions is not None else "(QEMU) ", events)
                if line is None:
                    break
                await _take(session, reader, line)
        except ConnectionLost as error:
            click.echo(f"livedisk: {error}", err=True)
            return 1
        finally:
            events.cancel()
            await asyncio.gather(events, return_exceptions=True)
    return 0


async def _next_line(prompt: PromptSession[str], text: str, events: asyncio.Task[None]) -> str | None:
    """The next line; None at the end of the input, or when the monitor goes away."""
    typing = asyncio.ensure_future(prompt.prompt_async(text))
    await asyncio.wait({typing, events}, return_when=asyncio.FIRST_COMPLETED)
    if not typing.done():
        typing.cancel()
        await asyncio.gather(typing, return_exceptions=True)
        click.echo("The monitor closed the connection.")
        return None
    try:
        return typing.result()
    except EOFError:
        return None
    except KeyboardInterrupt:
        return ""


async def _take(session: Session, reader: LineReader, line: str) -> None:
    try:
        request = reader.take(line)
    except ShellSyntaxError as error:
        click.echo(f"{error}", err=True)
        return
    if request is not None:
        await session.run(request)


async def _print_events(session: Session) -> None:
    async for event in session.client.events():
        click.echo(json.dumps(event, indent=session.indent))


def _history() -> Path:
    """``$XDG_STATE_HOME/livedisk/qmp_history``."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    folder = Path(state) / "livedisk"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "qmp_history"


def completions(schema: Introspection, before: str) -> tuple[str, list[str]]:
    """What is being typed at the end of ``before``, and what it may become: commands, then ``key=``, then values."""
    try:
        words = split_words(before)
    except ShellSyntaxError:
        return "", []
    if not before or before[-1].isspace():
        words.append("")
    stem = words[-1]
    if len(words) == 1:
        return stem, [name for name in schema.commands if name.startswith(stem)]
    command, typed = words[0], words[1:-1]
    try:
        given = parse_arguments(typed)
    except ShellSyntaxError:
        given = {}
    key, equals, value = stem.partition("=")
    if equals:
        return value, [item for item in schema.values(command, key, given) if item.startswith(value)]
    taken = {word.partition("=")[0] for word in typed}
    names = [name for name in schema.arguments(command, given) if name not in taken]
    return stem, [f"{name}=" for name in names if name.startswith(stem)]


def _completer(schema: Introspection) -> Completer:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document

    class SchemaCompleter(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            stem, candidates = completions(schema, document.text_before_cursor)
            for candidate in candidates:
                yield Completion(candidate, start_position=-len(stem))

    return SchemaCompleter()


if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer
