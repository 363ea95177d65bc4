"""The picture of a graph as text: for a terminal, and for Graphviz."""

from __future__ import annotations

from collections.abc import Iterator

from livedisk.emulator.cli.figures import bar
from livedisk.emulator.cli.graph import DEVICE, EXPORT, JOB, NODE, Box, Link, Picture


def text(picture: Picture) -> str:
    """Each device or free node with the chain below it; then the jobs."""
    rows: list[list[str]] = []
    seen: set[str] = set()
    for top in picture.tops():
        if rows:
            rows.append([])
        rows += _chain(picture, top, seen)
    jobs = list(_jobs(picture))
    return "\n".join([*_aligned(rows), *([""] if rows and jobs else []), *jobs]) or "an empty graph"


def _chain(picture: Picture, top: Box, seen: set[str]) -> Iterator[list[str]]:
    yield _row(picture, top, "")
    seen.add(top.id)
    side = picture.below(top.id)[1:]
    for box in picture.chain(top):
        if box.id in seen:
            yield [f"▼ {box.title} (see above)"]
            break
        seen.add(box.id)
        yield _row(picture, box, "▼ ")
        side += picture.below(box.id)[1:]
    for link in side:
        child = picture.box(link.child)
        yield [f"    {picture.box(link.parent).title}'s {link.name}:"]
        for row in [[child.title + " (see above)"]] if child.id in seen else list(_chain(picture, child, seen)):
            yield [f"    {row[0]}", *row[1:]]


def _row(picture: Picture, box: Box, lead: str) -> list[str]:
    what = "device" if box.kind == DEVICE else box.type
    notes = [f"◀ export {picture.box(link.parent).title}" for link in picture.users(box.id, EXPORT)]
    notes += [f"◀ job {picture.box(link.parent).title}: {link.name}" for link in picture.users(box.id, JOB)]
    return [f"{lead}{box.title}", what, box.file, ", ".join(box.facts), "  ".join(notes)]


def _jobs(picture: Picture) -> Iterator[str]:
    for job in picture.of_kind(JOB):
        yield f"job {job.title}  {job.type}  {bar(job.share or 0.0, 20, '█░')}  {', '.join(job.facts)}"


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    widths = [max((len(row[column]) for row in rows if len(row) > column + 1), default=0) for column in range(4)]
    for row in rows:
        cells = [cell.ljust(widths[column]) if column < 4 else cell for column, cell in enumerate(row)]
        yield "  ".join(cells).rstrip()


_SHAPES = {DEVICE: "component", EXPORT: "cds", JOB: "note", NODE: "box"}


def dot(picture: Picture) -> str:
    """In Graphviz's language."""
    lines = ["digraph livedisk {", "  rankdir=TB;", '  node [fontname="sans-serif", fontsize=11];']
    for box in picture.boxes:
        label = "\\n".join(map(_escaped, [f"{box.title}", *filter(None, [box.type, box.file]), *box.facts]))
        lines.append(f'  {_quoted(box.id)} [shape={_SHAPES[box.kind]}, label="{label}"];')
    lines += [_dot_link(picture, link) for link in picture.links]
    return "\n".join([*lines, "}"])


def _dot_link(picture: Picture, link: Link) -> str:
    style = ", style=dashed, constraint=false" if picture.box(link.parent).kind == JOB else ""
    return f'  {_quoted(link.parent)} -> {_quoted(link.child)} [label="{_escaped(link.name)}", fontsize=9{style}];'


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
