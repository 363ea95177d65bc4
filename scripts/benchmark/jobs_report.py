"""The jobs' result as a table on the terminal, and as Markdown for the README."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmark.jobs import JobsResult, Row
from benchmark.report import MIB, figure, ratio

HEAD = (
    *("job", "livedisk", "qemu-storage-daemon", "ratio"),
    *("guest: livedisk", "guest: qemu-storage-daemon", "ratio of the guest", "memory: livedisk"),
)


def _row(result: JobsResult, row: Row) -> list[str]:
    def rate(daemon: str) -> str:
        median = result.median(row, daemon, "rate")
        return figure(None if median is None else median / 1e6, "MB/s")

    def guest(daemon: str) -> str:
        return figure(result.median(row, daemon, "iops") if row.guest else None, "IOPS")

    peak = result.median(row, "livedisk", "peak")
    return [
        row.title,
        rate("livedisk"),
        rate("qemu-storage-daemon"),
        ratio(result.ratio(row, "rate"), row.wanted),
        guest("livedisk"),
        guest("qemu-storage-daemon"),
        ratio(result.ratio(row, "iops"), row.wanted_guest) if row.guest else "–",
        "–" if peak is None else f"{peak / MIB:.0f} MiB",
    ]


def show(result: JobsResult) -> None:
    """Print the table, and each aim that was missed."""
    console = Console()
    console.width = max(console.width, 170)
    table = Table(title=f"Jobs: medians of {result.runs} runs, {result.size // MIB} MiB allocated; ratio (aim)")
    for index, name in enumerate(HEAD):
        table.add_column(name, justify="right" if index else "left", no_wrap=not index)
    for row in result.rows:
        table.add_row(*_row(result, row))
    console.print(table)
    for line in result.missed():
        console.print(f"[bold red]missed[/] {line}", highlight=False)


def markdown(result: JobsResult) -> str:
    """The README's table, with date and machine below."""
    lines = [f"| {' | '.join(HEAD)} |", "|---|" + "--:|" * (len(HEAD) - 1)]
    lines += [f"| {' | '.join(_row(result, row))} |" for row in result.rows]
    lines += [
        "",
        f"{result.date}; {result.machine}; medians of {result.runs} runs, {result.size // MIB} MiB allocated, page cache warm, "
        f"targets in the page cache, too; a guest is fio at depth 32, 4 KiB, for {result.seconds:g} s.",
    ]
    return "\n".join(lines)
