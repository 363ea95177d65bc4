"""Monitors without an emulator behind them: what the tests of QMP itself talk to.

In a test: `Host`, `RecordingPort`. As a program (``python -m kit.qmp_host "qmp unix:PATH,server=on,wait=off" "hmp stdio"``): a
process with those monitors, which ends at ``quit``.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, cast

import msgspec

from livedisk.emulator.qmp import control
from livedisk.emulator.qmp.chardev import parse_compat
from livedisk.emulator.qmp.context import Daemon
from livedisk.emulator.qmp.events import EventHub
from livedisk.emulator.qmp.hmp import HumanMonitor
from livedisk.emulator.qmp.monitor import Dispatcher, QmpMonitor
from livedisk.emulator.qmp.registry import registry
from livedisk.emulator.qmp.server import Device, open_chardev


class Host:
    """As much of a daemon as the monitor's own commands ask for."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.events = EventHub()
        self.ended = asyncio.Event()
        self.reasons: list[str] = []

    def quit(self, reason: str) -> None:
        self.reasons.append(reason)
        self.events.emit(control.Shutdown(guest=False, reason=control.ShutdownCause(reason)))
        asyncio.get_running_loop().call_later(0.02, self.ended.set)


class RecordingPort:
    """A connection that keeps what it is told."""

    def __init__(self) -> None:
        self.written = b""
        self.reading = True

    def write(self, data: bytes) -> None:
        self.written += data

    def set_reading(self, on: bool) -> None:
        self.reading = on

    def take_descriptor(self) -> None:
        """Nothing comes with what a test says."""

    def take(self) -> list[Any]:
        """The messages written since last asked."""
        lines, self.written = self.written.splitlines(), b""
        return [msgspec.json.decode(line) for line in lines]


async def serve(monitors: list[str], host: Host | None = None, started: asyncio.Event | None = None) -> None:
    """Serve ``"qmp ADDRESS"``, ``"qmp-pretty ADDRESS"``, ``"hmp ADDRESS"`` until ``quit``."""
    host = host or Host()
    daemon = cast(Daemon, host)
    dispatcher = Dispatcher()
    devices: list[Device] = []
    for index, monitor in enumerate(monitors):
        kind, _, address = monitor.partition(" ")
        options = parse_compat(address, f"compat_monitor{index}", warn)
        device = await open_chardev(options, lambda message: print(f"info: {message}", file=sys.stderr, flush=True))
        devices.append(device)
        if kind == "hmp":
            device.attach(HumanMonitor(daemon, dispatcher))
        else:
            device.attach(QmpMonitor(daemon, registry, dispatcher, pretty=kind == "qmp-pretty"))
    if started is not None:
        started.set()
    await host.ended.wait()
    for device in devices:
        await device.close()


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1:]))
