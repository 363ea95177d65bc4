"""The result as a drawing: per workload one bar a server, as long as its ratio to qemu-storage-daemon.

Ratios, because the workloads' own figures lie a factor of thirty apart; the figure itself stands at the end of each
bar. SVG written by hand needs no library, and a few lines of CSS make it fit a light page and a dark one.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

from benchmark.measure import Result
from benchmark.report import figure
from benchmark.workloads import Workload

WIDTH = 1000
LABELS = 350
BAR = 13
GAP = 3
GROUP_GAP = 16
TOP = 78
RIGHT = 96

_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f; }
  .title { font-size: 17px; font-weight: 600; }
  .small { font-size: 11px; fill: #57606a; }
  .axis { stroke: #d0d7de; stroke-width: 1; }
  .one { stroke: #57606a; stroke-width: 1; stroke-dasharray: 3 3; }
  .livedisk { fill: #0969da; } .nbdkit { fill: #9a6700; } .qemu-storage-daemon { fill: #8c959f; }
  .target { stroke: #cf222e; stroke-width: 2; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .small { fill: #8d96a0; } .axis { stroke: #30363d; } .one { stroke: #8d96a0; }
    .livedisk { fill: #4493f8; } .nbdkit { fill: #d29922; } .qemu-storage-daemon { fill: #6e7681; }
    .target { stroke: #f85149; }
  }
"""
_BASE = "qemu-storage-daemon"


def draw(result: Result) -> str:
    """The whole SVG document."""
    order = [server for server in ("livedisk", "nbdkit", _BASE) if server in result.servers]
    groups = [(workload, _lengths(result, workload, order)) for workload in result.workloads]
    targets = [workload.targets.get(_BASE, 0.0) for workload in result.workloads] if "livedisk" in order else []
    longest = max([1.0, *targets, *(length for _, bars in groups for _, length, _ in bars)])
    scale = (WIDTH - LABELS - RIGHT) / longest
    parts: list[str] = []
    y = TOP
    for workload, bars in groups:
        parts += _group(workload, bars, y, scale)
        y += len(bars) * (BAR + GAP) + GROUP_GAP
    bottom = y - GROUP_GAP + 6
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 52}" role="img" '
            f'aria-label="Throughput relative to {_BASE}">',
            f"<style>{_STYLE}</style>",
            f'<text class="title" x="16" y="28">Throughput relative to {_BASE} (longer is better)</text>',
            *_legend(order),
            *_axis(longest, scale, bottom),
            *parts,
            _text(16, bottom + 38, f"{result.date}; {result.machine}; QEMU aio={result.aio}", "small"),
            "</svg>",
            "",
        ]
    )


def _lengths(result: Result, workload: Workload, order: list[str]) -> list[tuple[str, float, str]]:
    """``(server, ratio, figure)`` of every server that was measured. Without the reference all are held to the
    first."""
    measured = [(server, value) for server in order if (value := result.median(workload.name, server)) is not None]
    base = next((value for server, value in measured if server == _BASE), measured[0][1] if measured else 1.0)
    return [(server, value / base, figure(value, workload.unit)) for server, value in measured]


def _group(workload: Workload, bars: list[tuple[str, float, str]], y: float, scale: float) -> list[str]:
    middle = y + len(bars) * (BAR + GAP) / 2 + 3
    parts = [_text(LABELS - 12, middle, workload.title, anchor="end")]
    for index, (server, length, label) in enumerate(bars):
        top = y + index * (BAR + GAP)
        parts.append(
            f'<rect class="{server}" x="{LABELS}" y="{top}" width="{length * scale:.1f}" height="{BAR}" rx="2">'
            f"<title>{escape(f'{workload.title}: {server} {label}, {length:.2f}')}</title></rect>"
        )
        parts.append(_text(LABELS + length * scale + 5, top + BAR - 3, label, "small"))
        if server == "livedisk" and (target := workload.targets.get(_BASE)) is not None:
            x = LABELS + target * scale
            parts.append(f'<line class="target" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 1}" y2="{top + BAR + 1}"/>')
    return parts


def _legend(order: list[str]) -> list[str]:
    parts = []
    x = 16
    for server in order:
        parts.append(f'<rect class="{server}" x="{x}" y="43" width="12" height="12" rx="2"/>')
        parts.append(_text(x + 18, 53, server))
        x += 40 + 8 * len(server)
    if "livedisk" in order:
        parts.append(f'<line class="target" x1="{x}" x2="{x}" y1="42" y2="56"/>')
        parts.append(_text(x + 8, 53, "our target"))
    return parts


def _axis(longest: float, scale: float, bottom: float) -> list[str]:
    parts = []
    step = 1 if longest <= 10 else 2
    for mark in range(0, int(longest) + 1, step):
        x = LABELS + mark * scale
        parts.append(
            f'<line class="{"one" if mark == 1 else "axis"}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom}"/>'
        )
        parts.append(_text(x, bottom + 14, f"{mark}×", "small", "middle"))
    return parts


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
