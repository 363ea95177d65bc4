"""`Driver.sift` says what `Driver.map` says, many granules at a time: the flat map is the same with it and without it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kit.qcow2_corpus import CORPUS, Variant, make
from kit.qcow2_disk import Disk, opened
from livedisk.emulator.block.flatmap import REGION, REGION_BITS
from livedisk.emulator.drivers.qcow2.driver import Qcow2


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
