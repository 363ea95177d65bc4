"""Socket addresses to listening sockets, with QEMU's answers where they cannot be had.

Source: QEMU ``util/qemu-sockets.c`` (inet_listen_saddr, unix_listen_saddr, socket_get_fd).
"""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import TYPE_CHECKING, Any, Final

from livedisk.emulator.block.descriptors import refuse_socket, take_socket
from livedisk.emulator.block.sockets import UNIX_PATH, Fd, Inet, Unix, Vsock, inet_family, unix_name
from livedisk.emulator.errors import LiveDiskError

if TYPE_CHECKING:
    from livedisk.nbd.server import NbdServer

Address = Inet | Unix | Vsock | Fd

_BACKLOG: Final = 128


class ListenError(LiveDiskError):
    """No socket could be had at the address."""


async def listen(server: NbdServer, address: Address) -> None:
    """Let ``server`` accept clients at ``address``. Raises LiveDiskError in QEMU's words."""
    if isinstance(address, Inet):
        for sock in await _bind_inet(address):
            server.listen_socket(sock)
    elif isinstance(address, Unix):
        _listen_unix(server, address)
    elif isinstance(address, Fd):
        _listen_fd(server, address)
    else:
        raise ListenError("socket family AF_VSOCK unsupported")


# -- unix --------------------------------------------------------------------------------------------------------------


def _listen_unix(server: NbdServer, address: Unix) -> None:
    path = address.path
    try:
        name = unix_name(address)
    except ValueError as error:
        raise ListenError(str(error), hint=f"Path must be less than {UNIX_PATH} bytes") from None
    if address.abstract:
        server.listen_socket(_bind_abstract(path, name))
        return
    try:
        server.listen_unix(path)
    except OSError as error:
        text = str(error.strerror or error)
        raise ListenError(text if path in text else f"Failed to bind socket to {path}: {text}") from None


def _bind_abstract(shown: str, name: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(name)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(f"Failed to bind socket to {shown}: {error.strerror}") from None
    return sock


# -- descriptors -------------------------------------------------------------------------------------------------------


def _listen_fd(server: NbdServer, address: Fd) -> None:
    sock = take_socket(address.str)
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        refuse_socket(sock)
        raise ListenError(f"Failed to listen on fd socket: {error.strerror}") from None
    server.listen_socket(sock)


# -- TCP ---------------------------------------------------------------------------------------------------------------


async def _bind_inet(address: Inet) -> list[socket.socket]:
    """A socket for each address that the host has; with ``to``, all on the first port that is free."""
    try:
        family = inet_family(address)
    except ValueError as error:
        raise ListenError(str(error)) from None
    flags = socket.AI_PASSIVE | (socket.AI_NUMERICHOST | socket.AI_NUMERICSERV if address.numeric else 0)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            address.host or None, address.port, family=family, type=socket.SOCK_STREAM, flags=flags
        )
    except socket.gaierror as error:
        raise ListenError(f"address resolution failed for {address.host}:{address.port}: {error.strerror}") from None
    first = int(found[0][4][1])
    last = address.to if isinstance(address.to, int) else first
    if last < first:
        raise ListenError(f"port range '{first}-{last}' is empty: 'to' is below 'port'")
    problem: OSError | None = None
    for port in range(first, last + 1):
        try:
            return _bind_all(found, port, address)
        except OSError as error:
            problem = error
            if error.errno != errno.EADDRINUSE:
                raise ListenError(f"Failed to bind socket: {error.strerror}") from None
    assert problem is not None
    raise ListenError(f"Failed to find an available port: {problem.strerror}")


def _bind_all(found: list[Any], port: int, address: Inet) -> list[socket.socket]:
    families = {entry[0] for entry in found}
    # IPv6 first: an unrestricted "::" serves IPv4 as well, and 0.0.0.0 behind it is not needed.
    entries = sorted(found, key=lambda entry: entry[0] != socket.AF_INET6)
    everyone = any(entry[4][0] == "::" for entry in found) and address.ipv6 is not True
    bound: list[socket.socket] = []
    try:
        for family, kind, proto, _, (host, _, *scope) in entries:
            if everyone and host == "0.0.0.0":
                continue
            if not port and bound:
                port = bound[0].getsockname()[1]
            protocol = getattr(socket, "IPPROTO_MPTCP", 262) if address.mptcp else proto
            sock = socket.socket(family, kind, protocol)
            bound.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                alone = len(families) > 1 and host != "::"
                only = 1 if alone or address.ipv4 is False or address.ipv6 is True else 0
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
            if address.keep_alive is True:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.bind((host, port, *scope))
            sock.listen(_BACKLOG)
    except OSError:
        for sock in bound:
            sock.close()
        raise
    return bound
