"""Servers that lie, break the protocol or go away in the middle of a word: an error that says so, never a hang or a crash."""

from __future__ import annotations

import asyncio
import errno
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from contract.disks import new_graph, opened, parse, read

from kit import raw_nbd as raw
from livedisk.emulator.block.status import block_status
from livedisk.emulator.errors import BlockError

SIZE = 1 << 20
FLAGS = 0b1111_1101
Answer = Callable[[int, int, int, int], bytes | None]
"""Command, cookie, offset and length to what is sent; None: the connection is closed."""


def reply(option: int, kind: int, body: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(body)) + body


def chunk(flags: int, kind: int, cookie: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, size) + payload


def simple(cookie: int, error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie)


def data_chunk(flags: int, cookie: int, offset: int, content: bytes) -> bytes:
    return chunk(flags, 1, cookie, struct.pack(">Q", offset) + content)


def honest(command: int, cookie: int, offset: int, length: int) -> bytes | None:
    if command == raw.READ:
        return data_chunk(1, cookie, offset, b"\x11" * length)
    if command == raw.STATUS:
        return chunk(1, 5, cookie, struct.pack(">III", 0, length, 0))
    return simple(cookie)


class Puppet:
    """A server that shakes hands and then answers as it is told. ``options`` replaces its answers to options."""

    def __init__(
        self, answer: Answer = honest, *, size: int = SIZE, blocks: tuple[int, int, int] | None = None
    ) -> None:
        self.answer = answer
        self.greeting = raw.GREETING
        self.requests: list[tuple[int, int, int]] = []
        self.flags: list[int] = []
        self.clients: list[asyncio.Task[None]] = []
        blocks_info = reply(raw.GO, 3, struct.pack(">HIII", 3, *blocks)) if blocks else b""
        self.options = {
            raw.EXTENDED: reply(raw.EXTENDED, 2**31 + 1),
            raw.STRUCTURED: reply(raw.STRUCTURED, 1),
            raw.SET_META: reply(raw.SET_META, 4, struct.pack(">I", 0) + b"base:allocation") + reply(raw.SET_META, 1),
            raw.GO: reply(raw.GO, 3, struct.pack(">HQH", 0, size, FLAGS)) + blocks_info + reply(raw.GO, 1),
        }

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.clients.append(task)
        try:
            await self.serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, struct.error, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def negotiate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.greeting)
        await reader.readexactly(4)
        option = 0
        while option != raw.GO:
            _, option, length = struct.unpack(">QII", await reader.readexactly(16))
            await reader.readexactly(length)
            writer.write(self.options[option])

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.negotiate(reader, writer)
        while True:
            header = await reader.readexactly(28)
            _, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", header)
            if command == raw.DISC:
                break
            if command == raw.WRITE:
                await reader.readexactly(length)
            self.requests.append((command, offset, length))
            self.flags.append(flags)
            sent = self.answer(command, cookie, offset, length)
            if sent is None:
                break
            writer.write(sent)
            await writer.drain()


@asynccontextmanager
async def served(folder: Path, puppet: Puppet) -> AsyncIterator[dict[str, Any]]:
    server = await asyncio.start_unix_server(puppet.connected, folder / "server")
    try:
        yield {"driver": "nbd", "server": {"type": "unix", "path": str(folder / "server")}, "discard": "unmap"}
    finally:
        server.close()
        for client in puppet.clients:
            client.cancel()
        await asyncio.gather(*puppet.clients)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(limited())


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda command, cookie, offset, length: b"\0" * 64, "unknown magic"),
        (lambda command, cookie, offset, length: simple(cookie + 5), "unknown request"),
        (lambda command, cookie, offset, length: simple(cookie), "simple reply where a structured one"),
        (lambda command, cookie, offset, length: data_chunk(1, cookie, offset, b"x"), "claims success"),
        (lambda command, cookie, offset, length: data_chunk(1, cookie, offset - 1, b"x" * length), "outside"),
        (lambda command, cookie, offset, length: data_chunk(1, cookie, offset + 1, b"x" * length), "outside"),
        (lambda command, cookie, offset, length: chunk(1, 1, cookie, length=1 << 31), "data chunk of"),
        (lambda command, cookie, offset, length: chunk(1, 3, cookie, length=1 << 31), "chunk of type 3"),
        (lambda command, cookie, offset, length: chunk(0, 0x8001, cookie, struct.pack(">IH", 5, 0)) * 5000, "chunks"),
        (lambda command, cookie, offset, length: chunk(1, 0x8001, cookie, b"\0"), "error chunk"),
    ],
)
def test_a_server_that_breaks_the_protocol_is_not_asked_again(answer: Answer, text: str, short_path: Path) -> None:
    async def test() -> None:
        puppet = Puppet(answer)
        async with served(short_path, puppet) as options, opened({**options, "reconnect-delay": 3600}) as disk:
            others = [asyncio.ensure_future(read(disk, 4096 * n, 4096)) for n in range(1, 4)]
            with pytest.raises(OSError, match=text) as caught:
                await read(disk, 0x8000, 4096)
            assert caught.value.errno == errno.EIO
            assert "NBD server" in str(caught.value)
            assert {error.errno for error in await asyncio.gather(*others, return_exceptions=True)} == {errno.EIO}  # type: ignore[union-attr]
            asked = len(puppet.requests)
            puppet.answer = honest
            with pytest.raises(OSError, match=text):
                await read(disk, 0, 4096)
            assert len(puppet.requests) == asked

    run(test)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (struct.pack(">III", 0, 0, 0), "empty extent"),
        (struct.pack(">I", 0), "malformed"),
        (struct.pack(">III", 9, 4096, 0), "malformed"),
        (struct.pack(">III", 0, 4096, 0) + b"\0", "malformed"),
    ],
)
def test_block_status_that_cannot_be(flags: bytes, text: str, short_path: Path) -> None:
    async def test() -> None:
        puppet = Puppet(lambda command, cookie, offset, length: chunk(1, 5, cookie, flags))
        async with served(short_path, puppet) as options, opened(options) as disk:
            with pytest.raises(OSError, match=text):
                await block_status(disk.node, 0, SIZE)

    run(test)


def test_block_status_that_is_too_long_or_not_of_whole_blocks(short_path: Path) -> None:
    async def test() -> None:
        answers = iter(
            [struct.pack(">III", 0, SIZE * 2, 3), struct.pack(">III", 0, 700, 3), struct.pack(">III", 0, 100, 3)]
        )
        puppet = Puppet(lambda command, cookie, offset, length: chunk(1, 5, cookie, next(answers)))
        async with served(short_path, puppet) as options, opened(options) as disk:
            status = await block_status(disk.node, 0, SIZE)
            assert (status.length, status.zero, status.data) == (SIZE, True, False)
            status = await block_status(disk.node, 0, SIZE)
            assert (status.length, status.zero, status.data) == (512, True, False)
            status = await block_status(disk.node, 4096, SIZE - 4096)
            assert (status.length, status.zero, status.data) == (512, False, True)

    run(test)


def test_block_status_that_tells_nothing_is_data_but_no_clean_bitmap(short_path: Path) -> None:
    bitmap = b"qemu:dirty-bitmap:b"

    async def test() -> None:
        puppet = Puppet(lambda command, cookie, offset, length: chunk(1, 0, cookie))
        async with served(short_path, puppet) as options, opened(options) as disk:
            status = await block_status(disk.node, 0, SIZE)
            assert (status.length, status.zero, status.data) == (SIZE, False, True)
        told = struct.pack(">I", 0) + bitmap
        puppet.options[raw.SET_META] = reply(raw.SET_META, 4, told) + reply(raw.SET_META, 1)
        (short_path / "server").unlink()
        async with (
            served(short_path, puppet) as options,
            opened({**options, "x-dirty-bitmap": bitmap.decode()}) as disk,
        ):
            with pytest.raises(OSError, match="told nothing of qemu:dirty-bitmap:b at 0") as caught:
                await block_status(disk.node, 0, SIZE)
            assert caught.value.errno == errno.EIO

    run(test)


def test_a_server_that_goes_away_in_the_middle_of_an_answer(short_path: Path) -> None:
    """The read is sent again, and what came of the first answer does not show."""

    async def test() -> None:
        puppet = Puppet()
        whole = puppet.answer

        def half(command: int, cookie: int, offset: int, length: int) -> bytes | None:
            if len(puppet.requests) == 1:
                return data_chunk(1, cookie, offset, b"\xee" * length)[:-100]
            if len(puppet.requests) == 2:
                return None
            return whole(command, cookie, offset, length)

        puppet.answer = half
        async with served(short_path, puppet) as options, opened({**options, "reconnect-delay": 3600}) as disk:
            first = asyncio.ensure_future(read(disk, 0, 1 << 17))
            await asyncio.sleep(0.05)
            assert await read(disk, 0, 512) == b"\x11" * 512
            assert await first == b"\x11" * (1 << 17)

    run(test)


@pytest.mark.parametrize(
    ("error", "expected"), [(5, errno.EIO), (28, errno.ENOSPC), (108, errno.ESHUTDOWN), (12345, errno.EINVAL)]
)
def test_errors_arrive_as_they_are(error: int, expected: int, short_path: Path) -> None:
    async def test() -> None:
        puppet = Puppet(lambda command, cookie, offset, length: simple(cookie, error))
        async with served(short_path, puppet) as options, opened(options) as disk:
            for work in (read(disk, 0, 512), disk.write(0, memoryview(bytes(512))), disk.write_zeroes(0, 512)):
                with pytest.raises(OSError) as caught:
                    await work
                assert caught.value.errno == expected
            puppet.answer = honest
            assert await read(disk, 0, 512) == b"\x11" * 512

    run(test)


def test_an_answer_before_the_payload_is_read_leaves_the_buffer_to_the_caller(short_path: Path) -> None:
    """The server answers a write as soon as it has its header. What is sent afterwards is what the caller gave."""
    received = bytearray()

    class Hasty(Puppet):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self.negotiate(reader, writer)
            _, _, _, cookie, _, length = struct.unpack(">IHHQQI", await reader.readexactly(28))
            writer.write(simple(cookie))
            await writer.drain()
            await asyncio.sleep(0.1)
            received.extend(await reader.readexactly(length))
            while header := await reader.read(28):
                if struct.unpack(">IHHQQI", header)[2] == raw.DISC:
                    break
                writer.write(simple(struct.unpack(">IHHQQI", header)[3]))

    async def test() -> None:
        async with served(short_path, Hasty(size=64 << 20)) as options, opened(options) as disk:
            content = bytearray(b"\x77" * (32 << 20))
            await disk.write(0, memoryview(content))
            content[:] = bytes(len(content))
            await disk.flush()
            assert bytes(received) == b"\x77" * len(content)

    run(test)


def lie(**options: bytes) -> Callable[[Puppet], None]:
    def change(puppet: Puppet) -> None:
        for name, sent in options.items():
            if name == "greeting":
                puppet.greeting = sent
            else:
                puppet.options[getattr(raw, name)] = sent

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lie(greeting=b"SSH-2.0-OpenSSH_9.2p1\r\n"), "does not speak NBD"),
        (lie(greeting=b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53" + bytes(140)), "oldstyle"),
        (lie(EXTENDED=b"x" * 64), "Unexpected reply to option"),
        (lie(EXTENDED=struct.pack(">QIII", 0x3E889045565A9, 11, 1, 1 << 31)), "Unexpected reply to option"),
        (lie(SET_META=reply(raw.SET_META, 4, struct.pack(">I", 1) + b"x" * 5000)), "Unexpected reply type"),
        (
            lie(SET_META=b"".join(reply(raw.SET_META, 4, struct.pack(">I", n) + b"x") for n in range(9))),
            "Unexpected reply",
        ),
        (lie(GO=reply(raw.GO, 1)), "no NBD_INFO_EXPORT"),
        (lie(GO=reply(raw.GO, 3, b"x")), "Unexpected reply type"),
        (
            lie(GO=reply(raw.GO, 3, struct.pack(">HQH", 0, 1 << 63, FLAGS)) + reply(raw.GO, 1)),
            "export of 9223372036854775808",
        ),
        (
            lie(GO=reply(raw.GO, 3, struct.pack(">HQH", 0, (1 << 63) - 1, FLAGS)) + reply(raw.GO, 1)),
            "Could not refresh total sector count: File too large",
        ),
        (lie(GO=reply(raw.GO, 2**31 + 2, b"go away")), r"Denied by server for option 7 \(go\)"),
        (lie(GO=reply(raw.GO, 2**31 + 5)), r"Server requires TLS for option 7 \(go\)"),
        (lie(GO=b""), "did not answer in time"),
    ],
)
def test_handshakes_that_come_to_nothing(change: Callable[[Puppet], None], text: str, short_path: Path) -> None:
    async def test() -> None:
        puppet = Puppet()
        change(puppet)
        async with served(short_path, puppet) as options:
            graph = new_graph()
            with pytest.raises(BlockError, match=text):
                await graph.open(parse({**options, "open-timeout": 1}))
            assert not graph.nodes

    run(test)


@pytest.mark.parametrize(
    ("size", "blocks", "text"),
    [
        (SIZE, (0, 4096, 1 << 25), "minimum block size of 0"),
        (SIZE, (3, 4096, 1 << 25), "minimum block size of 3"),
        (SIZE, (1 << 17, 1 << 17, 1 << 25), "minimum block size of 131072"),
        (SIZE, (4096, 512, 1 << 25), "preferred block size of 512"),
        (SIZE, (512, 1000, 1 << 25), "preferred block size of 1000"),
        (SIZE, (4096, 4096, 512), "maximum block size of 512"),
        (SIZE + 512, (4096, 4096, 1 << 25), "no multiple of its minimum block size"),
    ],
)
def test_block_sizes_that_cannot_be(size: int, blocks: tuple[int, int, int], text: str, short_path: Path) -> None:
    async def test() -> None:
        async with served(short_path, Puppet(size=size, blocks=blocks)) as options:
            with pytest.raises(BlockError, match=text):
                await new_graph().open(parse(options))

    run(test)


def test_durable_writes_are_one_request(short_path: Path) -> None:
    async def test() -> None:
        puppet = Puppet()
        async with served(short_path, puppet) as options, opened({"driver": "raw", "file": options}) as disk:
            await disk.write(0, memoryview(bytes(4096)), fua=True)
            assert puppet.requests == [(raw.WRITE, 0, 4096)]
            assert puppet.flags == [raw.FUA]

    run(test)


def test_requests_keep_to_the_block_sizes(short_path: Path) -> None:
    async def test() -> None:
        puppet = Puppet(blocks=(4096, 4096, 65536))
        async with served(short_path, puppet) as options, opened(options) as disk:
            assert len(await read(disk, 100, 200_000)) == 200_000
            await disk.write(100, memoryview(bytes(200_000)))
            await disk.write_zeroes(100, 200_000)
            await disk.discard(100, 200_000)
            await disk.prefetch(100, 200_000)
            await block_status(disk.node, 100, 200_000)
            assert {command for command, _, _ in puppet.requests} == {
                raw.READ, raw.WRITE, raw.ZEROES, raw.TRIM, raw.STATUS
            }  # fmt: skip
            for command, offset, length in puppet.requests:
                assert offset % 4096 == length % 4096 == 0
                assert 0 < length <= (65536 if command in (raw.READ, raw.WRITE) else SIZE)

    run(test)


def test_a_size_that_is_not_whole_sectors(short_path: Path) -> None:
    async def test() -> None:
        puppet = Puppet(size=1000)
        async with served(short_path, puppet) as options, opened(options) as disk:
            assert disk.size == 1024
            assert await read(disk, 512, 512) == b"\x11" * 488 + bytes(24)
            await disk.write(512, memoryview(b"\x22" * 488 + bytes(24)))
            await disk.write_zeroes(512, 512)
            with pytest.raises(OSError) as caught:
                await disk.write(512, memoryview(b"\x22" * 512))
            assert caught.value.errno == errno.ENOSPC
            status = await block_status(disk.node, 1000, 24)
            assert (status.zero, status.length) == (True, 24)
            assert all(offset + length <= 1000 for _, offset, length in puppet.requests)

    run(test)
