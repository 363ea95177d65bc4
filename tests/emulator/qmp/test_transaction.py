"""Between the actions of a transaction nobody writes to a node whose bitmaps they handle."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from contract.disks import new_graph, parse

import livedisk.emulator.qmp.bitmap_commands  # noqa: F401  (registers the actions)
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.qmp.transaction import ACTIONS, Run, TransactionProperties

BITMAP = {"node": "disk", "name": "b"}
ACTION = {
    "block-dirty-bitmap-add": {"node": "disk", "name": "new"},
    "block-dirty-bitmap-clear": BITMAP,
    "block-dirty-bitmap-disable": BITMAP,
    "block-dirty-bitmap-enable": BITMAP,
    "block-dirty-bitmap-remove": BITMAP,
    "block-dirty-bitmap-merge": {"node": "other", "target": "t", "bitmaps": [BITMAP]},
}


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("name", ACTION)
def test_a_guest_is_held_from_the_first_action_to_the_last(name: str, several: bool) -> None:

    async def act() -> None:
        graph = new_graph()
        for node in ("disk", "other"):
            await graph.add(parse({"driver": "null-co", "size": 1 << 20, "node-name": node}))
        graph.nodes["disk"].bitmaps.create(65536, "b")
        graph.nodes["other"].bitmaps.create(65536, "t")
        guest = BlockBackend(graph, "guest")
        graph.attach_root(guest, graph.nodes["disk"], Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
        devices = SimpleNamespace(find=lambda name: None, drives=SimpleNamespace(find=lambda name: None))
        ctx: Any = SimpleNamespace(daemon=SimpleNamespace(graph=graph, devices=devices))
        run = Run(ctx, TransactionProperties(), several=several)
        variant, prepare = ACTIONS[name]
        one: Any = msgspec.convert({"type": name, "data": ACTION[name]}, variant)
        await prepare(ctx, one.data, run)
        assert guest.quiesced is several
        await run.finish()
        assert not guest.quiesced
        await graph.close()

    asyncio.run(act())
