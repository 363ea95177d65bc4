"""The driver on real servers: qemu-nbd, qemu-storage-daemon, nbdkit, nbd-server and ourselves; formats and snapshots on it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from contract.disks import opened, read

from kit.livedisk import Daemon, livedisk
from kit.nbdkit import Nbdkit
from kit.peers import peer
from kit.places import pattern
from kit.process import Process
from kit.qemu import QemuNbd, StorageDaemon, check, create, info, qemu_img, qemu_io, read_all
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.status import block_status
from livedisk.emulator.block.types import ZeroFlags

SIZE = 8 << 20
Options = dict[str, Any]


def on(socket: Path, export: str = "", **more: Any) -> Options:
    return {
        "driver": "nbd",
        "server": {"type": "unix", "path": str(socket)},
        "export": export,
        "discard": "unmap",
        **more,
    }


class ClassicServer(Process):
    """nbd-server, which with ``-d`` serves one connection and ends."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.socket = folder / "classic"
        config = folder / "classic.conf"
        config.write_text(
            f"[generic]\n  unixsock = {self.socket}\n[disk]\n  exportname = {image}\n"
            "  flush = true\n  fua = true\n  trim = true\n"
        )
        super().__init__([peer("nbd-server"), "-d", "-C", str(config)], log=folder / "classic.log")
        self.wait_for_socket(self.socket)


@contextmanager
def storage(cls: type[StorageDaemon], folder: Path, image: Path) -> Iterator[Options]:
    node = f"driver=raw,node-name=disk,discard=unmap,file.driver=file,file.filename={image}"
    with cls(folder, "--blockdev", node, "--export", "nbd,id=e,node-name=disk,name=disk,writable=on") as daemon:
        yield on(daemon.nbd_socket, "disk")


@contextmanager
def by_qemu_nbd(folder: Path, image: Path) -> Iterator[Options]:
    with QemuNbd(folder, image, "--discard=unmap") as server:
        yield on(server.socket)


@contextmanager
def by_storage_daemon(folder: Path, image: Path) -> Iterator[Options]:
    with storage(StorageDaemon, folder, image) as options:
        yield options


@contextmanager
def by_livedisk(folder: Path, image: Path) -> Iterator[Options]:
    with storage(Daemon, folder, image) as options:
        yield options


@contextmanager
def by_nbdkit(folder: Path, image: Path) -> Iterator[Options]:
    with Nbdkit(folder, "file", str(image)) as server:
        yield on(server.socket)


@contextmanager
def by_nbd_server(folder: Path, image: Path) -> Iterator[Options]:
    with ClassicServer(folder, image) as server:
        yield on(server.socket, "disk")


SERVERS: dict[str, Callable[[Path, Path], Any]] = {
    "qemu-nbd": by_qemu_nbd,
    "qemu-storage-daemon": by_storage_daemon,
    "livedisk": by_livedisk,
    "nbdkit": by_nbdkit,
    "nbd-server": by_nbd_server,
}


def with_disk(options: Options, test: Callable[[BlockBackend], Any]) -> None:
    async def main() -> None:
        async with opened(options) as disk:
            await test(disk)

    asyncio.run(main())


@pytest.mark.parametrize("server", SERVERS)
def test_every_kind_of_request(server: str, short_path: Path) -> None:
    model = bytearray(pattern(SIZE))
    image = short_path / "image"
    image.write_bytes(model)

    async def test(disk: BlockBackend) -> None:
        async def write(offset: int, length: int, byte: int, *, fua: bool = False) -> None:
            await disk.write(offset, memoryview(bytes([byte]) * length), fua=fua)
            model[offset : offset + length] = bytes([byte]) * length

        assert disk.size == SIZE
        assert await read(disk, 0, SIZE) == model
        await write(0, 512, 1)
        await write(4096, 1 << 20, 2, fua=True)
        await write(5 << 20, 3 << 20, 3)
        await asyncio.gather(*(write((2 << 20) + 4096 * n, 4096, n) for n in range(64)))
        for offset, length, flags in ((8192, 65536, ZeroFlags.NONE), (1 << 20, 1 << 20, ZeroFlags.MAY_UNMAP)):
            await disk.write_zeroes(offset, length, flags, fua=True)
            model[offset : offset + length] = bytes(length)
        await disk.flush()
        await disk.prefetch(0, SIZE)
        pieces = await asyncio.gather(*(read(disk, 4096 * n, 4096) for n in range(SIZE // 4096)))
        assert b"".join(pieces) == model
        position = 0
        while position < SIZE:
            async with disk.request() as node:
                status = await block_status(node, position, SIZE - position)
            assert not status.zero or not any(model[position : position + status.length])
            position += status.length
        await disk.discard(6 << 20, 1 << 20)
        await disk.flush()
        now = await read(disk, 6 << 20, 1 << 20)
        assert now in (bytes(1 << 20), bytes(model[6 << 20 : 7 << 20]))
        model[6 << 20 : 7 << 20] = now

    with SERVERS[server](short_path, image) as options:
        with_disk(options, test)
    assert image.read_bytes() == model


def test_holes_that_the_server_tells_of_are_told_on(short_path: Path) -> None:
    """Also to clients of ours: a sparse read goes through without a question for block status."""
    image = short_path / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
        file.seek(1 << 20)
        file.write(b"\x5a" * (1 << 20))
    with Nbdkit(short_path, "file", str(image)) as server:
        node = f"driver=nbd,node-name=disk,server.type=unix,server.path={server.socket}"
        with Daemon(short_path, "--blockdev", node, "--export", "nbd,id=e,node-name=disk,name=disk") as daemon:
            extents = qemu_img("map", "--output=json", daemon.uri("disk"))
            assert extents == qemu_img("map", "--output=json", server.uri)
            assert read_all(daemon.uri("disk"), short_path, "-f", "raw") == image.read_bytes()
            qemu_img("convert", "-f", "raw", "-O", "raw", daemon.uri("disk"), short_path / "sparse")
            assert (short_path / "sparse").stat().st_blocks * 512 < SIZE // 2


@pytest.mark.parametrize("server", ["nbdkit", "livedisk", "qemu-nbd"])
def test_a_qcow2_image_on_an_export(server: str, short_path: Path) -> None:
    image = create(short_path / "image", 64 << 20)
    with image.open("ab") as file:  # an export does not grow
        file.truncate(64 << 20)

    async def test(disk: BlockBackend) -> None:
        await disk.write(1 << 20, memoryview(pattern(3 << 20)))
        await disk.write_zeroes(2 << 20, 1 << 20)
        await disk.write(5, memoryview(b"x" * 70_000))
        await disk.flush()

    with SERVERS[server](short_path, image) as options:
        with_disk({"driver": "qcow2", "file": options}, test)
    check(image)
    expected = bytearray(64 << 20)
    expected[1 << 20 : 4 << 20] = pattern(3 << 20)
    expected[2 << 20 : 3 << 20] = bytes(1 << 20)
    expected[5 : 5 + 70_000] = b"x" * 70_000
    assert read_all(image, short_path) == expected


def test_snapshots_over_an_export_and_jobs_on_them(short_path: Path) -> None:
    base = short_path / "base"
    base.write_bytes(pattern(SIZE))
    with ExitStack() as stack:
        server = stack.enter_context(QemuNbd(short_path, base, "-x", "base"))
        node = f"driver=nbd,node-name=base,server.type=unix,server.path={server.socket},export=base"
        daemon = stack.enter_context(
            Daemon(short_path, "--blockdev", node, "--export", "nbd,id=e,node-name=base,name=disk,writable=on")
        )
        qmp = stack.enter_context(daemon.qmp())
        for old, new in (("base", "one"), ("one", "two")):
            qmp.execute(
                "blockdev-snapshot-sync",
                node_name=old,
                snapshot_file=str(short_path / new),
                snapshot_node_name=new,
            )
            qemu_io(daemon.uri("disk"), f"write -P {len(new)} {64 if old == 'base' else 256}k 128k", format="raw")
        assert qemu_img("info", short_path / "one").count(f"nbd+unix:///base?socket={server.socket}") >= 1
        before = read_all(daemon.uri("disk"), short_path, "-f", "raw")
        qmp.execute("block-commit", job_id="j", device="two", top_node="one", base_node="base")
        qmp.wait_event("BLOCK_JOB_COMPLETED", timeout=60)
        assert read_all(daemon.uri("disk"), short_path, "-f", "raw") == before
        committed = read_all(server.uri.replace("///", "///base"), short_path, "-f", "raw")
        assert committed[64 << 10 : 192 << 10] == bytes([3]) * (128 << 10)
        qmp.execute("block-stream", job_id="s", device="two")
        qmp.wait_event("BLOCK_JOB_COMPLETED", timeout=60)
        qmp.execute("block-export-del", id="e", mode="hard")
        qmp.execute("quit")
        daemon.wait()
        assert read_all(short_path / "two", short_path) == before


def test_img_takes_names_of_exports(short_path: Path) -> None:
    image = create(short_path / "image", SIZE)
    with QemuNbd(short_path, image) as server:
        for name in (server.uri, f"nbd:unix:{server.socket}"):
            ours = json.loads(livedisk("img", "info", "-f", "qcow2", "--output=json", name).stdout)
            theirs = info(name, "-f", "qcow2")
            for one in (ours, theirs):
                one.pop("children", None)
            assert ours == theirs
        refused = livedisk("img", "info", "-f", "raw", f"nbd:unix:{short_path}/nobody", expect=1)
        assert f"Failed to connect to '{short_path}/nobody': No such file or directory" in refused.stderr
