"""The result as a table on the terminal, and as Markdown for the README."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmark.measure import Result, Tell
from benchmark.workloads import Unit, Workload

MIB = 1 << 20


@contextmanager
def progress() -> Iterator[Tell]:
    """A bar on stderr while it runs; nothing of it remains."""
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def figure(value: float | None, unit: Unit) -> str:
    """A median as people read it: ``151.2 k`` IOPS, ``3700`` MB/s; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value / 1000:.1f} k" if unit == "IOPS" else f"{value:.0f} MB/s"


def ratio(value: float | None, target: float | None) -> str:
    """``2.91 (2.5)``: what was reached, and what was asked for."""
    if value is None:
        return "–"
    return f"{value:.2f}" if target is None else f"{value:.2f} ({target:g})"


def show(result: Result) -> None:
    """Print the table, start-up and memory, and each target that was missed."""
    console = Console()
    # A table is for reading across: where the terminal is narrow, or there is none, it may run over.
    console.width = max(console.width, 150)
    table = Table(title=f"Medians of {result.plan.runs} runs of {result.plan.seconds:g} s; ratio (target)")
    table.add_column("workload", no_wrap=True)
    for server in result.servers:
        table.add_column(server, justify="right")
    peers = [server for server in result.servers if server != "livedisk"] if "livedisk" in result.servers else []
    for peer in peers:
        table.add_column(f"to {peer}", justify="right")
    for workload in result.workloads:
        row = [
            workload.title,
            *(figure(result.median(workload.name, server), workload.unit) for server in result.servers),
        ]
        for peer in peers:
            reached, target = result.ratio(workload.name, peer), workload.targets.get(peer)
            met = reached is None or target is None or reached >= target
            row.append(f"[{'green' if met else 'bold red'}]{ratio(reached, target)}[/]")
        table.add_row(*row)
    console.print(table)
    for line in _startup(result) + _against(result):
        console.print(line, highlight=False)
    if result.disturbed:
        told = f"[yellow]the machine was busy[/] (load {result.load:.1f} before the first run): measure again when it is quiet"
        console.print(told, highlight=False)
    for line in result.missed():
        console.print(f"[bold red]missed[/] {line}", highlight=False)


def markdown(result: Result) -> str:
    """The README's table, with date and machine below."""
    head = [
        "workload",
        "livedisk",
        "qemu-storage-daemon",
        "nbdkit file",
        "ratio to qemu-storage-daemon",
        "ratio to nbdkit",
        "fio's core",
    ]
    lines = [_cells(head), "|---|--:|--:|--:|--:|--:|--:|"]
    for workload in result.workloads:
        figures = [_figure(result, workload, server) for server in ("livedisk", "qemu-storage-daemon", "nbdkit")]
        ratios = [
            ratio(result.ratio(workload.name, peer), workload.targets.get(peer))
            for peer in ("qemu-storage-daemon", "nbdkit")
        ]
        busy = result.client_busy(workload.name)
        lines.append(
            _cells([workload.title, *figures, *ratios, "–" if busy is None else f"{busy:.0%}".replace("%", " %")])
        )
    lines += ["", *(f"{line}  " for line in _startup(result) + _against(result))]
    lines.append(
        f"{result.date}; {result.machine}; qemu-storage-daemon with aio={result.aio}; "
        f"medians of {result.plan.runs} runs of {result.plan.seconds:g} s, disks of {result.plan.size // MIB} MiB."
    )
    return "\n".join(lines)


def put_into(page: Path, result: Result, drawing: Path) -> None:
    """Replace what stands between the page's two ``bench`` comments by the picture and the table."""
    picture = f"![Throughput relative to qemu-storage-daemon]({os.path.relpath(drawing, page.parent)})"
    put_between(page, "bench", f"{picture}\n\n{markdown(result)}")


def put_between(page: Path, what: str, text: str) -> None:
    """Replace what stands between the page's two comments of that name. Raises ValueError where it has none."""
    begin, end = f"<!-- {what} -->", f"<!-- end of {what} -->"
    before, found, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{page} lacks {begin} or {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def _figure(result: Result, workload: Workload, server: str) -> str:
    return figure(result.median(workload.name, server), workload.unit)


def _cells(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _startup(result: Result) -> list[str]:
    """One sentence a server: time to the greeting, memory idle and at its highest."""
    lines = []
    for server in result.servers:
        parts = []
        if greeting := result.greeting.get(server):
            parts.append(f"first QMP greeting after {statistics.median(greeting) * 1000:.0f} ms")
        if idle := result.idle.get(server):
            parts.append(f"{statistics.median(idle) / MIB:.0f} MiB idle")
        if peak := result.peak.get(server):
            parts.append(f"at most {peak / MIB:.0f} MiB under load")
        if parts:
            lines.append(f"{server}: {', '.join(parts)}")
    return lines


def _against(result: Result) -> list[str]:
    lines = []
    for workload in result.workloads:
        reached = result.ratio_against(workload)
        if reached is not None and workload.against is not None:
            title = next(other.title for other in result.workloads if other.name == workload.against[0])
            lines.append(f"livedisk, {workload.title}: {reached:.2f} of {title} (target {workload.against[1]:g})")
    return lines
