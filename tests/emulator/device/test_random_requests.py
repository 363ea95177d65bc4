"""Random requests to a device that fails, stops and continues at random, against a bytearray."""

from __future__ import annotations

import asyncio
import errno

from hypothesis import given
from hypothesis import strategies as st

from kit.memory_disk import Bench
from livedisk.emulator.device.spec import SECTOR, SEGMENT, WRITEBACK_OFFSET, RequestType, Status

SECTORS = 32
places = st.integers(0, SECTORS - 1)
lengths = st.integers(1, 8)
steps = st.one_of(
    st.tuples(st.just("write"), places, lengths, st.integers(1, 255)),
    st.tuples(st.just("read"), places, lengths, st.just(0)),
    st.tuples(st.just("zero"), places, lengths, st.booleans()),
    st.tuples(st.just("flush"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("full"), st.just(0), st.just(0), st.integers(1, 3)),
    st.tuples(st.just("stop"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("cache"), st.just(0), st.just(0), st.booleans()),
)


@given(st.lists(steps, max_size=40))
def test_a_device_is_a_bytearray_whatever_happens(script: list[tuple[str, int, int, int]]) -> None:
    async def main() -> None:
        bench = Bench()
        driver = await bench.disk(size=SECTORS * SECTOR)
        device = await bench.device(werror="stop", rerror="stop")
        model = bytearray(SECTORS * SECTOR)

        async def submit(kind: RequestType, sector: int, data: bytes = b"", room: int = 0) -> tuple[Status, bytes]:
            into = bytearray(room)
            request = asyncio.ensure_future(device.submit(kind, sector, memoryview(data), memoryview(into)))
            # Whoever operates the machine makes room and continues it.
            while not (await asyncio.wait([request], timeout=0))[0]:
                await asyncio.sleep(0)
                bench.run_state.cont()
            return request.result(), bytes(into)

        for what, sector, count, extra in script:
            start, length = sector * SECTOR, count * SECTOR
            fits = sector + count <= SECTORS
            expected = Status.OK if fits else Status.IOERR
            if what == "write":
                status, _ = await submit(RequestType.OUT, sector, bytes([extra]) * length)
                assert status is expected
                if fits:
                    model[start : start + length] = bytes([extra]) * length
            elif what == "read":
                status, got = await submit(RequestType.IN, sector, room=length)
                assert status is expected
                assert not fits or got == model[start : start + length]
            elif what == "zero":
                status, _ = await submit(RequestType.WRITE_ZEROES, 0, SEGMENT.pack(sector, count, extra))
                assert status is expected
                if fits:
                    model[start : start + length] = bytes(length)
            elif what == "flush":
                before = driver.flushes
                assert (await submit(RequestType.FLUSH, 0))[0] is Status.OK
                assert driver.flushes > before
            elif what == "full":
                driver.faults.extend([errno.ENOSPC] * extra)
            elif what == "stop":
                driver.faults.clear()
                await bench.run_state.stop()
            else:
                driver.faults.clear()
                bench.run_state.cont()
                await device.write_config(WRITEBACK_OFFSET, bytes([extra]))
        driver.faults.clear()
        bench.run_state.cont()
        assert driver.bytes == model
        counted = device.accounting.stats()
        assert counted.failed_wr_operations == counted.failed_rd_operations == 0
        await bench.close()

    asyncio.run(asyncio.wait_for(main(), 60))
