"""Socket addresses, typed once for servers and clients, and the way from one to a connected socket.

Source: QEMU ``qapi/sockets.json``, ``util/qemu-sockets.c`` (inet_connect_saddr, unix_connect_saddr, socket_get_fd); messages
are QEMU's.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Annotated, Any, Final

import msgspec

from livedisk.emulator.block.descriptors import copy_socket
from livedisk.emulator.errors import LiveDiskError

_UINT16 = Annotated[int, msgspec.Meta(extra={"qapi": "uint16"})]
UNIX_PATH: Final = 108
"""sizeof(sun_path): bytes that a path may have."""


class _Struct(msgspec.Struct, rename="kebab", kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """As QMP's types are (this layer knows nothing of QMP)."""


class Inet(_Struct):
    """A TCP address. ``to``: the last port to try. ``ipv4``, ``ipv6``: restrict the family. ``numeric``: no names."""

    host: str
    port: str
    numeric: bool = False
    to: _UINT16 | msgspec.UnsetType = msgspec.UNSET
    ipv4: bool | msgspec.UnsetType = msgspec.UNSET
    ipv6: bool | msgspec.UnsetType = msgspec.UNSET
    keep_alive: bool | msgspec.UnsetType = msgspec.UNSET
    mptcp: bool = False


class Unix(_Struct):
    """A path; or with ``abstract`` a name in Linux's abstract namespace, not padded with zeroes if ``tight``."""

    path: str
    abstract: bool = False
    tight: bool = True


class Vsock(_Struct):
    """An address between a virtual machine and its host."""

    cid: str
    port: str


class Fd(_Struct):
    """A descriptor of a socket: by the name that getfd gave it, on the command line by the number it was inherited with."""

    str: str


class SocketAddress(_Struct):
    """What all addresses have in common: nothing but their type."""


class InetAddress(Inet, SocketAddress, tag="inet", tag_field="type"):
    """``addr.type=inet``."""


class UnixAddress(Unix, SocketAddress, tag="unix", tag_field="type"):
    """``addr.type=unix``."""


class VsockAddress(Vsock, SocketAddress, tag="vsock", tag_field="type"):
    """``addr.type=vsock``."""


class FdAddress(Fd, SocketAddress, tag="fd", tag_field="type"):
    """``addr.type=fd``."""


AnyAddress = InetAddress | UnixAddress | VsockAddress | FdAddress


class ConnectFailed(OSError):
    """Nobody could be reached at an address. ``strerror`` is QEMU's text."""

    def __init__(self, number: int | None, text: str) -> None:
        super().__init__(number or errno.EINVAL, text)


def shown(address: AnyAddress) -> str:
    """The address as messages have it."""
    if isinstance(address, InetAddress):
        return f"{address.host}:{address.port}"
    if isinstance(address, UnixAddress):
        return address.path
    if isinstance(address, FdAddress):
        return f"file descriptor {address.str}"
    return f"{address.cid}:{address.port}"


async def connect(address: AnyAddress) -> socket.socket:
    """A connected, non-blocking socket. Raises `ConnectFailed`."""
    if isinstance(address, InetAddress):
        return await _connect_inet(address)
    if isinstance(address, UnixAddress):
        return await _connect_unix(address)
    if isinstance(address, FdAddress):
        try:
            return copy_socket(address.str)
        except LiveDiskError as error:
            raise ConnectFailed(errno.EBADF, str(error)) from None
    raise ConnectFailed(errno.EAFNOSUPPORT, "socket family AF_VSOCK unsupported")


async def _connect_unix(address: UnixAddress) -> socket.socket:
    try:
        name = unix_name(address)
    except ValueError as error:
        raise ConnectFailed(errno.ENAMETOOLONG, str(error)) from None
    return await _connected(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), name, address.path)


async def _connect_inet(address: InetAddress) -> socket.socket:
    loop = asyncio.get_running_loop()
    place = f"{address.host}:{address.port}"
    flags = socket.AI_ADDRCONFIG
    if address.numeric:
        flags |= socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    try:
        family = inet_family(address)
    except ValueError as error:
        raise ConnectFailed(errno.EINVAL, str(error)) from None
    try:
        found = await loop.getaddrinfo(address.host, address.port, family=family, type=socket.SOCK_STREAM, flags=flags)
    except (socket.gaierror, UnicodeError) as error:
        text = error.strerror if isinstance(error, socket.gaierror) else "Name or service not known"
        raise ConnectFailed(errno.EINVAL, f"address resolution failed for {place}: {text}") from None
    problem: ConnectFailed | None = None
    for family, kind, proto, _, where in found:
        sock = socket.socket(family, kind, getattr(socket, "IPPROTO_MPTCP", 262) if address.mptcp else proto)
        try:
            await _connected(sock, where, place)
        except ConnectFailed as error:
            problem = error
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.keep_alive is True:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return sock
    assert problem is not None
    raise problem


async def _connected(sock: socket.socket, where: Any, name: str) -> socket.socket:
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, where)
    except OSError as error:
        sock.close()
        text = os.strerror(error.errno) if error.errno else str(error)
        raise ConnectFailed(error.errno, f"Failed to connect to '{name}': {text}") from None
    except BaseException:
        sock.close()
        raise
    return sock


def unix_name(address: Unix) -> bytes:
    """What the kernel is told for a path or an abstract name. Raises ValueError with QEMU's text where it is too long."""
    name = os.fsencode(address.path)
    if len(name) + address.abstract > UNIX_PATH:
        raise ValueError(f"UNIX socket path '{address.path}' is too long")
    if not address.abstract:
        return name
    return b"\0" + name if address.tight else (b"\0" + name).ljust(UNIX_PATH, b"\0")


def inet_family(address: Inet) -> socket.AddressFamily:
    """The family asked for. Turning one off leaves the other; turning both on, or saying nothing, leaves both.

    Raises ValueError with QEMU's text.
    """
    four, six = address.ipv4, address.ipv6
    if four is False and six is False:
        raise ValueError("Cannot disable IPv4 and IPv6 at same time")
    if six is False or (four is True and six is not True):
        return socket.AF_INET
    if four is False or (six is True and four is not True):
        return socket.AF_INET6
    return socket.AF_UNSPEC
