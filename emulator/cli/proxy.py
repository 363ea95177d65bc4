"""``livedisk proxy``: one stable socket for an export that moves between servers."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from livedisk.emulator.errors import LiveDiskError

if TYPE_CHECKING:
    from livedisk.emulator.exports.relay import Connect

log = logging.getLogger(__name__)

HELP = """Serve an NBD export on a socket that stays, while the export moves from one server to another.

Each URI (nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH) is a place where the export may be. Requests go to the place
that has it. If the connection is lost, they wait, and go on at the first place that has it then: a guest that writes through the
proxy does not notice a 'livedisk migrate' but for the moment in which it is held. After --delay seconds without any, they fail.

Whoever moves the export must see to it that it is at one place at a time, as 'livedisk migrate' does.

\b
Example:
  livedisk proxy --socket /run/disk.sock 'nbd+unix:///disk?socket=/run/a.nbd' 'nbd+unix:///disk?socket=/run/b.nbd'

\b
Exit status:
  0  ended by a signal
  1  no place has the export, or the socket could not be opened
  2  the command line could not be understood
"""


@click.command("proxy", help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("uris", nargs=-1, required=True, metavar="URI...")
@click.option(
    "--socket", "path", required=True, type=click.Path(), metavar="PATH", help="Listen on a Unix socket at PATH."
)
@click.option("--name", metavar="NAME", help="The export's name here. Default: its name in the first URI.")
@click.option(
    "--delay",
    default=60.0,
    show_default=True,
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long requests wait for the export to be somewhere.",
)
@click.option(
    "--tls", type=click.Path(exists=True, file_okay=False), metavar="DIR", help="Use TLS towards the servers."
)
@click.option(
    "--tls-hostname",
    metavar="NAME",
    help="The name in the servers' certificates. Default: each one's host, or localhost on a Unix socket.",
)
def proxy(
    uris: tuple[str, ...], path: str, name: str | None, delay: float, tls: str | None, tls_hostname: str | None
) -> None:
    from livedisk.emulator.cli.process import log_to_stderr, run_loop

    if tls_hostname is not None and tls is None:
        raise click.UsageError("--tls-hostname: only with --tls")
    log_to_stderr()
    raise SystemExit(run_loop(lambda: _run(uris, path, name, delay, tls, tls_hostname)))


async def _run(
    uris: Sequence[str], path: str, name: str | None, delay: float, tls: str | None, hostname: str | None
) -> int:
    from livedisk.emulator.exports.relay import Relay, Servers
    from livedisk.nbd.client_handshake import NegotiationFailed
    from livedisk.nbd.server import NbdServer

    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    server = NbdServer()
    relay: Relay | None = None
    try:
        ways = [_way(uri, tls, hostname) for uri in uris]
        relay = Relay(name if name is not None else ways[0][1], Servers([way[0] for way in ways]), delay)
        await relay.open(0)
        server.add(relay)
        server.listen_unix(os.fspath(path))
        click.echo(f"Serving export '{relay.name}' ({relay.size} bytes) on {path}")
        await ended.wait()
    except (LiveDiskError, NegotiationFailed, OSError) as error:
        click.echo(f"livedisk proxy: {getattr(error, 'strerror', None) or error}", err=True)
        hint = getattr(error, "hint", "")
        if hint:
            click.echo(hint, err=True)
        return 1
    finally:
        await server.close()
        if relay is not None:
            await relay.close()
    return 0


def _way(uri: str, tls: str | None, hostname: str | None) -> tuple[tuple[str, Connect], str]:
    """How to connect to a URI, and the export's name there. Raises LiveDiskError."""
    from livedisk.emulator.block.sockets import InetAddress, connect
    from livedisk.emulator.drivers.nbd.names import parse
    from livedisk.emulator.qmp.object_commands import Objects
    from livedisk.nbd.client_connection import ClientConnection, open_connection
    from livedisk.nbd.constants import BASE_ALLOCATION

    if uri.lower().startswith("nbds"):
        # It would name an object with credentials, of which there are none here; to go on in plain text is no answer.
        raise LiveDiskError(f"'{uri}': not supported here", hint="Write nbd: for nbds:, and say --tls DIR.")
    options = parse(uri)
    export = options.export if isinstance(options.export, str) else ""
    secure = None
    if tls is not None:
        from livedisk.emulator.tls.credentials import TlsCredsX509Options, client_tls

        objects = Objects()
        objects.add(TlsCredsX509Options(qom_type="tls-creds-x509", id="tls", dir=tls))
        server = options.server
        host = hostname or (server.host if isinstance(server, InetAddress) else "localhost")
        secure = client_tls(objects, "tls", host).secure

    async def way() -> ClientConnection:
        return await open_connection(await connect(options.server), export, contexts=(BASE_ALLOCATION,), secure=secure)

    return (uri, way), export
