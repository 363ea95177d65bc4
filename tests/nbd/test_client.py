"""The client: its cores against scripted servers, its shell against our server and against QEMU's."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from kit import raw_nbd as raw
from kit.memory_export import MemoryExport
from kit.qemu import QemuNbd
from livedisk.nbd.client import NbdClient
from livedisk.nbd.client_handshake import ClientHandshake, ExportInfo, NegotiationFailed
from livedisk.nbd.client_transmission import ClientTransmission, ProtocolError
from livedisk.nbd.constants import Command, ReplyMode
from livedisk.nbd.export import Extent
from livedisk.nbd.handshake import Chosen, ServerHandshake
from livedisk.nbd.server import NbdServer

from .test_handshake import Directory, directory

MODES = list(ReplyMode)


def negotiate(client: ClientHandshake, exports: Directory, *, piece: int = 1 << 20) -> Chosen:
    """Let the two cores talk until the export is chosen, in pieces of any size."""
    server = ServerHandshake(exports)
    done, chosen = False, None
    while not done:
        output = server.take_output()
        assert output, "both wait for the other"
        for at in range(0, len(output), piece):
            done = client.receive(output[at : at + piece])
        sent = client.take_output()
        for at in range(0, len(sent), piece):
            for event in server.receive(sent[at : at + piece]):
                assert isinstance(event, Chosen)
                chosen = event
    assert chosen is not None
    return chosen


@pytest.mark.parametrize("best", MODES)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_the_two_handshakes_agree(best: ReplyMode, piece: int) -> None:
    client = ClientHandshake("ro", contexts=("qemu:allocation-depth", "x:y"), best=best)
    session = negotiate(client, directory(), piece=piece).session
    assert session.mode == client.info.mode == best
    assert client.info.contexts == dict(session.contexts) == ({} if not best else {1: "qemu:allocation-depth"})
    assert (client.info.size, client.info.min_block) == (4096, 1)


def test_block_sizes_and_description_are_taken_over() -> None:
    client = ClientHandshake("big")
    negotiate(client, directory())
    assert client.info.min_block == 512
    client = ClientHandshake("")
    negotiate(client, directory())
    assert client.info.description == "hello"


def feed(receive: Callable[[bytes], object], pieces: list[bytes]) -> None:
    for piece in pieces:
        receive(piece)


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


UNSUP = 2**31 + 1


def test_old_server_is_asked_less_and_less() -> None:
    client = ClientHandshake("x", contexts=("base:allocation",))
    client.receive(raw.GREETING)
    assert client.take_output() == b"\0\0\0\3" + raw.opt(raw.EXTENDED)
    client.receive(reply(raw.EXTENDED, UNSUP))
    assert client.take_output() == raw.opt(raw.STRUCTURED)
    client.receive(reply(raw.STRUCTURED, UNSUP))
    assert client.take_output() == raw.go(b"x", 3)
    client.receive(reply(raw.GO, UNSUP, b"what?"))
    assert client.take_output() == raw.opt(raw.EXPORT_NAME, b"x")
    assert client.receive(struct.pack(">QH", 4096, 0xD) + b"rest")
    assert (client.info.size, client.info.flags, client.leftover) == (4096, 0xD, b"rest")


def test_server_without_fixed_newstyle() -> None:
    client = ClientHandshake("x")
    client.receive(raw.GREETING[:16] + b"\0\0")
    assert client.take_output() == b"\0\0\0\0" + raw.opt(raw.EXPORT_NAME, b"x")
    assert not client.receive(struct.pack(">QH", 4096, 1) + bytes(123))
    assert client.receive(b"\0")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1", "does not speak NBD"),
        (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53" + bytes(8), "oldstyle"),
        (raw.GREETING + b"x" * 20, "Unexpected reply to option extended headers"),
        (raw.GREETING + reply(raw.LIST, 1), "Unexpected reply to option extended headers"),
        (raw.GREETING + reply(raw.EXTENDED, 99), "Unexpected reply type 0x63"),
        (raw.GREETING + reply(11, 1) + reply(raw.GO, 2**31 + 6, b"not here"), "Requested export not available"),
        (raw.GREETING + reply(11, 1) + reply(raw.GO, 2**31 + 2), "Denied by server for option 7"),
        (raw.GREETING + reply(11, 1) + reply(raw.GO, 1), "no NBD_INFO_EXPORT"),
        (raw.GREETING + reply(11, 1) + reply(raw.GO, 3, b"x"), "Unexpected reply type 0x3"),
    ],
)
def test_servers_that_cannot_be_used(data: bytes, text: str) -> None:
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
        client = ClientHandshake("x")
        with pytest.raises(NegotiationFailed, match=text):
            feed(client.receive, pieces)


def transmission(mode: ReplyMode) -> ClientTransmission:
    return ClientTransmission(ExportInfo(size=1 << 20, mode=mode, contexts={0: "base:allocation"}))


def chunk(flags: int, kind: int, cookie: int, payload: bytes = b"") -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload)) + payload


def data_chunk(flags: int, cookie: int, offset: int, data: bytes) -> bytes:
    return chunk(flags, 1, cookie, struct.pack(">Q", offset) + data)


def hole_chunk(flags: int, cookie: int, offset: int, length: int) -> bytes:
    return chunk(flags, 2, cookie, struct.pack(">QI", offset, length))


def error_chunk(flags: int, cookie: int, error: int, text: bytes) -> bytes:
    return chunk(flags, 0x8001, cookie, struct.pack(">IH", error, len(text)) + text)


@given(st.lists(st.integers(1, 400), max_size=8))
def test_replies_are_understood_however_they_are_cut(cuts: list[int]) -> None:
    core = transmission(ReplyMode.STRUCTURED)
    targets = [memoryview(bytearray(b"?" * 100)) for _ in range(3)]
    reads = [core.request(Command.READ, 1000, 100, target=target)[1] for target in targets]
    status = core.request(Command.BLOCK_STATUS, 0, 4096)[1]
    write = core.request(Command.WRITE, 0, 4)[1]
    stream = (
        data_chunk(0, 1, 1050, b"b" * 50)
        + hole_chunk(1, 2, 1000, 100)
        + chunk(1, 5, 4, struct.pack(">III", 0, 4096, 3))
        + struct.pack(">IIQ", 0x67446698, 0, 5)
        + data_chunk(0, 3, 1000, b"c" * 10)
        + data_chunk(1, 1, 1000, b"a" * 50)
        + error_chunk(1, 3, 5, b"bad block")
    )
    finished, at = [], 0
    for cut in [*cuts, len(stream)]:
        finished += core.receive(stream[at : at + cut])
        at += cut
    assert finished == [reads[1], status, write, reads[0], reads[2]]
    assert bytes(targets[0]) == b"a" * 50 + b"b" * 50
    assert bytes(targets[1]) == bytes(100)
    assert status.extents == {"base:allocation": [Extent(4096, 3)]}
    assert reads[2].error is not None
    assert (reads[2].error.errno, reads[2].error.strerror) == (5, "bad block")
    assert core.in_flight == 0


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\0\0\0\0" + bytes(20), "unknown magic"),
        (struct.pack(">IHHQQQ", 0x6E8A278C, 1, 0, 1, 0, 0), "extended reply where structured headers"),
        (chunk(1, 0, 9), "unknown request 9"),
        (struct.pack(">IIQ", 0x67446698, 0, 1), "simple reply where a structured one"),
        (chunk(1, 0, 1), "claims success but sent 0 of 100"),
        (data_chunk(1, 1, 1000, b"x" * 50), "claims success but sent 50 of 100"),
        (data_chunk(1, 1, 999, b"x" * 50), "outside its request"),
        (data_chunk(1, 1, 1051, b"x" * 50), "outside its request"),
        (data_chunk(1, 1, 1000, b"x" * 101), "data chunk of 109 bytes for a read of 100"),
        (chunk(1, 1, 1, bytes(8)), "data chunk of 8 bytes"),
        (data_chunk(0, 1, 1000, b"x" * 60) + hole_chunk(1, 1, 1050, 50), "sent twice"),
        (hole_chunk(0, 1, 1000, 0), "outside its request"),
        (chunk(0, 0, 1), "not the last"),
        (chunk(1, 77, 1, b"x"), "chunk of type 77"),
        (chunk(1, 77, 1) + b"", "chunk of type 77"),
        (chunk(1, 2, 1, bytes(11)), "chunk of type 2"),
        (struct.pack(">IHHQI", 0x668E33EF, 1, 5, 2, 1 << 30), "with 1073741824 bytes"),
        (chunk(1, 5, 2, struct.pack(">III", 7, 4096, 0)), "malformed block status"),
        (chunk(1, 5, 2, struct.pack(">I", 0)), "malformed block status"),
        (chunk(1, 5, 2, struct.pack(">III", 0, 0, 0)), "empty extent"),
        (chunk(0, 5, 2, struct.pack(">III", 0, 1, 0)) * 2, "twice"),
        (error_chunk(1, 1, 0, b""), "malformed error"),
        (chunk(1, 0x8001, 1, struct.pack(">IH", 5, 9) + b"short"), "malformed error"),
        (chunk(1, 0x8001, 1, b"x"), "without an error"),
    ],
)
def test_servers_that_break_the_protocol(data: bytes, text: str) -> None:
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
        core = transmission(ReplyMode.STRUCTURED)
        core.request(Command.READ, 1000, 100, target=memoryview(bytearray(100)))
        core.request(Command.BLOCK_STATUS, 0, 4096)
        with pytest.raises(ProtocolError, match=text):
            feed(core.receive, pieces)


def test_lengths_that_no_header_carries() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        transmission(ReplyMode.STRUCTURED).request(Command.TRIM, 0, 1 << 32)
    transmission(ReplyMode.EXTENDED).request(Command.TRIM, 0, 1 << 32)


# The shell.


def with_server(path: Path, test: Callable[[NbdServer, MemoryExport, str], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        server = NbdServer()
        export = MemoryExport(4 << 20, **options)
        server.add(export)
        await test(server, export, server.listen_unix(str(path / "s")))
        await server.close()

    uvloop.run(main())


@pytest.mark.parametrize("best", MODES)
@pytest.mark.parametrize("fast", [True, False])
def test_every_operation_in_every_mode(short_path: Path, best: ReplyMode, fast: bool) -> None:
    async def run(server: NbdServer, export: MemoryExport, path: str) -> None:
        client = await NbdClient.connect_unix(path, contexts=export.contexts, best=best)
        content = os.urandom(3 << 20)
        await client.write(5, content)
        assert await client.read(5, len(content)) == content
        assert await client.read(0, export.size) == bytes(export.data)
        await client.write(0, b"x" * 8192, fua=True)
        await client.write_zeroes(0, 4096, may_unmap=False, fua=True)
        await client.write_zeroes(4096, 4096, fast=True)
        await client.trim(8192, 4096, fua=True)
        await client.cache(0, 4096)
        await client.flush()
        assert bytes(export.data[:12288]) == bytes(12288)
        names = [name for name, _, _ in export.log]
        for name in ("write fua", "write_zeroes fua no_hole", "write_zeroes fast", "trim fua", "cache", "flush"):
            assert name in names
        if best:
            extents = await client.block_status(0, export.size)
            assert [extent.flags for extent in extents["base:allocation"]] == [0, 3, 0, 3]
            assert sum(extent.length for extent in extents["qemu:allocation-depth"]) == export.size
            one = await client.block_status(4096, 100, one=True)
            assert one["base:allocation"] == [Extent(100, 3)]
        with pytest.raises(OSError) as refused:
            await client.write(export.size - 1, b"xx")
        assert refused.value.errno == errno.ENOSPC
        await client.disconnect()

    with_server(short_path, run, fast=fast)


def test_many_requests_in_flight(short_path: Path) -> None:
    async def run(server: NbdServer, export: MemoryExport, path: str) -> None:
        client = await NbdClient.connect_unix(path)
        await asyncio.gather(*(client.write(i * 4096, bytes([i % 256]) * 4096) for i in range(1000)))
        assert client.in_flight == 0
        pieces = await asyncio.gather(*(client.read(i * 4096, 4096) for i in range(1000)))
        assert pieces == [bytes([i % 256]) * 4096 for i in range(1000)]
        await client.disconnect()

    with_server(short_path, run)


def test_disconnecting_takes_the_answers_that_are_under_way(short_path: Path) -> None:
    async def run(server: NbdServer, export: MemoryExport, path: str) -> None:
        client = await NbdClient.connect_unix(path)
        reading = [asyncio.create_task(client.read(i, 100_000)) for i in range(20)]
        await asyncio.sleep(0)
        await client.disconnect()
        for task in reading:
            assert len(await task) == 100_000
        with pytest.raises(ConnectionError):
            await client.read(0, 1)

    with_server(short_path, run)


def test_lost_connection_fails_what_is_under_way_and_all_later(short_path: Path) -> None:
    async def run(server: NbdServer, export: MemoryExport, path: str) -> None:
        gate = asyncio.Event()

        async def wait(*_: object) -> None:
            await gate.wait()

        export.hook = wait
        client = await NbdClient.connect_unix(path)
        flushing = asyncio.create_task(client.flush())
        await asyncio.sleep(0.01)
        removing = asyncio.create_task(server.remove_now(""))
        with pytest.raises(ConnectionError):
            await flushing
        gate.set()
        await removing
        with pytest.raises(ConnectionError):
            await client.read(0, 1)

    with_server(short_path, run)


def test_refusals_tell_why(short_path: Path) -> None:
    async def run(server: NbdServer, export: MemoryExport, path: str) -> None:
        with pytest.raises(NegotiationFailed, match="Requested export not available"):
            await NbdClient.connect_unix(path, "nope")
        with pytest.raises(FileNotFoundError):
            await NbdClient.connect_unix(path + "x")
        client = await NbdClient.connect_unix(path)
        with pytest.raises(OSError, match="does not support trim"):
            await client.trim(0, 512)
        with pytest.raises(PermissionError, match="Export is read-only"):
            await client.write(0, b"x")
        client.abort()

    with_server(short_path, run, read_only=True)


def test_against_qemus_server(short_path: Path) -> None:
    image = short_path / "image"
    image.write_bytes(bytes(1 << 20))
    with QemuNbd(short_path, image, "-x", "disk") as server:

        async def run() -> None:
            for best in MODES:
                client = await NbdClient.connect_unix(
                    str(server.socket), "disk", contexts=("base:allocation",), best=best
                )
                assert (client.info.mode, client.info.size) == (best, 1 << 20)
                await client.write(4096, bytes([best + 1]) * 70_000, fua=True)
                assert await client.read(0, 8192) == bytes(4096) + bytes([best + 1]) * 4096
                await client.write_zeroes(0, 1 << 20)
                if best:
                    extents = (await client.block_status(0, 1 << 20))["base:allocation"]
                    assert sum(extent.length for extent in extents) == 1 << 20
                with pytest.raises(OSError, match="operation past EOF" if best else "Invalid argument"):
                    await client.read(1 << 20, 1)
                await client.disconnect()

        uvloop.run(run())
