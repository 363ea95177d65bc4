"""``livedisk graph``: the block graph of a daemon as a picture: devices and exports, the nodes below them, running jobs.

What is drawn is gathered here (`Picture`), by queries that livedisk, QEMU and qemu-storage-daemon all answer;
`graph_text` and `graph_svg` draw it. A node that only stores another one's bytes, such as the file of an image, is told in
that node's box and has none of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from livedisk.emulator.cli.figures import human_bytes
from livedisk.emulator.cli.jobs import connected
from livedisk.emulator.qmp.client import ConnectionLost, QmpClient, QmpError

HELP = """Draw the block graph of the daemon whose QMP socket is SOCKET: devices and exports, the chains of nodes below them
with their images, and the jobs that run on them.

SOCKET is written as for 'livedisk qmp' and may be livedisk's, QEMU's or qemu-storage-daemon's. A QMP socket serves one
client at a time: if another is connected, this command ends with exit code 1 after --timeout.

\b
Formats:
  text   chains from the top down, a line a node
  svg    a drawing for a browser or a page, for light and dark backgrounds
  dot    for Graphviz: livedisk graph disk.qmp --format dot | dot -Tpdf -o graph.pdf
  json   {"boxes": [...], "links": [...]}: what the others are drawn from

\b
Examples:
  livedisk graph disk.qmp
  livedisk graph disk.qmp --format svg -o graph.svg

\b
Exit status:
  0  the graph was drawn
  1  the daemon could not be asked, or the file not be written
  2  the command line could not be understood
"""

DEVICE: Final = "device"
EXPORT: Final = "export"
JOB: Final = "job"
NODE: Final = "node"


@dataclass
class Box:
    """One thing of the graph. ``title``: its name; ``type``: driver, kind of job or of export; ``file``: where a node's bytes
    are; ``facts``: what else is known, a phrase each. ``share``: how much of a job is done, 0 to 1."""

    id: str
    kind: str
    title: str
    type: str = ""
    file: str = ""
    facts: list[str] = field(default_factory=list)
    share: float | None = None


@dataclass
class Link:
    """``parent`` uses ``child`` (ids) as ``name``: root, file, backing, or what the node is to a job."""

    parent: str
    child: str
    name: str


@dataclass
class Picture:
    """Boxes in the order in which they are told: devices, exports, jobs, then nodes, the newest first."""

    boxes: list[Box]
    links: list[Link]

    def box(self, id: str) -> Box:
        return next(box for box in self.boxes if box.id == id)

    def of_kind(self, *kinds: str) -> list[Box]:
        return [box for box in self.boxes if box.kind in kinds]

    def below(self, id: str) -> list[Link]:
        """What a box uses, what shows through first."""
        links = [link for link in self.links if link.parent == id]
        return sorted(links, key=lambda link: link.name not in ("root", "backing", "file"))

    def users(self, id: str, *kinds: str) -> list[Link]:
        """The links from boxes of these kinds to a box."""
        return [link for link in self.links if link.child == id and self.box(link.parent).kind in kinds]

    def tops(self) -> list[Box]:
        """Where chains begin: devices, then nodes that no device and no node stands on, those of jobs first."""
        free = [box for box in self.of_kind(NODE) if not self.users(box.id, NODE, DEVICE)]
        return [*self.of_kind(DEVICE), *sorted(free, key=lambda box: not self.users(box.id, JOB))]

    def chain(self, top: Box) -> Iterator[Box]:
        """The nodes below a device or node, each what shows through the one before."""
        while links := self.below(top.id):
            top = self.box(links[0].child)
            yield top


async def gather(client: QmpClient) -> Picture:
    """Ask for the graph. Raises QmpError, ConnectionLost."""
    graph = await client.execute("x-debug-query-block-graph")
    nodes = {node["node-name"]: node for node in await client.execute("query-named-block-nodes", flat=True)}
    jobs = {job["device"]: job for job in await client.execute("query-block-jobs")}
    exports = await client.execute("query-block-exports")
    return _Gathered(graph, nodes, jobs, exports).picture()


class _Gathered:
    """The answers of a daemon, on their way to a picture."""

    def __init__(
        self, graph: dict[str, Any], nodes: dict[str, Any], jobs: dict[str, Any], exports: list[dict[str, Any]]
    ) -> None:
        self._things = {thing["id"]: thing for thing in reversed(graph["nodes"])}
        self._edges = list(reversed(graph["edges"]))
        self._nodes = nodes
        self._jobs = jobs
        self._exports = exports
        self._stores = {edge["child"] for edge in self._edges if self._only_stores(edge)}
        self._boxes: dict[str, Box] = {}
        self._links: list[Link] = []

    def picture(self) -> Picture:
        for id, thing in self._things.items():
            if thing["type"] == "block-backend" and thing["name"]:
                self._add(Box(_id(id), DEVICE, _device_name(thing["name"])))
        self._add_exports()
        for id, thing in self._things.items():
            if thing["type"] == "block-job":
                self._add(self._job(_id(id), thing["name"]))
        for id, thing in reversed(self._things.items()):
            if thing["type"] == "block-driver" and id not in self._stores:
                self._add(self._node(id, thing["name"]))
        for edge in self._edges:
            if edge["child"] not in self._stores and _id(edge["parent"]) in self._boxes:
                self._links.append(Link(_id(edge["parent"]), _id(edge["child"]), edge["name"]))
        return Picture(list(self._boxes.values()), self._links)

    def _add(self, box: Box) -> None:
        self._boxes[box.id] = box

    def _only_stores(self, edge: dict[str, Any]) -> bool:
        """Whether the child is the file of an image, and nothing else's."""
        thing = self._things[edge["child"]]
        users = [other for other in self._edges if other["child"] == edge["child"]]
        has_children = any(other["parent"] == edge["child"] for other in self._edges)
        return edge["name"] == "file" and thing["type"] == "block-driver" and len(users) == 1 and not has_children

    def _add_exports(self) -> None:
        """An export stands on its node, or on the device that it is the door of."""
        unnamed = {
            id: edge["child"]
            for id, thing in self._things.items()
            if thing["type"] == "block-backend" and not thing["name"]
            for edge in self._edges
            if edge["parent"] == id
        }
        for export in reversed(self._exports):
            node = next((id for id, thing in self._things.items() if thing["name"] == export["node-name"]), None)
            own = next((id for id, child in unnamed.items() if child == node), None)
            box = Box(f"export-{export['id']}", EXPORT, export["id"], export["type"])
            if own is not None:
                box.id = _id(own)
                del unnamed[own]
            elif node is not None:
                device = next(
                    (link for link in self._edges if link["child"] == node and self._is_device(link["parent"])), None
                )
                self._links.append(Link(box.id, _id(node if device is None else device["parent"]), "root"))
            self._add(box)

    def _is_device(self, id: int) -> bool:
        thing = self._things[id]
        return bool(thing["type"] == "block-backend" and thing["name"])

    def _job(self, id: str, name: str) -> Box:
        job = self._jobs.get(name, {})
        total, done = job.get("len", 0), job.get("offset", 0)
        share = done / total if total else float(job.get("ready", False))
        facts = [job.get("status", "")] if job else []
        facts.append(f"{human_bytes(done)} of {human_bytes(total)}")
        if job.get("error"):
            facts.append(job["error"])
        return Box(id, JOB, name, job.get("type", ""), "", facts, share)

    def _node(self, id: int, name: str) -> Box:
        node = self._nodes.get(name, {})
        image = node.get("image", {})
        stores = [edge for edge in self._edges if edge["parent"] == id and edge["child"] in self._stores]
        file = image.get("filename", "") if stores or not self._has_children(id) else ""
        facts = []
        if "virtual-size" in image:
            facts.append(human_bytes(image["virtual-size"]))
        if "actual-size" in image:
            facts.append(f"{human_bytes(image['actual-size'])} on disk")
        if node.get("ro"):
            facts.append("read-only")
        facts += [f"bitmap {bitmap['name']}" for bitmap in node.get("dirty-bitmaps", ()) if "name" in bitmap]
        return Box(_id(id), NODE, name, node.get("drv", ""), file, facts)

    def _has_children(self, id: int) -> bool:
        return any(edge["parent"] == id for edge in self._edges)


def _id(number: int) -> str:
    return f"n{number}"


def _device_name(name: str) -> str:
    """``virtio0`` of ``/machine/peripheral/virtio0/virtio-backend``."""
    parts = [part for part in name.split("/") if part not in ("", "machine", "peripheral", "virtio-backend")]
    return "/".join(parts) or name


def as_json(picture: Picture) -> str:
    return json.dumps(
        {"boxes": [asdict(box) for box in picture.boxes], "links": [asdict(link) for link in picture.links]}
    )


def _drawers() -> dict[str, Callable[[Picture], str]]:
    # Imported here: one form is asked for at a time.
    from livedisk.emulator.cli import graph_svg, graph_text

    return {"text": graph_text.text, "svg": graph_svg.svg, "dot": graph_text.dot, "json": as_json}


@click.command("graph", help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("socket")
@click.option(
    "-f",
    "--format",
    "form",
    default="text",
    show_default=True,
    type=click.Choice(["text", "svg", "dot", "json"]),
    help="See above.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file.")
@click.option(
    "--timeout",
    default=3.0,
    show_default=True,
    metavar="SECONDS",
    type=click.FloatRange(min=0.05),
    help="How long to wait for the daemon's greeting.",
)
def graph(socket: str, form: str, output: Path | None, timeout: float) -> None:
    try:
        picture = asyncio.run(_gather(socket, timeout))
        drawn = _drawers()[form](picture)
        if output is None:
            click.echo(drawn)
        else:
            output.write_text(drawn + "\n")
    except (ConnectionLost, QmpError) as error:
        click.echo(f"livedisk: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        click.echo(f"livedisk: {output}: {error.strerror}", err=True)
        sys.exit(1)


async def _gather(address: str, timeout: float) -> Picture:
    async with connected(address, timeout) as client:
        return await gather(client)
