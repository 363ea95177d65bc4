"""Images that another process has now: complete on disk, unlocked, and closed to commands, until the guest comes back.

After a hand-over the source's images are written back and their locks given up (`Driver.inactivate`), from the active layer
down, and each node gets a blocker that refuses jobs and changes. ``cont`` takes them back (`block/activity.py`) from the bottom
up, which fails where somebody else has the lock.
"""

from __future__ import annotations

import asyncio
import logging

from livedisk.emulator.block.activity import activate
from livedisk.emulator.block.blockers import Blocker
from livedisk.emulator.block.node import Node
from livedisk.emulator.device.virtio_blk import VirtioBlk
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.context import Daemon

log = logging.getLogger(__name__)

_BLOCKER = Blocker("the guest was migrated to another process")


class Inactive:
    """The devices and nodes that were given up."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._devices: list[VirtioBlk] = []
        self._nodes: list[Node] = []
        self._moving = asyncio.Lock()

    async def give_up(self) -> None:
        """Write everything back and unlock it. What fails is logged: the guest runs elsewhere in any case."""
        async with self._moving:
            for device in self._daemon.devices:
                device.withdraw()
                self._devices.append(device)
            for device in self._devices:
                await self._give_up(device.backend.node)

    async def _give_up(self, node: Node) -> None:
        """This node, and those below that only it used: an export or a job that is still there keeps what it stands on."""
        mine = {id(device.backend) for device in self._devices} | {id(other) for other in self._nodes}
        if node in self._nodes or any(id(edge.parent) not in mine for edge in node.parents):
            return
        try:
            await node.driver.inactivate()
        except (OSError, LiveDiskError) as error:
            log.warning("node '%s' after the migration: %s", node.name, error)
            return
        node.active = False
        self._daemon.graph.refresh_permissions()
        node.blockers.append(_BLOCKER)
        self._nodes.append(node)
        for edge in list(node.children.values()):
            await self._give_up(edge.node)

    async def take_back(self) -> None:
        """Before the guest runs here again. Raises LiveDiskError or OSError where somebody else has an image."""
        async with self._moving:
            while self._nodes:
                node = self._nodes[-1]
                await activate(self._daemon.graph, node)
                node.blockers.remove(_BLOCKER)
                self._nodes.pop()
            for device in self._devices:
                device.claim()
            self._devices.clear()
