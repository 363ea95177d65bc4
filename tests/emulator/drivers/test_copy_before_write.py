"""copy-before-write and snapshot-access: the moment never changes, the disk is what was written, whatever goes on at once.

Writers and readers run as tasks on one loop, over disks of several kinds, so that copies, frozen reads and fast writes cross.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from contract.disks import new_graph, parse, read

from kit.memory_disk import MemoryDriver
from kit.qemu import create, qemu_io
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.flatmap import DATA, HOLE, MISS, FlatMap
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.status import block_status
from livedisk.emulator.block.types import Discard
from livedisk.emulator.drivers.copy_before_write import CopyBeforeWrite
from livedisk.emulator.errors import BlockError

SIZE = (2 << 20) + (100 << 10)
"""Bytes; the last cluster is short."""
CLUSTER = 64 << 10
GUEST = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE


class Fleece:
    """Nodes disk, target, cbw (over both) and moment (over cbw), with a guest on cbw and a reader on moment."""

    def __init__(self, graph: Graph, guest: BlockBackend, reader: BlockBackend) -> None:
        self.graph, self.guest, self.reader = graph, guest, reader

    @property
    def filter(self) -> CopyBeforeWrite:
        driver = self.graph.nodes["cbw"].driver
        assert isinstance(driver, CopyBeforeWrite)
        return driver

    def memory(self, name: str) -> MemoryDriver:
        driver = self.graph.nodes[name].driver
        assert isinstance(driver, MemoryDriver)
        return driver


async def add(graph: Graph, name: str, options: dict[str, Any]) -> None:
    if options["driver"] == "test-memory":
        make: Any = MemoryDriver.Options
        await graph.add(make(driver="test-memory", node_name=name, discard=Discard.UNMAP, size=options["size"]))
    else:
        await graph.add(parse({"node-name": name, **options}))


@asynccontextmanager
async def fleece(disk: dict[str, Any], target: dict[str, Any], **options: Any) -> AsyncIterator[Fleece]:
    graph = new_graph()
    try:
        await add(graph, "disk", disk)
        await add(graph, "target", target)
        cbw = {"driver": "copy-before-write", "file": "disk", "target": "target", "discard": "unmap", **options}
        await add(graph, "cbw", cbw)
        await add(graph, "moment", {"driver": "snapshot-access", "file": "cbw", "discard": "unmap"})
        guest, reader = BlockBackend(graph, "guest"), BlockBackend(graph, "reader")
        graph.attach_root(guest, graph.nodes["cbw"], GUEST, Perm.ALL)
        graph.attach_root(reader, graph.nodes["moment"], Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
        yield Fleece(graph, guest, reader)
    finally:
        for node in graph.nodes.values():
            if isinstance(node.driver, MemoryDriver) and node.driver.gate is not None:
                node.driver.gate.set()
        await graph.close()


MEMORY = {"driver": "test-memory", "size": SIZE}


def raw(folder: Path) -> dict[str, Any]:
    path = folder / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return {"driver": "raw", "discard": "unmap", "file": {"driver": "file", "filename": str(path), "discard": "unmap"}}


def overlay(folder: Path) -> dict[str, Any]:
    base = create(folder / "base.qcow2", SIZE)
    qemu_io(base, f"write -P 3 0 {SIZE}", "write -z 256k 128k")
    path = create(folder / "disk.qcow2", SIZE, backing=base, options="cluster_size=4k")
    qemu_io(path, "write -P 4 512k 300k", "write -z 1M 64k")
    return {"driver": "qcow2", "discard": "unmap", "file": {"driver": "file", "filename": str(path)}}


def qcow2_target(folder: Path) -> dict[str, Any]:
    path = create(folder / "target.qcow2", SIZE)
    return {"driver": "qcow2", "discard": "unmap", "file": {"driver": "file", "filename": str(path)}}


def raw_target(folder: Path) -> dict[str, Any]:
    path = folder / "target.raw"
    path.write_bytes(b"\xcc" * SIZE)
    return {"driver": "raw", "discard": "unmap", "file": {"driver": "file", "filename": str(path), "discard": "unmap"}}


def memory(folder: Path) -> dict[str, Any]:
    return MEMORY


async def write_fast_or_slow(backend: BlockBackend, offset: int, data: bytes) -> bool:
    """As the server does it. Whether it went fast."""
    if backend.try_write(offset, memoryview(data)) == DATA:
        return True
    await backend.write(offset, memoryview(data))
    return False


async def read_fast_or_slow(backend: BlockBackend, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xa5" * length)
    found = backend.try_read(offset, memoryview(buffer))
    if found == HOLE:
        return bytes(length)
    if found == MISS:
        await backend.read(offset, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("target", [qcow2_target, raw_target, memory])
@pytest.mark.parametrize("disk", [raw, overlay, memory])
def test_the_moment_stays_and_the_disk_is_what_was_written(
    disk: Callable[[Path], dict[str, Any]], target: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    chance = random.Random(f"{disk.__name__} {target.__name__}")
    fast = 0

    async def act() -> None:
        nonlocal fast
        async with fleece(disk(tmp_path), target(tmp_path)) as made:
            if disk is memory:
                made.memory("disk").bytes[:] = chance.randbytes(SIZE)
            then = await read(made.guest, 0, SIZE)
            model = bytearray(then)
            busy: list[tuple[int, int]] = []

            async def write_some(count: int) -> None:
                nonlocal fast
                for _ in range(count):
                    offset = chance.randrange(SIZE // 512) * 512
                    length = min(512 << chance.randrange(9), SIZE - offset)
                    if any(offset < high and low < offset + length for low, high in busy):
                        await asyncio.sleep(0)
                        continue
                    busy.append((offset, offset + length))
                    verb = chance.randrange(6)
                    if verb == 0:
                        await made.guest.write_zeroes(offset, length)
                        model[offset : offset + length] = bytes(length)
                    elif verb == 1:
                        await made.guest.discard(offset, length)
                        model[offset : offset + length] = await read(made.guest, offset, length)
                    else:
                        data = chance.randbytes(length)
                        fast += await write_fast_or_slow(made.guest, offset, data)
                        model[offset : offset + length] = data
                    busy.remove((offset, offset + length))
                    await asyncio.sleep(0)

            async def read_some(count: int) -> None:
                for _ in range(count):
                    offset = chance.randrange(SIZE // 512) * 512
                    length = min(512 << chance.randrange(11), SIZE - offset)
                    assert await read_fast_or_slow(made.reader, offset, length) == then[offset : offset + length]
                    await asyncio.sleep(0)

            await asyncio.gather(*(write_some(60) for _ in range(4)), *(read_some(60) for _ in range(4)))
            assert await read(made.reader, 0, SIZE) == then
            assert await read(made.guest, 0, SIZE) == model

    asyncio.run(act())
    assert disk is memory or fast


def test_a_cluster_is_copied_once_and_writes_to_it_are_fast_then(tmp_path: Path) -> None:
    async def act() -> None:
        async with fleece(raw(tmp_path), MEMORY) as made:
            for _ in range(2):
                assert (await read_fast_or_slow(made.guest, 4096, 512))[:0] == b""
            assert not await write_fast_or_slow(made.guest, 4096, b"1" * 4096)
            for offset in (0, 4096, CLUSTER - 4096):
                assert await write_fast_or_slow(made.guest, offset, b"2" * 4096)
            assert not await write_fast_or_slow(made.guest, CLUSTER - 512, b"3" * 1024)
            assert await write_fast_or_slow(made.guest, CLUSTER - 512, b"3" * 1024)
            assert made.memory("target").log == ["write"] * 2

    asyncio.run(act())


def test_what_a_job_wants_is_copied_along_up_to_a_bound_and_only_once(tmp_path: Path) -> None:
    async def act() -> None:
        async with fleece(raw(tmp_path), raw_target(tmp_path)) as made:
            then, moment = await read(made.guest, 0, SIZE), made.filter.moment
            made.filter.ahead = 4 * CLUSTER
            whole = moment.dirty
            assert await write_fast_or_slow(made.guest, CLUSTER + 512, b"1" * 512)
            assert moment.dirty == whole - 4 * CLUSTER
            assert await write_fast_or_slow(made.guest, 2 * CLUSTER, b"2" * 512)
            assert moment.dirty == whole - 4 * CLUSTER, "this cluster was copied with the first"
            last = SIZE // CLUSTER * CLUSTER
            assert await write_fast_or_slow(made.guest, last - CLUSTER, b"3" * 512)
            assert moment.dirty == whole - 6 * CLUSTER, "as far as the disk goes"
            made.filter.ahead = 0
            assert await write_fast_or_slow(made.guest, 16 * CLUSTER, b"4" * 512)
            assert moment.dirty == whole - 7 * CLUSTER
            assert await read(made.reader, 0, SIZE) == then

    asyncio.run(act())


def test_what_a_copy_changes_in_the_target_unsettles_the_guest_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved: list[int] = []
    fill = FlatMap._fill
    monkeypatch.setattr(FlatMap, "_fill", lambda flat, granule: (resolved.append(granule), fill(flat, granule))[1])

    async def act() -> None:
        async with fleece(raw(tmp_path), qcow2_target(tmp_path)) as made:
            known, buffer = list(range(20 * CLUSTER, SIZE - 512, CLUSTER)), memoryview(bytearray(512))
            for offset in (0, *known):
                assert (await read_fast_or_slow(made.guest, offset, 512))[:0] == b""
            await write_fast_or_slow(made.guest, 0, b"1" * 512)
            made.filter.ahead = 4 * CLUSTER
            assert await write_fast_or_slow(made.guest, CLUSTER, b"1" * 512), (
                "clusters are allocated in the target at once"
            )
            await made.filter.copy(made.filter.moment.take(*made.filter.moment.next_dirty(8 * CLUSTER, SIZE, CLUSTER)))
            resolved.clear()
            assert [made.guest.try_read(offset, buffer) for offset in known] == [DATA] * len(known)
            assert not resolved

    asyncio.run(act())


def test_a_write_waits_for_the_read_of_the_moment_that_it_would_change() -> None:
    async def act() -> None:
        async with fleece(MEMORY, MEMORY) as made:
            disk, target = made.memory("disk"), made.memory("target")
            disk.bytes[:] = b"o" * SIZE
            disk.gate = asyncio.Event()
            reading = asyncio.create_task(read(made.reader, 0, 4096))
            while not disk.under_way:
                await asyncio.sleep(0)
            gate, disk.gate = disk.gate, None
            writing = asyncio.create_task(made.guest.write(0, memoryview(b"n" * 4096)))
            while not target.bytes[0]:
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            assert not writing.done()  # copied, but somebody reads the old bytes from the disk
            another = asyncio.create_task(made.guest.write(8192, memoryview(b"n" * 4096)))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not another.done()  # and this one must not overtake it because its cluster is copied
            assert made.guest.try_write(16384, memoryview(b"n" * 4096)) == MISS
            gate.set()
            assert await reading == b"o" * 4096
            await asyncio.gather(writing, another)
            assert disk.bytes[:4096] == disk.bytes[8192:12288] == b"n" * 4096
            assert await read(made.reader, 0, 16384) == b"o" * 16384

    asyncio.run(act())


def test_a_flush_of_the_guest_is_none_of_the_target() -> None:
    async def act() -> None:
        async with fleece(MEMORY, MEMORY) as made:
            made.memory("target").faults.append(errno.EIO)
            await made.guest.flush()
            assert (made.memory("disk").flushes, made.memory("target").flushes) == (1, 0)
            made.memory("target").faults.clear()

    asyncio.run(act())


def test_two_writes_to_one_cluster_wait_for_the_same_copy() -> None:
    async def act() -> None:
        async with fleece(MEMORY, MEMORY) as made:
            target = made.memory("target")
            target.gate = asyncio.Event()
            both = [asyncio.create_task(made.guest.write(offset, memoryview(b"n" * 512))) for offset in (0, 4096)]
            for _ in range(20):
                await asyncio.sleep(0)
            assert target.under_way == 1
            assert not any(task.done() for task in both)
            target.gate.set()
            await asyncio.gather(*both)
            assert target.log == ["write"]

    asyncio.run(act())


@pytest.mark.parametrize("side", ["disk", "target"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_break_guest_write_fails_the_write_and_keeps_the_moment(side: str, number: int) -> None:
    async def act() -> None:
        async with fleece(MEMORY, MEMORY) as made:
            made.memory("disk").bytes[:] = b"o" * SIZE
            made.memory(side).faults.append(number)
            for attempt in (
                lambda: made.guest.write(0, memoryview(b"n" * 512)),
                lambda: made.guest.write_zeroes(0, 512),
                lambda: made.guest.discard(0, 512),
            ):
                made.memory(side).faults.clear()
                made.memory(side).faults.append(number)
                with pytest.raises(OSError) as caught:
                    await attempt()
                assert caught.value.errno == number
            assert await read(made.guest, 0, SIZE) == await read(made.reader, 0, SIZE) == b"o" * SIZE
            await made.guest.write(0, memoryview(b"n" * 512))
            assert await read(made.reader, 0, 512) == b"o" * 512

    asyncio.run(act())


@pytest.mark.parametrize("side", ["disk", "target"])
def test_break_snapshot_lets_the_guest_go_on_without_the_moment(side: str) -> None:
    async def act() -> None:
        async with fleece(MEMORY, MEMORY, **{"on-cbw-error": "break-snapshot"}) as made:
            await made.guest.write(CLUSTER, memoryview(b"n" * 512))
            assert await read(made.reader, CLUSTER, 512) == bytes(512)
            made.memory(side).faults.append(errno.EIO)
            await made.guest.write(0, memoryview(b"n" * 512))
            assert await read(made.guest, 0, 512) == b"n" * 512
            for offset in (0, CLUSTER, SIZE - 512):
                with pytest.raises(PermissionError):
                    await read(made.reader, offset, 512)
            with pytest.raises(PermissionError):
                await block_status(made.graph.nodes["moment"], 0, SIZE)
            before = len(made.memory("target").log)
            await made.guest.write(2 * CLUSTER, memoryview(b"n" * 512))
            assert len(made.memory("target").log) == before  # nothing is copied any more

    asyncio.run(act())


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
def test_a_copy_that_takes_too_long_counts_as_failed_and_a_drain_waits_for_it(policy: str) -> None:
    async def act() -> None:
        async with fleece(MEMORY, MEMORY, **{"on-cbw-error": policy, "cbw-timeout": 1}) as made:
            target = made.memory("target")
            made.memory("disk").bytes[:] = b"o" * SIZE
            target.gate = asyncio.Event()
            writing = made.guest.write(0, memoryview(b"n" * 512))
            if policy == "break-guest-write":
                with pytest.raises(OSError) as caught:
                    await writing
                assert caught.value.errno == errno.ETIMEDOUT
            else:
                await writing
                assert made.memory("disk").bytes[:512] == b"n" * 512
            drained = asyncio.Event()

            async def drain() -> None:
                async with made.graph.drained(made.graph.nodes["target"]):
                    drained.set()

            draining = asyncio.create_task(drain())
            for _ in range(20):
                await asyncio.sleep(0)
            assert not drained.is_set()
            target.gate.set()
            await draining
            if policy == "break-guest-write":  # it was copied in the end
                await made.guest.write(0, memoryview(b"n" * 512))
                assert await read(made.reader, 0, 512) == b"o" * 512

    asyncio.run(act())


def test_the_moment_takes_no_writes_and_what_is_discarded_is_neither_kept_nor_copied() -> None:
    async def act() -> None:
        async with fleece(MEMORY, MEMORY) as made:
            target = made.memory("target")
            for attempt in (made.reader.write(0, memoryview(bytes(512))), made.reader.write_zeroes(0, 512)):
                with pytest.raises(OSError) as caught:
                    await attempt
                assert caught.value.errno == errno.ENOTSUP
            await made.reader.discard(512, 3 * CLUSTER)  # two whole clusters
            assert target.log == ["discard"]
            for offset in (CLUSTER, 3 * CLUSTER - 512):
                with pytest.raises(PermissionError):
                    await read(made.reader, offset, 512)
            assert await read(made.reader, 0, CLUSTER) == bytes(CLUSTER)
            assert await read(made.reader, 3 * CLUSTER, CLUSTER) == bytes(CLUSTER)
            await made.guest.write(CLUSTER, memoryview(b"n" * 2 * CLUSTER))
            assert target.log == ["discard"]
            await made.reader.flush()

    asyncio.run(act())


def test_status_is_that_of_the_place_where_the_bytes_are(tmp_path: Path) -> None:
    async def runs(made: Fleece) -> list[tuple[int, bool, bool]]:
        found: list[tuple[int, bool, bool]] = []
        offset = 0
        while offset < SIZE:
            status = await block_status(made.graph.nodes["moment"], offset, SIZE - offset)
            if found and found[-1][1:] == (status.data, status.zero):
                found[-1] = (found[-1][0] + status.length, status.data, status.zero)
            else:
                found.append((status.length, status.data, status.zero))
            offset += status.length
        return found

    async def act() -> None:
        async with fleece(overlay(tmp_path), qcow2_target(tmp_path)) as made:
            before = await runs(made)
            assert before[0] == (256 << 10, True, False)  # it stands in the backing file
            assert before[1] == (128 << 10, False, True)
            await made.guest.write(0, memoryview(b"n" * (1 << 20)))
            assert await runs(made) == before

    asyncio.run(act())


def test_the_disk_may_be_below_the_target(tmp_path: Path) -> None:
    """Image fleecing: who reads the target sees the moment, also when it began to read before the copy came."""

    async def act() -> None:
        graph = new_graph()
        try:
            await add(graph, "disk", MEMORY)
            path = create(tmp_path / "target.qcow2", SIZE, options="cluster_size=4k")
            file = {"driver": "file", "filename": str(path)}
            await add(graph, "target", {"driver": "qcow2", "file": file, "backing": "disk"})
            await add(graph, "cbw", {"driver": "copy-before-write", "file": "disk", "target": "target"})
            guest, reader = BlockBackend(graph, "guest"), BlockBackend(graph, "reader")
            graph.attach_root(guest, graph.nodes["cbw"], GUEST, Perm.ALL)
            graph.attach_root(reader, graph.nodes["target"], Perm.CONSISTENT_READ, Perm.ALL)
            disk = graph.nodes["disk"].driver
            assert isinstance(disk, MemoryDriver)
            disk.bytes[:] = b"o" * SIZE
            disk.gate = asyncio.Event()
            reading = asyncio.create_task(read(reader, 0, 4096))
            while not disk.under_way:
                await asyncio.sleep(0)
            gate, disk.gate = disk.gate, None
            writing = asyncio.create_task(guest.write(0, memoryview(b"n" * 4096)))
            for _ in range(200):
                await asyncio.sleep(0)
            assert not writing.done()
            gate.set()
            assert await reading == b"o" * 4096
            await writing
            assert await read(reader, 0, SIZE) == b"o" * SIZE
        finally:
            await graph.close()

    asyncio.run(act())


def test_a_disk_that_shrinks_keeps_what_it_was_and_growth_is_not_of_the_moment() -> None:
    async def act() -> None:
        async with fleece(MEMORY, MEMORY) as made:
            made.memory("disk").bytes[:] = b"o" * SIZE
            async with made.graph.drained(made.graph.nodes["cbw"]):
                await made.guest.truncate(SIZE // 2)
            assert await read(made.reader, 0, SIZE) == b"o" * SIZE
            async with made.graph.drained(made.graph.nodes["cbw"]):
                await made.guest.truncate(SIZE + CLUSTER)
            await made.guest.write(SIZE, memoryview(b"n" * CLUSTER))
            assert await read(made.guest, SIZE, CLUSTER) == b"n" * CLUSTER
            assert made.reader.size == SIZE
            assert await read(made.reader, 0, SIZE) == b"o" * SIZE

    asyncio.run(act())


def test_nobody_else_writes_to_the_disk_and_the_filter_takes_what_it_needs() -> None:
    async def act() -> None:
        async with fleece(MEMORY, MEMORY) as made:
            other = BlockBackend(made.graph, "other")
            for name, perm in (("disk", Perm.WRITE), ("disk", Perm.RESIZE), ("target", Perm.RESIZE)):
                with pytest.raises(BlockError, match="Permission conflict"):
                    made.graph.attach_root(other, made.graph.nodes[name], perm, Perm.ALL)

    asyncio.run(act())


@pytest.mark.parametrize(("least", "cluster"), [(0, 64 << 10), (1 << 20, 1 << 20), (4096, 64 << 10)])
def test_clusters_are_as_large_as_is_asked_and_needed(least: int, cluster: int, tmp_path: Path) -> None:
    async def act() -> None:
        async with fleece(MEMORY, MEMORY, **{"min-cluster-size": least}) as made:
            assert made.filter.moment.cluster == cluster
        target = create(tmp_path / "t.qcow2", SIZE, options="cluster_size=2M")
        options = {"driver": "qcow2", "file": {"driver": "file", "filename": str(target)}}
        async with fleece(MEMORY, options, **{"min-cluster-size": least}) as made:
            assert made.filter.moment.cluster == 2 << 20

    asyncio.run(act())


def test_only_what_the_bitmap_says_is_of_the_moment() -> None:
    async def act() -> None:
        graph = new_graph()
        try:
            await add(graph, "disk", MEMORY)
            await add(graph, "target", MEMORY)
            bitmap = graph.nodes["disk"].bitmaps.create(4096, "b")
            bitmap.mark(CLUSTER + 4096, 1)
            options = {
                "driver": "copy-before-write",
                "file": "disk",
                "target": "target",
                "bitmap": {"node": "disk", "name": "b"},
            }
            await add(graph, "cbw", options)
            await add(graph, "moment", {"driver": "snapshot-access", "file": "cbw"})
            guest, reader = BlockBackend(graph, "guest"), BlockBackend(graph, "reader")
            graph.attach_root(guest, graph.nodes["cbw"], GUEST, Perm.ALL)
            graph.attach_root(reader, graph.nodes["moment"], Perm.CONSISTENT_READ, Perm.ALL)
            await guest.write(0, memoryview(b"n" * 3 * CLUSTER))
            target = graph.nodes["target"].driver
            assert isinstance(target, MemoryDriver)
            assert target.log == ["write"]
            assert await read(reader, CLUSTER, CLUSTER) == bytes(CLUSTER)
            for offset in (0, 2 * CLUSTER):
                with pytest.raises(PermissionError):
                    await read(reader, offset, 512)
            assert bitmap.count == 3 * CLUSTER  # it records on
            bitmap.freeze()
            with pytest.raises(BlockError, match=r"Failed to merge bitmap 'b' to internal copy-bitmap: .* in use"):
                await add(graph, "another", options)
            assert "another" not in graph.nodes
        finally:
            await graph.close()

    asyncio.run(act())


def test_over_another_driver_the_moment_cannot_be_read() -> None:
    async def act() -> None:
        graph = new_graph()
        try:
            await add(graph, "disk", MEMORY)
            await add(graph, "moment", {"driver": "snapshot-access", "file": "disk"})
            reader = BlockBackend(graph, "reader")
            graph.attach_root(reader, graph.nodes["moment"], Perm.CONSISTENT_READ, Perm.ALL)
            attempts: list[Awaitable[Any]] = [read(reader, 0, 512), block_status(graph.nodes["moment"], 0, SIZE)]
            for attempt in attempts:
                with pytest.raises(OSError) as caught:
                    await attempt
                assert caught.value.errno == errno.ENOTSUP
        finally:
            await graph.close()

    asyncio.run(act())
