"""Options, reopening, discards, errors of the file below, and what the driver says about an image."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from kit.crashdisk import CrashDisk, CrashDiskOptions, Platter
from kit.peers import run
from kit.qcow2_disk import VARIANTS, opened
from kit.qemu import assert_same, check, create, info, measure_map, qemu_img, qemu_io
from livedisk.emulator.block.types import ZeroFlags
from livedisk.emulator.drivers.qcow2.options import Encryption, EncryptionFormat, OverlapFlags, OverlapMode
from livedisk.emulator.drivers.qcow2.overlap import Section
from livedisk.emulator.errors import BlockError

MIB = 1 << 20
CLUSTER = 65536

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time": (
        "", {"cache_size": 1, "l2_cache_size": 1, "refcount_cache_size": 1}),
    "l2-cache-size may not exceed cache-size": ("", {"cache_size": 1, "l2_cache_size": 2}),
    "refcount-cache-size may not exceed cache-size": ("", {"cache_size": 1, "refcount_cache_size": 2}),
    "L2 cache entry size must be a power of two between 512 and the cluster size (65536)": (
        "", {"l2_cache_entry_size": 7}),
    "Cache clean interval too big": ("", {"cache_clean_interval": 5_000_000_000}),
    "No encryption in image header, but options specified format 'luks'": (
        "", {"encrypt": Encryption(format=EncryptionFormat.LUKS)}),
    "'data-file' can only be set for images with an external data file": (
        "", {"data_file": CrashDiskOptions(driver="crash-disk", platter=Platter())}),
    "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level": (
        "compat=0.10", {"lazy_refcounts": True}),
    "discard-no-unref is only supported since qcow2 version 3": ("compat=0.10", {"discard_no_unref": True}),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_contradict_the_image_are_refused_in_qemus_words(message: str, tmp_path: Path) -> None:
    image, options = REFUSED[message]
    path = create(tmp_path / "image.qcow2", MIB, options=image)

    async def use() -> None:
        async with opened(path, **options):
            raise AssertionError("it was opened")

    with pytest.raises(BlockError) as caught:
        asyncio.run(use())
    assert str(caught.value) == message


def test_overlap_flags_change_their_template(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", MIB)

    async def sections(flags: OverlapFlags) -> Section:
        async with opened(path, overlap_check=flags) as disk:
            return disk.image.storage.guard.checked

    flags = OverlapFlags(template=OverlapMode.CONSTANT, active_l2=True, main_header=False)
    wanted = (
        Section.ACTIVE_L1
        | Section.ACTIVE_L2
        | Section.REFCOUNT_TABLE
        | Section.SNAPSHOT_TABLE
        | Section.BITMAP_DIRECTORY
    )
    assert asyncio.run(sections(flags)) == wanted


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_says_of_an_image_what_qemu_says(variant: str, tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", MIB, options=VARIANTS[variant].format(folder=tmp_path))
    wanted = info(path)

    async def ask() -> None:
        async with opened(path, writable=False) as disk:
            assert disk.driver.specific_info() == wanted["format-specific"]
            assert disk.driver.cluster_size() == wanted["cluster-size"]
            assert disk.driver.dirty_flag() is wanted["dirty-flag"]

    asyncio.run(ask())


def test_it_lists_internal_snapshots_as_qemu_does(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", MIB)
    qemu_img("snapshot", "-c", "one", path)
    qemu_img("snapshot", "-c", "two", path)

    async def ask() -> list[Any]:
        async with opened(path) as disk:
            return list(disk.driver.snapshots())

    assert asyncio.run(ask()) == info(path)["snapshots"]


def test_lazy_refcounts_set_the_dirty_bit_first_and_close_clears_it(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", MIB, options="lazy_refcounts=on")

    async def use() -> None:
        async with opened(path) as disk:
            assert not path.read_bytes()[79] & 1
            await disk.write(0, b"x" * 512)
            assert path.read_bytes()[79] & 1
            await disk.backend.flush()
            (path.parent / "killed.qcow2").write_bytes(path.read_bytes())

    asyncio.run(use())
    assert not path.read_bytes()[79] & 1
    check(path)

    async def repaired() -> bytes:
        async with opened(path.parent / "killed.qcow2") as disk:
            return await disk.read(0, 512)

    assert asyncio.run(repaired()) == b"x" * 512
    check(path.parent / "killed.qcow2")


@pytest.mark.parametrize("options", ["", "cluster_size=4k", "extended_l2=on"])
def test_discarded_clusters_are_punched_and_used_again(options: str, tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", 8 * MIB, options=options)

    async def use() -> None:
        async with opened(path) as disk:
            for _ in range(4):
                await disk.write(0, b"x" * 4 * MIB)
                await disk.backend.discard(0, 4 * MIB)
                assert path.stat().st_blocks * 512 < MIB
                await disk.backend.flush()

    asyncio.run(use())
    assert path.stat().st_size < 6 * MIB
    check(path)
    assert not any(extent["data"] for extent in measure_map(path))


def test_discard_no_unref_keeps_the_host_cluster(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", MIB)

    async def use() -> tuple[int, int]:
        async with opened(path, discard_no_unref=True) as disk:
            await disk.write(0, b"x" * MIB)
            before = disk.image.tables.lookup(0, 1).host
            await disk.backend.discard(0, MIB)
            assert await disk.read(0, MIB) == bytes(MIB)
            return before, disk.image.tables.lookup(0, 1).host

    before, after = asyncio.run(use())
    assert before == after != 0
    check(path)


def test_fast_zero_refuses_what_would_have_to_be_written(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", MIB)

    async def use() -> None:
        async with opened(path) as disk:
            await disk.write(0, b"x" * MIB)
            with pytest.raises(OSError) as caught:
                await disk.backend.write_zeroes(512, 2 * CLUSTER, ZeroFlags.NO_FALLBACK)
            assert caught.value.errno == errno.ENOTSUP
            assert await disk.read(0, MIB) == b"x" * MIB
            await disk.backend.write_zeroes(CLUSTER, CLUSTER, ZeroFlags.NO_FALLBACK)
            # The rest of the cluster is zeroes already: the flag can say it.
            await disk.backend.write_zeroes(CLUSTER + 512, 512, ZeroFlags.NO_FALLBACK)
            assert await disk.read(CLUSTER, CLUSTER) == bytes(CLUSTER)

    asyncio.run(use())


def test_writes_to_one_new_cluster_queue_and_all_survive(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", MIB, options="cluster_size=2M")

    async def use() -> None:
        async with opened(path) as disk:
            await asyncio.gather(*(
                disk.backend.write(at, memoryview(bytes([at >> 9 & 255]) * 512)) for at in range(0, MIB, 512)
            ))  # fmt: skip
            for at in range(0, MIB, 512):
                assert await disk.read(at, 512) == bytes([at >> 9 & 255]) * 512

    asyncio.run(use())
    check(path)


class Faulty(Platter):
    """A platter on which writes fail as ``plan`` says: the numbers of the writes to fail."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.failing: set[int] = set()
        self.writes = 0

    def write(self, offset: int, data: bytes) -> None:
        self.writes += 1
        if self.writes in self.failing:
            raise OSError(errno.EIO, "Input/output error")
        super().write(offset, data)


assert CrashDisk.name == "crash-disk"


@pytest.mark.parametrize("options", ["", "cluster_size=512,refcount_bits=64", "extended_l2=on", "lazy_refcounts=on"])
@pytest.mark.parametrize("nth", range(1, 16, 2))
def test_an_error_of_the_file_leaks_at_most_and_later_requests_work(options: str, nth: int, tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", 2 * MIB, options=options)
    platter = Faulty(path.read_bytes())

    async def use() -> bytes:
        model = bytearray(2 * MIB)
        async with opened(CrashDiskOptions(driver="crash-disk", platter=platter)) as disk:
            platter.failing = {nth, nth + 1, nth + 4}
            for number in range(24):
                at, data = number * 70_001 % MIB // 512 * 512, bytes([number + 1]) * 20_480
                for _ in range(len(platter.failing) + 1):
                    try:
                        await disk.write(at, data)
                        model[at : at + len(data)] = data
                        if number % 3 == 0:
                            await disk.backend.flush()
                        break
                    except OSError as error:
                        if error.errno != errno.EIO:
                            raise
                    # A write that failed may have reached a part of its range: only the rest of the disk is known.
                    known = [(0, at), (at + len(data), 2 * MIB)]
                    for low, high in known:
                        assert await disk.read(low, high - low) == model[low:high]
                assert await disk.read(0, 2 * MIB) == model
            assert platter.writes >= nth
        return bytes(model)

    wanted = asyncio.run(use())
    path.write_bytes(platter.now)
    check(path, leaks=True)
    qemu_img("convert", "-O", "raw", path, tmp_path / "image.raw")
    assert (tmp_path / "image.raw").read_bytes() == wanted


def test_change_backing_file_is_what_qemu_reads(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", MIB)
    run(["qemu-img", "create", "-q", "-f", "raw", tmp_path / "base.raw", "1M"])

    async def change(name: str | None, fmt: str | None) -> None:
        async with opened(path, backing=None) as disk:
            await disk.driver.change_backing_file(name, fmt)
            assert disk.driver.backing_filename() == name

    asyncio.run(change("base.raw", "raw"))
    found = info(path)
    assert (found["backing-filename"], found["backing-filename-format"]) == ("base.raw", "raw")
    asyncio.run(change(None, None))
    assert "backing-filename" not in info(path)
    with pytest.raises(OSError):
        asyncio.run(change("x" * 1024, "raw"))
    check(path)


def test_inactivate_lets_qemu_in_and_activate_reads_what_it_did(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", MIB, options="lazy_refcounts=on")

    async def use() -> bytes:
        from kit.qcow2_disk import file_options
        from livedisk.emulator.block.options import OnOffAuto

        async with opened(file_options(path, locking=OnOffAuto.OFF)) as disk:
            await disk.write(0, b"ours" * 128)
            await disk.driver.inactivate()
            check(path)
            with pytest.raises(PermissionError):
                await disk.backend.write(0, memoryview(b"late" * 128))
            run(["qemu-io", "-f", "qcow2", "-c", "write -P 84 512 512", path])
            await disk.node.file.node.driver.activate()  # as whoever activates a chain does: children first
            await disk.driver.activate()
            return await disk.read(0, 1024)

    assert asyncio.run(use()) == b"ours" * 128 + b"T" * 512
    check(path)


def test_zeroes_take_no_room_in_a_version_2_image_without_a_backing_file(tmp_path: Path) -> None:
    """There is no zero flag: what has no storage reads as zeroes, as long as nothing is below."""
    ours, theirs = (create(tmp_path / name, MIB, options="compat=0.10") for name in ("ours.qcow2", "theirs.qcow2"))
    writes = [(0, 4 * CLUSTER), (8 * CLUSTER, CLUSTER)]
    zeroes = [(CLUSTER, CLUSTER), (3 * CLUSTER, CLUSTER + 512), (6 * CLUSTER + 512, CLUSTER), (8 * CLUSTER, 1024)]
    qemu_io(
        theirs,
        *(f"write -P 1 {offset} {length}" for offset, length in writes),
        *(f"write -z {offset} {length}" for offset, length in zeroes),
    )

    async def use() -> None:
        async with opened(ours) as disk:
            for offset, length in writes:
                await disk.write(offset, b"\1" * length)
            for offset, length in zeroes:
                await disk.backend.write_zeroes(offset, length, ZeroFlags.NONE)

    asyncio.run(use())
    check(ours)
    assert_same(ours, theirs, "-s")
    base = create(tmp_path / "base.qcow2", MIB)
    over = create(tmp_path / "over.qcow2", MIB, options="compat=0.10", backing=base)

    async def over_a_backing_file() -> None:
        async with opened(over) as disk:
            with pytest.raises(OSError, match="zero clusters need a version 3 image"):
                await disk.backend.write_zeroes(0, CLUSTER, ZeroFlags.NO_FALLBACK)

    asyncio.run(over_a_backing_file())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("variant", ["data file", "raw data file", "data file with subclusters"])
def test_the_first_cluster_of_a_data_file_is_written_zeroed_and_written_again(variant: str, tmp_path: Path) -> None:
    """Its host offset is 0, which elsewhere means that there is none: a write to it, zeroed but kept, never came to an end."""
    images: list[Path] = []
    for name in ("ours", "theirs"):
        folder = tmp_path / name
        folder.mkdir()
        images.append(create(folder / "image", MIB, options=VARIANTS[variant].format(folder=folder)))
    ours, theirs = images

    async def use() -> None:
        async with opened(ours) as disk:
            await disk.write(0, b"\1" * 2 * CLUSTER)
            await disk.backend.write_zeroes(0, 2 * CLUSTER, ZeroFlags.NONE)
            await disk.write(512, b"\2" * CLUSTER)
            await disk.backend.write_zeroes(0, CLUSTER, ZeroFlags.MAY_UNMAP)
            await disk.write(1024, b"\3" * 512)

    asyncio.run(use())
    qemu_io(
        theirs, "write -P 1 0 128k", "write -z 0 128k", "write -P 2 512 64k", "write -zu 0 64k", "write -P 3 1024 512"
    )
    for path in (ours, theirs):
        check(path)
    assert_same(ours, theirs)
    assert measure_map(ours) == measure_map(theirs)
