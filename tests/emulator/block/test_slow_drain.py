"""A drain that waits for a server without an answer tells what it waits for, and gives up what no guest needs."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from contract.disks import new_graph, parse

from kit.memory_export import MemoryExport
from livedisk.emulator.block import slow_drain
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.permissions import Perm
from livedisk.nbd.server import NbdServer

SIZE = 1 << 20


class OfJob(BlockBackend):
    """As a job has it."""

    of_job = True


@asynccontextmanager
async def stalled_server(folder: Path, gate: asyncio.Event) -> AsyncIterator[dict[str, Any]]:
    """Options of a node on a server whose writes have no answer before the gate opens."""

    async def wait(operation: str, offset: int, length: int) -> None:
        if operation == "write":
            await gate.wait()

    export = MemoryExport(SIZE, fast=False)
    export.hook = wait
    server = NbdServer()
    server.add(export)
    server.listen_unix(str(folder / "server"))
    try:
        yield {"driver": "nbd", "server": {"type": "unix", "path": str(folder / "server")}}
    finally:
        gate.set()
        server.stop_listening()
        for client in list(server._clients):
            client.close()
        await server.close()


def attached(graph: Graph, kind: type[BlockBackend], name: str, description: str) -> BlockBackend:
    backend = kind(graph, name, description=description)
    graph.attach_root(backend, graph.find(name), Perm.ALL, Perm.ALL)
    return backend


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_drain, "PATIENCE", 0.05)
    monkeypatch.setattr(slow_drain, "LIMIT", 0.1)


@pytest.mark.usefixtures("soon")
def test_requests_of_a_job_alone_are_given_up(short_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with stalled_server(short_path, asyncio.Event()) as options:
            graph = new_graph()
            await graph.add(parse({"node-name": "far", **options}))
            await graph.add(parse({"node-name": "top", "driver": "raw", "file": "far"}))
            job = attached(graph, OfJob, "top", "backup job 'j'")
            write = asyncio.ensure_future(job.write(0, memoryview(bytes(512))))
            await asyncio.sleep(0)
            async with asyncio.timeout(20), graph.drained(graph.find("top")):
                pass
            with pytest.raises(OSError, match="the server gives no answer") as failed:
                await write
            assert failed.value.errno == errno.EIO
            await graph.close()

    asyncio.run(test())
    assert "until nothing is in flight on node 'top': 1 request has no answer on node 'far'" in caplog.text
    assert "which backup job 'j' uses. yank with" in caplog.text
    assert "node 'far': requests without an answer are given up, no guest needs it" in caplog.text
    assert "nothing is in flight on node 'top' now; it goes on" in caplog.text


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("on_error", ["break-guest-write", "break-snapshot"])
def test_what_a_guest_needs_is_waited_for(short_path: Path, on_error: str, caplog: pytest.LogCaptureFixture) -> None:
    """The copy before a guest's write is needed where its failure would be the write's."""

    async def test() -> None:
        gate = asyncio.Event()
        async with stalled_server(short_path, gate) as options:
            graph = new_graph()
            await graph.add(parse({"node-name": "far", **options}))
            await graph.add(parse({"node-name": "near", "driver": "null-co", "size": SIZE}))
            filter = {"driver": "copy-before-write", "file": "near", "target": "far", "on-cbw-error": on_error}
            await graph.add(parse({"node-name": "top", **filter}))
            guest = attached(graph, BlockBackend, "top", "a guest")
            write = asyncio.ensure_future(guest.write(0, memoryview(bytes(512))))
            await asyncio.sleep(0)
            drained = asyncio.ensure_future(drain(graph))
            if on_error == "break-guest-write":
                while caplog.text.count("has no answer on node 'far'") < 4:
                    await asyncio.sleep(0.01)
                assert not drained.done()
                gate.set()
            async with asyncio.timeout(20):
                await drained
                await write
            await graph.close()

    asyncio.run(test())
    assert ("given up" in caplog.text) == (on_error == "break-snapshot")


async def drain(graph: Graph) -> None:
    async with graph.drained(graph.find("top")):
        pass


def test_a_quick_drain_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        graph = new_graph()
        await graph.add(parse({"node-name": "top", "driver": "null-co", "size": SIZE}))
        await drain(graph)
        await graph.close()

    asyncio.run(test())
    assert not caplog.text
