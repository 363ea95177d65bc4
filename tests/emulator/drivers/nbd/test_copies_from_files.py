"""What a job copies from a file to a server over a Unix socket: the kernel moves it, whatever happens on the way."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from contract.disks import opened

from kit import raw_nbd as raw
from livedisk.emulator.block.extents import Extents, SourceUnreadable
from livedisk.emulator.block.hostfile import HostFile
from livedisk.emulator.drivers.nbd import driver
from livedisk.nbd import file_payload
from livedisk.nbd.client_connection import ClientConnection
from livedisk.nbd.file_payload import FilePayload, Sending

from .test_lying_servers import Puppet, simple
from .test_lying_servers import served as puppet_served
from .test_outages import SIZE, begun, run, served

CONTENT = random.Random(5).randbytes(SIZE)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[HostFile]:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDONLY)
    yield HostFile(fd, str(path))
    os.close(fd)


def sent(payload: FilePayload) -> bytes:
    """What arrives, by as many calls as it takes."""
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        sending, arrived = Sending(payload), bytearray()
        while not sending.over:
            try:
                assert sending.send(here) > 0
            except BlockingIOError:
                arrived += there.recv(1 << 20)
        here.shutdown(socket.SHUT_WR)
        while more := there.recv(1 << 20):
            arrived += more
        return bytes(arrived)


def test_parts_of_files_and_zeroes_in_their_order(file: HostFile) -> None:
    payload = FilePayload([(file.fd, 100, 200_000), (-1, 0, 300_000), (file.fd, 0, 0), (file.fd, 7, 1)])
    assert len(payload) == 500_001
    assert sent(payload) == CONTENT[100:200_100] + bytes(300_000) + CONTENT[7:8]
    assert sent(payload) == CONTENT[100:200_100] + bytes(300_000) + CONTENT[7:8], "a payload can be sent again"
    assert payload.error is None


def test_what_a_file_has_lost_meanwhile_is_zeroes(file: HostFile) -> None:
    os.truncate(file.path, 5000)
    assert sent(FilePayload([(file.fd, 0, 9000), (file.fd, 1, 2)])) == CONTENT[:5000] + bytes(4000) + CONTENT[1:3]


def test_what_cannot_be_read_is_zeroes_and_told(file: HostFile) -> None:
    with open(os.devnull, "wb") as unreadable:
        payload = FilePayload([(file.fd, 0, 10), (unreadable.fileno(), 0, 100_000), (file.fd, 0, 10)])
        assert sent(payload) == CONTENT[:10] + bytes(100_000) + CONTENT[:10]
    assert payload.error is not None
    assert payload.error.errno == errno.EBADF


def test_a_file_system_without_sendfile(file: HostFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(file_payload.os, "sendfile", refuses)
    payload = FilePayload([(file.fd, 3, SIZE - 3)])
    assert sent(payload) == CONTENT[3:]
    assert payload.error is None


def test_a_receiver_that_is_gone_is_an_error_of_the_socket(file: HostFile) -> None:
    here, there = socket.socketpair()
    there.close()
    payload = FilePayload([(file.fd, 0, SIZE)])
    with here, pytest.raises(BrokenPipeError):
        Sending(payload).send(here)
    assert payload.error is None


def moved_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every call that moves some."""
    counts: list[int] = []
    send = Sending.send

    def counted(self: Sending, sock: socket.socket) -> int:
        count = send(self, sock)
        counts.append(count)
        return count

    monkeypatch.setattr(Sending, "send", counted)
    return counts


def test_a_copy_arrives(file: HostFile, short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = moved_by_the_kernel(monkeypatch)
    extents = Extents([(file, 4096, 300_032), (None, 0, 512), (file, 0, 4096), (file, 512, 512)])

    async def test() -> None:
        async with served(short_path) as place, opened(place.options()) as disk:
            assert disk.node.driver.copies_in
            await disk.node.copy_in(1024, extents)
            await disk.node.copy_in(SIZE - 512, extents[:512])
            expected = CONTENT[4096:304_128] + bytes(512) + CONTENT[:4096] + CONTENT[512:1024]
            assert place.export.data[1024 : 1024 + len(extents)] == expected
            assert place.export.data[-512:] == CONTENT[4096:4608]

    run(test)
    assert sum(counts) == len(extents) + 512


def test_zeroes_are_looked_for_where_they_are_asked_for(
    file: HostFile, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = moved_by_the_kernel(monkeypatch)
    Path(file.path).write_bytes(CONTENT[:65536] + bytes(65536))

    async def test() -> None:
        async with served(short_path) as place, opened(place.options(**{"detect-zeroes": "unmap"})) as disk:
            place.export.data[:] = b"\x01" * SIZE
            await disk.node.copy_in(0, Extents([(file, 0, 65536)]))
            assert sum(counts) == 65536
            await disk.node.copy_in(65536, Extents([(file, 65536, 65536)]))
            assert sum(counts) == 65536
            assert place.export.log[-1] == ("write_zeroes", 65536, 65536)
            assert place.export.data[: 131072 + 1] == CONTENT[:65536] + bytes(65536) + b"\x01"

    run(test)


def test_what_was_under_way_when_the_connection_broke_is_sent_again(file: HostFile, short_path: Path) -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def wait(operation: str, offset: int, length: int) -> None:
            await gate.wait()

        async with (
            served(short_path, fast=False) as place,
            opened(place.options(**{"reconnect-delay": 30})) as disk,
        ):
            place.export.hook = wait
            step = SIZE // 8
            tasks = await begun(
                *(disk.node.copy_in(at, Extents([(file, at, step)])) for at in range(0, SIZE, step)), disk.flush()
            )
            stopping = asyncio.ensure_future(place.stop())
            await asyncio.sleep(0.05)
            gate.set()
            await stopping
            place.export.data[:] = bytes(SIZE)
            assert not any(task.done() for task in tasks)
            await place.start()
            await asyncio.gather(*tasks)
            assert place.export.data == CONTENT

    run(test)


def test_an_answer_before_the_payload_is_sent_ends_the_use_of_the_file(file: HostFile, short_path: Path) -> None:
    """Whoever asked may close the file: what is left to send is zeroes. What comes behind is not disturbed."""
    received = bytearray()
    small = b"\x55" * 512

    class Hasty(Puppet):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self.negotiate(reader, writer)
            _, _, _, cookie, _, length = struct.unpack(">IHHQQI", await reader.readexactly(28))
            writer.write(simple(cookie))
            await writer.drain()
            await asyncio.sleep(0.1)
            received.extend(await reader.readexactly(length))
            while header := await reader.read(28):
                _, _, command, cookie, _, length = struct.unpack(">IHHQQI", header)
                if command == raw.DISC:
                    break
                if command == raw.WRITE:
                    received.extend(await reader.readexactly(length))
                writer.write(simple(cookie))

    async def test() -> None:
        async with puppet_served(short_path, Hasty(size=64 << 20)) as options, opened(options) as disk:
            link = disk.node.driver._link  # type: ignore[attr-defined]
            connection: ClientConnection = link._connections[0]
            payload = FilePayload([(file.fd, 0, SIZE)] * 32)
            await connection.request(raw.WRITE, 0, len(payload), payload=payload)  # type: ignore[arg-type]
            Path(file.path).write_bytes(b"\xee" * SIZE)
            await disk.write(0, memoryview(small))

    run(test)
    assert len(received) == (32 << 20) + 512
    assert received.endswith(small)
    begun, rest = received[: 1 << 16], received[-(1 << 20) : -512]
    assert begun == CONTENT[: 1 << 16]
    assert not any(rest)
    assert b"\xee" * 512 not in received


def test_a_source_that_cannot_be_read_is_told_apart_from_the_server(
    file: HostFile, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with served(short_path) as place, opened(place.options()) as disk:

            async def warm(self: Extents) -> bool:
                return True

            monkeypatch.setattr(Extents, "warm", warm)
            with open(os.devnull, "wb") as unreadable, pytest.raises(SourceUnreadable):
                await disk.node.copy_in(0, Extents([(HostFile(unreadable.fileno(), "x"), 0, 4096)]))
            await disk.node.copy_in(0, Extents([(file, 0, 4096)]))
            assert place.export.data[:4096] == CONTENT[:4096]

    run(test)


def test_not_warm_or_not_whole_blocks_goes_through_memory(
    file: HostFile, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = moved_by_the_kernel(monkeypatch)

    async def test() -> None:
        async with served(short_path) as place, opened(place.options()) as disk:
            os.truncate(file.path, 8192)
            await disk.node.copy_in(0, Extents([(file, 0, 16384)]))
            assert place.export.data[:16384] == CONTENT[:8192] + bytes(8192)
        async with served(short_path, min_block=4096) as place, opened(place.options()) as disk:
            assert disk.node.driver.request_alignment == 4096
            await disk.node.copy_in(512, Extents([(file, 0, 512)]))
            assert place.export.data[:4096] == bytes(512) + CONTENT[:512] + bytes(3072)

    run(test)
    assert not counts


@pytest.mark.parametrize("through_memory", [False, True])
def test_much_that_is_copied_is_flushed_meanwhile(
    through_memory: bool, file: HostFile, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for every so many bytes; a flush that failed is told to whoever asks for one, once."""
    monkeypatch.setattr(driver, "_FLUSH_EVERY", 2 * SIZE)
    full = False

    async def fail(operation: str, offset: int, length: int) -> None:
        if operation == "flush" and full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def test() -> None:
        nonlocal full
        async with served(short_path) as place, opened(place.options()) as disk:
            place.export.hook = fail

            async def copies(count: int) -> list[str]:
                place.export.log.clear()
                for _ in range(count):
                    if through_memory:
                        await disk.write(0, memoryview(CONTENT))
                    else:
                        await disk.node.copy_in(0, Extents([(file, 0, SIZE)]))
                await asyncio.sleep(0.05)
                return [name for name, _, _ in place.export.log if name == "flush"]

            for _ in range(4):
                await disk.write(0, memoryview(CONTENT)[: SIZE // 2])
            assert await copies(1) == []
            assert await copies(1) == ["flush"]
            assert await copies(4) == ["flush", "flush"]
            full = True
            await copies(2)
            full = False
            with pytest.raises(OSError, match="No space left"):
                await disk.flush()
            await disk.flush()
            assert place.export.data == CONTENT

    run(test)


def test_over_tcp_bytes_go_through_memory(short_path: Path) -> None:
    async def test() -> None:
        async with served(short_path) as place:
            assert place._server is not None
            [(host, port)] = await place._server.listen_tcp("127.0.0.1", 0)
            options = {"driver": "nbd", "server": {"type": "inet", "host": host, "port": str(port)}}
            async with opened(options) as disk:
                assert not disk.node.driver.copies_in

    run(test)
