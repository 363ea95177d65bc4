"""What ``livedisk migrate`` is going to do, and everything that can be known to be wrong before it does it.

A `Plan` is made of what both daemons answer; nothing is changed by making one. Each problem says what to do about it, and all
are told together.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Final

from livedisk.emulator.cli.figures import human_bytes
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.client import ConnectionLost, QmpClient, QmpError

MARK: Final = "livedisk-migrate"
"""How everything is named that a migration makes for itself; a later one clears away what has such a name."""
MADE: Final = re.compile(rf"{MARK}\d+(-create)?\Z")
FORMATS: Final = ("qcow2", "raw", "file")


class Refused(LiveDiskError):
    """The migration cannot be made, or failed; the text says why and, if it can be told, what to do."""


@dataclass
class End:
    """One of the two daemons. ``name``: source or destination, for messages."""

    name: str
    address: str
    qmp: QmpClient

    async def call(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command. Raises Refused or ConnectionLost; both name the end."""
        try:
            return await self.qmp.call(command, arguments)
        except QmpError as error:
            raise Refused(f"{self.name}: {command}: {error}") from error
        except ConnectionLost as error:
            raise ConnectionLost(f"the {self.name} at {self.address} is gone: {error}") from error

    @property
    def host(self) -> str | None:
        """The host of a TCP monitor; None where it is a Unix socket on this machine."""
        address = self.address.removeprefix("tcp:")
        host, colon, port = address.rpartition(":")
        return host.strip("[]") or "localhost" if colon and port.isdigit() and "/" not in address else None

    @property
    def folder(self) -> Path:
        """Where a Unix monitor's socket is."""
        return Path(self.address.removeprefix("unix:")).absolute().parent


@dataclass
class Disk:
    """One disk. ``node``: its node, on both ends. Sizes are bytes. ``target``: the file to be made on the destination, or None
    where the node is there. ``name``: of what the migration makes for it."""

    number: int
    node: str
    driver: str
    size: int
    allocated: int
    image: dict[str, Any]
    throttled: bool
    device: str
    target: str | None = None
    exists: bool = False

    @property
    def name(self) -> str:
        return f"{MARK}{self.number}"


@dataclass
class Plan:
    """All of it. ``exports``: ids of the source's exports that go with the disks. ``running``: whether the guest runs."""

    disks: list[Disk] = field(default_factory=list)
    exports: list[str] = field(default_factory=list)
    running: bool = True
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{disk.node}: {human_bytes(disk.size)} {disk.driver}, {human_bytes(disk.allocated)} allocated -> "
            + (f"{disk.target} (to be made)" if disk.target is not None else f"node '{disk.node}', which is there")
            for disk in self.disks
        ] + [f"export '{name}' goes with its disk" for name in self.exports]


async def make_plan(
    source: End, destination: End, wanted: tuple[str, ...], folder: str | None, *, shallow: bool
) -> Plan:
    """Look at both ends. Raises ConnectionLost; what is wrong is in ``problems``."""
    plan = Plan()
    versions = {end.qmp.greeting["version"]["package"] for end in (source, destination)}
    if len(versions) > 1:
        plan.problems.append(
            f"the ends are of different versions ({', '.join(sorted(versions))}): update the older one"
        )
    await _check_states(plan, source, destination)
    await _find_disks(plan, source, wanted)
    await _find_exports(plan, source)
    for disk in plan.disks:
        await _check_target(plan, disk, destination, folder, shallow=shallow)
    _check_space(plan, destination)
    return plan


async def _check_states(plan: Plan, source: End, destination: End) -> None:
    status = await source.call("query-status")
    plan.running = status["running"]
    if status["status"] in ("inmigrate", "finish-migrate", "postmigrate", "shutdown"):
        plan.problems.append(f"the source is in state {status['status']}: there is no guest to move")
    status = await destination.call("query-status")
    if status["status"] != "inmigrate":
        plan.problems.append(
            f"the destination is in state {status['status']}: start it with '-incoming defer', so that it waits for a guest"
        )


async def _find_disks(plan: Plan, source: End, wanted: tuple[str, ...]) -> None:
    found = [entry for entry in await source.call("query-block") if "inserted" in entry]
    names = {entry["inserted"]["node-name"] for entry in found}
    for name in wanted:
        if name not in names:
            plan.problems.append(
                f"the source has no device on a node '{name}'; its devices are on {', '.join(sorted(names)) or 'none'}"
            )
    left = sorted(names - set(wanted)) if wanted else []
    if left:
        plan.problems.append(
            f"the guest has more disks ({', '.join(left)}); a guest moves with all of them: name them too, or none"
        )
    for entry in found:
        inserted = entry["inserted"]
        device = entry["qdev"].removesuffix("/virtio-backend").removeprefix("/machine/peripheral/")
        if inserted["ro"]:
            plan.problems.append(f"node '{inserted['node-name']}' is read-only; only writable disks can be moved")
        plan.disks.append(_disk(len(plan.disks), device, inserted))
    if not plan.disks:
        plan.problems.append(
            "the source has no device with a disk; an image that is only exported can be copied, with nbdcopy"
        )


def _disk(number: int, device: str, inserted: dict[str, Any]) -> Disk:
    image = inserted["image"]
    return Disk(
        number=number,
        node=inserted["node-name"],
        driver=inserted["drv"],
        size=image["virtual-size"],
        allocated=image.get("actual-size", image["virtual-size"]),
        image=image,
        throttled=any(inserted.get(limit) for limit in ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"))
        and inserted.get("group") != MARK,
        device=device,
    )


async def _find_exports(plan: Plan, source: End) -> None:
    nodes = {disk.node for disk in plan.disks}
    exports = await source.call("query-block-exports")
    plan.exports = [one["id"] for one in reversed(exports) if one["node-name"] in nodes and not MADE.match(one["id"])]


async def _check_target(plan: Plan, disk: Disk, destination: End, folder: str | None, *, shallow: bool) -> None:
    """Whether the destination has the disk's node, or can make its file."""
    nodes = {node["node-name"]: node for node in await destination.call("query-named-block-nodes", {"flat": True})}
    there = nodes.get(disk.node)
    if there is not None:
        disk.exists = True
        if there["image"]["virtual-size"] != disk.size:
            plan.problems.append(
                f"node '{disk.node}' has {there['image']['virtual-size']} bytes on the destination, {disk.size} on the source: "
                "resize it (block_resize), or delete it (blockdev-del) and let this command make it"
            )
        if there["ro"]:
            plan.problems.append(f"node '{disk.node}' is read-only on the destination: open it with read-only=off")
        return
    if disk.driver not in FORMATS:
        plan.problems.append(
            f"node '{disk.node}' is of format {disk.driver}, which this command cannot make: make it on the destination "
            "(blockdev-add) under the same name, of the same size"
        )
        return
    file = disk.image["filename"]
    if file.startswith(("json:", "nbd")) or "://" in file:
        plan.problems.append(f"node '{disk.node}' is no file ({file}): make it on the destination under the same name")
        return
    disk.target = str(PurePath(folder, PurePath(file).name)) if folder is not None else file
    if await _is_there(destination, disk.target) and not await _is_ours(destination, disk):
        plan.problems.append(
            f"{disk.target} exists on the destination: choose another folder with --target, or remove it"
        )
    if shallow:
        backing = disk.image.get("full-backing-filename")
        if backing is not None and not await _is_there(destination, backing):
            plan.problems.append(
                f"--shallow needs the backing file {backing} on the destination: copy it, or leave --shallow out"
            )


async def _is_there(destination: End, path: str) -> bool:
    """Whether a file can be opened on the destination. One that cannot is an error where it is made."""
    probe = {"driver": "file", "node-name": f"{MARK}0", "filename": path, "read-only": True, "locking": "off"}
    try:
        await destination.qmp.call("blockdev-add", probe)
    except QmpError as error:
        return "No such file" not in str(error)
    await destination.call("blockdev-del", {"node-name": f"{MARK}0"})
    return True


async def _is_ours(destination: End, disk: Disk) -> bool:
    """Whether an earlier attempt made the file and came no further: its job is kept until the node is there."""
    jobs = await destination.call("query-jobs")
    return any(job["id"] == f"{disk.name}-create" for job in jobs)


def _check_space(plan: Plan, destination: End) -> None:
    """Where the destination is on this machine, its folders can be looked at."""
    if destination.host is not None:
        return
    needed: dict[str, int] = {}
    for disk in plan.disks:
        if disk.target is None:
            continue
        folder = os.path.dirname(disk.target)
        if not os.path.isdir(folder):
            plan.problems.append(f"{folder} is no folder on the destination: make it, or choose another with --target")
        elif not os.access(folder, os.W_OK):
            plan.problems.append(f"{folder} may not be written to: choose another with --target")
        else:
            needed[folder] = needed.get(folder, 0) + disk.allocated
    for folder, size in needed.items():
        info = os.statvfs(folder)
        free = info.f_bavail * info.f_frsize
        if free < size:
            plan.problems.append(
                f"{folder} has {human_bytes(free)} left, the disks need {human_bytes(size)}: make room, or use another --target"
            )
