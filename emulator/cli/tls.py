"""``livedisk tls``: certificates for NBD and QMP over TLS, with one command."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import click

from livedisk.emulator.errors import LiveDiskError

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

HELP = """Make certificates.

'init' makes all that a server and its clients need. Other tools make certificates as well; what is needed is in docs/tls.md.
"""

INIT = """Make a certificate authority, a server's and a client's certificate in the folder DIR.

The files have the names that QEMU, libnbd and nbdkit look for: ca-cert.pem, server-cert.pem and server-key.pem,
client-cert.pem and client-key.pem. ca-key.pem is there to sign further certificates; keep it to yourself. Private keys are
readable by their owner alone. Nothing that exists is overwritten.

The server's certificate is for this machine's name, localhost, 127.0.0.1 and ::1, and for each --hostname and --ip.

\b
Examples:
  livedisk tls init ~/tls
  livedisk tls init ~/tls --hostname storage.example --ip 192.0.2.7 --days 90
  livedisk serve disk.qcow2 --port 10809 --bind 0.0.0.0 --tls ~/tls

\b
Exit status:
  0  done
  1  a file exists or could not be written
  2  the command line could not be understood
"""


@click.group("tls", help=HELP, context_settings=_SETTINGS)
def tls() -> None:
    """The group."""


@tls.command("init", help=INIT, context_settings=_SETTINGS)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--hostname", "names", multiple=True, metavar="NAME", help="A name of the server; may be repeated.")
@click.option("--ip", "addresses", multiple=True, metavar="ADDR", help="An address of the server; may be repeated.")
@click.option(
    "--client", default="livedisk client", show_default=True, metavar="NAME", help="The client's common name."
)
@click.option(
    "--days", default=365, show_default=True, type=click.IntRange(1, 36500), metavar="N", help="How long they are good."
)
def init(folder: Path, names: tuple[str, ...], addresses: tuple[str, ...], client: str, days: int) -> None:
    for address in addresses:
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise click.UsageError(f"--ip {address}: not an IP address (names go to --hostname)") from None
    from livedisk.emulator.tls.certificates import make, write

    hosts = [*names, *addresses, socket.gethostname(), "localhost", "127.0.0.1", "::1"]
    hosts = [host for host in dict.fromkeys(hosts) if host]
    try:
        write(folder, make(hosts, days, client))
    except LiveDiskError as error:
        click.echo(f"livedisk tls init: {error}", err=True)
        if error.hint:
            click.echo(error.hint, err=True)
        raise SystemExit(1) from None
    click.echo(_instructions(folder, hosts, client, days))


def _instructions(folder: Path, hosts: list[str], client: str, days: int) -> str:
    return f"""Made in {folder}, good for {days} days:

    ca-cert.pem                       whom both ends trust
    server-cert.pem, server-key.pem   the server: {", ".join(hosts)}
    client-cert.pem, client-key.pem   the clients: CN={client}
    ca-key.pem                        signs further certificates; keep it to yourself

Server   livedisk serve IMAGE --port 10809 --bind 0.0.0.0 --tls {folder}
         livedisk daemon -object tls-creds-x509,id=tls0,dir={folder},endpoint=server \\
             -nbd-server addr.type=inet,addr.host=::,addr.port=10809,tls-creds=tls0 ...
Client   nbdinfo 'nbds://HOST:10809/?tls-certificates={folder}'
         qemu-img info --object tls-creds-x509,id=tls0,dir={folder},endpoint=client \\
             --image-opts driver=nbd,host=HOST,port=10809,tls-creds=tls0"""
