"""File names that mean an NBD export, and the name that an export's node is given.

    nbd://HOST[:PORT]/EXPORT            nbd+tcp://...        nbd:HOST:PORT[:exportname=NAME]
    nbd+unix:///EXPORT?socket=PATH                           nbd:unix:PATH[:exportname=NAME]
    nbds://..., nbds+unix://...         with ?tls-creds=ID[&tls-hostname=NAME]

In a URI, host, export and parameters are percent-decoded. Source: the NBD project's ``doc/uri.md``; QEMU ``block/nbd.c``
(nbd_parse_filename, nbd_parse_uri, nbd_refresh_filename), whose errors these are. QEMU knows no ``nbds``; a URI has no room for
credentials, so that ours names an object that has them.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from livedisk.emulator.block.sockets import InetAddress, UnixAddress
from livedisk.emulator.drivers.nbd.options import NbdOptions
from livedisk.emulator.errors import BlockError
from livedisk.nbd.constants import DEFAULT_PORT

PROTOCOLS: Final = ("nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix")
"""What stands before the first colon of such a name."""
_EXPORT: Final = ":exportname="


def parse(filename: str) -> NbdOptions:
    """The options that a name means. Raises BlockError in QEMU's words."""
    return _parse_uri(filename) if "://" in filename else _parse_older(filename)


def _parse_uri(filename: str) -> NbdOptions:
    wrong = BlockError("No valid URL specified", hint=f"'{filename}' is no NBD URI that can be opened.")
    try:
        parts = urlsplit(filename)
        port = parts.port
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise wrong from None
    given = dict(query)
    if len(given) != len(query) or parts.fragment:
        raise wrong
    secure, _, kind = parts.scheme.partition("+")
    tls_creds = tls_hostname = None
    if secure == "nbds":
        tls_creds, tls_hostname = given.pop("tls-creds", None), given.pop("tls-hostname", None)
        if not tls_creds:
            raise BlockError(
                f"'{filename}' does not say which TLS credentials to use",
                hint="Append ?tls-creds=ID, with the id of a tls-creds-x509 or tls-creds-psk object.",
            )
    server: InetAddress | UnixAddress
    if kind == "unix":
        if parts.netloc or list(given) != ["socket"]:
            raise wrong
        server = UnixAddress(path=given["socket"])
    else:
        if not parts.hostname or given or parts.username is not None:
            raise wrong
        # Not parts.hostname, which is in small letters.
        host = parts.netloc.removesuffix(f":{port}").removesuffix(":")
        host = host[1:-1] if host.startswith("[") else host
        server = InetAddress(host=unquote(host), port=str(port or DEFAULT_PORT))
    export = unquote(parts.path.removeprefix("/"))
    return NbdOptions(
        driver="nbd",
        server=server,
        export=export or msgspec.UNSET,
        tls_creds=tls_creds or msgspec.UNSET,
        tls_hostname=tls_hostname or msgspec.UNSET,
    )


def _parse_older(filename: str) -> NbdOptions:
    where, marker, export = filename.partition(_EXPORT)
    if not where.startswith("nbd:"):
        raise BlockError("File name string for NBD must start with 'nbd:'")
    where = where[4:]
    if not where or (marker and not export):
        raise BlockError("NBD server address missing")
    server: InetAddress | UnixAddress
    if where.startswith("unix:"):
        server = UnixAddress(path=where[5:])
    else:
        host, colon, port = where.rpartition("]:") if where.startswith("[") else where.partition(":")
        if not colon or not port or "," in port:
            raise BlockError(f"error parsing address '{where}'")
        server = InetAddress(host=host.removeprefix("["), port=port)
    return NbdOptions(driver="nbd", server=server, export=export or msgspec.UNSET)


def compose(options: NbdOptions) -> str:
    """The name that QEMU gives such a node: a URI without escapes, or "" where there is none of that form."""
    server = options.server
    export = options.export if isinstance(options.export, str) else None
    if isinstance(server, UnixAddress):
        return f"nbd+unix://{'' if export is None else '/' + export}?socket={server.path}"
    if isinstance(server, InetAddress):
        return f"nbd://{server.host}:{server.port}{'' if export is None else '/' + export}"
    return ""
