"""Character devices: where a monitor's bytes come from and go to, as ``-chardev`` and ``-qmp`` describe them.

This module reads the options; `server` does the I/O. Three ways to write the same thing, all of them QEMU's:

    -chardev socket,id=mon0,path=/run/x.sock,server=on,wait=off     `parse_chardev`
    -qmp unix:/run/x.sock,server=on,wait=off                        `parse_compat`
    -qmp tcp:localhost:4444,server=on      -monitor stdio

Backends: ``socket`` (``path``, ``host`` and ``port``, or ``fd``), ``stdio``, ``null``, ``file``,
``pipe``, ``pty``, ``ringbuf``. QEMU's others have no use for a monitor of a block device emulator; naming one is an error.

Source: QEMU ``chardev/char.c`` (qemu_chr_parse_compat), ``chardev/char-socket.c`` (qemu_chr_parse_socket,
qmp_chardev_validate_socket).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import msgspec

from livedisk.emulator.errors import LiveDiskError, ParameterError
from livedisk.emulator.qmp.keyval import HelpRequested, parse_opts
from livedisk.emulator.qmp.model import Object, describe, plain_object
from livedisk.emulator.qmp.qapi import QapiStruct, Size
from livedisk.emulator.qmp.visit import KEYVAL, parse_integer, visit


class ChardevBase(QapiStruct):
    """What all have: the name that ``-mon chardev=`` refers to, and a file that gets a copy of the output."""

    id: str
    logfile: str | None = None
    logappend: bool = False
    """What is in the log already stays."""


class SocketChardev(ChardevBase):
    """A stream socket: listening for one client at a time, or connecting.

    ``reconnect`` is in seconds (deprecated in QEMU), ``reconnect_ms`` in milliseconds; 0: no second attempt.
    """

    path: str | None = None
    host: str | None = None
    port: str | None = None
    fd: str | None = None
    """Number of a descriptor that this process inherited: listening with server=on, connected otherwise."""
    server: bool = False
    wait: bool | None = None
    """Hold start-up until the first client is there. Servers only, where it is the default."""
    nodelay: bool = False
    telnet: bool = False
    """Speak telnet: offer to echo, and take its commands out of what comes."""
    ipv4: bool | None = None
    ipv6: bool | None = None
    abstract: bool = False
    """``path`` is a name in Linux's abstract socket namespace."""
    tight: bool = True
    """An abstract address is as long as its name, not padded with zeroes."""
    reconnect: int | None = None
    reconnect_ms: int | None = None
    tls_creds: str | None = None
    """Credentials (``emulator/tls``) of a TCP socket that speaks TLS from the first byte."""
    tls_authz: str | None = None
    """Rules for clients' certificates."""


class StdioChardev(ChardevBase):
    """Standard input and output. ``signal``: Ctrl-C still interrupts."""

    signal: bool = True


class NullChardev(ChardevBase):
    """Nobody there."""


class FileChardev(ChardevBase, kw_only=True):
    """``path`` takes output; ``input_path`` gives input; ``append``: what is there stays."""

    path: str
    append: bool = False
    input_path: str | None = None


class PipeChardev(ChardevBase, kw_only=True):
    """Named pipes PATH.in and PATH.out, or one file for both ways."""

    path: str


class PtyChardev(ChardevBase):
    """A pseudo terminal. ``path``: a link to it."""

    path: str | None = None


class RingbufChardev(ChardevBase):
    """``size``: bytes, a power of two."""

    size: Size = 65536


Chardev: TypeAlias = (
    SocketChardev | StdioChardev | NullChardev | FileChardev | PipeChardev | PtyChardev | RingbufChardev
)

BACKENDS: Final[dict[str, type[Any]]] = {
    "socket": SocketChardev,
    "stdio": StdioChardev,
    "null": NullChardev,
    "file": FileChardev,
    "pipe": PipeChardev,
    "pty": PtyChardev,
    "ringbuf": RingbufChardev,
}


def backend_name(options: Chardev) -> str:
    """The name of the back-end that options are of."""
    return next(name for name, cls in BACKENDS.items() if type(options) is cls)


Warn: TypeAlias = Callable[[str], None]


def _silent(message: str) -> None:
    """Nobody wants to know."""


def parse_chardev(text: str, warn: Warn = _silent) -> Chardev:
    """The argument of ``-chardev``. Raises ParameterError in QEMU's words; HelpRequested for ``help``."""
    values = parse_opts(text, "backend", warn=warn)
    if "id" not in values:
        raise ParameterError("chardev: no id specified")
    return _typed(values)


def parse_compat(text: str, label: str, warn: Warn = _silent) -> Chardev:
    """The argument of ``-qmp`` or ``-monitor``. ``label`` becomes the id. Raises ParameterError in QEMU's words.

    ``chardev:ID``, which names an existing one, is the caller's to handle.
    """
    try:
        return _typed({**_compat_values(text, warn), "id": label})
    except HelpRequested:
        raise ParameterError(f"parse error: {text}") from None


_TCP: Final = re.compile(r"(?P<host>\[[^\]]{1,64}\]|[^:,]{0,64}):(?P<port>[^,]{1,32})(?:,(?P<rest>.*))?\Z", re.DOTALL)


def _compat_values(text: str, warn: Warn) -> dict[str, Any]:
    if text in ("null", "pty", "stdio"):
        return {"backend": text}
    kind, _, rest = text.partition(":")
    if kind == "unix":
        return {"backend": "socket", **parse_opts(rest, "path", warn=warn)}
    if kind in ("tcp", "telnet"):
        match = _TCP.match(rest)
        if match is None:
            raise ParameterError(f"parse error: {text}")
        options = parse_opts(match["rest"] or "", warn=warn)
        spoken = {"telnet": "on"} if kind == "telnet" else {}
        return {"backend": "socket", **options, **spoken, "host": match["host"].strip("[]"), "port": match["port"]}
    raise ParameterError(
        f"'{text}' is not a valid char driver",
        hint="Known: unix:PATH, tcp:HOST:PORT, telnet:HOST:PORT, stdio, pty, null",
    )


def _typed(values: dict[str, Any]) -> Chardev:
    backend = values.pop("backend", "null")
    if backend not in BACKENDS:
        raise ParameterError(f"'{backend}' is not a valid char driver name", hint=f"Known: {', '.join(BACKENDS)}")
    cls = BACKENDS[backend]
    known = {member.name for member in plain_object(cls).members}
    for name in values:
        if name not in known:
            raise ParameterError(f"Invalid parameter '{name}'")
    for name in ("reconnect", "reconnect-ms"):
        if name in values and parse_integer(values[name]) is None:
            raise ParameterError(f"Parameter '{name}' expects a number")
    if backend in ("file", "pipe") and "path" not in values:
        raise ParameterError(f"chardev: {backend}: no {'filename' if backend == 'file' else 'device path'} given")
    options: Chardev = visit(cls, values, KEYVAL)
    if isinstance(options, SocketChardev):
        _validate(options)
    return options


def check_socket(options: SocketChardev) -> None:
    """Raise ParameterError where a socket's options, from wherever they come, contradict each other."""
    _validate_role(options)
    _validate_tls(options)
    if options.reconnect is not None and options.reconnect_ms is not None:
        raise ParameterError("'reconnect' and 'reconnect-ms' are mutually exclusive")


def _validate(options: SocketChardev) -> None:
    """Options that contradict each other, in QEMU's words and order."""
    addresses = [options.path, options.fd, options.host]
    if sum(address is not None for address in addresses) > 1:
        raise ParameterError("None or one of 'path', 'fd' or 'host' option required.")
    if options.host is not None and options.port is None:
        raise ParameterError("chardev: socket: no port given")
    if options.path is None and options.host is None:
        _descriptor(options)
    check_socket(options)


def _descriptor(options: SocketChardev) -> None:
    number = parse_integer(options.fd or "")
    if number is None or number < 0:
        raise ParameterError(f"Unable to parse FD number {options.fd or ''}")
    if options.reconnect is not None:
        raise ParameterError("'reconnect' option is incompatible with 'fd' address type")


def _validate_role(options: SocketChardev) -> None:
    if options.server:
        if options.reconnect is not None or options.reconnect_ms is not None:
            name = "reconnect" if options.reconnect is not None else "reconnect-ms"
            raise ParameterError(f"'{name}' option is incompatible with socket in server listen mode")
    elif options.wait is not None:
        raise ParameterError("'wait' option is incompatible with socket in client connect mode")


def _validate_tls(options: SocketChardev) -> None:
    if options.tls_creds is not None and options.host is None:
        kind = "unix" if options.path is not None else "fd"
        raise ParameterError(f"'tls_creds' option is incompatible with '{kind}' address type")
    if options.tls_authz is not None and options.tls_creds is None:
        raise ParameterError("'tls_authz' option requires 'tls_creds' option")
    if options.tls_authz is not None and not options.server:
        raise ParameterError("'tls_authz' option needs server=on: only a server checks who comes")


class MonitorOptions(QapiStruct):
    """``-mon`` and ``--monitor``: what speaks on a character device."""

    chardev: str
    id: str | None = None
    mode: str | None = None
    pretty: bool | None = None


_MODES: Final = ("readline", "control")


def parse_monitor(text: str, default_mode: str, *, older_syntax: bool, warn: Warn = _silent) -> MonitorOptions:
    """The argument of ``-mon`` (``older_syntax``: QemuOpts) or ``--monitor`` (keyval or JSON). Raises ParameterError.

    ``default_mode``: "readline" for ``-mon``, "control" for ``--monitor``.
    """
    # Imported here: it leads to the JSON parser, which key=value has no need of.
    from livedisk.emulator.qmp.keyval import parse_text

    if older_syntax:
        values, syntax = parse_opts(text, "chardev", warn=warn), KEYVAL
        node = describe(MonitorOptions)
        assert isinstance(node, Object)
        unknown = next((name for name in values if name not in {member.name for member in node.members}), None)
        if unknown is not None:
            raise ParameterError(f"Invalid parameter '{unknown}'")
    else:
        values, syntax = parse_text(text, "chardev")
    options = visit(MonitorOptions, values, syntax)
    mode = options.mode or default_mode
    if mode not in _MODES:
        raise ParameterError(f"Parameter 'mode' does not accept value '{mode}'", hint=f"Known: {', '.join(_MODES)}")
    if options.pretty is not None and mode == "readline":
        raise LiveDiskError("'pretty' is not compatible with HMP monitors")
    return msgspec.structs.replace(options, mode=mode)
