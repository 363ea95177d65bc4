"""Every driver against the simplest model there is, a bytearray: random operations, one by one and many at once."""

from __future__ import annotations

import asyncio
import errno
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from contract.disks import opened, read
from contract.variants import SIZE, VARIANTS, Variant
from hypothesis import given
from hypothesis import strategies as st

from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.flatmap import DATA, HOLE, MISS
from livedisk.emulator.block.status import block_status
from livedisk.emulator.block.types import ZeroFlags

Operation = tuple[Any, ...]

offsets = st.one_of(
    st.integers(0, SIZE - 1), st.integers(0, SIZE // 512 - 1).map(lambda n: n * 512), st.just(SIZE - 512)
)
lengths = st.one_of(st.integers(1, 700), st.sampled_from([512, 4096, 65536, 65537, 200_000]), st.integers(1, SIZE))
fills = st.integers(0, 255)
flags = st.sampled_from(
    [ZeroFlags.NONE, ZeroFlags.MAY_UNMAP, ZeroFlags.NO_FALLBACK, ZeroFlags.MAY_UNMAP | ZeroFlags.NO_FALLBACK]
)
simple = st.one_of(
    st.tuples(st.just("read"), offsets, lengths),
    st.tuples(st.just("write"), offsets, lengths, fills, st.booleans()),
    st.tuples(st.just("zero"), offsets, lengths, flags),
    st.tuples(st.just("discard"), offsets, lengths),
)
operations = st.lists(
    st.one_of(
        simple,
        simple,
        st.tuples(st.just("flush")),
        st.tuples(st.just("reopen")),
        st.tuples(st.just("resize"), st.integers(1, 2 * SIZE // 512).map(lambda n: n * 512)),
        st.tuples(st.just("at-once"), st.lists(simple, min_size=2, max_size=6)),
    ),
    min_size=1,
    max_size=12,
)


class Run:
    """One disk and its model, and what each operation does to both."""

    def __init__(self, variant: Variant, folder: Path) -> None:
        self.variant = variant
        self.options = variant.make(folder, SIZE)
        self.model = bytearray(variant.content(SIZE))
        self.disk: BlockBackend
        self._stack = AsyncExitStack()

    async def start(self, blocks: int = 1) -> None:
        """``blocks``: bytes of those of the time before. As with QEMU, a write by O_DIRECT to the end of a file that is none of
        whole blocks, by somebody who may resize it, rounded it up; they are of 4096 bytes where it began with a hole."""
        self.disk = await self._stack.enter_async_context(opened(self.options))
        if self.disk.size == -(-len(self.model) // blocks) * blocks:
            self.model.extend(bytes(self.disk.size - len(self.model)))
        assert self.disk.size == len(self.model)

    async def end(self) -> None:
        await self._stack.aclose()

    def clip(self, offset: int, length: int) -> tuple[int, int]:
        """The range, moved and cut so that it lies in the disk."""
        offset = min(offset, len(self.model) - 1)
        return offset, min(length, len(self.model) - offset)

    async def do(self, operation: Operation) -> None:
        name, *arguments = operation
        step: Callable[..., Coroutine[Any, Any, None]] = getattr(self, name.replace("-", "_"))
        await step(*arguments)

    async def read(self, offset: int, length: int) -> None:
        offset, length = self.clip(offset, length)
        assert await read(self.disk, offset, length) == self.model[offset : offset + length]
        buffer = bytearray(b"\xa5" * length)
        outcome = self.disk.try_read(offset, memoryview(buffer))
        if outcome == HOLE:
            assert not any(self.model[offset : offset + length])
            assert buffer == b"\xa5" * length
        elif outcome == DATA:
            assert buffer == self.model[offset : offset + length]

    async def write(self, offset: int, length: int, fill: int, fast: bool) -> None:
        offset, length = self.clip(offset, length)
        data = memoryview(bytes([fill]) * length)
        if not fast or self.disk.try_write(offset, data) == MISS:
            await self.disk.write(offset, data, fua=length == 512)
        self.model[offset : offset + length] = data

    async def zero(self, offset: int, length: int, flags: ZeroFlags) -> None:
        offset, length = self.clip(offset, length)
        try:
            await self.disk.write_zeroes(offset, length, flags)
        except OSError as error:
            if error.errno != errno.ENOTSUP or not flags & ZeroFlags.NO_FALLBACK:
                raise
        else:
            self.model[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        offset, length = self.clip(offset, length)
        await self.disk.discard(offset, length)
        # What a discarded range reads as is open, but it must be the old bytes, zeroes or the backing file's.
        now = await read(self.disk, offset, length)
        old = self.model[offset : offset + length]
        below = self.variant.content(SIZE)[offset : offset + length].ljust(length, b"\0")
        assert all(byte in (0, a, b) for byte, a, b in zip(now, old, below, strict=True))
        self.model[offset : offset + length] = now

    async def flush(self) -> None:
        await self.disk.flush()

    async def reopen(self) -> None:
        blocks = self.disk.node.driver.request_alignment
        await self._stack.aclose()
        await self.start(blocks)

    async def resize(self, size: int) -> None:
        if self.variant.resizable:
            async with self.disk.graph.drained(self.disk.node):
                await self.disk.truncate(size)
            self.model[size:] = bytes(max(size - len(self.model), 0))
            assert self.disk.size == size

    async def at_once(self, operations: list[Operation]) -> None:
        """Those that do not overlap run at the same time, so that the outcome is known."""
        taken: list[range] = []
        chosen = []
        for operation in operations:
            offset, length = self.clip(operation[1], operation[2])
            if all(offset >= other.stop or offset + length <= other.start for other in taken):
                taken.append(range(offset, offset + length))
                chosen.append(operation)
        await asyncio.gather(*(self.do(operation) for operation in chosen))

    async def check_everything(self) -> None:
        assert await read(self.disk, 0, len(self.model)) == self.model
        position = 0
        while position < len(self.model):
            async with self.disk.request() as node:
                status = await block_status(node, position, len(self.model) - position)
            assert status.length > 0
            if status.zero:
                assert not any(self.model[position : position + status.length])
            position += status.length
        assert position == len(self.model)


async def run(variant: Variant, folder: Path, operations: list[Operation]) -> None:
    disk = Run(variant, folder)
    await disk.start()
    try:
        for operation in operations:
            await disk.do(operation)
        await disk.check_everything()
        await disk.reopen()
        await disk.check_everything()
    finally:
        await disk.end()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@given(operations=operations)
def test_disk_behaves_like_a_bytearray(variant: Variant, operations: list[Operation]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(variant, Path(folder), operations))


def test_a_part_of_a_file_is_written_and_nothing_around_it(tmp_path: Path) -> None:
    part = next(variant for variant in VARIANTS if variant.name == "raw-part")

    async def fill() -> None:
        async with opened(part.make(tmp_path, SIZE)) as disk:
            await disk.write(0, memoryview(b"\x77" * SIZE))
            await disk.write_zeroes(512, SIZE - 512)

    asyncio.run(fill())
    assert (tmp_path / "large.raw").read_bytes() == b"\xaa" * 1536 + b"\x77" * 512 + bytes(SIZE - 512) + b"\xbb" * 4096
