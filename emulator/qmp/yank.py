"""Connections that can be cut from outside when the peer hangs: the register behind ``yank`` and ``query-yank``.

Whoever holds a network connection that a command could wait for registers a function that cuts it at once, without
waiting (it runs out of band). Source: QEMU ``util/yank.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from livedisk.emulator.errors import DeviceNotFound

Key: TypeAlias = tuple[str, str]
"""Kind ("block-node", "chardev", "migration") and name."""

_cutters: dict[Key, Callable[[], None]] = {}


def register(kind: str, name: str, cut: Callable[[], None]) -> None:
    """Make an instance known. Raises ValueError for one that is known."""
    if (kind, name) in _cutters:
        raise ValueError(f"yank instance {kind} {name!r} is registered twice")
    _cutters[kind, name] = cut


def unregister(kind: str, name: str) -> None:
    del _cutters[kind, name]


def instances() -> list[Key]:
    return list(_cutters)


def yank(keys: Iterable[Key]) -> None:
    """Cut all of the instances, or, if one is unknown, none. Raises DeviceNotFound."""
    wanted = list(keys)
    if any(key not in _cutters for key in wanted):
        raise DeviceNotFound("Instance not found")
    for key in wanted:
        _cutters[key]()
