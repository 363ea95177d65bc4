"""What a command is handed besides its arguments.

`Daemon` is a typing Protocol, so that commands know what they may ask of the composition root
(``emulator/daemon.py``) without importing it. Whoever writes commands that need more adds the member here, with its
type, and the daemon provides it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    from livedisk.emulator.block.graph import Graph
    from livedisk.emulator.block.options import BlockdevOptions
    from livedisk.emulator.device.runstate import RunState
    from livedisk.emulator.device.tree import DeviceTree
    from livedisk.emulator.exports.exports import BlockExports
    from livedisk.emulator.qmp.chardev import Chardev
    from livedisk.emulator.qmp.events import EventHub
    from livedisk.emulator.qmp.monitor import Monitor
    from livedisk.emulator.qmp.object_commands import Objects
    from livedisk.emulator.qmp.server import Device


class Extension(Protocol):
    """What a plugin keeps for as long as the emulator lives."""

    async def close(self) -> None:
        """The emulator ends: give everything back. Exports, devices and nodes are still there."""


class Daemon(Protocol):
    """The running emulator, as commands see it."""

    @property
    def name(self) -> str | None:
        """The guest's name (``-name``), or None."""

    @property
    def option_names(self) -> Iterable[str]:
        """The options that the command line takes."""

    @property
    def option_parameters(self) -> Callable[[str], list[tuple[str, str]]]:
        """The keys that an option of the command line takes, and their types."""

    @property
    def graph(self) -> Graph:
        """All block nodes."""

    @property
    def events(self) -> EventHub:
        """Where events are emitted."""

    @property
    def devices(self) -> DeviceTree:
        """The emulated disks."""

    @property
    def run_state(self) -> RunState:
        """Whether the guest runs."""

    @property
    def exports(self) -> BlockExports:
        """The NBD server and what it serves."""

    @property
    def objects(self) -> Objects:
        """What object-add made."""

    @property
    def extensions(self) -> dict[type, Extension]:
        """What plugins keep, by its class. Closed in the order of their making, when the emulator ends."""

    @property
    def uuid(self) -> str:
        """The guest's UUID (``-uuid``), in lower case; all zeroes where none was given."""

    async def open_chardev(self, options: Chardev) -> None:
        """Open a character device. Raises LiveDiskError."""

    async def close_chardev(self, name: str) -> None:
        """Close a character device that no monitor speaks on."""

    def chardev(self, name: str) -> Device | None:
        """The character device of that id."""

    def chardev_is_busy(self, name: str) -> bool:
        """Whether a monitor speaks on it."""

    def chardevs(self) -> Iterable[tuple[str, str]]:
        """Every character device: its id, and the name of its back-end."""

    def parse_options(self, options: dict[str, Any]) -> BlockdevOptions:
        """Options of a node, as JSON has them, checked and typed. Raises ParameterError."""

    def quit(self, reason: str) -> None:
        """Ask the emulator to end, after the reply has been sent. ``reason`` is QAPI's ShutdownCause
        (``host-qmp-quit``)."""


class Context(msgspec.Struct, frozen=True):
    """One command's surroundings."""

    daemon: Daemon
    monitor: Monitor | None = None
    """The monitor that the command came in by; None where a program or the command line runs it."""
