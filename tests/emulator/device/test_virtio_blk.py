"""Requests as the specification has them, the error policies, and the statistics."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from kit.memory_disk import Bench, MemoryDriver
from kit.places import pattern
from livedisk.emulator.block.types import ZeroFlags
from livedisk.emulator.device.policy import Action, OnError, action_for, settled
from livedisk.emulator.device.runstate import MOVES, RunState, State
from livedisk.emulator.device.spec import SEGMENT, WRITEBACK_OFFSET, RequestType, Status
from livedisk.emulator.device.virtio_blk import VirtioBlk
from livedisk.emulator.errors import BlockError, DeviceNotFound, LiveDiskError
from livedisk.nbd.export import MISS

Body = Callable[[Bench, MemoryDriver, VirtioBlk], Awaitable[None]]


def with_device(body: Body, disk: dict[str, Any] | None = None, **properties: Any) -> None:
    """Run ``body`` on a device of 1 MiB of memory."""

    async def main() -> None:
        bench = Bench()
        driver = await bench.disk(**(disk or {}))
        device = await bench.device(**properties)
        await body(bench, driver, device)
        await bench.close()

    asyncio.run(asyncio.wait_for(main(), 20))


# -- requests ----------------------------------------------------------------------------------------------------------


def test_in_out_flush_and_get_id() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        data = pattern(8192)
        assert await device.submit(RequestType.OUT, 8, memoryview(data)) is Status.OK
        room = bytearray(8192)
        assert await device.submit(RequestType.IN, 8, into=memoryview(room)) is Status.OK
        assert room == data == bytes(driver.bytes[4096 : 4096 + 8192])
        assert await device.submit(RequestType.FLUSH, 0) is Status.OK
        assert driver.flushes == 1
        serial = bytearray(20)
        assert await device.submit(RequestType.GET_ID, 0, into=memoryview(serial)) is Status.OK
        assert bytes(serial) == b"a-serial-number-that"  # cut off after 20 bytes
        assert await device.submit(99, 0) is Status.UNSUPP

    with_device(body, serial="a-serial-number-that-is-too-long")


def test_a_short_serial_is_padded() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        serial = bytearray(b"x" * 24)
        await device.submit(RequestType.GET_ID, 0, into=memoryview(serial))
        assert bytes(serial) == b"abc".ljust(20, b"\0") + b"xxxx"

    with_device(body, serial="abc")


@pytest.mark.parametrize(("sector", "length"), [(2047, 1024), (1 << 60, 512), (0, 700), (2048, 512)])
def test_requests_outside_the_disk_or_misaligned_are_invalid(sector: int, length: int) -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        assert await device.submit(RequestType.IN, sector, into=memoryview(bytearray(length))) is Status.IOERR
        assert await device.submit(RequestType.OUT, sector, memoryview(bytes(length))) is Status.IOERR
        assert driver.log == ["read"]  # the geometry's look at the first sector
        stats = device.accounting.stats()
        assert (stats.invalid_rd_operations, stats.invalid_wr_operations) == (1, 1)
        assert (stats.rd_operations, stats.failed_rd_operations) == (0, 0)

    with_device(body)


def test_large_logical_blocks_are_enforced() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        assert await device.submit(RequestType.IN, 1, into=memoryview(bytearray(4096))) is Status.IOERR
        assert await device.submit(RequestType.IN, 8, into=memoryview(bytearray(4096))) is Status.OK

    with_device(body, logical_block_size=4096, physical_block_size=4096)


@pytest.mark.parametrize(
    ("kind", "segment", "status"),
    [
        (RequestType.DISCARD, (0, 8, 0), Status.OK),
        (RequestType.DISCARD, (0, 8, 1), Status.UNSUPP),
        (RequestType.DISCARD, (0, 9, 0), Status.IOERR),
        (RequestType.DISCARD, (2048, 1, 0), Status.IOERR),
        (RequestType.WRITE_ZEROES, (0, 8, 0), Status.OK),
        (RequestType.WRITE_ZEROES, (0, 8, 1), Status.OK),
        (RequestType.WRITE_ZEROES, (0, 8, 2), Status.UNSUPP),
        (RequestType.WRITE_ZEROES, (0, 9, 0), Status.IOERR),
    ],
)
def test_discard_and_write_zeroes_segments(kind: RequestType, segment: tuple[int, int, int], status: Status) -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        driver.bytes[:] = b"\1" * len(driver.bytes)
        packed = SEGMENT.pack(*segment)
        assert await device.submit(kind, 0, memoryview(packed)) is status
        zeroed = kind is RequestType.WRITE_ZEROES and status is Status.OK
        assert (bytes(driver.bytes[:4096]) == bytes(4096)) is zeroed
        assert await device.submit(kind, 0, memoryview(packed * 2)) is Status.UNSUPP

    with_device(body, **{"max-discard-sectors": 8, "max-write-zeroes-sectors": 8})


def test_what_is_not_offered_is_unsupported() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        packed = memoryview(SEGMENT.pack(0, 8, 0))
        assert await device.submit(RequestType.DISCARD, 0, packed) is Status.UNSUPP
        assert await device.submit(RequestType.WRITE_ZEROES, 0, packed) is Status.UNSUPP

    with_device(body, **{"discard": False, "write-zeroes": False})


def test_a_read_only_device_takes_no_writes() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        assert await device.submit(RequestType.OUT, 0, memoryview(bytes(512))) is Status.IOERR
        assert await device.submit(RequestType.WRITE_ZEROES, 0, memoryview(SEGMENT.pack(0, 8, 0))) is Status.IOERR
        assert "write" not in driver.log

    with_device(body, disk={"read-only": True})


def test_without_write_cache_every_write_is_flushed_and_the_fast_path_is_closed() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        device.try_write = _never  # replaced again when the cache is switched
        await device.submit(RequestType.OUT, 0, memoryview(bytes(512)))
        await device.submit(RequestType.WRITE_ZEROES, 0, memoryview(SEGMENT.pack(0, 8, 0)))
        assert driver.flushes == 2
        assert device.config().writeback == 0
        await device.write_config(WRITEBACK_OFFSET, b"\1")
        assert device.config().writeback == 1
        await device.submit(RequestType.OUT, 0, memoryview(bytes(512)))
        assert driver.flushes == 2
        await device.write_config(WRITEBACK_OFFSET, b"\0")
        assert driver.flushes == 3  # switching off flushes
        assert device.try_write(0, memoryview(bytes(512))) == MISS

    with_device(body, **{"write-cache": "off"})


def _never(offset: int, view: memoryview) -> int:
    raise AssertionError("the fast path was taken")


def test_a_resize_shows_in_the_capacity() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        before = device.config_generation
        await device.backend.node.truncate(2 << 20)
        assert device.config().capacity == 4096
        assert device.config_generation == before + 1

    with_device(body)


# -- error policies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.IGNORE, OnError.STOP, OnError.ENOSPC])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_policy_table(policy: OnError, number: int) -> None:
    expected = {
        OnError.REPORT: Action.REPORT,
        OnError.IGNORE: Action.IGNORE,
        OnError.STOP: Action.STOP,
        OnError.ENOSPC: Action.STOP if number == errno.ENOSPC else Action.REPORT,
    }[policy]
    assert action_for(policy, number) is expected


def test_auto_is_report_for_reads_and_enospc_for_writes() -> None:
    assert settled(OnError.AUTO, read=True) is OnError.REPORT
    assert settled(OnError.AUTO, read=False) is OnError.ENOSPC


def test_reported_errors_reach_the_guest_and_the_event_says_so() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        driver.faults.append(errno.EIO)
        assert await device.submit(RequestType.IN, 0, into=memoryview(bytearray(512))) is Status.IOERR
        assert bench.events == [
            (
                "BlockIoError",
                {
                    "qom-path": "/machine/peripheral/virtio0/virtio-backend",
                    "device": "",
                    "node-name": "disk",
                    "operation": "read",
                    "action": "report",
                    "nospace": False,
                    "reason": "Input/output error",
                },
            )
        ]
        stats = device.accounting.stats()
        assert (stats.failed_rd_operations, stats.rd_operations) == (1, 0)
        assert device.io_status == "ok"

    with_device(body)


def test_ignored_errors_succeed() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        driver.faults.append(errno.ENOSPC)
        assert await device.submit(RequestType.OUT, 0, memoryview(bytes(512))) is Status.OK
        assert bench.events[0][1]["action"] == "ignore"
        assert "nospace" not in bench.events[0][1]  # no policy here keeps an I/O status
        assert device.io_status is None
        assert device.accounting.stats().wr_operations == 1

    with_device(body, werror="ignore", rerror="ignore")


def test_a_full_disk_stops_the_guest_and_cont_tries_again() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        data = pattern(4096)
        driver.faults.append(errno.ENOSPC)
        write = asyncio.ensure_future(device.submit(RequestType.OUT, 0, memoryview(data)))
        while bench.run_state.running:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert not write.done()
        assert bench.run_state.state is State.IO_ERROR
        assert device.io_status == "nospace"
        assert bench.event_names == ["BlockIoError", "Stop"]
        assert bench.events[0][1]["action"] == "stop"
        assert bench.events[0][1]["nospace"] is True
        read = asyncio.ensure_future(device.submit(RequestType.IN, 0, into=memoryview(bytearray(512))))
        await asyncio.sleep(0.01)
        assert not read.done()
        bench.run_state.cont()
        assert await write is Status.OK
        assert await read is Status.OK
        assert bytes(driver.bytes[:4096]) == data
        assert bench.event_names[2:] == ["Resume"]
        assert device.io_status == "ok"
        stats = device.accounting.stats()
        assert (stats.wr_operations, stats.failed_wr_operations) == (1, 0)

    with_device(body)


def test_it_stops_again_as_long_as_it_fails() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        driver.faults.append(errno.EIO)
        write = asyncio.ensure_future(device.submit(RequestType.OUT, 0, memoryview(bytes(512))))
        for again in (True, True, False):
            while bench.run_state.running:
                await asyncio.sleep(0)
            await asyncio.sleep(0.01)  # the flush that belongs to stopping
            assert device.io_status == "failed"
            if again:
                driver.faults.append(errno.EIO)
            bench.run_state.cont()
        assert await write is Status.OK
        assert bench.event_names == ["BlockIoError", "Stop", "Resume"] * 3

    with_device(body, werror="stop")


def test_fast_zero_that_would_be_slow_is_no_error() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        with pytest.raises(OSError, match="supported"):
            await device.write_zeroes(0, 4096, ZeroFlags.NO_FALLBACK)
        assert bench.events == []
        assert bench.run_state.running

    with_device(body, disk={"slow-zeroes": True}, werror="stop")


def test_the_fast_path_leaves_errors_to_the_slow_path() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        def broken(offset: int, view: memoryview) -> int:
            raise OSError(errno.ENOSPC, "full")

        fast = device.accounting.counted_write(broken)
        assert fast(0, memoryview(bytes(512))) == MISS
        assert device.accounting.stats().wr_operations == 0

    with_device(body)


# -- run state ---------------------------------------------------------------------------------------------------------


def test_stop_waits_for_what_is_in_flight_and_flushes() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        driver.gate = asyncio.Event()
        write = asyncio.ensure_future(device.submit(RequestType.OUT, 0, memoryview(bytes(512))))
        await asyncio.sleep(0)
        stop = asyncio.ensure_future(bench.run_state.stop())
        await asyncio.sleep(0.01)
        assert not stop.done()
        assert driver.under_way == 1
        driver.gate.set()
        await stop
        assert write.done()
        assert driver.under_way == 0
        assert driver.flushes == 1
        late = asyncio.ensure_future(device.submit(RequestType.OUT, 8, memoryview(b"x" * 512)))
        await asyncio.sleep(0.01)
        assert not late.done()
        assert driver.bytes[4096] == 0
        bench.run_state.cont()
        assert await late is Status.OK
        assert bench.event_names == ["Stop", "Resume"]

    with_device(body)


def test_stop_and_cont_are_idempotent() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        await bench.run_state.stop()
        await bench.run_state.stop()
        bench.run_state.cont()
        bench.run_state.cont()
        assert bench.event_names == ["Stop", "Resume"]
        assert await device.submit(RequestType.FLUSH, 0) is Status.OK

    with_device(body)


def test_before_launch_a_device_holds_its_requests() -> None:
    async def main() -> None:
        bench = Bench(running=False)
        await bench.disk()
        device = await bench.device()
        flush = asyncio.ensure_future(device.submit(RequestType.FLUSH, 0))
        await asyncio.sleep(0.01)
        assert not flush.done()
        await bench.run_state.stop()
        assert bench.run_state.state is State.PRELAUNCH
        bench.run_state.cont()
        assert await flush is Status.OK
        assert bench.run_state.state is State.RUNNING
        await bench.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_while_a_migration_comes_in_cont_and_stop_only_say_what_follows() -> None:
    async def main() -> None:
        bench = Bench(running=False)
        bench.run_state.move(State.INMIGRATE)
        await bench.run_state.stop()
        assert not bench.run_state.start_after_migration
        bench.run_state.cont()
        assert bench.run_state.start_after_migration
        assert bench.run_state.state is State.INMIGRATE
        assert bench.events == []
        await bench.close()

    asyncio.run(main())


@pytest.mark.parametrize("start", State)
@pytest.mark.parametrize("goal", State)
def test_every_move_of_the_run_state(start: State, goal: State) -> None:
    async def flush() -> None: ...

    state = RunState(lambda data: None, flush, start)
    if goal is start or goal in MOVES[start]:
        state.move(goal)
        assert state.state is goal
    else:
        with pytest.raises(LiveDiskError, match=f"'{start}' -> '{goal}'"):
            state.move(goal)
        assert state.state is start


# -- statistics --------------------------------------------------------------------------------------------------------


def test_statistics_count_each_request_once() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        assert "idle_time_ns" not in sums(device)
        for _ in range(3):
            await device.submit(RequestType.IN, 0, into=memoryview(bytearray(1024)))
        await device.submit(RequestType.OUT, 0, memoryview(bytes(2048)))
        await device.submit(RequestType.WRITE_ZEROES, 0, memoryview(SEGMENT.pack(0, 8, 0)))
        await device.submit(RequestType.DISCARD, 0, memoryview(SEGMENT.pack(0, 16, 0)))
        await device.submit(RequestType.FLUSH, 0)
        stats = sums(device)
        assert (stats["rd_operations"], stats["rd_bytes"]) == (3, 3072)
        assert (stats["wr_operations"], stats["wr_bytes"]) == (2, 2048 + 4096)
        assert (stats["unmap_operations"], stats["unmap_bytes"]) == (1, 8192)
        assert stats["flush_operations"] == 1
        assert stats["rd_total_time_ns"] > 0
        assert stats["idle_time_ns"] > 0

    with_device(body)


def sums(device: VirtioBlk) -> dict[str, Any]:
    result: dict[str, Any] = msgspec.to_builtins(device.accounting.stats())
    return result


def test_fast_requests_are_counted_and_their_time_estimated() -> None:
    async def body(bench: Bench, driver: MemoryDriver, device: VirtioBlk) -> None:
        outcomes = iter([1, 2, 0] * 100)
        fast = device.accounting.counted_read(lambda offset, view: next(outcomes))
        view = memoryview(bytes(100))
        for _ in range(300):
            fast(0, view)
        stats = device.accounting.stats()
        assert (stats.rd_operations, stats.rd_bytes) == (200, 20000)
        assert stats.rd_total_time_ns > 0

    with_device(body)


# -- the device tree ---------------------------------------------------------------------------------------------------


def test_devices_are_found_by_id_and_by_path_and_deleted_with_events() -> None:
    async def main() -> None:
        bench = Bench()
        await bench.disk()
        device = await bench.device()
        for name in ("virtio0", "/machine/peripheral/virtio0", "/machine/peripheral/virtio0/virtio-backend"):
            assert bench.devices.find(name) is device
        assert bench.devices.find("disk") is None
        assert bench.devices.find("") is None
        with pytest.raises(LiveDiskError, match="Duplicate device ID 'virtio0'"):
            await bench.device()
        await bench.devices.delete("virtio0")
        assert bench.events == [
            ("DeviceDeleted", {"path": "/machine/peripheral/virtio0/virtio-backend"}),
            ("DeviceDeleted", {"device": "virtio0", "path": "/machine/peripheral/virtio0"}),
        ]
        with pytest.raises(DeviceNotFound, match="Device 'virtio0' not found"):
            await bench.devices.delete("virtio0")
        await bench.graph.delete("disk")
        await bench.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"drive": "nope"}, "Property 'virtio-blk-device.drive' can't find value 'nope'"),
        ({"iothread": "nope"}, "Device 'nope' not found"),
        ({"id": "9x"}, "Parameter 'id' expects an identifier"),
        (
            {"id": "second"},
            "Permission conflict on node 'disk': permissions 'write' are both required by block device "
            "'/machine/peripheral/second/virtio-backend' (uses node 'disk' as 'root' child) and unshared by block "
            "device '/machine/peripheral/virtio0/virtio-backend' (uses node 'disk' as 'root' child).",
        ),
    ],
)
def test_refused_devices_leave_nothing(properties: dict[str, Any], message: str) -> None:
    async def main() -> None:
        bench = Bench()
        await bench.disk()
        await bench.device()
        with pytest.raises((LiveDiskError, BlockError)) as caught:
            await bench.device(**{"id": "other", **properties})
        # Of two edges that exclude each other either may be named first.
        assert sorted(str(caught.value).split()) == sorted(message.split()) or str(caught.value) == message
        assert len(list(bench.devices)) == 1
        assert len(bench.graph.backends) == 1
        await bench.close()

    asyncio.run(main())


def test_share_rw_lets_two_devices_write() -> None:
    async def main() -> None:
        bench = Bench()
        await bench.disk()
        one = await bench.device(**{"share-rw": True})
        two = await bench.device(id="second", **{"share-rw": True})
        await one.submit(RequestType.OUT, 0, memoryview(b"1" * 512))
        room = bytearray(512)
        await two.submit(RequestType.IN, 0, into=memoryview(room))
        assert room == b"1" * 512
        await bench.close()

    asyncio.run(main())
