"""``livedisk migrate``: all disks of a running guest, from one daemon to another, with one command.

The order is what makes it safe. Until the source is told to ``migrate`` nothing has happened to the guest: whoever kills this
command leaves copies and mirrors behind, which the next run clears away. From then on the two daemons do it between them
(``livedisk.jobs.migration``), and it does not matter whether this command lives.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from livedisk.emulator.cli import migrate_prepare as prepare
from livedisk.emulator.cli.migrate_follow import Follower
from livedisk.emulator.cli.migrate_plan import End, Plan, Refused, make_plan
from livedisk.emulator.cli.rate import Rate
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.client import ConnectionLost, QmpClient

HELP = """Move a running guest's disks from one livedisk daemon to another: copy them while the guest writes, hold it for a
moment, hand it over, and let it run on the destination.

SOURCE and DESTINATION are QMP sockets (a path, or tcp:HOST:PORT). The destination waits for a guest: 'livedisk daemon -incoming
defer -qmp ...'. It may have nodes of the disks' names already; those that it lacks are made, at the source's paths or in
--target. Devices come along, and so do their exports, under the same names, on the destination's NBD server.

The guest is handed over when what is left to copy takes no longer than --downtime-limit. If it writes as fast as it is copied,
its writes are made to wait for the destination, and then limited; each is told.

Whatever fails before the hand-over leaves the guest on the source, as it was; after it the guest is on the destination. Ctrl-C,
and killing this command, are safe at any moment, and it can be run again.

\b
Examples:
  livedisk migrate --from a.qmp --to b.qmp --target /srv/new --dry-run
  livedisk migrate --from a.qmp --to b.qmp --target /srv/new --downtime-limit 50
  livedisk migrate --from a.qmp --to tcp:b.example:4444 --tls /etc/livedisk/tls --bandwidth 100M

\b
Exit status:
  0  the guest is on the destination (with --dry-run: nothing is in the way)
  1  it is on the source, as before; the reason is on standard error
  2  the command line could not be understood
  3  it may be on neither side running; standard error says what to look at
"""


@dataclass(frozen=True)
class Order:
    """The command line. ``limit``: seconds; ``bandwidth``: bytes a second, 0 for any."""

    source: str
    destination: str
    disks: tuple[str, ...]
    folder: str | None
    listen: str | None
    limit: float
    bandwidth: int
    shallow: bool
    tls: str | None
    dry_run: bool


@click.command("migrate", help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--from", "source", required=True, metavar="QMP", help="The source's QMP socket.")
@click.option("--to", "destination", required=True, metavar="QMP", help="The destination's QMP socket.")
@click.option("--disk", "disks", multiple=True, metavar="NODE", help="A disk's node; may be repeated. Default: all.")
@click.option("--target", "folder", metavar="DIR", help="The destination's folder for images that are made.")
@click.option("--nbd", "listen", metavar="ADDR", help="Where its NBD server is to listen: unix:PATH or tcp:HOST:PORT.")
@click.option(
    "--downtime-limit",
    "limit",
    default=100,
    show_default=True,
    type=click.IntRange(1, 2_000_000),
    metavar="MS",
    help="How long the guest may be held.",
)
@click.option(
    "--bandwidth", default=0, type=Rate(), metavar="N", help="Bytes a second at most, all disks together: 100M."
)
@click.option("--shallow", is_flag=True, help="Copy the active images only; the destination has the backing files.")
@click.option(
    "--tls", type=click.Path(exists=True, file_okay=False), metavar="DIR", help="Use TLS, with these certificates."
)
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, change nothing.")
def migrate(**given: Any) -> None:
    given["limit"] /= 1000
    for name in ("tls", "folder"):
        if given[name] is not None:
            given[name] = str(Path(given[name]).absolute())
    listen = given["listen"]
    if listen is not None and not (
        listen.startswith("unix:") or (listen.startswith("tcp:") and listen.count(":") >= 2)
    ):
        raise click.UsageError(f"--nbd {listen}: neither unix:PATH nor tcp:HOST:PORT")
    raise SystemExit(asyncio.run(_run(Order(**given))))


async def _run(order: Order) -> int:
    """The exit code. Ctrl-C cancels the work, which then puts things back."""
    work = asyncio.ensure_future(_Migration(order).run())
    loop = asyncio.get_running_loop()
    import signal

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, work.cancel)
    try:
        return await work
    except asyncio.CancelledError:
        click.echo("livedisk migrate: interrupted: the guest is on the source, as before", err=True)
    except LiveDiskError as error:
        click.echo(f"livedisk migrate: {error}", err=True)
        return 3 if isinstance(error, _Unclear) else 1
    return 1


class _Migration:
    """One run."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._tls = order.tls is not None

    async def run(self) -> int:
        async with AsyncExitStack() as stack:
            ends = []
            for name, address in (("source", self._order.source), ("destination", self._order.destination)):
                client = await QmpClient.connect(address, timeout=5)
                ends.append(End(name, address, await stack.enter_async_context(client)))
            source, destination = ends
            for end in ends:
                if not end.qmp.greeting["version"]["package"].startswith("livedisk"):
                    raise Refused(
                        f"the {end.name} at {end.address} is no livedisk; this command moves disks between two of them"
                    )
            if (done := await self._finish_earlier(source, destination)) is not None:
                return done
            return await self._fresh(source, destination)

    async def _finish_earlier(self, source: End, destination: End) -> int | None:
        """An earlier run may have been killed during, or after, the hand-over. The exit code if that settles it."""
        there = await destination.call("query-status")
        here = await source.call("query-status")
        if here["status"] == "finish-migrate":
            state = await _settled(source)
            return await self._outcome(source, destination, state)
        if here["status"] == "postmigrate" and there["status"] != "inmigrate":
            await prepare.forget(source)
            click.echo("The guest is on the destination already.")
            return 0
        if here["status"] == "postmigrate":
            return await self._outcome(source, destination, await source.call("query-migrate"))
        return None

    async def _fresh(self, source: End, destination: End) -> int:
        order = self._order
        if not order.dry_run:
            await prepare.clear(source, destination)
        plan = await make_plan(source, destination, order.disks, order.folder, shallow=order.shallow)
        if plan.problems:
            raise Refused("nothing was begun:\n" + "\n".join(f"  - {problem}" for problem in plan.problems))
        for line in plan.lines():
            click.echo(line)
        if order.dry_run:
            click.echo("Nothing is in the way; nothing was changed (--dry-run).")
            return 0
        try:
            uri = await self._copy(source, destination, plan)
        except BaseException:
            await self._put_back(source, destination)
            raise
        # From here on it must be known how it ended, whatever happens to this command.
        ending = asyncio.ensure_future(prepare.hand_over(source, plan, uri, tls=self._tls))
        state = await _through(ending, source)
        return await self._outcome(source, destination, state)

    async def _copy(self, source: End, destination: End, plan: Plan) -> str:
        """Everything up to the moment before the hand-over. Returns where the guest goes."""
        order = self._order
        if order.tls is not None:
            await prepare.secure(source, destination, order.tls)
        server = await prepare.serve(destination, order.listen, tls=self._tls)
        uri = await prepare.listen_for_guest(destination, tls=self._tls)
        for disk in plan.disks:
            await prepare.make_target(destination, disk, shallow=order.shallow)
        speed = order.bandwidth // len(plan.disks)
        for disk in plan.disks:
            await prepare.start_mirror(source, disk, server, shallow=order.shallow, tls=self._tls, speed=speed)
        with _Screen() as screen:
            follower = Follower(source, destination, plan, order.limit, screen.tell)
            await follower.until_close(lambda: screen.draw(list(follower.lines())), screen.interval)
        return uri

    async def _take_back(self, source: End, destination: End, state: dict[str, Any]) -> None:
        """The source gave the guest up, and this destination does not have it. Raises Refused in any case.

        It comes back only if the word to run was lost, and this is the destination that it was lost to: another one, that
        the guest went to before, runs it.
        """
        if "error-desc" not in state:
            raise Refused(
                "the source has handed its guest over already, to another daemon than this; nothing was changed"
            )
        if not await _has_failed(destination):
            raise _Unclear(
                f"the source has given its guest up, and it is not known whether another daemon has it: {state['error-desc']}"
            )
        await source.call("cont")
        await self._put_back(source, destination)
        raise Refused("the destination did not take the guest over in the end; it is back on the source")

    async def _put_back(self, source: End, destination: End) -> None:
        """The guest stays: take away what was made for it. Whoever is gone needs nothing taken away."""
        try:
            await asyncio.shield(prepare.clear(source, destination))
        except (Refused, ConnectionLost) as error:
            click.echo(f"livedisk migrate: clearing up: {error}; the next run clears the rest", err=True)

    async def _outcome(self, source: End, destination: End, state: dict[str, Any]) -> int:
        """Say how it ended, and settle what is open."""
        if state["status"] != "completed":
            await self._put_back(source, destination)
            raise Refused(
                f"the hand-over failed, the guest is on the source as before: {state.get('error-desc', state['status'])}"
            )
        there = await destination.call("query-status")
        if there["status"] == "inmigrate":
            await self._take_back(source, destination, state)
        await prepare.forget(source)
        click.echo(
            f"The guest is on the destination ({there['status']}). It was held for {state.get('downtime', '?')} ms."
        )
        return 0


async def _has_failed(destination: End) -> bool:
    """Whether a guest that was to come to this destination cannot come any more; it may take a moment to notice."""
    for _ in range(100):
        status = (await destination.call("query-migrate")).get("status")
        if status in (None, "failed"):
            return status is not None
        await asyncio.sleep(0.1)
    return False


async def _settled(source: End) -> dict[str, Any]:
    """The outcome of a hand-over that is under way."""
    while True:
        state: dict[str, Any] = await source.call("query-migrate")
        if state["status"] in ("completed", "failed", "cancelled"):
            return state
        await asyncio.sleep(0.02)


async def _through(ending: asyncio.Future[dict[str, Any]], source: End) -> dict[str, Any]:
    """Wait for the hand-over; Ctrl-C asks the source to stop it, which it does only while it can be stopped."""
    try:
        return await asyncio.shield(ending)
    except asyncio.CancelledError:
        with suppress(LiveDiskError):
            await source.call("migrate_cancel")
        return await ending


class _Unclear(Refused):
    """Nobody can tell from here who has the guest; nothing was changed."""


class _Screen:
    """The bars: on a terminal drawn in place, elsewhere a line now and then."""

    def __init__(self) -> None:
        self._live: Any = None
        self._printed = 0
        self.interval = 0.1

    def __enter__(self) -> _Screen:
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(highlight=False), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def draw(self, lines: list[str]) -> None:
        if self._live is None:
            if self._printed % 50 == 0:
                click.echo("\n".join(lines))
            self._printed += 1
            return
        from rich.text import Text

        self._live.update(Text("\n".join(lines), no_wrap=True), refresh=True)

    def tell(self, line: str) -> None:
        """Something that stays on the screen."""
        say: Callable[[str], None] = click.echo if self._live is None else self._live.console.print
        say(line)
