"""Persistent bitmaps in an image: ours are read by QEMU, QEMU's by us; what is malformed is refused as by QEMU; limits."""

from __future__ import annotations

import asyncio
import errno
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.libnbd import nbdinfo_map
from kit.peers import run
from kit.qcow2_disk import Disk, opened
from kit.qemu import QemuNbd, create, info, qemu_img, qemu_io
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.reopen import set_read_only
from livedisk.emulator.drivers.qcow2 import bitmaps as module
from livedisk.emulator.drivers.qcow2.bitmap_directory import check_directory_size
from livedisk.emulator.errors import BlockError, ImageError

SIZE = 40 << 20
Runs = list[tuple[int, int]]
VARIANTS = {
    "default": "",
    "clusters of 512": "cluster_size=512",
    "clusters of 2M": "cluster_size=2M",
    "subclusters": "extended_l2=on",
    "refcounts of 1 bit": "cluster_size=1k,refcount_bits=1",
    "lazy refcounts": "lazy_refcounts=on",
    "data file": "data_file={folder}/data",
}
WRITES = ["write 64k 64k", "write 3M 100k", "write -z 9M 64k", "write 30M 512"]


def image(folder: Path, variant: str = "default", *bitmaps: tuple[str, ...]) -> Path:
    path = create(folder / "image.qcow2", SIZE, options=VARIANTS[variant].format(folder=folder))
    for arguments in bitmaps:
        qemu_img("bitmap", "--add", *arguments[:-1], path, arguments[-1])
    return path


def theirs(path: Path, name: str, folder: Path) -> Runs:
    """What QEMU shows of a bitmap of an image that nobody has open."""
    with QemuNbd(folder, path, "-r", "-B", name, format="qcow2", name="q") as server:
        found = nbdinfo_map(server.uri, f"qemu:dirty-bitmap:{name}")
    return [(one["offset"], one["length"]) for one in found if one["type"]]


def flags(path: Path, *options: str) -> dict[str, list[str]]:
    return {one["name"]: one["flags"] for one in info(path, *options)["format-specific"]["data"].get("bitmaps", [])}


def look(path: Path, *names: str) -> dict[str, Runs]:
    async def scene() -> dict[str, Runs]:
        async with opened(path, writable=False) as disk:
            return {name: [*disk.node.bitmaps.get(name).runs()] for name in names}

    return asyncio.run(scene())


async def write_some(disk: Disk) -> None:
    await disk.write(64 << 10, b"a" * 65536)
    await disk.write(3 << 20, b"b" * 102400)
    await disk.backend.write_zeroes(9 << 20, 65536)
    await disk.write(30 << 20, b"c" * 512)
    await disk.write(SIZE - 512, b"d" * 512)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bitmaps_of_qemu_are_read(variant: str, tmp_path: Path, short_path: Path) -> None:
    path = image(tmp_path, variant, ("one",), ("-g", "512", "fine"), ("-g", "1M", "coarse"), ("--disable", "off"))
    qemu_io(path, *WRITES)
    ours = look(path, "one", "fine", "coarse", "off")
    assert ours["one"][0] == (65536, 65536)
    for name, runs in ours.items():
        assert runs == theirs(path, name, short_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bitmaps_of_ours_are_read_by_qemu(variant: str, tmp_path: Path, short_path: Path) -> None:
    path = image(tmp_path, variant, ("old",))

    async def scene() -> dict[str, Runs]:
        async with opened(path) as disk:
            for name, granularity in (("fine", 512), ("coarse", 1 << 20)):
                disk.driver.check_bitmap_storable(name, granularity)
                disk.node.bitmaps.create(granularity, name, persistent=True)
                await disk.driver.sync_bitmaps()
            await write_some(disk)
            await disk.backend.flush()
            disk.node.bitmaps.get("coarse").disable()
            await disk.driver.sync_bitmaps()
            return {name: [*disk.node.bitmaps.get(name).runs()] for name in ("old", "fine", "coarse")}

    ours = asyncio.run(scene())
    assert json.loads(qemu_img("check", "--output=json", path)).get("leaks", 0) == 0
    assert flags(path) == {"old": ["auto"], "fine": ["auto"], "coarse": []}
    for name, runs in ours.items():
        assert runs
        assert theirs(path, name, short_path) == runs
    qemu_io(path, "write 20M 64k")  # QEMU goes on with them, and gives them back
    assert (20 << 20, 65536) in look(path, "old")["old"]
    for name in ours:
        qemu_img("bitmap", "--remove", path, name)
    assert flags(path) == {}
    qemu_img("check", path)


def test_an_image_that_is_only_read_is_left_alone(tmp_path: Path) -> None:
    path = image(tmp_path, "default", ("one",))
    before = path.read_bytes()
    look(path, "one")

    async def scene() -> None:
        async with opened(path) as disk:
            await disk.read(0, 512)
            await disk.backend.flush()

    asyncio.run(scene())
    assert path.read_bytes() == before


def test_removed_bitmaps_leave_no_cluster_behind(tmp_path: Path) -> None:
    path = image(tmp_path, "clusters of 512", ("one",), ("-g", "512", "fine"))
    qemu_io(path, *WRITES)

    async def scene() -> None:
        async with opened(path) as disk:
            for name in ("one", "fine"):
                disk.node.bitmaps.remove(disk.node.bitmaps.get(name))
                await disk.driver.sync_bitmaps()
                await write_some(disk)

    asyncio.run(scene())
    assert flags(path) == {}
    assert json.loads(qemu_img("check", "--output=json", path)).get("leaks", 0) == 0


def test_an_inconsistent_bitmap_stays_as_it_is_and_can_be_removed(tmp_path: Path) -> None:
    path = image(tmp_path, "default", ("lost",), ("good",))
    raw = bytearray(path.read_bytes())
    entries = places(raw)[1]
    raw[entries[0] + 15] |= 1  # in use
    path.write_bytes(raw)

    async def write() -> None:
        async with opened(path) as disk:
            lost = disk.node.bitmaps.get("lost")
            assert lost.inconsistent
            assert lost.disabled
            await write_some(disk)

    asyncio.run(write())
    assert flags(path) == {"good": ["auto"], "lost": ["in-use", "auto"]}
    assert look(path, "good")["good"]

    async def remove() -> None:
        async with opened(path) as disk:
            with pytest.raises(BlockError, match="inconsistent"):
                async with disk.graph.drained(disk.node):
                    await disk.node.truncate(SIZE * 2)
            disk.node.bitmaps.remove(disk.node.bitmaps.get("lost"))
            await disk.driver.sync_bitmaps()

    asyncio.run(remove())
    assert flags(path) == {"good": ["auto"]}
    assert json.loads(qemu_img("check", "--output=json", path)).get("leaks", 0) == 0


def test_read_only_and_back(tmp_path: Path, short_path: Path) -> None:
    path = image(tmp_path, "default", ("one",))

    async def scene() -> Runs:
        async with opened(path) as disk:
            await write_some(disk)
            bitmap = disk.node.bitmaps.get("one")
            runs = [*bitmap.runs()]
            disk.graph.set_root_permissions(disk.backend, Perm.CONSISTENT_READ, Perm.ALL)
            await set_read_only(disk.graph, disk.node, True)
            assert bitmap.read_only
            assert flags_of(disk) == ["auto"]
            await set_read_only(disk.graph, disk.node, False)
            assert not bitmap.read_only
            disk.graph.set_root_permissions(disk.backend, Perm.ALL, Perm.ALL)
            await disk.write(20 << 20, b"e" * 65536)
            assert flags_of(disk) == ["in-use", "auto"]
            return [*runs, (20 << 20, 65536)]

    expected = sorted(asyncio.run(scene()))
    assert theirs(path, "one", short_path) == expected


def flags_of(disk: Disk) -> list[str]:
    shown = disk.driver.specific_info()["data"]["bitmaps"]
    found: list[str] = shown[0]["flags"]
    return found


def test_another_process_may_take_over_and_give_back(tmp_path: Path) -> None:
    path = image(tmp_path, "default", ("one",))

    async def scene() -> None:
        async with opened(path) as disk:
            await write_some(disk)
            await disk.driver.inactivate()
            assert not disk.node.bitmaps
            assert flags(path, "-U") == {"one": ["auto"]}
            await disk.driver.activate()
            assert next(disk.node.bitmaps.get("one").runs()) == (65536, 65536)

    asyncio.run(scene())


@pytest.mark.parametrize("sizes", [(SIZE * 3, SIZE // 2, SIZE), (512, SIZE * 2)])
@pytest.mark.parametrize("variant", ["default", "clusters of 512"])
def test_bitmaps_follow_the_size(variant: str, sizes: tuple[int, ...], tmp_path: Path, short_path: Path) -> None:
    path = image(tmp_path, variant, ("one",), ("--disable", "off"), ("-g", "512", "fine"))

    async def scene() -> dict[str, Runs]:
        async with opened(path) as disk:
            await write_some(disk)
            for size in sizes:
                async with disk.graph.drained(disk.node):
                    await disk.node.truncate(size)
                assert all(bitmap.size == size for bitmap in disk.node.bitmaps)
                await disk.write(size - 512, b"e" * 512)
            return {name: [*disk.node.bitmaps.get(name).runs()] for name in ("one", "off", "fine")}

    ours = asyncio.run(scene())
    assert json.loads(qemu_img("check", "--output=json", path)).get("leaks", 0) == 0
    for name, runs in ours.items():
        assert theirs(path, name, short_path) == runs


@pytest.mark.parametrize("bitmap", [("b",), ("--disable", "b")], ids=["records", "does not"])
def test_an_image_of_no_size_keeps_no_bitmaps_and_can_be_opened(bitmap: tuple[str, ...], tmp_path: Path) -> None:
    """Nobody can read an exact bitmap of nothing: QEMU 10.0.2 refuses the whole image."""
    path = image(tmp_path, "default", bitmap)

    async def scene(*sizes: int) -> None:
        async with opened(path) as disk:
            for size in sizes:
                async with disk.graph.drained(disk.node):
                    await disk.node.truncate(size)
                qemu_img("info", "-U", path)  # as after a crash here
            if not disk.node.size:
                with pytest.raises(BlockError, match="An image of no size keeps no bitmaps"):
                    disk.driver.image.bitmaps.check_storable("other", 65536)

    asyncio.run(scene(0, SIZE))
    assert look(path, "b") == {"b": [(0, SIZE)]}  # there were bytes before
    qemu_img("check", path)
    asyncio.run(scene(0))
    assert flags(path) == {}
    qemu_img("check", path)


def test_no_space_for_a_mark_ends_the_tracking_and_not_the_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_path: Path
) -> None:
    path = image(tmp_path, "default", ("one",))

    async def full(self: object, *arguments: object) -> None:
        raise OSError(28, "No space left on device")

    async def scene() -> Runs:
        async with opened(path) as disk:
            await disk.write(0, b"a" * 512)
            with monkeypatch.context() as patch:
                patch.setattr(module.StoredBitmap, "set", full)
                await disk.write(20 << 20, b"b" * 512)
            await disk.write(30 << 20, b"b" * 512)
            assert flags_of(disk) == ["in-use", "auto"]
            assert path.read_bytes()[88] & 0x80 == 0  # nobody is to believe it
            return [*disk.node.bitmaps.get("one").runs()]

    assert asyncio.run(scene()) == theirs(path, "one", short_path)


# -- limits ------------------------------------------------------------------------------------------------------------
def test_limits_of_names_numbers_and_sizes(tmp_path: Path) -> None:
    assert check_directory_size([b"x"] * 65535, 65535) is None
    assert check_directory_size([b"x"] * 65536, 65535) == "Maximum number of persistent bitmaps is already reached"
    assert check_directory_size([b"x" * 1023] * 65535, 65535) == "Not enough space in the bitmap directory"
    path = create(tmp_path / "huge.qcow2", "1P", options="cluster_size=2M")

    async def scene() -> None:
        async with opened(path) as disk:
            check = disk.driver.check_bitmap_storable
            with pytest.raises(
                BlockError, match=r"Can't make bitmap 'x' persistent in '.*': Too much space will be occup"
            ):
                check("x", 512)
            with pytest.raises(BlockError, match="Name length exceeds maximum"):
                check("x" * 1024, 1 << 20)
            with pytest.raises(BlockError, match="Granularity exceeds maximum"):
                check("x", 1 << 32)
            check("x" * 1023, 1 << 31)

    asyncio.run(scene())


def test_many_bitmaps(tmp_path: Path) -> None:
    path = image(tmp_path, "clusters of 512")

    async def scene() -> None:
        async with opened(path) as disk:
            for number in range(300):
                disk.node.bitmaps.create(65536, f"bitmap {number}", persistent=True)
            await disk.driver.sync_bitmaps()
            await disk.write(0, b"x" * 512)

    asyncio.run(scene())
    assert len(flags(path)) == 300
    assert look(path, "bitmap 299") == {"bitmap 299": [(0, 65536)]}
    assert json.loads(qemu_img("check", "--output=json", path)).get("leaks", 0) == 0


# -- malformed images ----------------------------------------------------------------------------------------------------
def places(raw: bytes | bytearray) -> tuple[int, list[int]]:
    """Where the bitmaps extension's data stands, and where each directory entry does."""
    at = 112
    while True:
        kind, length = struct.unpack_from(">II", raw, at)
        if kind == 0x23852875:
            break
        at += 8 + -(-length // 8) * 8
    count, _, _, directory = struct.unpack_from(">IIQQ", raw, at + 8)
    entries, place = [], directory
    for _ in range(count):
        entries.append(place)
        name, extra = struct.unpack_from(">HI", raw, place + 18)
        place += -(-(24 + name + extra) // 8) * 8
    return at + 8, entries


def put(fmt: str, at: int, *values: int) -> Callable[[bytearray, int, int, int], None]:
    """A change at an offset in the first entry."""
    return lambda raw, extension, entry, table: struct.pack_into(fmt, raw, entry + at, *values)


def in_table(value: int) -> Callable[[bytearray, int, int, int], None]:
    return lambda raw, extension, entry, table: struct.pack_into(">Q", raw, table, value)


def in_extension(fmt: str, at: int, value: int) -> Callable[[bytearray, int, int, int], None]:
    return lambda raw, extension, entry, table: struct.pack_into(fmt, raw, extension + at, value)


DAMAGES = {
    "table at 0": put(">Q", 0, 0),
    "table not aligned": put(">Q", 0, 512),
    "table past the end": put(">Q", 0, 1 << 40),
    "table nowhere": put(">Q", 0, 1 << 63),
    "no table": put(">I", 8, 0),
    "table too short": put(">I", 8, 0xFFFF),
    "table too long": put(">I", 8, 0xFFFF_FFFF),
    "unknown flag": put(">I", 12, 8),
    "extra data is compatible": put(">I", 12, 4),
    "unknown type": put(">B", 16, 2),
    "granularity below": put(">B", 17, 8),
    "granularity above": put(">B", 17, 32),
    "granularity far above": put(">B", 17, 255),
    "no name": put(">H", 18, 0),
    "a name past the end": put(">H", 18, 60000),
    "extra data": put(">I", 20, 8),
    "much extra data": put(">I", 20, 0xFFFF_FFF0),
    "a name twice": lambda raw, extension, entry, table: raw.__setitem__(slice(entry + 24, entry + 27), b"two"),
    "reserved bits": in_table(1 << 60),
    "a cluster not aligned": in_table(0x10200),
    "a cluster past the end": in_table(1 << 40),
    "a cluster and all ones": in_table(0x10001),
    "all ones": in_table(1),
    "all zeroes": in_table(0),
    "fewer than said": in_extension(">I", 0, 3),
    "more than said": in_extension(">I", 0, 1),
    "none": in_extension(">I", 0, 0),
    "too many": in_extension(">I", 0, 65536),
    "reserved field": in_extension(">I", 4, 1),
    "directory cut": in_extension(">Q", 8, 40),
    "directory of nothing": in_extension(">Q", 8, 0),
    "directory too large": in_extension(">Q", 8, 1 << 40),
    "directory past the end": in_extension(">Q", 16, 1 << 40),
    "directory not aligned": in_extension(">Q", 16, 512),
}


OTHERWISE = {
    # QEMU reads zeroes there.
    "table past the end": "Could not read bitmap_table table from image for bitmap 'one'",
    "a cluster past the end": "Could not read bitmap 'one' from image",
    "directory past the end": "Failed to read bitmap directory",
    # QEMU takes the size for a negative one; and an empty name for a good one, but not what follows.
    "much extra data": "Broken bitmap directory",
    "no name": "Bitmap '' doesn't satisfy the constraints",
}
"""What is refused here in other words than by QEMU, or where it is not."""


def damaged(folder: Path, name: str) -> Path:
    path = image(folder, "default", ("one",), ("two",))
    qemu_io(path, *WRITES)
    raw = bytearray(path.read_bytes())
    extension, entries = places(raw)
    table = int.from_bytes(raw[entries[0] : entries[0] + 8], "big")
    DAMAGES[name](raw, extension, entries[0], table)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("writable", [False, True])
def test_damage_is_refused_as_by_qemu(name: str, writable: bool, tmp_path: Path) -> None:
    path = damaged(tmp_path, name)
    before = path.read_bytes()
    expected = run(["qemu-io", *(() if writable else ("-r",)), "-f", "qcow2", "-c", "read 0 512", path], expect=None)
    path.write_bytes(before)

    async def scene() -> None:
        async with opened(path, writable=writable) as disk:
            await disk.read(0, 512)

    if expected.returncode or name in OTHERWISE:
        with pytest.raises(ImageError) as caught:
            asyncio.run(scene())
        assert path.read_bytes() == before
        assert str(caught.value) == OTHERWISE.get(name) or str(caught.value) in expected.stderr
    else:
        asyncio.run(scene())


def test_damage_that_the_tracking_of_bitmaps_meets_is_what_the_first_write_tells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not that there is no medium, which the next one hears, nor that only the tracking ended."""
    path = image(tmp_path, "default", ("one",))
    raw = bytearray(path.read_bytes())
    l1 = int.from_bytes(raw[40:48], "big") >> 16
    block = int.from_bytes(raw[1 << 16 : (1 << 16) + 8], "big")
    raw[block + 2 * l1 : block + 2 * l1 + 2] = bytes(2)  # the L1 table's cluster is free, says the refcount block
    path.write_bytes(raw)

    async def scene() -> list[int | None]:
        told = []
        async with opened(path) as disk:
            for _ in range(2):
                with pytest.raises(OSError) as caught:
                    await disk.write(0, b"x" * 512)
                told.append(caught.value.errno)
        return told

    assert asyncio.run(scene()) == [errno.EIO, errno.ENOMEDIUM]
    assert "overlaps with active L1 table" in caplog.text
    assert "cannot be tracked" not in caplog.text


@given(
    st.lists(
        st.tuples(st.sampled_from(["entries", "table", "extension"]), st.integers(0, 79), st.integers(0, 255)),
        min_size=1,
        max_size=4,
    )
)
def test_random_damage_is_an_error_or_none(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, int, int]]
) -> None:
    global _TEMPLATE
    if _TEMPLATE is None:
        path = image(tmp_path_factory.mktemp("template"), "default", ("one",), ("two",))
        qemu_io(path, *WRITES)
        _TEMPLATE = path.read_bytes()
    raw = bytearray(_TEMPLATE)
    extension, entries = places(raw)
    table = int.from_bytes(raw[entries[0] : entries[0] + 8], "big")
    starts = {"entries": (entries[0], 64), "table": (table, 8), "extension": (extension, 24)}
    for where, at, value in changes:
        start, length = starts[where]
        raw[start + at % length] = value
    path = tmp_path_factory.getbasetemp() / "random.qcow2"
    path.write_bytes(raw)

    async def scene() -> None:
        try:
            async with opened(path) as disk:
                await disk.write(0, b"x" * 512)
        except (ImageError, OSError):
            return

    asyncio.run(scene())


_TEMPLATE: bytes | None = None
