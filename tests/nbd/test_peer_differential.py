"""The same bytes to QEMU's NBD server and to ours: the replies must be the same bytes.

The peer is the oracle for everything that the specification leaves open: wording, order, which check comes first. Both
servers serve the same content. We differ on purpose in one thing: QEMU sends EINVAL for every request that it refuses, and
the specification wants EPERM for writes to a read-only export and ENOSPC for writes beyond the end (`expected_error`).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from kit import raw_nbd as raw
from kit.memory_export import MemoryExport
from kit.places import pattern, short_folder
from kit.qemu import StorageDaemon
from kit.raw_nbd import Gone, RawClient, go, meta, opt, request

from .conftest import Served

SIZE = 1 << 20
DATA = pattern(128 << 10)


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    """Socket paths of QEMU's and our server; exports "" (writable) and "ro" (with allocation depth)."""
    with short_folder() as folder:
        image = folder / "image"
        image.write_bytes(DATA)
        with image.open("r+b") as file:
            file.truncate(SIZE)
        file_node = f"driver=file,filename={image},discard=unmap"
        daemon = StorageDaemon(
            folder,
            *("--blockdev", f"{file_node},node-name=rw"),
            *("--blockdev", f"driver=file,filename={image},node-name=ro,read-only=on"),
            *("--export", "nbd,id=a,node-name=rw,name=,writable=on,description=hello"),
            *("--export", "nbd,id=b,node-name=ro,name=ro,allocation-depth=on"),
        )
        with daemon:
            served = Served(folder / "ours")
            try:
                served.call(served.server.add, ours("", contexts=("base:allocation",), description="hello"))
                served.call(served.server.add, ours("ro", read_only=True))
                yield {"qemu": str(daemon.nbd_socket), "ours": served.path}
            finally:
                served.stop()


def ours(name: str, **options: Any) -> MemoryExport:
    """Our image: data, then a hole. To file systems what is not a hole is allocated: depth 1 all over."""
    export = _FileLike(SIZE, name, **options)
    export.fill(0, DATA)
    return export


class _FileLike(MemoryExport):
    async def block_status(self, context: str, offset: int, length: int, limit: int) -> list[Any]:
        extents = await super().block_status(context, offset, length, limit)
        if context == "base:allocation":
            return extents
        return [type(extents[0])(length, 1)]


def exchange(path: str, flags: int, *pieces: bytes) -> bytes:
    """Everything the server says to a client that says all this and then no more; b"!" at the end if it hung up."""
    with RawClient(path, timeout=0.3) as client:
        said = client.take(18)
        with suppress(Gone):
            client.send(struct.pack(">I", flags), *pieces)
        try:
            while True:
                piece = client.sock.recv(1 << 20)
                if not piece:
                    return said + b"!"
                said += piece
        except TimeoutError:
            return said
        except ConnectionError:
            return said + b"!"


OPTIONS = {
    "list": opt(raw.LIST),
    "list with data": opt(raw.LIST, b"abc"),
    "abort": opt(raw.ABORT),
    "starttls": opt(raw.STARTTLS),
    "starttls with data": opt(raw.STARTTLS, b"x"),
    "unknown": opt(4) + opt(99, b"data") + opt(2**32 - 1),
    "unknown long": opt(77, b"x" * 70000),
    "too long": opt(77, length=33 << 20),
    "info": go(number=raw.INFO) + go(b"ro", number=raw.INFO),
    "info items": go(b"", 1, 2, 3, 4, 99, number=raw.INFO) + go(b"ro", 1, number=raw.INFO),
    "info missing": go(b"nope", number=raw.INFO) + go(b"n" * 100, number=raw.INFO) + go(b"n" * 5000, number=raw.INFO),
    "info nul": go(b"a\0b", number=raw.INFO),
    "info not utf-8": go(b"\xff\xfe", number=raw.INFO),
    **{f"short go {data!r}": opt(raw.GO, data) for data in (b"", b"\0\0", b"\0\0\0\5abc", bytes(4), bytes(5) + b"\1")},
    "long go": opt(raw.GO, bytes(5) + b"\1\0\1\0"),
    "structured twice": opt(raw.STRUCTURED, b"x") + opt(raw.STRUCTURED) + opt(raw.STRUCTURED),
    "extended twice": opt(raw.EXTENDED, b"x") + opt(raw.EXTENDED) + opt(raw.EXTENDED) + opt(raw.STRUCTURED),
    "structured then extended": opt(raw.STRUCTURED) + opt(raw.EXTENDED) + opt(raw.STRUCTURED),
    "flags structured": opt(raw.STRUCTURED) + go(number=raw.INFO) + go(b"ro", number=raw.INFO),
    "flags extended": opt(raw.EXTENDED) + go(number=raw.INFO) + go(b"ro", number=raw.INFO),
    "set before structured": meta(raw.SET_META, b"", b"base:allocation"),
    "list before structured": meta(raw.LIST_META, b"", b"base:"),
    "meta of nothing": meta(raw.LIST_META, b"nope", b"base:"),
    **{
        f"short meta {data!r}": opt(raw.LIST_META, data)
        for data in (b"", bytes(4), bytes(7) + b"\5", bytes(7) + b"\1\0\0\0\5ab")
    },
}
QUERIES: list[tuple[bytes, ...]] = [
    (),
    (b"",),
    (b"base:",),
    (b"base:allocation",),
    (b"base:alloc",),
    (b"base:allocation2",),
    (b"base",),
    (b"qemu:",),
    (b"qemu",),
    (b"qemu:allocation-depth",),
    (b"qemu:dirty-bitmap:",),
    (b"other:",),
    (b"qemu:", b"base:"),
    (b"qemu:allocation-depth", b"base:allocation", b"base:allocation"),
    (b"x" * 300, b"x" * 5000),
    (b"base:\0allocation",),
]
for index, queries in enumerate(QUERIES):
    for name in (b"", b"ro"):
        listing = meta(raw.LIST_META, name, *queries)
        OPTIONS[f"meta {name!r} {index}"] = opt(raw.STRUCTURED) + listing + meta(raw.SET_META, name, *queries)


@pytest.mark.parametrize("what", OPTIONS)
def test_options(servers: dict[str, str], what: str) -> None:
    # ABORT at the end, so that nobody waits for a timeout.
    end = b"" if what in ("abort", "too long") else opt(raw.ABORT)
    said = {who: exchange(path, 3, OPTIONS[what], end) for who, path in servers.items()}
    assert said["ours"] == said["qemu"]


@pytest.mark.parametrize("flags", [0, 1, 2, 4, 7, 0x80000000])
@pytest.mark.parametrize("option", [opt(raw.LIST) + opt(raw.ABORT), opt(raw.EXPORT_NAME) + request(raw.DISC)])
def test_client_flags(servers: dict[str, str], flags: int, option: bytes) -> None:
    said = {who: exchange(path, flags, option) for who, path in servers.items()}
    assert said["ours"] == said["qemu"]


@pytest.mark.parametrize("option", [opt(1, b"nope"), opt(1, b"x" * 5000), b"IHAVEOPX" + bytes(8)])
def test_ends_of_negotiation(servers: dict[str, str], option: bytes) -> None:
    said = {who: exchange(path, 3, option) for who, path in servers.items()}
    assert said["ours"] == said["qemu"]


END = SIZE - 512
COMMANDS: dict[str, tuple[Any, ...]] = {
    "read": (raw.READ, 0, 512),
    "read odd": (raw.READ, 3, 5),
    "read nothing": (raw.READ, 0, 0),
    "read hole": (raw.READ, 512 << 10, 4096),
    "read hole whole": (raw.READ, 512 << 10, 4096, raw.DF),
    "read fua": (raw.READ, 0, 512, raw.FUA),
    "read no hole": (raw.READ, 0, 512, raw.NO_HOLE),
    "read past": (raw.READ, END, 1024),
    "read far past": (raw.READ, 2**64 - 1, 512),
    "read huge": (raw.READ, 0, (32 << 20) + 1),
    "flush": (raw.FLUSH, 0, 0),
    "flush with range": (raw.FLUSH, 5, 7),
    "flush past": (raw.FLUSH, 0, 2 * SIZE),
    "flush flags": (raw.FLUSH, 0, 0, raw.NO_HOLE),
    "trim": (raw.TRIM, 900 << 10, 4096),
    "trim nothing": (raw.TRIM, 0, 0),
    "trim past": (raw.TRIM, END, 1024),
    "trim flags": (raw.TRIM, 0, 512, raw.NO_HOLE),
    "cache": (raw.CACHE, 0, 4096),
    "cache past": (raw.CACHE, SIZE, 4096),
    "cache huge": (raw.CACHE, 0, 33 << 20),
    "zeroes": (raw.ZEROES, 950 << 10, 4096),
    "zeroes fast": (raw.ZEROES, 950 << 10, 4096, raw.FAST),
    "zeroes flags": (raw.ZEROES, 0, 512, raw.REQ_ONE),
    "zeroes past": (raw.ZEROES, END, 1024),
    "status": (raw.STATUS, 0, SIZE),
    "status one": (raw.STATUS, 0, SIZE, raw.REQ_ONE),
    "status inside": (raw.STATUS, 4096, 8192),
    "status nothing": (raw.STATUS, 0, 0),
    "status past": (raw.STATUS, END, 1024),
    "status flags": (raw.STATUS, 0, 512, raw.DF),
    "write past": (raw.WRITE, END, 1024),
    "write flags": (raw.WRITE, 0, 512, raw.DF),
    "write strange flags": (raw.WRITE, 0, 512, 0x80),
    "write huge": (raw.WRITE, 0, (32 << 20) + 1),
    "unknown": (42, 0, 512),
    "resize": (8, 0, 0),
    "unknown flags": (42, 0, 0, 0x20),
}


@pytest.mark.parametrize("export", [b"", b"ro"])
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("what", COMMANDS)
def test_commands(servers: dict[str, str], what: str, mode: int, export: bytes) -> None:
    contexts = (b"base:allocation", b"qemu:allocation-depth") if mode else ()
    command, offset, length, *flags = COMMANDS[what]
    write = command == raw.WRITE and length < 1 << 20
    bits = (flags or [0])[0] | (raw.PAYLOAD if write and mode == 2 else 0)
    asked = request(command, offset, length, bits, payload=b"w" * length if write else b"", extended=mode == 2)
    said = {}
    for who, path in servers.items():
        with RawClient(path).enter(export, mode=mode, contexts=contexts) as client:
            client.send(asked)
            said[who] = client.reply(length if command == raw.READ else 0)
    qemu = [with_error(reply, expected_error(what, export)) for reply in said["qemu"]]
    assert said["ours"] == qemu


def expected_error(what: str, export: bytes) -> int | None:
    """The error number that ours must have where it is not QEMU's."""
    if export == b"ro" and what.split()[0] in ("write", "zeroes", "trim") and what != "write huge":
        return errno.EPERM
    return errno.ENOSPC if what in ("write past", "zeroes past") else None


def with_error(reply: tuple[Any, ...], error: int | None) -> tuple[Any, ...]:
    """QEMU's reply with that error number instead of its EINVAL."""
    if error is None:
        return reply
    if reply[0] == "simple":
        assert reply[1] == errno.EINVAL
        return (*reply[:1], error, *reply[2:])
    assert reply[5].startswith(struct.pack(">I", errno.EINVAL))
    return (*reply[:5], struct.pack(">I", error) + reply[5][4:])
