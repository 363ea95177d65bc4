"""Options of a command line, worked off in order into a `Daemon`: a table from an option's name to what does it."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from livedisk.emulator.block import descriptors
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.cli import option_groups
from livedisk.emulator.cli.daemon_options import DEVICES, MACHINE, MONITORS, STORAGE_DAEMON, TABLE
from livedisk.emulator.cli.options import Given
from livedisk.emulator.daemon import Daemon
from livedisk.emulator.device.runstate import State
from livedisk.emulator.errors import LiveDiskError, ParameterError, reason_of
from livedisk.emulator.exports.options import NbdExportOptions, NbdServerOptions
from livedisk.emulator.qmp.chardev import (
    MonitorOptions,
    PtyChardev,
    StdioChardev,
    parse_chardev,
    parse_compat,
    parse_monitor,
)
from livedisk.emulator.qmp.keyval import HelpRequested, parse_option, parse_opts, parse_text
from livedisk.emulator.qmp.object_commands import ObjectOptions
from livedisk.emulator.qmp.visit import KEYVAL, parse_integer

log = logging.getLogger(__name__)
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z", re.IGNORECASE)
_EFFECTIVE: Final = ("name", "uuid")
"""Options of a whole machine that have an effect here."""


class Refused(Exception):
    """An option failed. The text names it as it was written; further lines say what would be accepted."""

    def __init__(self, given: Given, error: Exception) -> None:
        hint = getattr(error, "hint", "")
        super().__init__(f"{given.text}: {reason_of(error)}" + (f"\n{hint}" if hint else ""))


class HelpShown(Exception):
    """An option asked for help; the text is the answer, and there is nothing else to do."""


class Builder:
    """One command line and the daemon that it describes.

    Raises `Refused` for an argument that is wrong on its face when it is made; `build` does the rest.
    """

    def __init__(self, given: Sequence[Given], *, daemonize: bool) -> None:
        self._given = [self._accepted(*one) for one in option_groups.expand(given, TABLE)]
        self._daemonize = daemonize
        self._monitors = 0
        self._driven: list[tuple[Given, str]] = []
        self._paused = False
        self.daemon = Daemon()
        self.daemon.option_parameters = option_groups.parameters
        self.daemon.option_names = tuple(name for option in TABLE for name in option.names)
        for one in self._given:
            if one.name in _IDENTITY:
                self._checked(one, _IDENTITY[one.name])
        self._say_what_has_no_effect()

    @staticmethod
    def _accepted(given: Given, error: Exception | None) -> Given:
        if error is not None:
            raise Refused(given, error) from error
        return given

    def _checked(self, given: Given, step: Callable[[Builder, str], None]) -> None:
        try:
            step(self, given.value)
        except LiveDiskError as error:
            raise Refused(given, error) from error

    def _say_what_has_no_effect(self) -> None:
        idle = [one.text for one in self._given if one.option.group == MACHINE and one.name not in _EFFECTIVE]
        if idle:
            log.info("without effect here: %s", ", ".join(dict.fromkeys(idle)))

    # -- order -------------------------------------------------------------------------------------------------------
    def _in_order(self) -> list[Given]:
        """What is to be built, in the order in which qemu-storage-daemon, or else QEMU, builds it."""
        steps = [one for one in self._given if one.option.rank is not None]
        if all(one.name in STORAGE_DAEMON and not self._is_compat(one) for one in self._given):
            return steps
        return sorted(steps, key=lambda one: one.option.rank or 0)

    def _is_compat(self, given: Given) -> bool:
        """Whether this is QEMU's ``-monitor DEVICE`` rather than the storage daemon's ``--monitor [chardev=]ID``."""
        if given.name != "monitor" or given.value.startswith("{"):
            return False
        fields = given.value.split(",")
        if any(field.partition("=")[0] == "chardev" for field in fields):
            return False
        ids = {
            field.removeprefix("id=")
            for one in self._given
            if one.name == "chardev"
            for field in one.value.split(",")
            if field.startswith("id=")
        }
        return fields[0] not in ids and not given.spelled.startswith("--")

    # -- work --------------------------------------------------------------------------------------------------------
    async def build(self) -> bool:
        """Work the options off. False if a signal ended it before. Raises Refused, HelpShown."""
        # No command of a monitor that is open already sees what is half built (QEMU's main loop does not run yet then).
        work = asyncio.ensure_future(self.daemon.exclusively(self._work()))
        ended = asyncio.ensure_future(self.daemon.serve())
        await asyncio.wait((work, ended), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            ended.cancel()
            work.result()
            return True
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        return False

    async def _work(self) -> None:
        """The guest runs before the first monitor can ask for it."""
        steps = self._in_order()
        first = next((place for place, one in enumerate(steps) if one.option.rank == MONITORS), len(steps))
        for place, one in enumerate(steps):
            if (one.option.rank or 0) > DEVICES:
                await self._attach_drives()
            if place == first:
                self._start()
            try:
                await _STEPS[one.name](self, one)
            except HelpRequested as request:
                # Imported here: a daemon that starts has no use for it.
                from livedisk.emulator.cli.listing import listing

                raise HelpShown(listing(one.name, request.values)) from None
            except (LiveDiskError, OSError) as error:
                raise Refused(one, error) from error
        await self._attach_drives()
        if first == len(steps):
            self._start()
        await self._await_migration()

    def _start(self) -> None:
        """Let the guest run, unless it is to wait."""
        if self._paused:
            self.daemon.run_state.start_after_migration = False
        elif self.daemon.run_state.state is not State.INMIGRATE:
            self.daemon.start()

    # -- identity and first state --------------------------------------------------------------------------------------
    def name(self, text: str) -> None:
        values = parse_opts(text, "guest")
        unknown = next((name for name in values if name not in ("guest", "process", "debug-threads")), None)
        if unknown is not None:
            raise ParameterError(f"Invalid parameter '{unknown}'")
        self.daemon.name = values.get("guest")

    def uuid(self, text: str) -> None:
        if not _UUID.match(text):
            raise ParameterError("failed to parse UUID string: wrong format")
        self.daemon.uuid = text.lower()

    def pause(self, text: str) -> None:
        self._paused = True

    def incoming(self, text: str) -> None:
        if text != "defer" and text.partition(":")[0] not in ("tcp", "unix", "fd"):
            raise ParameterError(
                f"unknown migration protocol: {text}", hint="Known: tcp:HOST:PORT, unix:PATH, fd:N, defer"
            )
        self.daemon.run_state.move(State.INMIGRATE)

    async def _await_migration(self) -> None:
        """Everything is there: listen for the guest that ``-incoming`` tells of."""
        given = next((one for one in reversed(self._given) if one.name == "incoming"), None)
        if given is None or given.value == "defer":
            return
        # What listens is a plugin's.
        from livedisk.emulator.qmp.context import Context
        from livedisk.emulator.qmp.registry import registry

        try:
            await registry.execute(Context(self.daemon), "migrate-incoming", {"uri": given.value})
        except LiveDiskError as error:
            raise Refused(given, error) from error

    def trace(self, text: str) -> None:
        raise ParameterError("there is no tracing; a Python profiler such as py-spy shows what the process does")

    # -- steps -------------------------------------------------------------------------------------------------------
    async def object(self, given: Given) -> None:
        self.daemon.objects.add(parse_option(ObjectOptions, given.value, "qom-type"))

    async def add_fd(self, given: Given) -> None:
        """Sets are there before anything that could open one: they come with the objects."""
        values = parse_opts(given.value, warn=self._warn(given))
        unknown = next((name for name in values if name not in ("fd", "set", "opaque")), None)
        if unknown is not None:
            raise ParameterError(f"Invalid parameter '{unknown}'")
        numbers = {}
        for name in ("fd", "set"):
            number = parse_integer(values.get(name, "-1"))
            if number is None:
                raise ParameterError(f"Parameter '{name}' expects a number")
            numbers[name] = number
        descriptors.inherit(numbers["fd"], numbers["set"], values.get("opaque"))

    async def blockdev(self, given: Given) -> None:
        await self.daemon.add_blockdev(parse_option(BlockdevOptions, given.value, "driver"))

    async def nbd_server(self, given: Given) -> None:
        await self.daemon.exports.start_server(parse_option(NbdServerOptions, given.value))

    async def export(self, given: Given) -> None:
        await self.daemon.exports.add(parse_option(NbdExportOptions, given.value, "type"))

    async def drive(self, given: Given) -> None:
        """A drive; one with a bus gets its device when the devices are made, after those that are asked for."""
        # Imported here: many daemons have none.
        from livedisk.emulator.device import drive_options

        devices, warn = self.daemon.devices, self._warn(given)
        values = parse_opts(given.value, warn=warn)
        present = [drive.spec for drive in devices.drives]
        spec = await drive_options.read(self.daemon.graph, values, present, warn)
        await devices.drives.add(spec)
        if spec.interface == "virtio":
            self._driven.append((given, spec.name))

    async def _attach_drives(self) -> None:
        while self._driven:
            given, name = self._driven.pop(0)
            try:
                await self.daemon.add_device({"driver": "virtio-blk", "drive": name}, KEYVAL)
            except (LiveDiskError, OSError) as error:
                raise Refused(given, error) from error

    async def device(self, given: Given) -> None:
        if given.value.startswith("{"):
            values, syntax = parse_text(given.value)
        else:
            values, syntax = parse_opts(given.value, "driver", warn=self._warn(given)), KEYVAL
        await self.daemon.add_device(values, syntax)

    async def chardev(self, given: Given) -> None:
        options = parse_chardev(given.value, self._warn(given))
        await self._open(options)

    async def mon(self, given: Given) -> None:
        warn = self._warn(given)
        self.daemon.add_monitor(parse_monitor(given.value, "readline", older_syntax=True, warn=warn))

    async def monitor(self, given: Given) -> None:
        if not self._is_compat(given):
            self.daemon.add_monitor(parse_monitor(given.value, "control", older_syntax=False))
        elif given.value != "none":
            await self._in_place(given, MonitorOptions(chardev="", mode="readline"))

    async def qmp(self, given: Given) -> None:
        await self._in_place(given, MonitorOptions(chardev="", mode="control"))

    async def qmp_pretty(self, given: Given) -> None:
        await self._in_place(given, MonitorOptions(chardev="", mode="control", pretty=True))

    async def qtest(self, given: Given) -> None:
        # Imported here: only machinery around QEMU asks for it.
        from livedisk.emulator.qmp.qtest import Qtest

        path = next((one.value for one in reversed(self._given) if one.name == "qtest-log"), "none")
        log = None if path == "none" else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        kind, _, name = given.value.partition(":")
        if kind != "chardev":
            name = "qtest"
            await self._open(parse_compat(given.value, name, self._warn(given)))
        self.daemon.plug(name, Qtest(log))

    async def _in_place(self, given: Given, options: MonitorOptions) -> None:
        """A monitor on a device that the option itself describes, or that it names as ``chardev:ID``."""
        kind, _, name = given.value.partition(":")
        if kind == "chardev":
            options.chardev = name
        else:
            options.chardev = f"compat_monitor{self._monitors}"
            self._monitors += 1
            await self._open(parse_compat(given.value, options.chardev, self._warn(given)))
        self.daemon.add_monitor(options)

    async def _open(self, options: Any) -> None:
        if self._daemonize and isinstance(options, StdioChardev):
            raise ParameterError("cannot use stdio with -daemonize")
        await self.daemon.open_chardev(options)
        if isinstance(options, PtyChardev):
            terminal = self.daemon.chardev(options.id)
            assert terminal is not None
            print(
                f"char device redirected to {terminal.filename.removeprefix('pty:')} (label {options.id})", flush=True
            )

    def _warn(self, given: Given) -> Callable[[str], None]:
        return lambda message: log.warning("%s: %s", given.text, message)


_IDENTITY: Final[dict[str, Callable[[Builder, str], None]]] = {
    "name": Builder.name,
    "uuid": Builder.uuid,
    "S": Builder.pause,
    "incoming": Builder.incoming,
    "trace": Builder.trace,
}

_STEPS: Final[dict[str, Callable[[Builder, Given], Awaitable[None]]]] = {
    "add-fd": Builder.add_fd,
    "object": Builder.object,
    "blockdev": Builder.blockdev,
    "nbd-server": Builder.nbd_server,
    "export": Builder.export,
    "drive": Builder.drive,
    "device": Builder.device,
    "chardev": Builder.chardev,
    "mon": Builder.mon,
    "monitor": Builder.monitor,
    "qmp": Builder.qmp,
    "qmp-pretty": Builder.qmp_pretty,
    "qtest": Builder.qtest,
}
