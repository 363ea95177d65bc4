"""``livedisk img compare``: whether two images read alike, as with ``qemu-img compare``.

Exit status (qemu-img's): 0 alike, 1 different or a usage error, 2 an image could not be opened, 3 block status could not be
read, 4 data could not be read. Source: QEMU ``qemu-img.c`` (img_compare).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from livedisk.emulator.cli.img import SETTINGS, img, run_to_end
from livedisk.emulator.cli.img_options import (
    PROGRESS,
    QUIET,
    SOURCE_CACHE,
    cache_mode,
    format_option,
    image_name,
    image_options,
)
from livedisk.emulator.errors import LiveDiskError, ParameterError, reason_of

if TYPE_CHECKING:
    from livedisk.emulator.block.backend import BlockBackend
    from livedisk.emulator.block.status import BlockStatus

_STEP: Final = 2 << 20
_SECTOR: Final = 512


@img.command("compare", context_settings=SETTINGS)
@format_option("-f", "--a-format", "fmt", help="The first image's format; what its header says if not given.")
@format_option("-F", "--b-format", "other_fmt", help="The second image's.")
@SOURCE_CACHE
@click.option("-s", "--strict", "strict", is_flag=True, help="Sizes, and what is allocated, must be the same, too.")
@PROGRESS
@QUIET
@click.option("-U", "--force-share", is_flag=True, help="Compare although a writer has an image open.")
@image_options
@click.argument("image1", callback=image_name)
@click.argument("image2", callback=image_name)
def compare_command(
    fmt: str | None,
    other_fmt: str | None,
    cache: str | None,
    strict: bool,
    progress: bool,
    quiet: bool,
    force_share: bool,
    image1: str,
    image2: str,
) -> None:
    """Say whether IMAGE1 and IMAGE2 read alike; a longer one may be so if the rest of it is zeroes.

    \b
    Exit status (qemu-img's): 0 alike, 1 different, 2 not opened, 3 block status not read, 4 data not read.
    """

    async def work() -> int:
        from livedisk.emulator.cli.img_open import Progress, Quit, images

        async with images() as made:
            try:
                mode = cache_mode(cache, "source cache")
            except ParameterError as error:
                raise Quit(str(error), 2) from None
            backends = []
            for path, kind in ((image1, fmt), (image2, other_fmt)):
                try:
                    backends.append(await made.open(path, kind, force_share=force_share, cache=mode))
                except (LiveDiskError, OSError) as error:
                    raise Quit(reason_of(error), 2) from None
            shown = Progress(progress and not quiet)
            comparison = _Comparison((backends[0], backends[1]), (image1, image2), strict=strict)
            difference = await comparison.run(shown)
            shown.end()
            if not quiet:
                if comparison.common_is_alike:
                    click.echo("Warning: Image size mismatch!")
                click.echo(difference or "Images are identical.")
            return 1 if difference else 0

    run_to_end(work)


class _Comparison:
    """Two images side by side."""

    def __init__(self, pair: tuple[BlockBackend, BlockBackend], names: tuple[str, str], *, strict: bool) -> None:
        self._pair = pair
        self._names = names
        self._strict = strict
        self.common_is_alike = False
        """Whether one is longer, and its rest was looked at."""

    async def run(self, shown: object) -> str | None:
        """What differs first, in qemu-img's words, or None. Raises Quit."""
        from livedisk.emulator.cli.img_open import Progress

        assert isinstance(shown, Progress)
        sizes = [backend.size for backend in self._pair]
        if self._strict and sizes[0] != sizes[1]:
            return "Strict mode: Image size mismatch!"
        offset, end = 0, min(sizes)
        while offset < max(sizes):
            if offset < end:
                length, difference = await self._compare(offset, end - offset)
            else:
                self.common_is_alike = True
                longer = sizes.index(max(sizes))
                length, difference = await self._rest(longer, offset, max(sizes) - offset)
            if difference is not None:
                return difference
            offset += length
            shown.show(offset, max(sizes))
        return None

    async def _compare(self, offset: int, length: int) -> tuple[int, str | None]:
        from livedisk.emulator.block.status import Status

        first, second = await self._status(0, offset, length), await self._status(1, offset, length)
        length = min(first.length, second.length)
        if self._strict and (first.flags ^ second.flags) & ~Status.OFFSET_VALID:
            return length, f"Strict mode: Offset {offset} block status mismatch!"
        if first.zero and second.zero:
            return length, None
        length = min(length, _STEP)
        zeroes = bytes(length)
        data = [
            zeroes if status.zero else await self._read(index, offset, length)
            for index, status in enumerate((first, second))
        ]
        return length, _mismatch(offset, data[0], data[1])

    async def _rest(self, index: int, offset: int, length: int) -> tuple[int, str | None]:
        """What only one of the two has must be zeroes."""
        status = await self._status(index, offset, length)
        if status.zero or not status.allocated:
            return status.length, None
        length = min(status.length, _STEP)
        return length, _mismatch(offset, await self._read(index, offset, length), bytes(length))

    async def _status(self, index: int, offset: int, length: int) -> BlockStatus:
        from livedisk.emulator.block.status import block_status
        from livedisk.emulator.cli.img_open import Quit

        try:
            return await block_status(self._pair[index].node, offset, length)
        except OSError as error:
            raise Quit(f"Sector allocation test failed for {self._names[index]}: {reason_of(error)}", 3) from None

    async def _read(self, index: int, offset: int, length: int) -> bytearray:
        from livedisk.emulator.cli.img_open import Quit

        data = bytearray(length)
        try:
            await self._pair[index].read(offset, memoryview(data))
        except OSError as error:
            raise Quit(f"Error while reading offset {offset} of {self._names[index]}: {reason_of(error)}", 4) from None
        return data


def _mismatch(offset: int, one: bytes | bytearray, other: bytes | bytearray) -> str | None:
    if one == other:
        return None
    starts = range(0, len(one), _SECTOR)
    at = next(start for start in starts if one[start : start + _SECTOR] != other[start : start + _SECTOR])
    return f"Content mismatch at offset {offset + at}!"
