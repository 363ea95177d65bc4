"""NBD by hand: the bytes of options and requests, and a blocking socket that sends and takes them apart.

Independent of `livedisk.nbd`, whose servers it tests, and used on QEMU's server alike: written from the specification, no shared
code, so that a mistake is not made on both sides.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = 1, 2, 3, 5, 6, 7, 8, 9, 10, 11
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST, PAYLOAD = (1 << bit for bit in range(6))
ACK = 1
GREETING = b"NBDMAGICIHAVEOPT\x00\x03"


def opt(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """An option; ``length`` to lie about its data."""
    return b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length) + data


def string(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def go(name: bytes = b"", *items: int, number: int = GO) -> bytes:
    return opt(number, string(name) + struct.pack(f">H{len(items)}H", len(items), *items))


def meta(number: int, name: bytes, *queries: bytes) -> bytes:
    return opt(number, string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries)))


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    flags: int = 0,
    *,
    cookie: int = 7,
    payload: bytes = b"",
    extended: bool = False,
    magic: int | None = None,
) -> bytes:
    """A request with its payload, in compact or extended form."""
    form, usual = (">IHHQQQ", 0x21E41C71) if extended else (">IHHQQI", 0x25609513)
    return struct.pack(form, magic or usual, flags, command, cookie, offset, length) + payload


def option_replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """All option replies in ``data`` as (option, type, payload); fails on anything else."""
    found = []
    while data:
        magic, number, kind, length = struct.unpack_from(">QIII", data)
        assert magic == 0x3E889045565A9
        assert len(data) >= 20 + length
        found.append((number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


class Gone(Exception):
    """The server closed the connection."""


class RawClient:
    """A blocking connection to a unix socket path or a (host, port)."""

    def __init__(self, address: str | tuple[str, int], *, timeout: float = 5) -> None:
        if isinstance(address, str):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(timeout)
            self.sock.connect(address)
        else:
            self.sock = socket.create_connection(address, timeout)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def __del__(self) -> None:
        self.sock.close()  # tests that only ask `with ...:` for what follows the connection need no names

    def send(self, *data: bytes) -> None:
        try:
            self.sock.sendall(b"".join(data))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Gone from error

    def take(self, count: int) -> bytes:
        """Exactly ``count`` bytes; `Gone` if the connection ends before."""
        data = bytearray()
        while len(data) < count:
            try:
                piece = self.sock.recv(count - len(data))
            except ConnectionResetError as error:
                raise Gone from error
            if not piece:
                raise Gone
            data += piece
        return bytes(data)

    def gone(self) -> bool:
        """Whether the server closes the connection (waits for it up to the timeout); data before that is a failure."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    def hello(self, flags: int = 3) -> RawClient:
        assert self.take(18) == GREETING
        self.send(struct.pack(">I", flags))
        return self

    def option(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """Send an option and take its replies up to the final one."""
        self.send(data)
        found: list[tuple[int, int, bytes]] = []
        while not found or not (found[-1][1] == ACK or found[-1][1] >> 31):
            magic, number, kind, length = struct.unpack(">QIII", self.take(20))
            assert magic == 0x3E889045565A9
            found.append((number, kind, self.take(length)))
        return found

    def enter(self, name: bytes = b"", *, mode: int = 0, contexts: tuple[bytes, ...] = ()) -> RawClient:
        """Negotiate ``mode`` (0 simple, 1 structured, 2 extended) and ``contexts`` and go."""
        self.hello()
        if mode:
            assert self.option(opt(STRUCTURED if mode == 1 else EXTENDED))[-1][1] == ACK
        if contexts:
            assert self.option(meta(SET_META, name, *contexts))[-1][1] == ACK
        assert self.option(go(name))[-1][1] == ACK
        return self

    def reply(self, read: int = 0) -> list[tuple[Any, ...]]:
        """One whole reply: ("simple", error, cookie, data) or a list of ("chunk", flags, type, cookie, offset, payload).

        ``read`` is the length of the READ that a simple reply answers.
        """
        chunks: list[tuple[Any, ...]] = []
        while True:
            magic = struct.unpack(">I", self.take(4))[0]
            if magic == 0x67446698:
                error, cookie = struct.unpack(">IQ", self.take(12))
                return [("simple", error, cookie, b"" if error else self.take(read))]
            if magic == 0x668E33EF:
                flags, kind, cookie, length = struct.unpack(">HHQI", self.take(16))
                offset = None
            else:
                assert magic == 0x6E8A278C, hex(magic)
                flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self.take(28))
            chunks.append(("chunk", flags, kind, cookie, offset, self.take(length)))
            if flags & 1:
                return chunks
