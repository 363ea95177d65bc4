"""`Driver.sift` says what `Driver.map` says, many granules at a time: the flat map is the same with it and without it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kit.qcow2_corpus import CORPUS, Variant, make
from kit.qcow2_disk import Disk, file_options, opened
from kit.qemu import create, qemu_io
from livedisk.emulator.block.flatmap import REGION, REGION_BITS, FlatMap
from livedisk.emulator.drivers.copy_before_write import CopyBeforeWrite
from livedisk.emulator.drivers.qcow2.driver import Qcow2
from livedisk.emulator.drivers.qcow2.options import Qcow2Options
from livedisk.jobs.filters import insert_filter


async def entries(disk: Disk) -> list[int]:
    """What the flat map says of every granule, with all tables in memory."""
    size = disk.node.size
    await disk.read(0, 512)  # learns the granularity
    fast = disk.backend.fast
    step = 1 << fast._shift
    for offset in range(0, size, step):
        await disk.backend.read(offset, memoryview(bytearray(min(512, size - offset))))
    disk.backend.refresh()
    for offset in range(0, size, step):
        disk.backend.try_read(offset, memoryview(bytearray(min(512, size - offset))))
    return [fast._regions[n >> REGION_BITS][n & (REGION - 1)] for n in range(-(-size // step))]


@pytest.mark.parametrize("variant", CORPUS, ids=lambda variant: variant.name)
def test_the_flat_map_is_the_same_with_and_without(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make(variant, tmp_path)

    async def ask(*, writable: bool) -> tuple[list[int], bool]:
        async with opened(image.path, writable=writable) as disk:
            asked = []
            original = disk.driver.image.sift

            def sift(*args):  # type: ignore[no-untyped-def]
                asked.append(original(*args))
                return asked[-1]

            monkeypatch.setattr(disk.driver.image, "sift", sift)
            return await entries(disk), any(answer is not None for answer in asked)

    for writable in (False, True):
        with_sift, answered = asyncio.run(ask(writable=writable))
        with monkeypatch.context() as patch:
            patch.setattr(Qcow2, "sift", lambda *args: None)
            without, _ = asyncio.run(ask(writable=writable))
        assert with_sift == without
        if "extended" not in variant.name and "raw" not in variant.name and variant.cluster_size >= 4096:
            assert answered


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("filter", ["mirror_top", "commit_top", "copy-on-read", "copy-before-write", "raw"])
def test_filters_that_show_their_child_are_passed(
    filter: str, writable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a chain that reaches past the ends of its lower images; copy-before-write shows some of it for reading only."""
    size = 96 * 65536
    for name, options, written in (("a", "", 40), ("b", "backing_file=a,backing_fmt=qcow2", 70)):
        create(tmp_path / name, written * 65536, options=options)
        qemu_io(tmp_path / name, *(f"write -q {n * 65536} 64k" for n in range(ord(name) % 3, written, 3)))
    create(tmp_path / "c", size, options="backing_file=b,backing_fmt=qcow2")
    qemu_io(tmp_path / "c", *(f"write -q {n * 65536} 64k" for n in range(1, 96, 5)), "write -q -z 2M 1M")
    create(tmp_path / "t", size)

    async def ask() -> tuple[list[int], int]:
        async with opened(tmp_path / "c", writable=writable) as disk:
            more = {}
            if filter == "copy-before-write":
                await disk.graph.add(Qcow2Options(driver="qcow2", file=file_options(tmp_path / "t"), node_name="t"))
                more = {"target": "t"}
            if not writable:
                more["read_only"] = True
            node = await insert_filter(disk.graph, filter, disk.node, "f", **more)
            if isinstance(node.driver, CopyBeforeWrite) and writable:
                for offset in range(0, size, 7 * 65536):
                    await disk.backend.write(offset, memoryview(bytes(512)))
            answers = []
            original = Qcow2.sift
            with monkeypatch.context() as patch:
                patch.setattr(Qcow2, "sift", lambda *args: answers.append(original(*args)) or answers[-1])
                return await entries(disk), len(answers)

    with_sift, answers = asyncio.run(ask())
    assert answers
    with monkeypatch.context() as patch:
        patch.setattr(FlatMap, "_sift", lambda *args: 0)
        without, _ = asyncio.run(ask())
    assert with_sift == without
