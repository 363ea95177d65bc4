"""What a person sees of a backup: bars on a terminal, lines elsewhere, and tables."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from livedisk.emulator.cli.figures import human_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bars(Protocol):
    """Shows how far something is."""

    def show(self, title: str, done: int, total: int) -> None:
        """``done`` of ``total`` bytes. May be called from a thread."""


class Silent:
    """Shows nothing: for programs."""

    def show(self, title: str, done: int, total: int) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class TerminalBars:
    """A bar for each title on standard error, with rate and remaining time; where that is no terminal, one line for each
    that is done."""

    def __init__(self) -> None:
        self._bars: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, title: str, done: int, total: int) -> None:
        if self._progress is None:
            if done >= total and title not in self._told:
                self._told.add(title)
                print(f"{title}: {human_bytes(total)}", file=sys.stderr)
            return
        bar = self._bars.get(title)
        if bar is None:
            bar = self._bars[title] = self._progress.add_task(title, total=total)
        self._progress.update(bar, completed=done, total=total)


def columns(rows: list[list[str]]) -> str:
    """Rows as aligned columns, the last one ragged."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )
