"""Block status against qemu-img map, on chains that have everything."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from contract.disks import opened

from kit.qemu import create, measure_map, qemu_io
from livedisk.emulator.block.node import Node, read_now
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.status import Status, allocation_depth, block_status

SIZE = 4 << 20


def raw_with_holes(folder: Path) -> Path:
    path = folder / "holes.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for start in (0, 128 << 10, 3 << 20):
            file.seek(start)
            file.write(b"r" * 70_000)
    return path


def chain(folder: Path) -> Path:
    """raw (with holes, shorter) <- middle (written, zeroed, discarded, compressed) <- top."""
    base = raw_with_holes(folder)
    middle = create(folder / "middle.qcow2", SIZE + (1 << 20), options=f"backing_file={base},backing_fmt=raw")
    qemu_io(middle, "write -P 1 64k 192k", "write -z 512k 128k", "write -z -u 700k 64k", "write -c 1M 64k")
    top = create(folder / "top.qcow2", SIZE + (2 << 20), backing=middle)
    qemu_io(top, "write -P 2 96k 8k", "write -z 1M 32k", "write -P 3 5M 64k")
    return top


def options_of(path: Path) -> dict[str, Any]:
    driver = "raw" if path.suffix == ".raw" else "qcow2"
    return {"driver": driver, "read-only": True, "file": {"driver": "file", "filename": str(path)}}


async def our_map(node: Node) -> list[dict[str, Any]]:
    """As qemu-img map prints it; equal neighbours are one entry there."""
    entries: list[dict[str, Any]] = []
    position = 0
    while position < node.size:
        status = await block_status(node, position, node.size - position)
        assert status.length > 0
        flags = status.flags
        entry: dict[str, Any] = {
            "start": position,
            "length": status.length,
            "data": bool(flags & Status.DATA),
            "zero": bool(flags & Status.ZERO),
            "depth": max(status.depth - 1, 0) if flags & Status.ALLOCATED else None,
            "compressed": bool(flags & Status.COMPRESSED),
        }
        if flags & Status.OFFSET_VALID:
            entry["offset"] = status.offset
        entries.append(entry)
        position += status.length
    return entries


def by_sector(entries: list[dict[str, Any]]) -> dict[int, tuple[Any, ...]]:
    """What each 4 KiB says, whatever the runs: data, zero, compressed, depth and place of the bytes that are there."""
    table = {}
    for entry in entries:
        for step in range(0, entry["length"], 4096):
            place = entry["offset"] + step if entry["data"] and "offset" in entry else None
            depth = entry["depth"] if entry["data"] else None
            table[entry["start"] + step] = (entry["data"], entry["zero"], entry["compressed"], depth, place)
    return table


@pytest.mark.parametrize("make", [raw_with_holes, chain])
def test_map_is_what_qemu_img_maps(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path)

    async def run() -> list[dict[str, Any]]:
        async with opened(options_of(path), Perm.CONSISTENT_READ) as disk:
            return await our_map(disk.node)

    theirs = measure_map(path, "-f", "raw" if path.suffix == ".raw" else "qcow2")
    assert by_sector(asyncio.run(run())) == by_sector(theirs)


def test_depth_and_base(tmp_path: Path) -> None:
    top = chain(tmp_path)

    async def run() -> None:
        async with opened(options_of(top), Perm.CONSISTENT_READ) as disk:
            node = disk.node
            assert node.backing is not None
            middle = node.backing.node
            assert middle.backing is not None
            assert (await allocation_depth(node, 96 << 10, 4096)) == (1, 4096)
            assert (await allocation_depth(node, 200 << 10, 4096))[0] == 2
            assert (await allocation_depth(node, 3 << 20, 4096))[0] == 3, "raw is allocated everywhere"
            assert (await allocation_depth(node, SIZE + 4096, 4096))[0] == 3, "zeroes past a short file are its own"
            assert (await allocation_depth(node, 200 << 10, 4096, base=middle)) == (0, 4096)
            assert (await allocation_depth(node, 200 << 10, 4096, base=middle, include_base=True))[0] == 2
            assert (await allocation_depth(node, 3 << 20, 4096, base=middle, include_base=True))[0] == 0
            assert (await block_status(node, node.size - 4096, 4096)).flags & Status.EOF

    asyncio.run(run())


@pytest.mark.parametrize("make", [raw_with_holes, chain])
def test_what_is_stored_is_read_without_waiting_and_nothing_else(tmp_path: Path, make: Any) -> None:
    chance = random.Random(make.__name__)

    async def act() -> None:
        async with opened(options_of(make(tmp_path)), Perm.CONSISTENT_READ) as backend:
            node = backend.node
            metadata_is_there = read_now(node, 0, memoryview(bytearray(4096)), stored=True)
            assert make is raw_with_holes or not metadata_is_there
            await our_map(node)
            found = set()
            for _ in range(300):
                offset = chance.randrange(node.size // 512) * 512
                length = min(512 << chance.randrange(10), node.size - offset)
                wanted, position = True, offset
                while position < offset + length:
                    status = await block_status(node, position, offset + length - position)
                    plain = status.flags & (Status.DATA | Status.ZERO | Status.COMPRESSED) == Status.DATA
                    wanted, position = wanted and plain, position + status.length
                there, data = bytearray(length), bytearray(length)
                await node.read(offset, memoryview(there))  # nothing is cold
                assert read_now(node, offset, memoryview(data), stored=True) is wanted
                assert not wanted or data == there
                found.add(wanted)
            assert found == {False, True}

    asyncio.run(act())
