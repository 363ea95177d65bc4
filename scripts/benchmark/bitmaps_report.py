"""The bitmaps' result as two tables on the terminal, and as Markdown for the README."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmark.bitmaps import (
    COMMANDS,
    GUESTS,
    LEAST_KEPT,
    MIB,
    MOST_BYTES,
    MOST_SECONDS,
    NONE,
    TURNS,
    BitmapsResult,
    row_title,
)
from benchmark.jobs import DAEMONS

NAMES = [kind.name for kind in DAEMONS][::-1]


def _commands(result: BitmapsResult) -> list[list[str]]:
    aims = (f"{MOST_SECONDS * 1000:.0f} ms", f"{MOST_BYTES // MIB} MiB")
    head = ["1 TiB, bitmaps of 64 KiB, dirty all over", *NAMES, f"memory (aim {aims[1]}): {NAMES[0]}", NAMES[1]]
    head[1] = f"time (aim {aims[0]}): {NAMES[0]}"
    rows = [head]
    for title in COMMANDS.values():
        times = [result.median(title, name, "seconds") for name in NAMES]
        memory = [result.median(title, name, "memory") for name in NAMES]
        rows.append(
            [
                title,
                *("–" if one is None else f"{one * 1000:.1f} ms" for one in times),
                *("–" if one is None else f"{one / MIB:.1f} MiB" for one in memory),
            ]
        )
    return rows


def _guests(result: BitmapsResult) -> list[list[str]]:
    rows = [
        ["a writing guest, depth 32", *NAMES, f"keeps (aim {LEAST_KEPT * 100:.0f} %): {NAMES[0]}", f"keeps: {NAMES[1]}"]
    ]
    for guest in GUESTS:
        for kind in guest.kinds:
            title = row_title(guest, kind)
            iops = [result.median(title, name, "iops") for name in NAMES]
            kept = [None if kind is NONE else result.median(title, name, "kept") for name in NAMES]
            rows.append(
                [
                    title,
                    *("–" if one is None else f"{one / 1000:.1f} k" for one in iops),
                    *("–" if one is None else f"{one * 100:.0f} %" for one in kept),
                ]
            )
    return rows


def show(result: BitmapsResult) -> None:
    """Print the tables, and each aim that was missed."""
    console = Console()
    console.width = max(console.width, 150)
    for rows in (_commands(result), _guests(result)):
        table = Table()
        for index, name in enumerate(rows[0]):
            table.add_column(name, justify="right" if index else "left", no_wrap=not index)
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    for line in result.missed():
        console.print(f"[bold red]missed[/] {line}", highlight=False)


def markdown(result: BitmapsResult) -> str:
    """The README's tables, with date and machine below."""
    lines = []
    for rows in (_commands(result), _guests(result)):
        lines += [f"| {' | '.join(rows[0])} |", "|---|" + "--:|" * (len(rows[0]) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in rows[1:]]
        lines.append("")
    lines += [
        f"{result.date}; {result.machine}; medians of {result.runs} runs; memory: how far resident memory rose during",
        f"the command; the guest's disk has {result.size // MIB} MiB and was written to everywhere; turns of",
        f"{result.seconds:g} s under one export, {result.runs * TURNS} of each, and what is kept is the median of each",
        "turn's ratio.",
    ]
    return "\n".join(lines)
