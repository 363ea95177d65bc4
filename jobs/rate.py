"""How fast a job may go: a limit in bytes a second that can change while the job waits for it. And how fast it goes."""

from __future__ import annotations

import time
from collections import deque
from typing import Final

SLICE: Final = 0.1
"""Seconds of its time that a job may make up for (QEMU's BLOCK_JOB_SLICE_TIME)."""
LOOKS: Final = 12
LOOK_EVERY: Final = 0.25
"""A pace is that of the last three seconds."""


class RateLimit:
    """Accounts what was moved and says how long to wait. ``speed`` is bytes a second; 0: no limit.

    After a chunk of n bytes the next waits n / speed seconds from when the chunk was due, so that one that came late for its
    turn does not slow the job down; what was missed by more than `SLICE` is lost. As with QEMU, the first chunk after a pause
    goes at once.
    """

    def __init__(self) -> None:
        self.speed = 0
        self._due = 0.0

    def set(self, speed: int) -> None:
        """Another limit, from now on."""
        self.speed = speed
        self._due = time.monotonic()

    def account(self, length: int) -> None:
        """``length`` bytes were moved."""
        if self.speed:
            self._due = max(self._due, time.monotonic() - SLICE) + length / self.speed

    def delay(self) -> float:
        """Seconds until the next bytes may be moved; 0: at once."""
        return max(self._due - time.monotonic(), 0.0) if self.speed else 0.0


class Pace:
    """How fast a job's work is done, and how fast it grows: what a mirror copies, and what a guest dirties meanwhile."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int, int]] = deque(maxlen=LOOKS)

    def note(self, total: int, done: int) -> None:
        """The work stands so (bytes). To be told again and again."""
        now = time.monotonic()
        if not self._looks or now - self._looks[-1][0] >= LOOK_EVERY:
            self._looks.append((now, total, done))

    def rates(self, total: int, done: int) -> tuple[int, int]:
        """Bytes a second: by which the work grows, and that are done. ``total``, ``done``: as it stands now."""
        if not self._looks:
            return 0, 0
        then, old_total, old_done = self._looks[0]
        passed = max(time.monotonic() - then, 0.001)
        return max(int((total - old_total) / passed), 0), int((done - old_done) / passed)
