"""compress, blkverify, blklogwrites, preallocate: what each is there for, and that options are taken as QEMU takes them."""

from __future__ import annotations

import asyncio
import errno
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from contract.disks import opened, read

from kit.livedisk import Daemon
from kit.qemu import StorageDaemon, check, create, measure_map, qemu_img, qemu_io
from kit.qmp import QmpError
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.permissions import Perm

MIB = 1 << 20


def file(path: Path, **more: Any) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path), **more}


def qcow2(path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "discard": "unmap", "file": file(path)}


# -- options -----------------------------------------------------------------------------------------------------------
FILE = {"driver": "file", "filename": "FOLDER/a.raw", "locking": "off"}
IMAGE = {"driver": "qcow2", "file": {"driver": "file", "filename": "FOLDER/a.qcow2", "locking": "off"}}
LOG = {"driver": "file", "filename": "FOLDER/log", "locking": "off"}
ZEROES = {"driver": "file", "filename": "FOLDER/zeroes", "locking": "off"}
OPTIONS: list[dict[str, Any]] = [
    {"driver": "compress", "file": FILE}, {"driver": "compress", "file": {"driver": "raw", "file": FILE}},
    {"driver": "compress", "file": IMAGE}, {"driver": "compress"}, {"driver": "compress", "file": IMAGE, "x": 1},
    {"driver": "preallocate", "file": FILE, "prealloc-align": 1000}, {"driver": "preallocate", "file": FILE, "prealloc-align": 0},
    {"driver": "preallocate", "file": FILE, "prealloc-size": -1}, {"driver": "preallocate", "file": FILE},
    {"driver": "blklogwrites", "file": FILE}, {"driver": "blklogwrites", "file": FILE, "log": LOG},
    {"driver": "blklogwrites", "file": FILE, "log": LOG, "log-sector-size": 1000},
    {"driver": "blklogwrites", "file": FILE, "log": LOG, "log-sector-size": 1 << 24},
    {"driver": "blklogwrites", "file": FILE, "log": LOG, "log-append": True, "log-sector-size": 4096},
    {"driver": "blklogwrites", "file": FILE, "log": LOG, "log-super-update-interval": 0},
    {"driver": "blklogwrites", "file": FILE, "log": ZEROES, "log-append": True},
    {"driver": "blkverify", "test": FILE}, {"driver": "blkverify", "raw": FILE},
    {"driver": "blkverify", "raw": FILE, "test": IMAGE},
    {"driver": "blklogwrites", "file": FILE, "log": LOG, "log-sector-size": 4096},
]  # fmt: skip


def test_options_and_names_are_those_of_qemu(short_path: Path) -> None:
    create(short_path / "a.raw", MIB, format="raw")
    create(short_path / "a.qcow2", MIB)
    create(short_path / "zeroes", MIB, format="raw")
    (short_path / "log").touch()
    answers: list[list[Any]] = []
    for daemon in (StorageDaemon(short_path, name="q"), Daemon(short_path, name="l")):
        answers.append([])
        with daemon, daemon.qmp() as qmp:
            for given in OPTIONS:
                try:
                    qmp.call("blockdev-add", {"node-name": "n", **_placed(given, short_path)})
                except QmpError as error:
                    answers[-1].append((error.kind, error.desc))
                    continue
                found = next(
                    node for node in qmp.execute("query-named-block-nodes", flat=True) if node["node-name"] == "n"
                )
                image = found["image"]
                answers[-1].append(
                    (_parsed(found["file"]), image["virtual-size"], image["format"], image.get("actual-size") is None)
                )
                qmp.execute("blockdev-del", node_name="n")
    for given, theirs, ours in zip(OPTIONS, *answers, strict=True):
        assert ours == theirs, given


def _parsed(name: str) -> Any:
    """A node's name; of a ``json:`` one, what it says: QEMU gives its members in the order of a hash."""
    return json.loads(name.removeprefix("json:")) if name.startswith("json:") else name


def _placed(options: Any, folder: Path) -> Any:
    if isinstance(options, dict):
        return {key: _placed(value, folder) for key, value in options.items()}
    return options.replace("FOLDER", str(folder)) if isinstance(options, str) else options


# -- compress ------------------------------------------------------------------------------------------------------------
def test_all_that_is_written_is_compressed(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB + 512)

    async def act() -> None:
        async with opened({"driver": "compress", "file": qcow2(path)}) as backend:
            await backend.write(0, memoryview(b"a" * 200_000))
            await backend.write(100, memoryview(b"b" * 10))  # over what is compressed already
            await backend.write(MIB, memoryview(b"c" * 512))  # the last cluster, which is short

    asyncio.run(act())
    check(path)
    extents = [extent for extent in measure_map(path) if extent["data"]]
    assert all(extent["compressed"] for extent in extents)
    assert sum(extent["length"] for extent in extents) == 4 * 65536 + 512
    qemu_io(path, "read -P 97 0 100", "read -P 98 100 10", "read -P 97 110 199890", "read -P 99 1M 512")


# -- blkverify -------------------------------------------------------------------------------------------------------------
def test_what_differs_is_told_and_fails_the_read_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image, copy = create(tmp_path / "a.qcow2", MIB), create(tmp_path / "a.raw", MIB, format="raw")
    qemu_io(copy, "write -P 9 65546 1", format="raw")

    async def act() -> None:
        async with opened({"driver": "blkverify", "test": qcow2(image), "raw": file(copy)}) as backend:
            await backend.write(0, memoryview(b"v" * 4096))
            assert await read(backend, 0, 4096) == b"v" * 4096
            with pytest.raises(OSError) as caught:
                await read(backend, 65536, 512)
            assert caught.value.errno == errno.EIO
            await backend.write(65536, memoryview(b"w" * 512))
            assert await read(backend, 65536, 512) == b"w" * 512
            with pytest.raises(OSError):
                await backend.node.driver._both("read", 0, 512, _failing(errno.EIO), _failing(0))  # type: ignore[attr-defined]
            await backend.flush()

    asyncio.run(act())
    assert capfd.readouterr().err.splitlines() == [
        "blkverify: read offset=65536 bytes=512 contents mismatch at offset 65546",
        "blkverify: read offset=0 bytes=512 return value mismatch 0 != -5",
    ]
    assert copy.read_bytes()[:4096] == b"v" * 4096
    qemu_io(image, "read -P 118 0 4096")


async def _failing(number: int) -> None:
    if number:
        raise OSError(number, "")


# -- blklogwrites ----------------------------------------------------------------------------------------------------------
def replayed(log: bytes, size: int, upto: int | None = None) -> bytes:
    """What the log makes of a disk of zeroes: our own reading of the format."""
    magic, _, entries, sector = struct.unpack_from("<QQQI", log)
    assert magic == 0x6A736677736872
    disk, at = bytearray(size), sector
    for _ in range(entries if upto is None else upto):
        first, count, flags, _ = struct.unpack_from("<QQQQ", log, at)
        at += sector
        if flags & 4:
            disk[first * sector : (first + count) * sector] = bytes(count * sector)
        else:
            disk[first * sector : (first + count) * sector] = log[at : at + count * sector].ljust(count * sector, b"\0")
            at += count * sector
    return bytes(disk)


def entries(log: bytes) -> list[tuple[int, int, int, bytes]]:
    """First sector, sectors, flags and data of every entry but flushes, which qemu-io makes more of."""
    found, at = [], 512
    for _ in range(struct.unpack_from("<Q", log, 16)[0]):
        first, count, flags, _ = struct.unpack_from("<QQQQ", log, at)
        length = 0 if flags & 4 else count * 512
        data = log[at + 512 : at + 512 + length]
        at += 512 + length
        if not flags & 1:
            found.append((first, count, flags, data))
    return found


def test_a_log_replays_to_the_same_disk_and_has_qemus_entries(tmp_path: Path) -> None:
    disk, log = tmp_path / "d.raw", tmp_path / "log"
    disk.write_bytes(bytes(MIB))
    log.touch()

    async def act(**more: Any) -> None:
        async with opened(
            {
                "driver": "blklogwrites",
                "discard": "unmap",
                "file": file(disk, discard="unmap"),
                "log": file(log),
                **more,
            }
        ) as backend:
            await backend.write(0, memoryview(b"1" * 1024))
            await backend.write(512, memoryview(b"2" * 512), fua=True)
            await backend.write_zeroes(65536, 4096)
            await backend.discard(0, 512)
            await backend.write(4096, memoryview(b"3" * 4096))
            await backend.flush()

    asyncio.run(act())
    theirs = tmp_path / "theirs.log"
    theirs.touch()
    (tmp_path / "theirs.raw").write_bytes(bytes(MIB))
    node = (
        f"driver=blklogwrites,discard=unmap,file.driver=file,file.discard=unmap,file.filename={tmp_path}/theirs.raw,"
        f"log.driver=file,log.filename={theirs}"
    )
    commands = [
        "write -q -P 49 0 1024",
        "write -q -f -P 50 512 512",
        "write -q -z 64k 4k",
        "discard -q 0 512",
        "write -q -P 51 4k 4k",
        "flush",
    ]
    qemu_io(node, *commands, format=None, options=["--image-opts"])
    assert replayed(log.read_bytes(), MIB) == disk.read_bytes()
    assert log.read_bytes()[:16] == theirs.read_bytes()[:16]
    assert entries(log.read_bytes()) == entries(theirs.read_bytes())
    asyncio.run(act(**{"log-append": True}))
    assert replayed(log.read_bytes(), MIB) == disk.read_bytes()


def test_a_log_with_larger_sectors(tmp_path: Path) -> None:
    disk, log = tmp_path / "d.raw", tmp_path / "log"
    disk.write_bytes(bytes(MIB))
    log.touch()

    async def act() -> None:
        options = {"driver": "blklogwrites", "file": file(disk), "log": file(log), "log-sector-size": 4096}
        async with opened(options) as backend:
            await backend.write(1000, memoryview(b"1" * 3500))
            await backend.write_zeroes(2000, 100)
            await backend.flush()

    asyncio.run(act())
    assert replayed(log.read_bytes(), MIB) == disk.read_bytes()


# -- preallocate -----------------------------------------------------------------------------------------------------------
def test_a_file_grows_in_large_steps_and_is_cut_at_the_end(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", 64 * MIB)
    below = {"driver": "preallocate", "prealloc-size": 8 * MIB, "file": file(path)}
    sizes: list[int] = []

    async def act() -> None:
        async with opened({"driver": "qcow2", "file": below}) as backend:
            for offset in range(0, MIB, 65536):
                await backend.write(offset, memoryview(b"g" * 65536))
                sizes.append(path.stat().st_size)
            assert backend.node.file.node.size < 2 * MIB

    asyncio.run(act())
    assert len(set(sizes)) == 1
    assert sizes[0] >= 8 * MIB
    assert path.stat().st_size < 2 * MIB
    check(path)
    qemu_io(path, "read -P 103 0 1M")


def test_the_reserve_goes_with_the_last_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(512))

    async def act() -> None:
        options = {"driver": "preallocate", "prealloc-size": MIB, "file": file(path)}
        async with opened(options, Perm.CONSISTENT_READ) as reader:
            graph = reader.graph
            writer = BlockBackend(graph, "writer")
            graph.attach_root(writer, reader.node, Perm.WRITE | Perm.RESIZE, Perm.ALL)
            await writer.node.write(512, memoryview(b"x" * 512))
            assert path.stat().st_size > MIB
            assert reader.size == 1024
            await graph.detach_root(writer)
            for _ in range(1000):
                if path.stat().st_size == 1024:
                    break
                await asyncio.sleep(0.001)
            assert path.stat().st_size == 1024
            assert not reader.node.file.perm & Perm.WRITE

    asyncio.run(act())


def test_an_image_made_by_qemu_is_what_the_names_in_a_backing_chain_lead_to(tmp_path: Path) -> None:
    raw = create(tmp_path / "a.raw", MIB, format="raw")
    qemu_img(
        "create", "-q", "-f", "qcow2", "-u", "-b", f"blkverify:{raw}:{raw}", "-F", "raw", tmp_path / "top.qcow2", "1M"
    )

    async def act() -> None:
        async with opened(qcow2(tmp_path / "top.qcow2")) as backend:
            assert backend.node.backing is not None
            assert backend.node.backing.node.file.node.options.driver == "blkverify"

    asyncio.run(act())
