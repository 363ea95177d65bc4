"""Damage that shows while the image is in use: told once, marked in the header, nothing written over metadata.

The texts are QEMU's; each was compared with qemu-io on the same image.
"""

from __future__ import annotations

import asyncio
import errno
import re
from pathlib import Path

import pytest

from kit.peers import run
from kit.qcow2_disk import Disk, opened
from kit.qemu import create
from livedisk.emulator.block.node import Node
from livedisk.emulator.drivers.qcow2.overlap import Section
from livedisk.emulator.errors import ImageError

CLUSTER = 65536
COPIED = 1 << 63
Told = list[tuple[str, int | None, int | None, bool]]


def image(folder: Path, options: str = "") -> Path:
    """An image with one data cluster; header, refcount table and block, L1, L2 and data in clusters 0 to 5."""
    path = create(folder / "image.qcow2", 64 << 20, options=options)
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", path])
    return path


def patch(path: Path, offset: int, value: int, length: int = 8) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(length, "big"))


def word(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return int.from_bytes(file.read(8), "big")


def tables(path: Path) -> tuple[int, int]:
    """Where the L1 table and the first L2 table stand."""
    l1 = word(path, 40)
    return l1, word(path, l1) & ~COPIED


def listen(disk: Disk) -> Told:
    told: Told = []

    def on_corruption(node: Node, text: str, offset: int | None, size: int | None, fatal: bool) -> None:
        assert node is disk.node
        told.append((text, offset, size, fatal))

    disk.graph.on_corruption.append(on_corruption)
    return told


async def touch(path: Path, *, write: bool, writable: bool = True) -> tuple[Told, list[int]]:
    """Two requests at the start of the disk: what was told, and the error numbers."""
    numbers = []
    async with opened(path, writable=writable) as disk:
        told = listen(disk)
        for _ in range(2):
            try:
                if write:
                    await disk.write(0, b"x" * 512)
                else:
                    await disk.read(0, 512)
            except OSError as error:
                numbers.append(error.errno)
    return told, numbers


def qemu_says(path: Path, command: str) -> str:
    """The corruption that qemu-io reports for the same request, without its frame."""
    done = run(["qemu-io", "-f", "qcow2", "-c", command, path], expect=None)
    match = re.search(r"(?:corrupt): (.*); further", done.stdout + done.stderr)
    assert match is not None, done
    return match.group(1)


DAMAGES: dict[str, tuple[int, int, bool]] = {
    # what: (0: in the L1 table, 1: in the L2 table), the entry, whether only a write finds it
    "an L2 table that is not aligned": (0, 0x40200 | COPIED, False),
    "a data cluster that is not aligned": (1, 0x50200 | COPIED, False),
    "a data cluster on the header": (1, 0x0, True),
    "a data cluster on the refcount table": (1, 0x10000 | COPIED, True),
    "a data cluster on the refcount block": (1, 0x20000 | COPIED, True),
    "a data cluster on the L1 table": (1, 0x30000 | COPIED, True),
    "a data cluster on its own L2 table": (1, 0x40000 | COPIED, True),
}


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "a data cluster on the header"])
def test_damage_is_told_once_in_qemus_words_and_stops_the_image(damage: str, tmp_path: Path) -> None:
    level, entry, only_write = DAMAGES[damage]
    path = image(tmp_path)
    patch(path, tables(path)[level], entry)
    twin = tmp_path / "twin.qcow2"
    twin.write_bytes(path.read_bytes())
    before = path.read_bytes()
    told, numbers = asyncio.run(touch(path, write=only_write))
    assert [text for text, *_ in told] == [qemu_says(twin, "write 0 512" if only_write else "read 0 512")]
    assert told[0][3] is True
    assert numbers == [errno.EIO, errno.ENOMEDIUM]
    after = path.read_bytes()
    assert after[79] & 2, "the corrupt bit is not set"
    assert after[:72] + after[80:] == before[:72] + before[80:], "something else was written"


def test_damage_found_by_a_read_only_user_does_not_stop_the_image(tmp_path: Path) -> None:
    path = image(tmp_path)
    patch(path, tables(path)[1], 0x50200 | COPIED)
    before = path.read_bytes()
    told, numbers = asyncio.run(touch(path, write=False, writable=False))
    assert [fatal for *_, fatal in told] == [False]
    assert numbers == [errno.EIO, errno.EIO]
    assert path.read_bytes() == before


def test_an_image_marked_corrupt_opens_read_only(tmp_path: Path) -> None:
    path = image(tmp_path)
    patch(path, 72, 2)

    async def read() -> bytes:
        async with opened(path, writable=False) as disk:
            return await disk.read(0, 4)

    async def write() -> None:
        async with opened(path):
            raise AssertionError("it was opened")

    assert asyncio.run(read()) == b"\1" * 4
    with pytest.raises(ImageError, match="qcow2: Image is corrupt; cannot be opened read/write"):
        asyncio.run(write())


def test_allocation_over_metadata_is_prevented_when_refcounts_lie(tmp_path: Path) -> None:
    path = image(tmp_path)
    patch(path, 0x20000 + 2 * 3, 0, 2)  # the L1 table's cluster is free, says the refcount block

    async def write() -> Told:
        async with opened(path) as disk:
            told = listen(disk)
            with pytest.raises(OSError, match="Input/output error"):
                await disk.write(1 << 20, b"x" * 512)
            return told

    told = asyncio.run(write())
    assert told == [("Preventing invalid write on metadata (overlaps with active L1 table)", 0x30000, CLUSTER, True)]


@pytest.mark.parametrize("mode", ["none", "all"])
def test_overlap_check_is_what_the_option_says(mode: str, tmp_path: Path) -> None:
    path = image(tmp_path)
    patch(path, tables(path)[1], 0x30000 | COPIED)

    async def write() -> Section:
        from livedisk.emulator.drivers.qcow2.options import OverlapMode

        async with opened(path, overlap_check=OverlapMode(mode)) as disk:
            told = listen(disk)
            if mode == "none":
                await disk.write(4096, b"x" * 512)
                assert told == []
            else:
                with pytest.raises(OSError, match="overlaps with active L1 table"):
                    await disk.write(4096, b"x" * 512)
            return disk.image.storage.guard.checked

    checked = asyncio.run(write())
    assert checked == (Section.NONE if mode == "none" else Section(511))


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_compressed_cluster_that_holds_too_much_or_too_little_is_an_error(kind: str, tmp_path: Path) -> None:
    from livedisk.emulator.drivers.qcow2.compress import compress, decompress
    from livedisk.emulator.drivers.qcow2.header import Compression

    which = Compression[kind.upper()]
    exact = bytes(range(256)) * 16
    assert decompress(which, compress(which, exact) + b"junk behind it", 4096) == exact
    for wrong in (bytes(4097), bytes(1 << 24), bytes(4095)):
        with pytest.raises(OSError, match="cannot be decompressed") as caught:
            decompress(which, compress(which, wrong), 4096)
        assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="cannot be decompressed"):
        decompress(which, b"\xff" * 100, 4096)
