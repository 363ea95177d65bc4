"""Requests in flight: who waits for whom, the gate, drain, and callers that go away."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from contract.disks import ALL_WRITES, new_graph, opened, parse, read

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.permissions import Perm


@pytest.fixture
def disk_options(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "disk.raw").write_bytes(b"d" * (1 << 20))
    return {"driver": "file", "filename": str(tmp_path / "disk.raw"), "discard": "unmap"}


class Held:
    """Makes a driver's coroutine wait until it is let go, and notes what is under way."""

    def __init__(self, node: Node, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running: list[tuple[Any, ...]] = []
        self.go = asyncio.Event()
        real = getattr(node.driver, method)

        async def held(*arguments: Any) -> None:
            self.running.append(arguments)
            await self.go.wait()
            await real(*arguments)

        monkeypatch.setattr(node.driver, method, held)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_discard_waits_for_overlapping_writes_and_later_ones_wait_for_it(
    disk_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with opened(disk_options) as disk:
            writes = Held(disk.node, "write", monkeypatch)
            discards = Held(disk.node, "discard", monkeypatch)
            data = memoryview(b"w" * 4096)
            tasks = [asyncio.ensure_future(disk.write(0, data))]
            await settle()
            tasks.append(asyncio.ensure_future(disk.discard(0, 8192)))
            await settle()
            tasks.append(asyncio.ensure_future(disk.write(4096, data)))
            tasks.append(asyncio.ensure_future(disk.write(65536, data)))
            await settle()
            assert [offset for offset, _ in writes.running] == [0, 65536], "only what does not overlap passes"
            assert discards.running == []
            discards.go.set()
            writes.go.set()
            await asyncio.gather(*tasks)
            assert discards.running == [(0, 8192)]
            assert await read(disk, 0, 8192) == bytes(4096) + b"w" * 4096
            assert not disk.node.busy

    asyncio.run(run())


def test_unaligned_direct_writes_to_one_block_do_not_undo_each_other(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(65536))
    direct = {"driver": "file", "filename": str(tmp_path / "disk.raw"), "cache": {"direct": True}}

    async def run() -> bytes:
        async with opened(direct) as disk:
            assert disk.node.driver.request_alignment > 1
            writes = (disk.write(start, memoryview(bytes([start % 251]) * 100)) for start in range(0, 60_000, 100))
            await asyncio.gather(*writes)
            return await read(disk, 0, 60_000)

    assert asyncio.run(run()) == b"".join(bytes([start % 251]) * 100 for start in range(0, 60_000, 100))


def test_a_cancelled_request_runs_to_its_end_and_leaves_nothing_behind(
    disk_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    real = os.pwrite

    def slow(fd: int, data: memoryview, offset: int) -> int:
        let_go.wait(10)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)

    async def run() -> None:
        async with opened(disk_options) as disk:
            size = (1 << 20) - 4096
            disk.node.driver.host.inline_writes = False  # type: ignore[attr-defined]  # through a thread
            task = asyncio.ensure_future(disk.write(4096, memoryview(b"n" * size)))
            await asyncio.sleep(0.05)
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0.01)
            assert not task.done(), "the thread still works on the caller's buffer"
            assert disk.in_flight == 1
            drained = asyncio.ensure_future(drain(disk))
            await asyncio.sleep(0.01)
            assert not drained.done()
            let_go.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            await drained
            assert disk.in_flight == 0
            assert not disk.node.busy
            assert await read(disk, 4096, size) == b"n" * size

    asyncio.run(run())


async def drain(disk: BlockBackend) -> None:
    async with disk.graph.drained(disk.node):
        assert disk.in_flight == 0


def test_a_cancelled_waiter_at_the_gate_is_forgotten(disk_options: dict[str, Any]) -> None:
    async def run() -> None:
        async with opened(disk_options) as disk:
            async with disk.graph.drained(disk.node):
                task = asyncio.ensure_future(read(disk, 0, 512))
                await settle()
                assert disk.in_flight == 0
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await read(disk, 0, 4) == b"dddd"

    asyncio.run(run())


def test_drain_holds_requests_and_nests(disk_options: dict[str, Any]) -> None:
    async def run() -> None:
        async with opened(disk_options) as disk:
            async with disk.graph.drained(), disk.graph.drained(disk.node):
                task = asyncio.ensure_future(read(disk, 0, 4))
                await settle()
                assert not task.done()
            assert await task == b"dddd"

    asyncio.run(run())


def test_a_backend_that_comes_while_drained_is_held_too(disk_options: dict[str, Any]) -> None:
    async def run() -> None:
        graph = new_graph()
        node = await graph.add(parse({"node-name": "n", **disk_options}))
        late = BlockBackend(graph, "late")
        async with graph.drained(node):
            graph.attach_root(late, node, ALL_WRITES, Perm.ALL)
            task = asyncio.ensure_future(read(late, 0, 4))
            await settle()
            assert not task.done()
            assert late.try_read(0, memoryview(bytearray(4))) == 0
        assert await task == b"dddd"
        await graph.close()

    asyncio.run(run())


def test_what_is_outside_the_disk_is_refused(disk_options: dict[str, Any]) -> None:
    async def run() -> None:
        async with opened(disk_options) as disk:
            for offset, length in ((1 << 20, 1), ((1 << 20) - 1, 2), (-1, 1)):
                with pytest.raises(OSError, match="outside node 'disk'"):
                    await read(disk, offset, length)
            assert disk.in_flight == 0

    asyncio.run(run())
