"""Block status of an export: the server's extents in one meta context.

A question costs a round trip, and a sweep over the disk (a job, a map) asks many, each where the last answer ended. So once a
question goes on where the last one ended, the server is asked for many extents at once, and those are kept for the questions to
come: until the sweep is over, or a second has passed, or we changed anything in the range. An extent is never kept for anybody
who comes from elsewhere: whoever starts to look sees what is there then, also if it was another client that wrote it.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from typing import Final

from livedisk.nbd.client_link import Link
from livedisk.nbd.client_transmission import NO_FLAGS
from livedisk.nbd.constants import BASE_ALLOCATION, Command, CommandFlag

_AHEAD: Final = 256 << 20
"""Bytes that a sweep asks for at once."""
_KEEP: Final = 1.0
"""Seconds that extents are kept."""
_LONGEST: Final = (1 << 32) - (1 << 20)
"""Bytes in one question: its length has 32 bits."""
MAX_KEPT: Final = 4096


class Extents:
    """The extents of ``context`` as ``link``'s server tells them; offsets and lengths in bytes, multiples of ``block``."""

    def __init__(self, link: Link, context: str, block: int) -> None:
        self._link = link
        self._context = context
        self._block = block
        self._ahead: deque[tuple[int, int]] = deque()  # length and flags, from `_position` on
        self._position = -1  # where the last answer ended
        self._expires = 0.0
        self._changes = 0

    @property
    def known(self) -> bool:
        """Whether the server tells this context at all."""
        return self._context in self._link.info.contexts.values()

    def forget(self) -> None:
        """Something was written."""
        self._changes += 1
        self._ahead.clear()

    async def at(self, offset: int, length: int, size: int) -> tuple[int, int]:
        """Flags and length, at most ``length``, of the run at ``offset`` of an export of ``size`` bytes. Raises OSError."""
        now = asyncio.get_running_loop().time()
        sweeping = offset == self._position
        if sweeping and self._ahead and now < self._expires:
            extents = self._ahead
        else:
            changes = self._changes
            extents = await self._ask(offset, length, size, sweeping=sweeping)
            if changes != self._changes:
                extents = deque([extents[0]])
            self._ahead, self._expires = extents, now + _KEEP
        run, flags = extents[0]
        if run <= length:
            extents.popleft()
        else:
            extents[0] = run - length, flags
        self._position = offset + min(run, length)
        return flags, min(run, length)

    async def _ask(self, offset: int, length: int, size: int, *, sweeping: bool) -> deque[tuple[int, int]]:
        """What the server says from ``offset`` on; at least one run."""
        wanted = min(max(length, _AHEAD) if sweeping else length, size - offset, _LONGEST)
        pending = await self._link.request(
            Command.BLOCK_STATUS, offset, wanted, flags=NO_FLAGS if sweeping else CommandFlag.REQ_ONE
        )
        extents = deque[tuple[int, int]]()
        left = wanted
        for extent in pending.extents.get(self._context, ())[:MAX_KEPT]:
            run, flags = min(extent.length, left), extent.flags
            if run % self._block:
                # No server should tell this. What cannot be said of whole blocks is data.
                extents.append((run // self._block * self._block, flags) if run > self._block else (self._block, 0))
                break
            extents.append((run, flags))
            left -= run
            if not left:
                break
        if not extents and self._context != BASE_ALLOCATION:
            raise OSError(errno.EIO, f"server told nothing of {self._context} at {offset}")
        # An answer without the allocation says nothing: data, which is never wrong. Of a bitmap, that would mean clean.
        return extents or deque([(wanted, 0)])
