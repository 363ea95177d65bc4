"""The disks of one moment, exported over NBD while the guest writes on: for `verify`, and for anybody's reader.

One transaction over all disks: new bitmaps are added, earlier ones frozen (disabled, or copied where they must go on), and a
backup job with sync=none starts for each disk, which keeps what the guest overwrites in a scratch image above the disk. Then
each scratch image is exported read-only; it reads as its disk did in that moment. The end takes all of it away again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from livedisk.emulator.cli.backup.manifest import BackupError
from livedisk.emulator.cli.backup.source import Disk, create_image, end_job, quietly
from livedisk.emulator.qmp.client import ConnectionLost, QmpClient, QmpError


@dataclass(frozen=True)
class Moment:
    """What is wanted. ``since``: a bitmap on each disk that is frozen and exported (meta context
    ``qemu:dirty-bitmap:NAME``); ``copy``: export a frozen copy instead and let the bitmap record on; ``new``: the name of a
    bitmap that starts to record in the moment. ``server``: the NBD server's Unix socket, started unless ``running``.
    ``scratch``: a folder for scratch images."""

    disks: Sequence[Disk]
    since: dict[str, str]
    server: str
    scratch: Path
    copy: bool = False
    new: str | None = None
    running: bool = False


@dataclass(frozen=True)
class Door:
    """A disk's export: its NBD URI, and the name of the exported bitmap."""

    uri: str
    export: str
    bitmap: str | None


@contextlib.asynccontextmanager
async def held(qmp: QmpClient, moment: Moment) -> AsyncIterator[dict[str, Door]]:
    """Inside, the exports by disk. Raises BackupError, QmpError, ConnectionLost."""
    run = _Held(qmp, moment)
    try:
        yield await run.start()
    finally:
        # What cannot be said to an emulator that is gone need not be said.
        with contextlib.suppress(ConnectionLost):
            await run.end()


class _Held:
    def __init__(self, qmp: QmpClient, moment: Moment) -> None:
        self._qmp = qmp
        self._moment = moment
        tag = secrets.token_hex(4)
        self._names = {disk.name: f"ldm{tag}-{index}" for index, disk in enumerate(moment.disks)}
        self._copies: dict[str, str] = {}
        self._started_server = False
        if moment.copy:
            self._copies = {disk.name: f"livedisk-moment-{tag}" for disk in moment.disks if disk.name in moment.since}

    async def start(self) -> dict[str, Door]:
        qmp, moment = self._qmp, self._moment
        for disk in moment.disks:
            if (name := moment.since.get(disk.name)) is not None and name not in disk.bitmaps:
                raise BackupError(f"node '{disk.node}' has no bitmap '{name}'")
        if not moment.running:
            address = {"type": "unix", "data": {"path": moment.server}}
            try:
                await qmp.execute("nbd-server-start", addr=address)
            except QmpError as error:
                if "already running" in str(error):
                    raise BackupError(
                        "the emulator's NBD server is running: say with --nbd-socket where it listens"
                    ) from None
                raise
            self._started_server = True
        for disk in moment.disks:
            name = self._names[disk.name]
            await self._make_scratch(disk, name)
        actions = [action for disk in moment.disks for action in self._actions(disk)]
        await qmp.call("transaction", {"actions": actions})
        return {disk.name: await self._export(disk) for disk in moment.disks}

    async def _make_scratch(self, disk: Disk, name: str) -> None:
        path = str(self._moment.scratch / f"{name}.qcow2")
        await create_image(self._qmp, path, name, disk.size, None)
        await self._qmp.execute("blockdev-del", node_name=name)
        options: dict[str, Any] = {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": path}}
        await self._qmp.call("blockdev-add", {**options, "backing": disk.node})

    def _actions(self, disk: Disk) -> list[dict[str, Any]]:
        moment, found = self._moment, list[dict[str, Any]]()
        if moment.new is not None:
            data: dict[str, Any] = {"node": disk.node, "name": moment.new, "persistent": disk.keeps_bitmaps}
            found.append({"type": "block-dirty-bitmap-add", "data": data})
        since, copy = moment.since.get(disk.name), self._copies.get(disk.name)
        if since is not None and copy is not None:
            granularity = disk.bitmaps[since]["granularity"]
            data = {"node": disk.node, "name": copy, "disabled": True, "granularity": granularity}
            found.append({"type": "block-dirty-bitmap-add", "data": data})
            data = {"node": disk.node, "target": copy, "bitmaps": [since]}
            found.append({"type": "block-dirty-bitmap-merge", "data": data})
        elif since is not None:
            found.append({"type": "block-dirty-bitmap-disable", "data": {"node": disk.node, "name": since}})
        name = self._names[disk.name]
        data = {"job-id": name, "device": disk.node, "target": name, "sync": "none"}
        return [*found, {"type": "blockdev-backup", "data": data}]

    async def _export(self, disk: Disk) -> Door:
        name = self._names[disk.name]
        bitmap = self._copies.get(disk.name) or self._moment.since.get(disk.name)
        # A server that was running may have an export of the disk's own name.
        export = f"{disk.name}-{name}" if self._moment.running else disk.name
        options: dict[str, Any] = {"type": "nbd", "id": name, "node-name": name, "name": export, "writable": False}
        if bitmap is not None:
            options["bitmaps"] = [{"node": disk.node, "name": bitmap}]
        await self._qmp.call("block-export-add", options)
        uri = f"nbd+unix:///{quote(export)}?socket={quote(self._moment.server)}"
        return Door(uri, export, bitmap)

    async def end(self) -> None:
        """Take everything away. What is not there (any more) is no error."""
        qmp = self._qmp
        for name in self._names.values():
            if await quietly(qmp, "block-export-del", id=name, mode="hard") is None:
                await self._export_gone(name)
        for disk in self._moment.disks:
            name = self._names[disk.name]
            await end_job(qmp, name)
            for node in (name, f"{name}-f"):
                await quietly(qmp, "blockdev-del", node_name=node)
            if (copy := self._copies.get(disk.name)) is not None:
                await quietly(qmp, "block-dirty-bitmap-remove", node=disk.node, name=copy)
            (self._moment.scratch / f"{name}.qcow2").unlink(missing_ok=True)
        if self._started_server:
            await quietly(qmp, "nbd-server-stop")

    async def _export_gone(self, name: str) -> None:
        async for event in self._qmp.events():
            if event["event"] == "BLOCK_EXPORT_DELETED" and event["data"]["id"] == name:
                return


@contextlib.contextmanager
def scratch_folder(given: Path | None) -> Iterator[Path]:
    """The folder for scratch images: ``given``, or a temporary one on the machine that the emulator shares with us."""
    if given is not None:
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="livedisk-moment-") as made:
        os.chmod(made, 0o700)
        yield Path(made)
