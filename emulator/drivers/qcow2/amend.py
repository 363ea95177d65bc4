"""Changing what an image's header promises: version, lazy refcounts, the width of refcounts, a raw data file (img amend).

Each change is a step of its own, old or new after a power cut: version, feature bits and width stand in the first sector, and
what they need (entries of the snapshot table, other refcount structures, no zero clusters) is on the disk before. Source: QEMU
``block/qcow2.c`` (qcow2_amend_options_opts, qcow2_downgrade), for the order and wording of refusals.
"""

from __future__ import annotations

from typing import Final

from livedisk.emulator.block.node import fill_zeroes
from livedisk.emulator.drivers.qcow2.driver import Qcow2
from livedisk.emulator.drivers.qcow2.geometry import OFFSET_MASK, ZERO, table_from_bytes
from livedisk.emulator.drivers.qcow2.header import Autoclear, Compatible, Incompatible
from livedisk.emulator.drivers.qcow2.image import Image
from livedisk.emulator.drivers.qcow2.snapshot_change import publish, settled
from livedisk.emulator.drivers.qcow2.snapshots import complete
from livedisk.emulator.drivers.qcow2.tables import State
from livedisk.emulator.errors import BlockError

_CHUNK: Final = 2 << 20


async def set_lazy_refcounts(driver: Qcow2, *, on: bool) -> None:
    """Whether refcounts may fall behind by default. Raises OSError."""
    header, bit = driver.image.header, int(Compatible.LAZY_REFCOUNTS)
    if not on:
        await driver.image.finish()
    header.compatible = header.compatible | bit if on else header.compatible & ~bit
    driver.image.lazy = on
    await driver.image.write_header()


async def stop_raw_data_file(driver: Qcow2) -> None:
    """The data file need not stay valid as a raw image any more. Raises OSError."""
    driver.image.header.autoclear &= ~int(Autoclear.DATA_FILE_RAW)
    await driver.image.write_header()


async def upgrade(driver: Qcow2) -> None:
    """Version 2 becomes 3. Raises OSError."""
    image = driver.image
    if image.snapshots:
        async with settled(image):
            await publish(image, tuple(complete(one, image.size) for one in image.snapshots))
    image.header.version = image.tables.version = 3
    await image.write_header()


async def downgrade(driver: Qcow2) -> None:
    """Version 3 becomes 2. Raises BlockError, in QEMU's words, where something of version 3 is in use, or OSError."""
    image = driver.image
    header = image.header
    await check_downgrade(image)
    await _expand_zero_clusters(image)
    await image.finish()
    image.lazy = False
    header.incompatible = header.compatible = header.autoclear = 0
    header.version = image.tables.version = 2
    await image.write_header()


async def check_downgrade(image: Image) -> None:
    """Raise BlockError for what version 2 cannot say."""
    header = image.header
    if header.refcount_order != 4:
        raise BlockError("compat=0.10 requires refcount_bits=16")
    if header.has_data_file:
        raise BlockError("Cannot downgrade an image with a data file")
    if header.incompatible & ~int(Incompatible.DIRTY):
        raise BlockError(f"Cannot downgrade an image with incompatible features {header.incompatible:#x} set")
    if header.bitmaps is not None:
        raise BlockError("Cannot downgrade an image with persistent bitmaps")
    for known in image.snapshots:
        if known.vm_state_size or (known.disk_size or image.size) != image.size:
            raise BlockError("Internal snapshots prevent downgrade of image")
        for entry in table_from_bytes(await image.storage.read(known.l1_table_offset, known.l1_size * 8)):
            if entry & OFFSET_MASK:
                l2 = table_from_bytes(await image.storage.read(entry & OFFSET_MASK, image.geometry.cluster_size))
                if any(word & ZERO and not word >> 62 & 1 for word in l2):
                    raise BlockError(
                        f"Internal snapshot '{known.name.decode(errors='replace')}' has zero clusters, which version 2 "
                        "does not know: delete it first"
                    )


async def _expand_zero_clusters(image: Image) -> None:
    """Zero clusters become unallocated where nothing shows through, else clusters of zeroes."""
    offset, backing = 0, image.node.backing
    while offset < image.size:
        run = await image.lookup(offset, image.size - offset)
        if run.state in (State.ZERO, State.ZERO_ALLOC):
            end = min(offset + run.length, image.geometry.round_up(image.size))
            if backing is None or offset >= backing.node.size:
                await image.zeroer.drop(offset, image.geometry.round_up(end))
            else:
                await _write_zeroes(image, offset, min(run.length, image.size - offset))
        offset += run.length
    await image.writeback.run()


async def _write_zeroes(image: Image, offset: int, length: int) -> None:
    zeroes = bytearray(min(length, _CHUNK))
    fill_zeroes(memoryview(zeroes))
    for at in range(0, length, _CHUNK):
        await image.writer.write(offset + at, memoryview(zeroes)[: min(_CHUNK, length - at)])
