"""Block device options as QMP types: the union of what every registered driver takes, and references to nodes.

The base class and the drivers' classes live below (``emulator/block/options.py``, ``emulator/drivers``), which know
nothing of QMP; here they are joined. ``import``ing this module is enough. Source: QEMU ``qapi/block-core.json``,
BlockdevOptions, BlockdevRef, BlockdevRefOrNull.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from livedisk.emulator.block.driver import DRIVERS
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.qmp.qapi import define_alternate, define_union


def driver_options() -> Mapping[str, type[msgspec.Struct]]:
    """The options class of every registered driver that users may open, by the driver's name."""
    return {name: driver.Options for name, driver in DRIVERS.items() if not driver.internal}


define_union(BlockdevOptions, "driver", driver_options)
define_alternate("BlockdevRef", str, BlockdevOptions)
define_alternate("BlockdevRefOrNull", str, BlockdevOptions, None)
