"""file, host_device, raw and null against the same command given to qemu-storage-daemon; and what only we do."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from contract.disks import ALL_WRITES, new_graph, opened, parse, read

from kit.qemu import StorageDaemon, create, qemu_img, qemu_io
from kit.qmp import QmpError
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.flatmap import MISS
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.reopen import reopen
from livedisk.emulator.block.status import block_status
from livedisk.emulator.block.transaction import Transaction
from livedisk.emulator.block.types import Preallocation, ZeroFlags
from livedisk.emulator.drivers.file import FileDriver
from livedisk.emulator.errors import BlockError, LiveDiskError, LockError

REFUSED: list[dict[str, Any]] = [
    {"driver": "file", "filename": "none"},
    {"driver": "file", "filename": ""},
    {"driver": "file", "filename": "folder"},
    {"driver": "file", "filename": "folder", "read-only": True},
    {"driver": "file", "filename": "/dev/zero"},
    {"driver": "file", "filename": "file:disk.raw"},
    {"driver": "file", "filename": "disk.raw", "aio": "native"},
    {"driver": "file", "filename": "disk.raw", "force-share": True},
    {"driver": "file", "filename": "disk.raw", "detect-zeroes": "unmap"},
    {"driver": "host_device", "filename": "disk.raw"},
    {"driver": "raw", "offset": 2048, "file": {"driver": "file", "filename": "odd.raw"}},
    {"driver": "raw", "size": 2048, "file": {"driver": "file", "filename": "odd.raw"}},
    {"driver": "raw", "size": 100, "file": {"driver": "file", "filename": "odd.raw"}},
    {"driver": "raw", "size": 512, "offset": 513, "file": {"driver": "file", "filename": "odd.raw"}},
    {"driver": "raw", "file": "nobody"},
    {"driver": "null-co", "latency-ns": 1 << 63},
]
REFUSED_REOPENS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"driver": "null-co", "size": 1024}, {"driver": "null-co", "size": 1024, "latency-ns": 5}),
    ({"driver": "null-co", "size": 1024}, {"driver": "null-co"}),
    ({"driver": "file", "filename": "disk.raw"}, {"driver": "file", "filename": "odd.raw"}),
    ({"driver": "file", "filename": "disk.raw"}, {"driver": "file", "filename": "disk.raw", "aio": "io_uring"}),
    ({"driver": "file", "filename": "disk.raw"}, {"driver": "file", "filename": "disk.raw", "locking": "off"}),
]


class Peer:
    """qemu-storage-daemon's monitor, with refusals as text."""

    def __init__(self, daemon: StorageDaemon) -> None:
        self.daemon = daemon
        self._monitor = daemon.qmp()

    def close(self) -> None:
        self._monitor.close()

    def error(self, command: str, arguments: dict[str, Any]) -> str:
        """The error's text, or nothing where the command is accepted."""
        try:
            self._monitor.call(command, arguments)
        except QmpError as error:
            return error.desc
        return ""


@pytest.fixture
def peer(folder: Path, short_path: Path) -> Iterator[Peer]:
    """The daemon, with `folder` as its current folder."""
    with StorageDaemon(short_path, cwd=folder) as daemon:
        monitor = Peer(daemon)
        yield monitor
        monitor.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files to open, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.raw").write_bytes(b"d" * (1 << 20))
    (tmp_path / "odd.raw").write_bytes(b"o" * 1000)
    (tmp_path / "folder").mkdir()
    return tmp_path


def our_answer(*options: dict[str, Any]) -> str:
    """What blockdev-add, and then blockdev-reopen, answer here: the error's text, or nothing."""

    async def run() -> str:
        graph = new_graph()
        try:
            node = await graph.add(parse({"node-name": "n", **options[0]}))
            for later in options[1:]:
                await reopen(graph, {node: parse({"node-name": "n", **later})})
        except LiveDiskError as error:
            return str(error)
        finally:
            await graph.close()
        return ""

    return asyncio.run(run())


def test_what_is_refused_is_refused_in_qemus_words(folder: Path, peer: Peer) -> None:
    for options in REFUSED:
        theirs = peer.error("blockdev-add", {"node-name": "n", **options})
        assert our_answer(options) == theirs, options
    for before, after in REFUSED_REOPENS:
        assert peer.error("blockdev-add", {"node-name": "n", **before}) == ""
        theirs = peer.error("blockdev-reopen", {"options": [{"node-name": "n", **after}]})
        assert our_answer(before, after) == theirs != "", after
        assert peer.error("blockdev-del", {"node-name": "n"}) == ""


def test_a_descriptor_set_and_a_reservation_manager_are_refused_by_name(folder: Path) -> None:
    assert "/dev/fdset/3" in our_answer({"driver": "file", "filename": "/dev/fdset/3"})
    assert "'x'" in our_answer({"driver": "file", "filename": "disk.raw", "pr-manager": "x"})


def test_odd_size_is_shown_in_whole_sectors_padded_by_zeroes(folder: Path) -> None:
    async def run() -> None:
        async with opened({"driver": "raw", "file": {"driver": "file", "filename": "odd.raw"}}) as disk:
            assert disk.size == 1024
            assert await read(disk, 0, 1024) == b"o" * 1000 + bytes(24)

    asyncio.run(run())


# -- locks -----------------------------------------------------------------------------------------------------------
def shared_for_guest() -> Perm:
    """What a device shares: other readers, nobody who writes."""
    return Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED


def test_qemu_img_is_kept_off_an_image_in_use_here(folder: Path) -> None:
    async def run() -> None:
        async with opened(
            {"driver": "raw", "file": {"driver": "file", "filename": "disk.raw"}}, ALL_WRITES, shared_for_guest()
        ):
            done = await asyncio.to_thread(qemu_io_result, "write 0 512")
            assert 'Failed to get "write" lock' in done
            assert "Is another process using the image [disk.raw]?" in done
        assert 'Failed to get "write" lock' not in await asyncio.to_thread(qemu_io_result, "write 0 512")

    asyncio.run(run())


def qemu_io_result(command: str) -> str:
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", command, "disk.raw"], capture_output=True, text=True, check=False
    )
    return done.stderr + done.stdout


def test_qemu_img_cannot_even_look_at_a_qcow2_image_in_use_here(folder: Path) -> None:
    create(folder / "disk.qcow2", 1 << 20)

    async def run() -> str:
        disk = {"driver": "qcow2", "file": {"driver": "file", "filename": "disk.qcow2"}}
        async with opened(disk, ALL_WRITES, shared_for_guest()):
            command = ["qemu-img", "info", "disk.qcow2"]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
            return done.stderr

    assert 'Failed to get shared "write" lock' in asyncio.run(run())


def attempt(perm: Perm, shared: Perm, **options: Any) -> tuple[str, str]:
    """The text and the hint of the refusal to open disk.raw, or nothing."""

    async def run() -> tuple[str, str]:
        try:
            async with opened({"driver": "file", "filename": "disk.raw", **options}, perm, shared):
                return "", ""
        except LockError as error:
            return str(error), error.hint

    return asyncio.run(run())


def test_an_image_in_use_by_qemu_is_refused_naming_the_process(folder: Path, peer: Peer) -> None:
    assert peer.error("blockdev-add", {"driver": "file", "filename": "disk.raw", "node-name": "f"}) == ""
    export = {"type": "nbd", "id": "e", "node-name": "f", "writable": True}
    assert peer.error("block-export-add", export) == ""
    assert attempt(ALL_WRITES, Perm.ALL)[0] == 'Failed to get "resize" lock', "the export lets nobody resize"
    text, hint = attempt(Perm.CONSISTENT_READ | Perm.WRITE, shared_for_guest())
    assert text == 'Failed to get shared "write" lock'
    assert hint.startswith("Is another process using the image [disk.raw]?\n")
    assert f"(process {peer.daemon.pid})" in hint
    assert attempt(Perm.CONSISTENT_READ, shared_for_guest(), locking="off") == ("", "")
    assert attempt(Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL) == ("", ""), "who lets others write gets along with it"


def test_two_graphs_of_one_process_refuse_each_other(folder: Path) -> None:
    async def run() -> None:
        async with opened({"driver": "file", "filename": "disk.raw"}, ALL_WRITES, shared_for_guest()):
            with pytest.raises(LockError, match='Failed to get "write" lock') as refused:
                async with opened({"driver": "file", "filename": "disk.raw"}, ALL_WRITES, shared_for_guest()):
                    pass
            assert "locked by this process" in refused.value.hint

    asyncio.run(run())


def test_a_refused_change_of_permissions_leaves_the_old_locks(folder: Path) -> None:
    async def run() -> None:
        file = {"driver": "file", "filename": "disk.raw"}
        async with (
            opened(file, Perm.CONSISTENT_READ, Perm.ALL) as one,
            opened(file, Perm.CONSISTENT_READ, shared_for_guest()) as two,
        ):
            with pytest.raises(LockError, match='Failed to get "write" lock'):
                one.graph.set_root_permissions(one, ALL_WRITES, Perm.ALL)
            assert one.node.perm == Perm.CONSISTENT_READ
            two.graph.set_root_permissions(two, Perm.CONSISTENT_READ, Perm.ALL)
            one.graph.set_root_permissions(one, ALL_WRITES, Perm.ALL)
            assert one.try_write(0, memoryview(b"x" * 512)) == 1

    asyncio.run(run())


# -- opening for writing only when somebody writes -------------------------------------------------------------------
@pytest.mark.parametrize("ends", ["commits", "is undone"])
def test_permissions_prepared_twice_in_a_transaction_leave_one_descriptor(ends: str, folder: Path) -> None:
    """As an export attaches itself. A second one would hold locks that nobody gives back."""

    def descriptors() -> int:
        found = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return found.count(str((folder / "disk.raw").resolve()))

    async def act() -> None:
        graph = new_graph()
        try:
            file = {"driver": "file", "node-name": "disk", "filename": str(folder / "disk.raw"), "auto-read-only": True}
            node = await graph.add(parse(file))
            backend = BlockBackend(graph, "test")
            try:
                with Transaction() as steps:
                    graph.attach_root(backend, node, Perm.WRITE, Perm.ALL, steps)
                    graph.set_root_permissions(backend, Perm.WRITE, Perm.ALL & ~Perm.RESIZE)
                    if ends == "is undone":
                        raise BlockError("on purpose")
            except BlockError:
                assert ends == "is undone"
            assert descriptors() == 1
        finally:
            await graph.close()
        assert descriptors() == 0

    asyncio.run(act())


def test_auto_read_only_opens_for_writing_when_a_parent_writes(folder: Path) -> None:
    async def run() -> None:
        file = {"driver": "file", "filename": "disk.raw", "auto-read-only": True}
        async with opened(file, Perm.CONSISTENT_READ, Perm.ALL) as disk:
            driver = disk.node.driver
            assert isinstance(driver, FileDriver)
            fd = driver.host.fd
            assert mode(fd) == os.O_RDONLY
            os.rename("disk.raw", "moved.raw")  # it is the file that was opened, not the name
            disk.graph.set_root_permissions(disk, ALL_WRITES, Perm.ALL)
            assert driver.host.fd == fd
            assert mode(fd) == os.O_RDWR
            await disk.write(0, memoryview(b"new"))
            disk.graph.set_root_permissions(disk, Perm.CONSISTENT_READ, Perm.ALL)
            assert mode(fd) == os.O_RDONLY
            assert await read(disk, 0, 4) == b"newd"

    asyncio.run(run())


def mode(fd: int) -> int:
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    return int(text.split("flags:")[1].split()[0], 8) & os.O_ACCMODE


def test_a_read_only_node_has_no_writers(folder: Path) -> None:
    async def run() -> None:
        with pytest.raises(BlockError, match="Block node is read-only"):
            async with opened({"driver": "file", "filename": "disk.raw", "read-only": True}):
                pass

    asyncio.run(run())


def test_reopen_to_direct_and_back_keeps_descriptor_and_content(folder: Path) -> None:
    async def run() -> None:
        file = {"driver": "file", "filename": "disk.raw", "node-name": "f"}
        async with opened(file) as disk:
            for direct in (True, False, True):
                await reopen(disk.graph, {disk.node: parse({**file, "cache": {"direct": direct}})})
                assert (disk.node.driver.request_alignment > 1) is direct
                await read(disk, 0, 512)  # warms the page cache, if there is one
                assert (disk.try_read(0, memoryview(bytearray(512))) == MISS) is direct
                await disk.write(513, memoryview(b"\x01\x02\x03"))
                assert await read(disk, 510, 8) == b"ddd\x01\x02\x03dd"

    asyncio.run(run())


# -- size, holes ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prealloc", list(Preallocation))
def test_growing_with_preallocation(folder: Path, prealloc: Preallocation) -> None:
    async def run() -> None:
        async with opened({"driver": "file", "filename": "disk.raw"}) as disk:
            before = await disk.node.driver.allocated_size() or 0
            if prealloc is Preallocation.METADATA:
                with pytest.raises(BlockError, match="Unsupported preallocation mode: metadata"):
                    await disk.truncate(2 << 20, prealloc=prealloc)
                return
            await disk.truncate(2 << 20, prealloc=prealloc)
            assert disk.size == 2 << 20
            more = (await disk.node.driver.allocated_size() or 0) - before
            assert (more >= 1 << 20) is (prealloc is not Preallocation.OFF)
            assert await read(disk, 1 << 20, 1 << 20) == bytes(1 << 20)
            if prealloc is not Preallocation.OFF:
                with pytest.raises(BlockError, match="Cannot use preallocation for shrinking files"):
                    await disk.truncate(1 << 20, prealloc=prealloc)

    asyncio.run(run())


def test_unmapping_zeroes_and_discard_free_space(folder: Path) -> None:
    async def run() -> None:
        async with opened({"driver": "file", "filename": "disk.raw", "discard": "unmap"}) as disk:
            await disk.flush()
            full = await disk.node.driver.allocated_size() or 0
            await disk.write_zeroes(0, 256 << 10)
            assert await disk.node.driver.allocated_size() == full, "zeroes without MAY_UNMAP stay allocated"
            await disk.write_zeroes(0, 256 << 10, ZeroFlags.MAY_UNMAP)
            assert await disk.node.driver.allocated_size() == full - (256 << 10)
            await disk.discard(512 << 10, 256 << 10)
            assert await disk.node.driver.allocated_size() == full - (512 << 10)

    asyncio.run(run())


def test_a_hole_is_looked_for_once_and_again_when_there_may_be_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    search = os.lseek

    def counted(fd: int, offset: int, whence: int) -> int:
        nonlocal asked
        asked += 1
        return search(fd, offset, whence)

    monkeypatch.setattr(os, "lseek", counted)

    async def run() -> None:
        async with opened({"driver": "file", "filename": "disk.raw", "discard": "unmap"}) as disk:
            for offset in range(0, 1 << 20, 64 << 10):
                assert (await block_status(disk.node, offset, 64 << 10)).data
            assert asked == 2, "one for data, one for the hole behind it"
            await disk.discard(256 << 10, 64 << 10)
            assert not (await block_status(disk.node, 256 << 10, 64 << 10)).data
            await disk.write_zeroes(512 << 10, 64 << 10, ZeroFlags.MAY_UNMAP)
            assert not (await block_status(disk.node, 512 << 10, 64 << 10)).data
            await disk.write(256 << 10, memoryview(bytes(64 << 10)))
            assert (await block_status(disk.node, 256 << 10, 64 << 10)).data

    asyncio.run(run())


def test_discard_is_ignored_unless_asked_for(folder: Path) -> None:
    async def run() -> None:
        async with opened({"driver": "file", "filename": "disk.raw"}) as disk:
            await disk.discard(0, 1 << 20)
            assert await read(disk, 0, 1 << 20) == b"d" * (1 << 20)

    asyncio.run(run())


# -- flush ----------------------------------------------------------------------------------------------------------
def test_flushes_share_a_sync_but_never_one_that_began_before_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[int] = []
    real = os.fdatasync

    def counted(fd: int) -> None:
        syncs.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counted)

    async def run() -> None:
        async with opened({"driver": "file", "filename": "disk.raw"}) as disk:
            first = asyncio.ensure_future(disk.flush())
            while not syncs:
                await asyncio.sleep(0)
            await asyncio.gather(*(disk.flush() for _ in range(20)))
            await first
            assert 2 <= len(syncs) <= 3
            before = len(syncs)
            await disk.flush()
            assert len(syncs) == before + 1

    asyncio.run(run())


def test_a_failed_sync_fails_every_later_flush(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with opened({"driver": "file", "filename": "disk.raw"}) as disk:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fdatasync", fail)
                with pytest.raises(OSError, match="Input/output error"):
                    await disk.flush()
            with pytest.raises(OSError, match="Input/output error"):
                await disk.flush()

    asyncio.run(run())


def fail(fd: int) -> None:
    raise OSError(5, os.strerror(5))


def test_null_is_zeroes_and_keeps_nothing() -> None:
    async def run() -> None:
        for zeroes in (False, True):
            async with opened({"driver": "null-co", "size": 1 << 40, "read-zeroes": zeroes}) as disk:
                await disk.write(1 << 39, memoryview(b"x" * 4096))
                assert await read(disk, 1 << 39, 4096) == bytes(4096)

    asyncio.run(run())


def test_what_is_written_here_is_read_by_qemu(folder: Path) -> None:
    async def run() -> None:
        async with opened(
            {"driver": "raw", "file": {"driver": "file", "filename": "disk.raw", "cache": {"direct": True}}}
        ) as disk:
            await disk.write(1000, memoryview(b"\x5a" * 3000))
            await disk.flush()

    asyncio.run(run())
    qemu_io(folder / "disk.raw", "read -P 0x5a 1000 3000", "read -P 0x64 0 1000", format="raw")
    assert qemu_img("info", "-f", "raw", folder / "disk.raw")


def test_a_backend_without_the_permission_may_not_write_or_resize(folder: Path) -> None:
    async def run() -> None:
        async with opened({"driver": "file", "filename": "disk.raw"}, Perm.CONSISTENT_READ) as disk:
            assert isinstance(disk, BlockBackend)
            with pytest.raises(PermissionError, match="no write permission"):
                await disk.write(0, memoryview(b"x"))
            with pytest.raises(PermissionError, match="no resize permission"):
                await disk.truncate(512)

    asyncio.run(run())


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_that_is_closed_in_order_is_on_stable_storage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)

    async def run() -> None:
        graph = new_graph()
        await graph.add(
            parse({"driver": "file", "node-name": "f", "filename": str(folder / "disk.raw"), "read-only": read_only})
        )
        await graph.close()

    asyncio.run(run())
    assert len(synced) == (0 if read_only else 1)


def test_zeroes_past_the_end_never_cut_what_another_write_added_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file grows between the look at its size and the step that makes it long enough."""
    path = folder / "growing.raw"
    path.write_bytes(b"x" * 4096)

    async def run() -> None:
        graph = new_graph()
        node = await graph.add(parse({"driver": "file", "node-name": "f", "filename": str(path), "discard": "unmap"}))
        real = os.fstat

        def late(fd: int) -> os.stat_result:
            found = real(fd)
            os.pwrite(fd, b"later", 1 << 20)
            return found

        with monkeypatch.context() as patched:
            patched.setattr(os, "fstat", late)
            await node.driver.write_zeroes(4096, 65536, ZeroFlags.MAY_UNMAP)
        await graph.close()

    asyncio.run(run())
    assert path.read_bytes()[1 << 20 :] == b"later"
    assert path.read_bytes()[: 1 << 20] == (b"x" * 4096).ljust(1 << 20, b"\0")
