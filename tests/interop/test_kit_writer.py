"""The checker behind the live snapshot tests must itself refuse what is not a moment in time."""

from __future__ import annotations

import struct

import pytest

from kit.writer import BLOCK, History, Write

SIZE = 4 * BLOCK


def image(*contents: int) -> bytes:
    return b"".join(
        bytes(BLOCK) if content == 0 else struct.pack("<QQ", block, content) * (BLOCK // 16)
        for block, content in enumerate(contents)
    )


HISTORY = History(
    SIZE,
    [
        Write(block=0, content=1, issued=10, acknowledged=20),
        Write(block=1, content=2, issued=30, acknowledged=40),
        Write(block=0, content=3, issued=50, acknowledged=60),
        Write(block=2, content=4, issued=55, acknowledged=70),
        Write(block=1, content=0, issued=80, acknowledged=90),
    ],
)


@pytest.mark.parametrize(
    ("contents", "before", "after"),
    [
        ((0, 0, 0, 0), 0, 5),
        ((1, 0, 0, 0), 20, 25),
        ((1, 2, 0, 0), 45, 48),
        ((1, 2, 4, 0), 45, 65),
        ((3, 2, 0, 0), 45, 65),
        ((3, 2, 4, 0), 75, 75),
        ((3, 0, 4, 0), 95, 95),
    ],
)
def test_states_of_one_moment_are_accepted(contents: tuple[int, ...], before: int, after: int) -> None:
    HISTORY.check_moment(image(*contents), before, after)


@pytest.mark.parametrize(
    ("contents", "before", "after", "reason"),
    [
        ((0, 0, 0, 0), 20, 25, "cannot have"),  # lost an acknowledged write
        ((1, 2, 0, 0), 20, 25, "cannot have"),  # has a write of the future
        ((1, 4, 0, 0), 75, 75, "cannot have"),  # has another block's content
        ((1, 0, 4, 0), 15, 75, "not one moment"),  # has the later, lacks the earlier write
    ],
)
def test_other_states_are_refused(contents: tuple[int, ...], before: int, after: int, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        HISTORY.check_moment(image(*contents), before, after)


def test_torn_block_is_refused() -> None:
    torn = bytearray(image(1, 0, 0, 0))
    torn[100] ^= 1
    with pytest.raises(AssertionError, match="content -1"):
        HISTORY.check_moment(bytes(torn), 20, 25)
