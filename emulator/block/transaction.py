"""Prepare, then commit or abort: how changes that may fail half-way leave nothing behind.

Each step that has been taken adds what would undo it (``abort``, run last-in first-out) and what makes it final
(``commit``, run in
order). Undo and commit actions must not fail; ``clean`` actions run after either.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Transaction:
    """A list of steps taken. Used as a context manager: commits on success, aborts on an exception."""

    def __init__(self) -> None:
        self._commit: list[Callable[[], None]] = []
        self._abort: list[Callable[[], None]] = []

    def add(self, *, commit: Callable[[], None] | None = None, abort: Callable[[], None] | None = None) -> None:
        """Note what finishes and what undoes the step just taken."""
        if commit is not None:
            self._commit.append(commit)
        if abort is not None:
            self._abort.append(abort)

    def commit(self) -> None:
        """Finish every step, first to last."""
        steps, self._commit, self._abort = self._commit, [], []
        for step in steps:
            step()

    def abort(self) -> None:
        """Undo every step, last to first."""
        steps, self._commit, self._abort = self._abort, [], []
        for step in reversed(steps):
            step()

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()
