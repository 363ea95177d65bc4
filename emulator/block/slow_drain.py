"""Tells when a drain takes long: who waits, and which requests do not come back.

A drained section begins when nothing is in flight on its nodes. Where a server or a disk does not answer, whoever wants
the section (a snapshot, a job's end, another job's start) waits, and all guests above the nodes with it. QEMU waits for
ever, and answers no command meanwhile. Here the daemon's log says what is waited for; and what no guest needs, a dead
target of a job, does not cost the guest more than `LIMIT`: its requests are let fail then (`Driver.give_up`), and the
job's error policy decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from livedisk.emulator.block.backend import BlockBackend

if TYPE_CHECKING:
    from livedisk.emulator.block.graph import Graph
    from livedisk.emulator.block.node import Node

log = logging.getLogger(__name__)

PATIENCE: Final = 10.0
"""Seconds before it is told first, and then between two times."""
LIMIT: Final = 30.0
"""Seconds before requests are given up that no guest needs."""


@contextmanager
def told_if_slow(graph: Graph, what: str, blocking: Callable[[], Iterable[Node]]) -> Iterator[None]:
    """While inside, something is waited for: ``what`` ("nothing is in flight on node 'a'"). ``blocking``: nodes whose
    requests, or those of nodes below, are in the way."""
    loop = asyncio.get_running_loop()
    waited = 0.0
    timer: asyncio.TimerHandle

    def tell() -> None:
        nonlocal waited, timer
        waited += PATIENCE
        nodes = [*blocking()]
        log.warning("waiting for %.0f s until %s: %s", waited, what, describe(graph, nodes))
        if waited >= LIMIT:
            give_up(graph, nodes)
        timer = loop.call_later(PATIENCE, tell)

    timer = loop.call_later(PATIENCE, tell)
    try:
        yield
    finally:
        timer.cancel()
        if waited:
            log.warning("%s now; it goes on", what)


def describe(graph: Graph, nodes: Iterable[Node]) -> str:
    """Which requests have no answer, on the lowest nodes that know of them, and who uses those."""
    found = [_describe(graph, node) for node in stuck(graph, nodes)]
    return "; ".join(found) or "whoever works there has no request under way"


def give_up(graph: Graph, nodes: Iterable[Node]) -> None:
    """Let those requests fail, where that is possible, on which no guest depends."""
    needed: dict[int, Node] = {}
    todo = [user.root.node for user in graph.backends if not user.of_job and user.root is not None]
    while todo:
        node = todo.pop()
        if id(node) not in needed:
            needed[id(node)] = node
            todo += [edge.node for name, edge in node.children.items() if name not in node.driver.dispensable]
    for node in stuck(graph, nodes):
        if id(node) not in needed and node.driver.give_up():
            log.warning("node '%s': requests without an answer are given up, no guest needs it", node.name)


def stuck(graph: Graph, nodes: Iterable[Node]) -> list[Node]:
    """Nodes with requests in flight, of these and all below, that stand on none with requests in flight."""
    around = {id(node): node for top in nodes for node in (top, *graph.below(top))}
    busy = [node for node in around.values() if node.busy]
    return [node for node in busy if not any(below.busy for below in graph.below(node))]


def _describe(graph: Graph, node: Node) -> str:
    requests = len(node.in_flight())
    where = f" ({node.driver.filename})" if node.driver.filename else ""
    text = f"{requests} {'request has' if requests == 1 else 'requests have'} no answer on node '{node.name}'{where}"
    jobs = sorted(
        {user.description for user in graph.backends_above([node]) if isinstance(user, BlockBackend) and user.of_job}
    )
    if jobs:
        text += f", which {' and '.join(jobs)} {'uses' if len(jobs) == 1 else 'use'}"
    return f"{text}. {node.driver.way_out()}".rstrip()
