"""query-chardev, chardev-add, -change, -remove, -send-break, and the commands of ring buffers.

Source: QEMU ``qapi/char.json``, ``chardev/char.c``; messages asked from QEMU 10.0.2. Where we differ: there
are no back-ends for serial lines, mice and consoles; of a TCP address ``numeric``, ``to``,
``keep-alive`` and ``mptcp`` are refused.
"""

from __future__ import annotations

import base64
import binascii
import enum
from typing import Any

import msgspec

from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.exports.options import FdLegacy, InetLegacy, UnixLegacy, VsockLegacy
from livedisk.emulator.qmp.chardev import (
    BACKENDS,
    Chardev,
    FileChardev,
    NullChardev,
    PipeChardev,
    PtyChardev,
    RingbufChardev,
    SocketChardev,
    StdioChardev,
    check_socket,
)
from livedisk.emulator.qmp.chardev_files import RingbufDevice
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.emulator.qmp.registry import command

_Bool = bool | UnsetType


class ChardevCommon(QapiStruct, kw_only=True):
    """What all back-ends take: a file for a copy of the output; with ``logappend`` what is in it stays."""

    logfile: str | UnsetType = UNSET
    logappend: bool = False


class ChardevFile(ChardevCommon, kw_only=True):
    """``out`` takes output, ``in`` gives input; ``append``: what is there stays."""

    input: str | UnsetType = msgspec.field(default=UNSET, name="in")
    out: str
    append: bool = False


class ChardevSocket(ChardevCommon, kw_only=True):
    """As the options of ``-chardev socket``."""

    addr: InetLegacy | UnixLegacy | VsockLegacy | FdLegacy
    tls_creds: str | UnsetType = UNSET
    tls_authz: str | UnsetType = UNSET
    server: bool = True
    wait: _Bool = UNSET
    nodelay: bool = False
    telnet: bool = False
    reconnect: int | UnsetType = UNSET
    reconnect_ms: int | UnsetType = UNSET


class ChardevHostdev(ChardevCommon, kw_only=True):
    """A device of the host, or named pipes."""

    device: str


class ChardevPty(ChardevCommon, kw_only=True):
    """``path``: a link to the terminal."""

    path: str | UnsetType = UNSET


class ChardevRingbuf(ChardevCommon, kw_only=True):
    """``size``: bytes, a power of two."""

    size: int = 65536


class ChardevStdio(ChardevCommon, kw_only=True):
    """``signal``: Ctrl-C interrupts."""

    signal: bool = True


class ChardevBackend(QapiStruct, tag_field="type"):
    """A back-end and its options."""


class _File(ChardevBackend, tag="file", kw_only=True):
    data: ChardevFile


class _Null(ChardevBackend, tag="null", kw_only=True):
    data: ChardevCommon


class _Pipe(ChardevBackend, tag="pipe", kw_only=True):
    data: ChardevHostdev


class _Pty(ChardevBackend, tag="pty", kw_only=True):
    data: ChardevPty


class _Ringbuf(ChardevBackend, tag="ringbuf", kw_only=True):
    data: ChardevRingbuf


class _Socket(ChardevBackend, tag="socket", kw_only=True):
    data: ChardevSocket


class _Stdio(ChardevBackend, tag="stdio", kw_only=True):
    data: ChardevStdio


Backend = _File | _Null | _Pipe | _Pty | _Ringbuf | _Socket | _Stdio


class ChardevAdd(QapiStruct):
    """A new character device."""

    id: str
    backend: Backend


class ChardevReturn(QapiStruct):
    """``pty``: the path of a new pseudo terminal."""

    pty: str | UnsetType = UNSET


def _options(id: str, backend: Backend) -> Chardev:
    """As ``-chardev`` would have them."""
    data = backend.data
    logfile = data.logfile if isinstance(data.logfile, str) else None
    return msgspec.structs.replace(_own_options(id, backend), logfile=logfile, logappend=data.logappend)


def _own_options(id: str, backend: Backend) -> Chardev:
    if isinstance(backend, _Null):
        return NullChardev(id=id)
    if isinstance(backend, _Stdio):
        return StdioChardev(id=id, signal=backend.data.signal)
    if isinstance(backend, _Pty):
        return PtyChardev(id=id, path=backend.data.path if isinstance(backend.data.path, str) else None)
    if isinstance(backend, _Ringbuf):
        return RingbufChardev(id=id, size=backend.data.size)
    if isinstance(backend, _Pipe):
        return PipeChardev(id=id, path=backend.data.device)
    if isinstance(backend, _File):
        source = backend.data.input
        given = source if isinstance(source, str) else None
        return FileChardev(id=id, path=backend.data.out, append=backend.data.append, input_path=given)
    return _socket(id, backend.data)


def _socket(id: str, data: ChardevSocket) -> SocketChardev:
    found: dict[str, Any] = {"id": id, "server": data.server, "nodelay": data.nodelay, "telnet": data.telnet}
    for name in ("wait", "reconnect", "reconnect_ms", "tls_creds", "tls_authz"):
        value = getattr(data, name)
        if value is not UNSET:
            found[name] = value
    address = data.addr
    if isinstance(address, UnixLegacy):
        found |= {"path": address.data.path, "abstract": address.data.abstract, "tight": address.data.tight}
    elif isinstance(address, InetLegacy):
        for name in ("numeric", "to", "keep_alive", "mptcp"):
            if getattr(address.data, name) not in (UNSET, False):
                raise LiveDiskError(f"'{name.replace('_', '-')}' is not supported for character devices' addresses")
        found |= {"host": address.data.host, "port": address.data.port}
        for name in ("ipv4", "ipv6"):
            value = getattr(address.data, name)
            found |= {} if value is UNSET else {name: value}
    elif isinstance(address, FdLegacy):
        found["fd"] = address.data.str
    else:
        raise LiveDiskError("vsock sockets are not supported for character devices")
    options = SocketChardev(**found)
    check_socket(options)
    return options


@command("chardev-add")
async def chardev_add(ctx: Context, args: ChardevAdd) -> ChardevReturn:
    """Open a character device. A listening socket does not wait for its client."""
    if ctx.daemon.chardev(args.id) is not None:
        raise LiveDiskError(f"Chardev with id '{args.id}' already exists")
    return await _open(ctx, args.id, args.backend)


async def _open(ctx: Context, id: str, backend: Backend) -> ChardevReturn:
    try:
        options = _options(id, backend)
        if isinstance(options, SocketChardev) and options.server:
            options.wait = False
        await ctx.daemon.open_chardev(options)
    except LiveDiskError as error:
        raise LiveDiskError(f"Failed to add chardev '{id}': {error}", hint=error.hint) from error
    if isinstance(options, PtyChardev):
        device = ctx.daemon.chardev(id)
        assert device is not None
        return ChardevReturn(pty=device.filename.removeprefix("pty:"))
    return ChardevReturn()


@command("chardev-change")
async def chardev_change(ctx: Context, args: ChardevAdd) -> ChardevReturn:
    """Give a character device that no monitor speaks on another back-end."""
    if ctx.daemon.chardev(args.id) is None:
        raise LiveDiskError(f"Chardev '{args.id}' does not exist")
    if ctx.daemon.chardev_is_busy(args.id):
        raise LiveDiskError("Chardev user does not support chardev hotswap")
    await ctx.daemon.close_chardev(args.id)
    return await _open(ctx, args.id, args.backend)


class ChardevId(QapiStruct):
    """A character device."""

    id: str


@command("chardev-remove")
async def chardev_remove(ctx: Context, args: ChardevId) -> None:
    """Close a character device that no monitor speaks on."""
    if ctx.daemon.chardev(args.id) is None:
        raise LiveDiskError(f"Chardev '{args.id}' not found")
    if ctx.daemon.chardev_is_busy(args.id):
        raise LiveDiskError(f"Chardev '{args.id}' is busy")
    await ctx.daemon.close_chardev(args.id)


@command("chardev-send-break")
async def chardev_send_break(ctx: Context, args: ChardevId) -> None:
    """Nothing happens: none of the back-ends is a line that could be broken."""
    if ctx.daemon.chardev(args.id) is None:
        raise LiveDiskError(f"Chardev '{args.id}' not found")


class ChardevInfo(QapiStruct):
    """``frontend-open``: whether a monitor speaks on it."""

    label: str
    filename: str
    frontend_open: bool


@command("query-chardev", allow_preconfig=True)
async def query_chardev(ctx: Context) -> list[ChardevInfo]:
    """Every character device."""
    found = []
    for name, _ in ctx.daemon.chardevs():
        device = ctx.daemon.chardev(name)
        assert device is not None
        busy = ctx.daemon.chardev_is_busy(name)
        found.append(ChardevInfo(label=name, filename=device.filename, frontend_open=busy))
    return found


class ChardevBackendInfo(QapiStruct):
    """A back-end."""

    name: str


@command("query-chardev-backends", allow_preconfig=True)
async def query_chardev_backends(ctx: Context) -> list[ChardevBackendInfo]:
    """Every back-end that there is here."""
    return [ChardevBackendInfo(name=name) for name in BACKENDS]


# -- ring buffers ------------------------------------------------------------------------------------------------------
class DataFormat(enum.StrEnum):
    """How bytes are written as text."""

    UTF8 = "utf8"
    BASE64 = "base64"


class RingbufWrite(QapiStruct):
    """``data``, written as ``format`` says."""

    device: str
    data: str
    format: DataFormat = DataFormat.UTF8


def _ring(ctx: Context, name: str) -> RingbufDevice:
    device = ctx.daemon.chardev(name)
    if device is None:
        raise LiveDiskError(f"Device '{name}' not found")
    if not isinstance(device, RingbufDevice):
        raise LiveDiskError(f"{name} is not a ringbuf device")
    return device


@command("ringbuf-write")
async def ringbuf_write(ctx: Context, args: RingbufWrite) -> None:
    """Put bytes into a ring; the oldest give way."""
    ring = _ring(ctx, args.device)
    data = args.data.encode()
    if args.format is DataFormat.BASE64:
        try:
            data = base64.b64decode(data, validate=True)
        except binascii.Error:
            raise LiveDiskError("Base64 data contains invalid characters") from None
    ring.write(data)


class RingbufRead(QapiStruct):
    """Up to ``size`` bytes."""

    device: str
    size: int
    format: DataFormat = DataFormat.UTF8


@command("ringbuf-read")
async def ringbuf_read(ctx: Context, args: RingbufRead) -> str:
    """Take the oldest bytes out of a ring."""
    ring = _ring(ctx, args.device)
    if args.size <= 0:
        raise LiveDiskError("size must be greater than zero")
    data = ring.take(args.size)
    return base64.b64encode(data).decode() if args.format is DataFormat.BASE64 else data.decode(errors="replace")
