"""Waiting for a descriptor, for the handshakes: after them, connections stay registered with the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def readable(descriptor: int) -> None:
    """Wait until there is something to receive, or the end of it."""
    loop = asyncio.get_running_loop()
    await _told(descriptor, loop.add_reader, loop.remove_reader)


async def writable(descriptor: int) -> None:
    """Wait until something can be sent."""
    loop = asyncio.get_running_loop()
    await _told(descriptor, loop.add_writer, loop.remove_writer)


async def _told(descriptor: int, watch: Callable[..., None], forget: Callable[[int], object]) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    watch(descriptor, _settle, ready)
    try:
        await ready
    finally:
        forget(descriptor)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
