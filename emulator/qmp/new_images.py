"""Images that a command puts where no file is made: into storage that is there already, as an NBD export is.

drive-mirror, drive-backup and blockdev-snapshot-sync with ``mode=absolute-paths`` and a name such as
``nbd+unix:///disk?socket=...``: what is opened under the name becomes an image of the format. Source: QEMU ``block.c``
(bdrv_co_create_opts_simple, bdrv_create_co_entry).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from livedisk.emulator.block.creation import taken
from livedisk.emulator.block.driver import DRIVERS
from livedisk.emulator.block.gate import protocol_options
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.types import SECTOR
from livedisk.emulator.errors import BlockError

if TYPE_CHECKING:
    from livedisk.emulator.drivers.qcow2.create import CreateOptions

_PROTOCOL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def host_path(name: str) -> str | None:
    """The path of a file of this host that ``name`` means; None: it is storage of another kind.

    Raises BlockError, in QEMU's words, for what no image can be put into.
    """
    found = _PROTOCOL.match(name)
    if found is None:
        return name
    protocol = found.group(1)
    if protocol == "file":
        return name[len("file:") :]
    if any(protocol in driver.protocols for driver in DRIVERS.values()):
        return None
    if protocol not in DRIVERS:
        raise BlockError(f"Unknown protocol '{protocol}'")
    raise BlockError(f"Protocol driver '{protocol}' does not support image creation")


async def create_in_storage(graph: Graph, name: str, fmt: str, options: CreateOptions) -> None:
    """Make an image in what ``name`` means. Raises BlockError or OSError."""
    storage = protocol_options(graph, name)
    try:
        node = await graph.open(storage)
    except (BlockError, OSError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise BlockError(
            f"Protocol driver '{storage.driver}' does not support creating new images, so an existing image must be "
            f"selected as the target; however, opening the given target as an existing image failed: {reason}"
        ) from error
    async with taken(graph, node.name):
        if fmt == "qcow2":
            # Imported here: creation is not needed to start up.
            from livedisk.emulator.drivers.qcow2.create import create

            await create(node, options)
        else:
            if options.size > node.size:
                await node.truncate(options.size, exact=False)
            # What was there before must not be taken for an image of its format.
            await node.write_zeroes(0, min(SECTOR, node.size))
