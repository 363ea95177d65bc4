"""Exports in one process: real NBD clients against nodes and devices."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kit import libnbd
from kit.memory_disk import Bench
from kit.peers import run
from kit.places import pattern
from livedisk.emulator import drivers as _registered
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.device.runstate import State
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.exports.options import NbdExportOptions, NbdServerAdd, NbdServerOptions, RemoveMode, UnixAddress
from livedisk.emulator.qmp import blockdev as _unions
from livedisk.emulator.qmp.visit import JSON, visit

assert _registered
assert _unions

MIB = 1 << 20
Body = Callable[[Bench, Callable[[str], str]], Awaitable[None]]


def with_server(folder: Path, body: Body, **server: Any) -> None:
    """Run ``body`` beside an NBD server; it gets a function from export names to URIs."""
    socket = folder / "nbd.sock"

    async def main() -> None:
        bench = Bench()
        await bench.exports.start_server(NbdServerOptions(addr=UnixAddress(path=str(socket)), **server))
        try:
            await body(bench, lambda name: f"nbd+unix:///{name}?socket={socket}")
        finally:
            await bench.close()

    asyncio.run(asyncio.wait_for(main(), 60))


async def file_node(bench: Bench, path: Path, name: str, driver: str = "file", **options: Any) -> None:
    """A node on a host file; ``driver`` names a format above it."""
    values: dict[str, Any] = {"driver": "file", "filename": str(path), **options}
    if driver != "file":
        values = {"driver": driver, "file": values}
    await bench.graph.add(visit(BlockdevOptions, {**values, "node-name": name}, JSON))


async def script(uri: str, code: str, **how: Any) -> Any:
    """A libnbd script, while our loop goes on."""
    return await asyncio.to_thread(libnbd.script, uri, code, **how)


async def doomed(uri: str, action: str) -> Any:
    """A client whose ``action`` is not going to succeed because its export ends: "gone", or what went well instead."""
    code = f"""
        try:
            h.connect_uri({uri!r})
            {action}
            result = "served"
        except nbd.Error:
            result = "gone"
        """
    return await asyncio.to_thread(libnbd.script, None, code)


def export(id: str = "e", node: str = "disk", **options: Any) -> NbdExportOptions:
    return NbdExportOptions(id=id, node_name=node, **options)


# -- nodes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writethrough", [False, True])
def test_a_node_is_written_and_read_through_its_export(short_path: Path, writethrough: bool) -> None:
    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        driver = await bench.disk()
        await bench.exports.add(export(writable=True, writethrough=writethrough, description="memory"))
        got = await script(
            uri("disk"),
            """
            h.pwrite(b"a" * 4096, 512)
            h.zero(1024, 512)
            h.trim(4096, 8192)
            h.cache(4096, 0)
            h.pwrite(b"f" * 512, 0, nbd.CMD_FLAG_FUA)
            h.flush()
            result = [h.get_size(), h.is_read_only(), h.can_multi_conn(), h.can_fua(), h.can_fast_zero(), h.can_cache(),
                      h.get_block_size(nbd.SIZE_MINIMUM), h.get_block_size(nbd.SIZE_PREFERRED),
                      h.get_block_size(nbd.SIZE_MAXIMUM), h.get_canonical_export_name(),
                      h.get_export_description(), h.pread(1536, 512).hex()]
            """,
            before="h.set_full_info(True); h.set_request_block_size(True)",
        )
        assert got[:9] == [MIB, False, True, True, True, True, 1, 4096, 32 * MIB]
        assert got[9:11] == ["disk", "memory"]
        assert bytes.fromhex(got[11]) == bytes(1024) + b"a" * 512
        assert bytes(driver.bytes[:512]) == b"f" * 512
        assert "discard" in driver.log
        # FUA and FLUSH flush; writing through flushes for each of the two writes, the zeroes and the discard besides.
        assert driver.flushes == (2 if not writethrough else 5)

    with_server(short_path, body)


def test_a_read_only_export_refuses_writes(short_path: Path) -> None:
    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        await bench.disk()
        await bench.exports.add(export())
        assert await script(uri("disk"), "result = h.is_read_only()") is True
        await bench.disk("ro", **{"read-only": True})
        with pytest.raises(LiveDiskError, match="Cannot export read-only node as writable"):
            await bench.exports.add(export("e2", "ro", writable=True))
        await bench.exports.add_legacy(NbdServerAdd(device="ro", writable=True))
        assert await script(uri("ro"), "result = h.is_read_only()") is True

    with_server(short_path, body)


def test_errors_of_the_disk_reach_the_client(short_path: Path) -> None:
    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        driver = await bench.disk()
        await bench.exports.add(export(writable=True))
        driver.faults.append(errno.ENOSPC)
        got = await script(
            uri("disk"),
            """
            try:
                h.pwrite(b"x" * 512, 0)
            except nbd.Error as error:
                result = error.errno
            """,
        )
        assert got == "ENOSPC"
        assert bench.run_state.running  # an export of a node is no guest
        assert bench.events == []

    with_server(short_path, body)


def test_the_fast_path_serves_a_raw_file_and_an_export_follows_its_node(short_path: Path) -> None:
    data = pattern(MIB)
    image, other = short_path / "a.raw", short_path / "b.raw"
    image.write_bytes(data)
    other.write_bytes(bytes(reversed(data)))

    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        await file_node(bench, image, "disk")
        await file_node(bench, other, "other")
        await bench.exports.add(export(writable=True))
        served = bench.exports.find("e")
        assert served is not None
        # Whatever way it takes, slow or fast, the second read finds the page in the cache.
        room = bytearray(4096)
        await served.read(8192, memoryview(room))
        assert served.try_read(8192, memoryview(room)) != 0
        assert bytes(room) == data[8192 : 8192 + 4096]
        assert served.try_write(0, memoryview(b"q" * 512)) == 1
        digest = "import hashlib; result = hashlib.sha256(h.pread(65536, 4096)).hexdigest()"
        first = await script(uri("disk"), digest)
        bench.graph.replace_node(bench.graph.nodes["disk"], bench.graph.nodes["other"])
        assert await script(uri("disk"), digest) != first
        assert [info.node_name for info in bench.exports.query()] == ["other"]

    with_server(short_path, body)


def test_drained_nodes_hold_their_exports(short_path: Path) -> None:
    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        driver = await bench.disk()
        await bench.exports.add(export(writable=True))
        async with bench.graph.drained(driver.node):
            write = asyncio.ensure_future(script(uri("disk"), 'h.pwrite(b"x" * 512, 0); result = True'))
            await asyncio.sleep(0.5)
            assert not write.done()
            assert driver.log == []
        assert await write is True

    with_server(short_path, body)


def test_a_shared_export_refuses_a_resize_and_lets_others_write(short_path: Path) -> None:
    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        await bench.disk()
        await bench.exports.add(export("one", writable=True))
        await bench.exports.add(export("two", name="again", writable=True))
        await script(uri("disk"), 'h.pwrite(b"x" * 512, 0); h.flush()')
        assert await script(uri("again"), "result = h.pread(2, 0).decode()") == "xx"

    with_server(short_path, body)


def test_max_connections_of_one_stops_offering_several(short_path: Path) -> None:
    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        await bench.disk()
        await bench.exports.add(export(writable=True))
        assert await script(uri("disk"), "result = h.can_multi_conn()") is False

    with_server(short_path, body, max_connections=1)


def test_block_status_of_a_chain(short_path: Path) -> None:
    base, top = short_path / "base.qcow2", short_path / "top.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", base, "1M"])
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top])
    run(["qemu-io", "-c", "write 64k 64k", "-c", "write -z 192k 64k", base])
    run(["qemu-io", "-c", "write 256k 64k", "-c", "write -z 384k 64k", top])

    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        await file_node(bench, top, "disk", "qcow2")
        await bench.exports.add(export(allocation_depth=True))
        contexts = ("base:allocation", "qemu:allocation-depth")
        got = await script(
            uri("disk"),
            """
            result = {}
            def extent(context, offset, entries, error):
                result.setdefault(context, []).extend(entries)
            h.block_status(h.get_size(), 0, extent)
            """,
            contexts=contexts,
        )
        unit = 65536
        # As qemu-storage-daemon answers for these images.
        assert got == {
            "base:allocation": [unit, 3, unit, 0, 2 * unit, 3, unit, 0, 11 * unit, 3],
            "qemu:allocation-depth": [
                *(unit, 0, unit, 2, unit, 0, unit, 2, unit, 1),
                *(unit, 0, unit, 1, 9 * unit, 0),
            ],
        }

    with_server(short_path, body)


# -- the guest's door ----------------------------------------------------------------------------------------------------


def test_a_devices_export_is_held_by_the_run_state_and_a_nodes_is_not(short_path: Path) -> None:
    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        await bench.disk()
        await bench.device(**{"share-rw": True})
        await bench.exports.add_legacy(NbdServerAdd(device="virtio0", writable=True))
        await bench.exports.add(export(writable=True))
        write = 'h.pwrite(b"x" * 512, 0); result = True'
        assert await script(uri("virtio0"), write)
        await bench.run_state.stop()
        held = asyncio.ensure_future(script(uri("virtio0"), write))
        assert await script(uri("disk"), write)
        await asyncio.sleep(0.3)
        assert not held.done()
        bench.run_state.cont()
        assert await held

    with_server(short_path, body)


def test_a_device_is_exported_by_id_by_path_and_by_node_name_of_block_export_add(short_path: Path) -> None:
    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        await bench.disk()
        device = await bench.device(serial="x")
        await bench.exports.add_legacy(NbdServerAdd(device=device.backend_path, name="path"))
        await bench.exports.add(export("door", "virtio0", writable=True))
        await script(uri("virtio0"), 'h.pwrite(b"y" * 512, 0)')
        assert await script(uri("path"), "result = h.pread(1, 0).decode()") == "y"
        assert device.accounting.stats().wr_operations == 1
        assert [info.node_name for info in bench.exports.query()] == ["disk", "disk"]

    with_server(short_path, body)


def test_statistics_of_a_device_behind_its_door(short_path: Path) -> None:
    (short_path / "a.raw").write_bytes(pattern(MIB))

    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        await file_node(bench, short_path / "a.raw", "disk")
        device = await bench.device()
        await bench.exports.add_legacy(NbdServerAdd(device="virtio0", writable=True))
        await script(
            uri("virtio0"),
            """
            for n in range(64):
                h.pread(4096, n * 4096)
            for n in range(16):
                h.pwrite(b"z" * 512, n * 512)
            h.trim(65536, 131072)
            h.zero(65536, 0)
            h.flush()
            """,
        )
        stats = device.accounting.stats(device.backend.node.wr_highest)
        assert (stats.rd_operations, stats.rd_bytes) == (64, 64 * 4096)
        assert (stats.wr_operations, stats.wr_bytes) == (17, 16 * 512 + 65536)
        assert (stats.unmap_operations, stats.unmap_bytes) == (1, 65536)
        assert stats.flush_operations == 1
        assert stats.wr_highest_offset >= 65536
        assert stats.rd_total_time_ns > 0

    with_server(short_path, body)


def test_nothing_changes_between_stop_and_cont_while_a_client_writes(short_path: Path) -> None:
    image = short_path / "a.raw"
    image.write_bytes(bytes(MIB))

    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        await file_node(bench, image, "disk")
        await bench.device()
        await bench.exports.add_legacy(NbdServerAdd(device="virtio0", writable=True))
        writer = asyncio.ensure_future(
            script(
                uri("virtio0"),
                """
                import time
                result, end = 0, time.monotonic() + seconds
                while time.monotonic() < end:
                    result += 1
                    h.pwrite(result.to_bytes(8, "big") * 64, result * 512 % h.get_size())
                    if not result % 7:
                        h.zero(65536, 0)
                """,
                seconds=2,
            )
        )
        seen = set()
        while not writer.done():
            await asyncio.sleep(0.1)
            await bench.run_state.stop()
            frozen = image.read_bytes()
            await asyncio.sleep(0.05)
            assert image.read_bytes() == frozen
            seen.add(hash(frozen))
            bench.run_state.cont()
        last = await writer
        at = last * 512 % MIB
        assert last % 7 == 0 or image.read_bytes()[at : at + 512] == last.to_bytes(8, "big") * 64
        assert len(seen) > 2

    with_server(short_path, body)


def test_a_full_disk_behind_the_door_waits_for_cont(short_path: Path) -> None:
    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        driver = await bench.disk()
        device = await bench.device()
        await bench.exports.add_legacy(NbdServerAdd(device="virtio0", writable=True))
        driver.faults.append(errno.ENOSPC)
        write = asyncio.ensure_future(script(uri("virtio0"), 'h.pwrite(b"n" * 512, 0); result = True'))
        while bench.run_state.running:
            await asyncio.sleep(0.01)
        assert bench.run_state.state is State.IO_ERROR
        assert device.io_status == "nospace"
        await asyncio.sleep(0.1)
        assert not write.done()
        bench.run_state.cont()
        assert await write
        assert bytes(driver.bytes[:512]) == b"n" * 512

    with_server(short_path, body)


def test_ending_an_export_or_its_device_does_not_wait_for_cont(short_path: Path) -> None:
    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        await bench.disk()
        await bench.device()
        for end in ("export", "device"):
            await bench.exports.add_legacy(NbdServerAdd(device="virtio0", writable=True))
            await bench.run_state.stop()
            write = asyncio.ensure_future(doomed(uri("virtio0"), 'h.pwrite(b"x" * 512, 0)'))
            await asyncio.sleep(0.6)
            if end == "export":
                await bench.exports.delete("virtio0", RemoveMode.HARD)
            else:
                await bench.devices.delete("virtio0")
            assert await write == "gone"
            bench.run_state.cont()
        assert [name for name in bench.event_names if name.endswith("Deleted")] == [
            "BlockExportDeleted",
            "BlockExportDeleted",
            "DeviceDeleted",
            "DeviceDeleted",
        ]

    with_server(short_path, body)


def test_large_logical_blocks_are_the_doors_smallest_blocks(short_path: Path) -> None:
    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        await bench.disk()
        await bench.device(logical_block_size=4096, physical_block_size=8192)
        await bench.exports.add_legacy(NbdServerAdd(device="virtio0"))
        sizes = "result = [h.get_block_size(nbd.SIZE_MINIMUM), h.get_block_size(nbd.SIZE_PREFERRED)]"
        assert await script(uri("virtio0"), sizes) == [4096, 8192]

    with_server(short_path, body)


def test_switching_the_write_cache_moves_the_doors_fast_path(short_path: Path) -> None:
    (short_path / "a.raw").write_bytes(pattern(MIB))

    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        await file_node(bench, short_path / "a.raw", "disk")
        device = await bench.device()
        await bench.exports.add_legacy(NbdServerAdd(device="virtio0", writable=True))
        served = bench.exports.find("virtio0")
        assert served is not None
        view = memoryview(b"1" * 512)
        assert served.try_write(0, view) == 1
        await device.write_config(32, b"\0")
        assert served.try_write(0, view) == 0
        await device.write_config(32, b"\1")
        assert served.try_write(0, view) == 1
        await bench.run_state.stop()
        assert served.try_write(0, view) == 0
        assert served.try_read(0, memoryview(bytearray(512))) == 0
        bench.run_state.cont()

    with_server(short_path, body)


# -- making and ending -------------------------------------------------------------------------------------------------


def test_a_removal_that_waits_says_so_and_ends_with_its_event(short_path: Path) -> None:
    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        driver = await bench.disk()
        driver.gate = asyncio.Event()
        await bench.exports.add(export(writable=True))
        write = asyncio.ensure_future(doomed(uri("disk"), 'h.pwrite(b"x" * 512, 0)'))
        while not driver.under_way:
            await asyncio.sleep(0.01)
        with pytest.raises(LiveDiskError, match="export 'e' still in use") as caught:
            await bench.exports.delete("e", RemoveMode.SAFE)
        assert caught.value.hint == "Use mode='hard' to force client disconnect"
        await bench.exports.delete("e", RemoveMode.HARD)
        assert await write == "gone"
        assert [info.shutting_down for info in bench.exports.query()] == [True]
        assert bench.events == []
        with pytest.raises(LiveDiskError, match="Export 'e' is already shutting down"):
            await bench.exports.delete("e", RemoveMode.HARD)
        driver.gate.set()
        while bench.exports.query():
            await asyncio.sleep(0.01)
        assert bench.events == [("BlockExportDeleted", {"id": "e"})]

    with_server(short_path, body)


def test_stopping_the_server_ends_every_export_and_it_can_start_again(short_path: Path) -> None:
    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        await bench.disk()
        await bench.device(**{"share-rw": True})
        await bench.exports.add(export("one", writable=True))
        await bench.exports.add(export("two", "virtio0"))
        await bench.run_state.stop()
        waiting = asyncio.ensure_future(doomed(uri("virtio0"), "h.pread(512, 0)"))
        await asyncio.sleep(0.6)
        await bench.exports.stop_server()
        assert await waiting == "gone"
        assert bench.events[1:] == [("BlockExportDeleted", {"id": "two"}), ("BlockExportDeleted", {"id": "one"})]
        bench.run_state.cont()
        socket = uri("x").partition("=")[2]
        await bench.exports.start_server(NbdServerOptions(addr=UnixAddress(path=socket)))
        await bench.exports.add(export("one"))
        assert await script(uri("disk"), "result = h.get_size()") == MIB

    with_server(short_path, body)


def test_a_refused_export_leaves_nothing(short_path: Path) -> None:
    async def body(bench: Bench, uri: Callable[[str], str]) -> None:
        await bench.disk()
        for options in (
            export("9"),
            export(node="nope"),
            export(iothread="nope"),
            export(bitmaps=["nope"]),
            export(name="x" * 5000),
            export(description="x" * 5000),
        ):
            with pytest.raises(LiveDiskError):
                await bench.exports.add(options)
        assert bench.exports.query() == []
        assert bench.graph.backends == []
        await bench.graph.delete("disk")

    with_server(short_path, body)
