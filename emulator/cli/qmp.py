"""``livedisk qmp``: one command to a monitor, its events, or a shell."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import click

from livedisk.emulator.qmp.client import ConnectionLost, QmpClient, QmpError
from livedisk.emulator.qmp.introspect import Introspection
from livedisk.emulator.qmp.shell_syntax import (
    LineReader,
    Request,
    ShellSyntaxError,
    command_request,
    parse_arguments,
)

HELP = """Talk to the QMP monitor at SOCKET: run one COMMAND and print its reply, or open a shell.

SOCKET is the path of a Unix socket, or HOST:PORT, or either as QEMU writes it (unix:PATH, tcp:HOST:PORT). It may
belong to livedisk, to QEMU or to qemu-storage-daemon.

\b
Arguments are written as in QEMU's qmp-shell:
  key=value            a string; a number or true, false, null where it looks like one
  key='"value"'        a string in any case
  a.b.c=value          a member of an object; a.0=value an element of a list
  key=[1, 2]           JSON, or the same in Python's notation

Numbers become strings where the command's schema takes only strings.

Without COMMAND a shell opens: TAB completes commands, arguments and values, the arrow keys recall earlier lines (kept
in $XDG_STATE_HOME/livedisk/qmp_history), events are shown as they come. A line that opens with "transaction("
collects commands until ")" and runs them as one. "{...}" sends a request as it stands. If standard input is not a
terminal, its lines are run one after the other, and the first that fails ends the run.

\b
Examples:
  livedisk qmp disk.qmp query-block
  livedisk qmp disk.qmp blockdev-snapshot-sync node-name=disk snapshot-file=snap.qcow2
  livedisk qmp disk.qmp transaction actions='[{"type": "abort", "data": {}}]'
  livedisk qmp disk.qmp --events
  livedisk qmp localhost:4444

\b
Exit status:
  0  the command succeeded
  1  the command failed, or the monitor could not be reached
  2  the command line could not be understood
"""


@click.command("qmp", help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("socket")
@click.argument("command", required=False)
@click.argument("arguments", nargs=-1, metavar="[key=value ...]")
@click.option("--events", is_flag=True, help="Print events as they come, one JSON value a line, until interrupted.")
@click.option("--compact", is_flag=True, help="Print replies on one line.")
@click.option(
    "--timeout", default=10.0, show_default=True, metavar="SECONDS", help="How long to wait for the greeting."
)
def qmp(
    socket: str, command: str | None, arguments: tuple[str, ...], events: bool, compact: bool, timeout: float
) -> None:
    try:
        request = _request(command, arguments)
    except ShellSyntaxError as error:
        raise click.UsageError(str(error)) from None
    try:
        status = asyncio.run(_run(socket, request, events=events, indent=None if compact else 4, timeout=timeout))
    except KeyboardInterrupt:
        status = 130
    except (ConnectionLost, QmpError) as error:
        click.echo(f"livedisk: {error}", err=True)
        status = 1
    sys.exit(status)


def _request(command: str | None, arguments: tuple[str, ...]) -> Request | None:
    if command is None:
        return None
    if command.startswith("{"):
        if arguments:
            raise ShellSyntaxError("a JSON request takes no further arguments")
        return LineReader().take(command)
    return command_request(command, parse_arguments(list(arguments)))


async def _run(address: str, request: Request | None, *, events: bool, indent: int | None, timeout: float) -> int:
    async with await QmpClient.connect(address, timeout=timeout) as client:
        session = Session(client, indent)
        if request is not None:
            status = await session.run(request)
            if status or not events:
                return status
        if events:
            async for event in client.events():
                click.echo(json.dumps(event))
            return 0
        # Imported here: one command must not wait for the shell's libraries.
        from livedisk.emulator.cli import qmp_shell

        return await qmp_shell.run(session, address)


class Session:
    """A connection and how to print what it answers. ``indent``: spaces a level; None for one line."""

    def __init__(self, client: QmpClient, indent: int | None) -> None:
        self.client = client
        self.indent = indent
        self._schema: Introspection | None = None

    async def run(self, request: Request) -> int:
        """Run a request and print its reply, or its error on standard error. Returns the exit status."""
        try:
            reply = await self.client.send(await self._typed(request))
        except QmpError as error:
            click.echo(f"{error.kind}: {error}", err=True)
            return 1
        click.echo(json.dumps(reply, indent=self.indent, ensure_ascii=False))
        return 0

    async def schema(self) -> Introspection:
        """The server's schema, asked for once; an empty one if it has none."""
        if self._schema is None:
            try:
                self._schema = Introspection(await self.client.execute("query-qmp-schema"))
            except QmpError:
                self._schema = Introspection([])
        return self._schema

    async def _typed(self, request: Request) -> dict[str, Any]:
        """The message, with numbers made strings where only a string is taken. The schema is asked for only if there
        is something to decide."""
        message = request.message
        arguments = message.get("arguments")
        if request.as_written or not _has_numbers(arguments):
            return message
        return {**message, "arguments": (await self.schema()).coerce(message["execute"], arguments or {})}


def _has_numbers(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_numbers(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_numbers(item) for item in value)
    return isinstance(value, bool | int | float)
