"""How fast a job may go: a limit in bytes a second that can change while the job waits for it."""

from __future__ import annotations

import time


class RateLimit:
    """Accounts what was moved and says how long to wait. ``speed`` is bytes a second; 0: no limit.

    What is moved may be late for its turn, never early: after a chunk of n bytes the next waits n / speed seconds from when
    the chunk was due. As with QEMU, the first chunk after a pause goes at once.
    """

    def __init__(self) -> None:
        self.speed = 0
        self._due = 0.0

    def set(self, speed: int) -> None:
        """Another limit, from now on."""
        self.speed = speed
        self._due = 0.0

    def account(self, length: int) -> None:
        """``length`` bytes were moved."""
        if self.speed:
            self._due = max(self._due, time.monotonic()) + length / self.speed

    def delay(self) -> float:
        """Seconds until the next bytes may be moved; 0: at once."""
        return max(self._due - time.monotonic(), 0.0) if self.speed else 0.0
