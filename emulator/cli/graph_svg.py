"""The picture of a graph as a drawing: SVG, written by hand, that fits a light page and a dark one.

Layout: each chain is a column, from its device or free node down; a node that was drawn already is pointed at. A node stands
lower than all that use it. Jobs stand in a column between the first chain and the others, beside the first node that they hold,
and point at their nodes with dashed lines; the other chains stand as low as what they use or what uses them. Exports are
named in the box of what they export. All lengths are pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from livedisk.emulator.cli.graph import DEVICE, EXPORT, JOB, NODE, Box, Link, Picture

MARGIN = 24
LINE = 17
PADDING = 10
ROW_GAP = 44
COLUMN_GAP = 120
MIN_WIDTH = 170
MAX_CHARACTERS = 46
_CHARACTER = 6.9

_STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #24292f; }
  .name { font-weight: 600; font-size: 13px; }
  .fact, .link-name { fill: #57606a; font-size: 11px; }
  .export-name { fill: #1a7f37; font-size: 11px; font-weight: 600; }
  rect { stroke-width: 1.5; }
  .node { fill: #ddf4ff; stroke: #0969da; } .read-only { fill: #f6f8fa; stroke: #8c959f; }
  .device { fill: #dafbe1; stroke: #1a7f37; } .job { fill: #fff8c5; stroke: #9a6700; }
  .track { fill: #eac54f; fill-opacity: .35; } .done { fill: #bf8700; }
  path { fill: none; stroke: #57606a; stroke-width: 1.4; } .job-link { stroke: #9a6700; stroke-dasharray: 5 4; }
  marker path { fill: #57606a; stroke: none; } marker.of-job path { fill: #9a6700; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .fact, .link-name { fill: #8d96a0; } .export-name { fill: #3fb950; }
    .node { fill: #121d2f; stroke: #4493f8; } .read-only { fill: #161b22; stroke: #6e7681; }
    .device { fill: #12261e; stroke: #3fb950; } .job { fill: #272115; stroke: #d29922; }
    path { stroke: #8d96a0; } .job-link { stroke: #d29922; }
    marker path { fill: #8d96a0; } marker.of-job path { fill: #d29922; }
  }
"""


@dataclass
class Placed:
    """A box on the page: its lines of text and where it stands."""

    box: Box
    column: int
    row: int
    lines: list[tuple[str, str]] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0
    width: float = MIN_WIDTH
    height: float = 0.0

    @property
    def middle(self) -> float:
        return self.x + self.width / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height

    @property
    def right(self) -> float:
        return self.x + self.width


def svg(picture: Picture) -> str:
    """The whole document."""
    placed = _place(picture)
    width = max((one.right for one in placed.values()), default=200) + MARGIN
    height = max((one.bottom for one in placed.values()), default=60) + MARGIN
    links = [link for link in picture.links if link.parent in placed and link.child in placed]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" role="img" aria-label="Block graph">',
            f"<style>{_STYLE}</style>",
            "<defs>",
            _marker("arrow", ""),
            _marker("job-arrow", "of-job"),
            "</defs>",
            *(_link(placed[link.parent], placed[link.child], link) for link in links),
            *(line for one in placed.values() for line in _draw(one)),
            "</svg>",
        ]
    )


def _marker(name: str, kind: str) -> str:
    return (
        f'<marker id="{name}" class="{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker>'
    )


# -- where -----------------------------------------------------------------------------------------------------------
def _place(picture: Picture) -> dict[str, Placed]:
    """Columns, then rows, then pixels."""
    placed: dict[str, Placed] = {}
    column = 0
    jobs = picture.of_kind(JOB)
    waiting = picture.tops()
    while waiting:
        top = waiting.pop(0)
        if top.id in placed:
            continue
        chain = [top, *_until_seen(picture, top, placed)]
        for box in chain:
            placed[box.id] = Placed(box, column, 0)
            waiting[:0] = [picture.box(link.child) for link in picture.below(box.id)[1:]]
        column += 2 if column == 0 and jobs else 1  # the second column is the jobs'
    _set_rows(picture, placed)
    for number in range(1, column):
        _lower(picture, placed, number)
    taken: set[int] = set()
    for job in jobs:
        rows = [placed[link.child].row for link in picture.below(job.id) if link.child in placed]
        row = next(row for row in range(min(rows, default=0), 10_000) if row not in taken)
        taken.add(row)
        placed[job.id] = Placed(job, 1, row)
    _set_pixels(picture, placed)
    return placed


def _until_seen(picture: Picture, top: Box, placed: dict[str, Placed]) -> Iterator[Box]:
    for box in picture.chain(top):
        if box.id in placed:
            return
        yield box


def _set_rows(picture: Picture, placed: dict[str, Placed]) -> None:
    """Each node below all that stand on it."""
    links = [link for link in picture.links if link.parent in placed and link.child in placed]
    changed = True
    while changed:
        changed = False
        for link in links:
            lowest = placed[link.parent].row + 1
            if placed[link.child].row < lowest:
                placed[link.child].row = lowest
                changed = True


def _lower(picture: Picture, placed: dict[str, Placed], column: int) -> None:
    """Move a column down to just above what it uses in other columns, or else beside what its job works on."""
    members = [one for one in placed.values() if one.column == column]
    ids = {one.box.id for one in members}
    uses = [link for link in picture.links if link.parent in ids and link.child in placed and link.child not in ids]
    beside = [
        placed[other.child].row
        for one in members
        for link in picture.users(one.box.id, JOB)
        for other in picture.below(link.parent)
        if other.child in placed and other.child not in ids
    ]
    used = any(link.child in ids and link.parent in placed and link.parent not in ids for link in picture.links)
    room = [placed[link.child].row - placed[link.parent].row - 1 for link in uses]
    wanted = min(beside) - min(one.row for one in members) if beside and not used else 0
    down = max(0, min([*room, wanted] if beside else room, default=wanted))
    for one in members:
        one.row += down


def _set_pixels(picture: Picture, placed: dict[str, Placed]) -> None:
    for one in placed.values():
        one.lines = list(_lines(picture, one.box))
        one.width = max([MIN_WIDTH, *(len(text) * _CHARACTER + 2 * PADDING for _, text in one.lines)])
        one.height = len(one.lines) * LINE + 2 * PADDING + (12 if one.box.kind == JOB else 0)
    x = float(MARGIN)
    for column in range(max((one.column for one in placed.values()), default=0) + 1):
        members = [one for one in placed.values() if one.column == column]
        width = max((one.width for one in members), default=0.0)
        for one in members:
            one.x, one.width = x, width
        x += width + COLUMN_GAP if members else 0
    y = float(MARGIN)
    for row in range(max((one.row for one in placed.values()), default=0) + 1):
        members = [one for one in placed.values() if one.row == row]
        for one in members:
            one.y = y
        y += max((one.height for one in members), default=0.0) + (ROW_GAP if members else 0)


def _lines(picture: Picture, box: Box) -> Iterator[tuple[str, str]]:
    """Style and text of each line in a box."""
    what = {DEVICE: "device", JOB: f"{box.type} job"}.get(box.kind, box.type)
    yield "name", _cut(box.title)
    yield "fact", _cut(what)
    if box.file:
        yield "fact", _cut(box.file)
    if box.facts:
        yield "fact", _cut(", ".join(box.facts))
    for link in picture.users(box.id, EXPORT):
        export = picture.box(link.parent)
        yield "export-name", _cut(f"exported as {export.title} ({export.type})")


def _cut(text: str) -> str:
    """The end of a name tells more than its beginning."""
    return text if len(text) <= MAX_CHARACTERS else f"…{text[-MAX_CHARACTERS + 1 :]}"


# -- drawing -----------------------------------------------------------------------------------------------------------
def _draw(one: Placed) -> Iterator[str]:
    box = one.box
    kind = "read-only" if box.kind == NODE and "read-only" in box.facts else box.kind
    title = escape(f"{box.title}: {', '.join(filter(None, [box.file, *box.facts]))}")
    yield f'<g><title>{title}</title><rect class="{kind}" x="{one.x:.0f}" y="{one.y:.0f}" width="{one.width:.0f}" '
    yield f'height="{one.height:.0f}" rx="8"/>'
    for number, (style, text) in enumerate(one.lines):
        y = one.y + PADDING + LINE * (number + 0.75)
        yield f'<text class="{style}" x="{one.x + PADDING:.0f}" y="{y:.0f}">{escape(text)}</text>'
    if box.kind == JOB:
        full = one.width - 2 * PADDING
        y = one.bottom - PADDING - 6
        yield f'<rect class="track" x="{one.x + PADDING:.0f}" y="{y:.0f}" width="{full:.0f}" height="6" rx="3"/>'
        done = full * (box.share or 0.0)
        yield f'<rect class="done" x="{one.x + PADDING:.0f}" y="{y:.0f}" width="{done:.0f}" height="6" rx="3"/>'
    yield "</g>"


def _link(parent: Placed, child: Placed, link: Link) -> str:
    of_job = parent.box.kind == JOB
    style = 'class="job-link" marker-end="url(#job-arrow)"' if of_job else 'marker-end="url(#arrow)"'
    if parent.column == child.column and not of_job:
        x1, y1, x2, y2 = parent.middle, parent.bottom, child.middle, child.y
        path = f"M{x1:.0f},{y1:.0f} L{x2:.0f},{y2:.0f}"
        name_x, name_y, anchor = x1 + 6, (y1 + y2) / 2 + 4, "start"
    else:
        to_right = child.x > parent.x
        x1 = parent.right if to_right else parent.x
        x2 = child.x if to_right else child.right
        y1, y2 = parent.y + parent.height / 2, child.y + child.height / 2
        half = (x1 + x2) / 2
        path = f"M{x1:.0f},{y1:.0f} C{half:.0f},{y1:.0f} {half:.0f},{y2:.0f} {x2:.0f},{y2:.0f}"
        name_x, name_y, anchor = (
            (x2 - 12 if to_right else x2 + 12),
            y2 + (14 if y1 < y2 else -7),
            "end" if to_right else "start",
        )
    place = f'text-anchor="{anchor}" x="{name_x:.0f}" y="{name_y:.0f}"'
    return f'<path {style} d="{path}"/><text class="link-name" {place}>{escape(link.name)}</text>'
