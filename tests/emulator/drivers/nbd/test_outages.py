"""A server that goes and comes back: requests are held and replayed, or fail; what comes back is looked at.

The server is ours, in the same process; `test_peers.py` has real ones.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from contract.disks import new_graph, opened, parse, read

from kit.memory_export import MemoryExport
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.driver import Driver
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp import yank
from livedisk.nbd.client_connection import ClientConnection
from livedisk.nbd.constants import Command
from livedisk.nbd.server import NbdServer

SIZE = 1 << 20


class Place:
    """A server that can be taken away and brought back, with ``export``."""

    def __init__(self, path: Path, export: MemoryExport) -> None:
        self.path = str(path / "server")
        self.export = export
        self._server: NbdServer | None = None

    async def start(self) -> None:
        self._server = NbdServer()
        self._server.add(self.export)
        self._server.listen_unix(self.path)

    async def stop(self) -> None:
        """Cut every connection, also those with requests under way."""
        server, self._server = self._server, None
        if server is not None:
            server.stop_listening()
            for client in list(server._clients):
                client.close()
            await server.close()

    def options(self, **more: Any) -> dict[str, Any]:
        return {"driver": "nbd", "server": {"type": "unix", "path": self.path}, "discard": "unmap", **more}


@asynccontextmanager
async def served(path: Path, **how: Any) -> AsyncIterator[Place]:
    place = Place(path, MemoryExport(SIZE, **how))
    await place.start()
    try:
        yield place
    finally:
        await place.stop()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


async def begun(*work: Awaitable[Any]) -> list[asyncio.Future[Any]]:
    """Start requests and let them get as far as they can without time passing."""
    tasks = [asyncio.ensure_future(one) for one in work]
    await asyncio.sleep(0.05)
    return tasks


async def fails(request: Awaitable[Any], number: int = errno.EIO) -> str:
    with pytest.raises(OSError) as caught:
        await request
    assert caught.value.errno == number
    return str(caught.value)


def data(byte: int, length: int = 4096) -> memoryview:
    return memoryview(bytes([byte]) * length)


def test_requests_are_held_and_run_when_the_server_is_back(short_path: Path) -> None:
    async def test() -> None:
        async with served(short_path) as place, opened(place.options(**{"reconnect-delay": 30})) as disk:
            await disk.write(0, data(1))
            await place.stop()
            tasks = await begun(
                disk.write(4096, data(2)), read(disk, 0, 4096), disk.write_zeroes(8192, 4096), disk.flush()
            )
            assert not any(task.done() for task in tasks)
            await place.start()
            _, content, *_ = await asyncio.gather(*tasks)
            assert content == data(1)
            assert await read(disk, 0, 12288) == bytes(data(1)) + bytes(data(2)) + bytes(4096)

    run(test)


def test_what_was_under_way_when_the_connection_broke_is_sent_again(short_path: Path) -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def wait(operation: str, offset: int, length: int) -> None:
            await gate.wait()

        async with (
            served(short_path, fast=False) as place,
            opened(place.options(**{"reconnect-delay": 30})) as disk,
        ):
            place.export.hook = wait
            tasks = await begun(*(disk.write(4096 * n, data(n + 1)) for n in range(8)), disk.flush())
            stopping = asyncio.ensure_future(place.stop())
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in tasks)
            gate.set()
            await stopping
            place.export.log.clear()
            await place.start()
            await asyncio.gather(*tasks)
            assert {offset for name, offset, _ in place.export.log if name == "write"} == {4096 * n for n in range(8)}
            assert place.export.data[: 8 * 4096] == b"".join(bytes(data(n + 1)) for n in range(8))

    run(test)


def test_after_the_delay_requests_fail_and_after_a_later_reconnect_they_run(short_path: Path) -> None:
    async def test() -> None:
        async with served(short_path) as place, opened(place.options(**{"reconnect-delay": 1})) as disk:
            await place.stop()
            first, second = await begun(disk.write(0, data(1)), read(disk, 0, 512))
            text = await fails(first)
            assert f"NBD server '{place.path}', export ''" in text
            assert "No such file or directory" in text
            await fails(second)
            await fails(read(disk, 0, 512))
            await place.start()
            await disk.write(0, data(7))
            assert await read(disk, 0, 4096) == data(7)

    run(test)


def test_without_a_delay_requests_fail_at_once(short_path: Path) -> None:
    async def test() -> None:
        async with served(short_path) as place, opened(place.options()) as disk:
            await disk.write(0, data(1))
            await place.stop()
            await fails(disk.flush())
            text = await fails(read(disk, 0, 512))
            assert text.endswith(f"export '': Failed to connect to '{place.path}': {os.strerror(errno.ENOENT)}")
            await place.start()
            assert await read(disk, 0, 4096) == data(1)
            await disk.flush()

    run(test)


def test_an_outage_that_nobody_noticed_takes_nothing_from_the_delay(short_path: Path) -> None:
    async def test() -> None:
        async with served(short_path) as place, opened(place.options(**{"reconnect-delay": 1})) as disk:
            await place.stop()
            await asyncio.sleep(1.2)
            (task,) = await begun(read(disk, 0, 512))
            assert not task.done()
            await place.start()
            await task

    run(test)


def smaller(place: Place) -> None:
    place.export = MemoryExport(SIZE // 2)


def read_only(place: Place) -> None:
    place.export = MemoryExport(SIZE, read_only=True)


def gone(place: Place) -> None:
    place.export = MemoryExport(SIZE, "other")


def larger_blocks(place: Place) -> None:
    place.export = MemoryExport(SIZE, min_block=4096)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (smaller, f"the export now has {SIZE // 2} bytes, not {SIZE} as before"),
        (read_only, "the export is read-only now"),
        (gone, "Requested export not available"),
        (larger_blocks, "the export now has other block sizes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_take_the_place_is_not_accepted(
    change: Callable[[Place], None], text: str, short_path: Path
) -> None:
    async def test() -> None:
        async with served(short_path) as place, opened(place.options(**{"reconnect-delay": 1})) as disk:
            before = place.export
            await place.stop()
            change(place)
            await place.start()
            assert text in await fails(read(disk, 0, 512))
            await place.stop()
            place.export = before
            await place.start()
            await read(disk, 0, 512)

    run(test)


def test_a_larger_export_is_accepted_and_the_size_stays(short_path: Path) -> None:
    async def test() -> None:
        async with served(short_path) as place, opened(place.options(**{"reconnect-delay": 30})) as disk:
            await place.stop()
            place.export = MemoryExport(2 * SIZE)
            await place.start()
            await disk.write(SIZE - 4096, data(3))
            assert disk.size == SIZE
            assert place.export.data[SIZE - 4096 : SIZE] == data(3)

    run(test)


def test_yank_cuts_for_good(short_path: Path) -> None:
    async def test() -> None:
        async with served(short_path) as place, opened(place.options(**{"reconnect-delay": 30})) as disk:
            assert ("block-node", "disk") in yank.instances()
            await place.stop()
            (held,) = await begun(read(disk, 0, 512))
            yank.yank([("block-node", "disk")])
            assert "yank" in await fails(held)
            await place.start()
            await fails(read(disk, 0, 512))
        assert ("block-node", "disk") not in yank.instances()

    run(test)


def test_yank_ends_what_a_stalled_server_holds(short_path: Path) -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def wait(operation: str, offset: int, length: int) -> None:
            await gate.wait()

        async with served(short_path, fast=False) as place, opened(place.options(**{"reconnect-delay": 30})) as disk:
            place.export.hook = wait
            (stalled,) = await begun(read(disk, 0, 512))
            yank.yank([("block-node", "disk")])
            await fails(stalled)
            gate.set()

    run(test)


def test_whoever_gives_up_does_not_wait_for_the_delay(short_path: Path) -> None:
    async def test() -> None:
        async with served(short_path) as place, opened(place.options(**{"reconnect-delay": 3600})) as disk:
            await place.stop()
            (held,) = await begun(read(disk, 0, 512))
            driver: Driver = disk.node.driver
            driver.cancel_in_flight()
            await fails(held)
            await place.start()
            await read(disk, 0, 512)

    run(test)


def test_open_waits_for_the_server_as_long_as_it_is_told(short_path: Path) -> None:
    async def test() -> None:
        place = Place(short_path, MemoryExport(SIZE))
        graph = new_graph()
        opening = asyncio.ensure_future(
            graph.open(parse({"node-name": "disk", **place.options(**{"open-timeout": 30})}))
        )
        await asyncio.sleep(0.2)
        assert not opening.done()
        await place.start()
        assert (await opening).size == SIZE
        await graph.close()
        await place.stop()
        with pytest.raises(BlockError, match=r"^Failed to connect to '.*': No such file or directory$"):
            await graph.open(parse(place.options(**{"open-timeout": 1})))
        with pytest.raises(BlockError, match=r"^Failed to connect to '.*': No such file or directory$"):
            await graph.open(parse(place.options()))
        assert not graph.nodes
        assert not yank.instances()

    run(test)


def test_yank_ends_an_open_that_hangs(short_path: Path) -> None:
    """The server takes the connection and never says a word."""

    async def test() -> None:
        clients: list[asyncio.StreamWriter] = []
        silent = await asyncio.start_unix_server(lambda _, writer: clients.append(writer), short_path / "server")
        place = Place(short_path, MemoryExport(SIZE))
        graph = new_graph()
        opening = asyncio.ensure_future(graph.open(parse({"node-name": "disk", **place.options()})))
        await asyncio.sleep(0.05)
        yank.yank([("block-node", "disk")])
        with pytest.raises(BlockError, match="yank"):
            await opening
        with pytest.raises(BlockError, match="did not answer in time"):
            await graph.open(parse(place.options(**{"open-timeout": 1})))
        silent.close()
        for client in clients:
            client.close()
        assert not graph.nodes

    run(test)


def test_a_node_can_be_closed_while_its_server_is_away(short_path: Path) -> None:
    async def test() -> None:
        async with served(short_path) as place:
            async with opened(place.options(**{"reconnect-delay": 3600})) as disk:
                await disk.write(0, data(1))
                await place.stop()
            assert not yank.instances()
            await place.start()
            async with opened(place.options()) as disk:
                await disk.write(0, data(1))
                await disk.flush()
                await place.stop()

    run(test)


async def connections(disk: BlockBackend) -> list[ClientConnection]:
    link: Any = disk.node.driver
    found: list[ClientConnection] = link._link._connections
    return found


def test_much_under_way_takes_several_connections_and_losing_one_loses_nothing(short_path: Path) -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def wait(operation: str, offset: int, length: int) -> None:
            await gate.wait()

        async with served(short_path, fast=False) as place, opened(place.options()) as disk:
            place.export.hook = wait
            big = 512 << 10
            tasks = await begun(*(disk.write(0, data(n, big)) for n in range(24)))
            several = await connections(disk)
            while len(several) < 4:
                tasks += await begun(*(disk.write(big, data(n, big)) for n in range(4)))
            assert len(place.export.clients) == 4
            several[1].abort()
            several[0].abort()
            gate.set()
            await asyncio.gather(*tasks)
            link: Any = disk.node.driver
            await link._link.request(Command.FLUSH, 0, 0)
            assert len(several) >= 2

    run(test)


def test_one_connection_where_the_server_promises_nothing(short_path: Path) -> None:
    async def test() -> None:
        async with served(short_path, fast=False) as place:
            place.export.can_multi_conn = False
            async with opened(place.options()) as disk:
                tasks = await begun(*(disk.write(0, data(n, 512 << 10)) for n in range(24)))
                await asyncio.gather(*tasks)
                assert len(await connections(disk)) == 1

    run(test)
