"""A client that writes without pause, and proves afterwards what an image may contain.

A snapshot under load must be a moment in time: it has every write that was acknowledged before the command was sent,
none that was issued after the reply came, and of those between some, but never one without another that had ended
before it began. `History` checks exactly that, block by block and across blocks, from the times that the client
noted.
"""

from __future__ import annotations

import json
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kit.peers import SYSTEM_PYTHON
from kit.process import Process

BLOCK: Final = 4096
"""Bytes per write; every write is one aligned block."""

_CONTENT = struct.Struct("<QQ")


def now() -> int:
    """The clock that the client notes its times with (CLOCK_MONOTONIC, nanoseconds)."""
    return time.monotonic_ns()


@dataclass(frozen=True)
class Write:
    """One request: block ``block`` became ``content`` (0: zeroes) at some moment between ``issued`` and
    ``acknowledged``."""

    block: int
    content: int
    issued: int
    acknowledged: int


class Writer(Process):
    """The client: random writes and zero-writes at ``depth`` on the ``size`` bytes of ``uri``, reads compared in
    between.

    ``pause`` (seconds) makes it slower: fast as it is, no mirror catches up with it. ``folder`` takes its log. It
    starts at once; `finish` ends it in order and returns what it did.
    """

    def __init__(
        self,
        uri: str,
        size: int,
        folder: Path,
        *,
        depth: int = 8,
        seed: int = 1,
        pause: float = 0,
        name: str = "writer",
    ) -> None:
        self._history = folder / f"{name}.json"
        self.size = size
        program = str(Path(__file__).with_name("writer_child.py"))
        arguments = [SYSTEM_PYTHON, "-I", program, uri, str(size), str(depth), str(seed), str(pause)]
        arguments.append(str(self._history))
        super().__init__(arguments, log=folder / f"{name}.log", stdin=subprocess.PIPE)
        self.wait_for_output("writing")

    def finish(self) -> History:
        """Let the client wait for what is in flight, flush and end. Raises `kit.process.ProcessFailed` if any
        request failed or read back wrong."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.wait()
        return History(self.size, [Write(*record) for record in json.loads(self._history.read_text())])


class History:
    """What the client did, in order of issue. At most one request was in flight on a block at any time."""

    def __init__(self, size: int, writes: list[Write]) -> None:
        self.size = size
        self.writes = writes
        self._by_block: dict[int, list[Write]] = {}
        for write in writes:
            self._by_block.setdefault(write.block, []).append(write)

    def check_final(self, image: bytes) -> None:
        """``image`` is exactly what the client left (the rest zeroes)."""
        last = self.writes[-1].acknowledged if self.writes else 0
        end = max([last, *(w.acknowledged for w in self.writes)]) + 1
        self.check_moment(image, end, end)

    def check_moment(self, image: bytes, before: int, after: int) -> tuple[int, int]:
        """``image`` is the state at one moment between the times ``before`` and ``after``. Raises
        `AssertionError`. Returns when that was: not before the one time, not after the other."""
        if len(image) != self.size:
            raise AssertionError(f"the image has {len(image)} bytes, not {self.size}")
        latest_included = (0, -1)
        earliest_excluded = (1 << 63, -1)
        for block in range(self.size // BLOCK):
            found = _content(image, block)
            writes = self._by_block.get(block, [])
            positions = _positions(writes, found, before, after)
            if not positions:
                raise AssertionError(self._explain(block, found, before, after))
            # Zeroes may stand for several of a block's writes: count as included and as excluded only what is
            # certain.
            if positions[0] > 0:
                latest_included = max(latest_included, (writes[positions[0] - 1].issued, block))
            if positions[-1] < len(writes):
                earliest_excluded = min(earliest_excluded, (writes[positions[-1]].acknowledged, block))
        if latest_included[0] > earliest_excluded[0]:
            raise AssertionError(
                f"not one moment: block {latest_included[1]} has a write that was issued at {latest_included[0]}, "
                f"block {earliest_excluded[1]} lacks one that was acknowledged at {earliest_excluded[0]}"
            )
        return latest_included[0], earliest_excluded[0]

    def _explain(self, block: int, found: int, before: int, after: int) -> str:
        writes = "".join(
            f"\n  content {write.content} issued {write.issued} acknowledged {write.acknowledged}"
            for write in self._by_block.get(block, [])
        )
        return (
            f"block {block} has content {found}, which it cannot have between {before} and {after}; its writes:{writes}"
        )


def _content(image: bytes, block: int) -> int:
    """The number of the write that left the block; -1 if no write can have left it like that."""
    data = image[block * BLOCK : (block + 1) * BLOCK]
    if not any(data):
        return 0
    number: int
    own, number = _CONTENT.unpack_from(data)
    if own != block or data != _CONTENT.pack(block, number) * (BLOCK // _CONTENT.size):
        return -1
    return number


def _positions(writes: list[Write], found: int, before: int, after: int) -> list[int]:
    """Every number of a block's writes, in order, that the state ``found`` may include."""
    fewest = sum(write.acknowledged <= before for write in writes)
    most = sum(write.issued < after for write in writes)
    return [n for n in range(fewest, most + 1) if (writes[n - 1].content if n else 0) == found]
