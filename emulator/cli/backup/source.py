"""The disks of a running emulator and the dirty bitmaps on them, asked over QMP. Works on livedisk and on QEMU."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from livedisk.emulator.cli.backup.manifest import BackupError
from livedisk.emulator.qmp.client import QmpClient, QmpError

POLL: Final = 0.2
"""Seconds between two looks at a job."""


@dataclass(frozen=True)
class Disk:
    """A disk: ``name`` as the user knows it, ``node`` as the graph does; ``size``: bytes; ``keeps_bitmaps``: whether
    bitmaps on it survive the emulator; ``bitmaps``: QMP's BlockDirtyInfo by name."""

    name: str
    node: str
    size: int
    read_only: bool
    keeps_bitmaps: bool
    allocated: int | None
    bitmaps: dict[str, dict[str, Any]] = field(default_factory=dict)


async def find_disks(qmp: QmpClient, names: Sequence[str]) -> list[Disk]:
    """The disks called ``names`` (a device's id, or a node's name), or all writable disks of devices. Raises BackupError."""
    nodes = {info["node-name"]: info for info in await qmp.execute("query-named-block-nodes", flat=True)}
    devices = await _devices(qmp)
    if not names:
        chosen = {name: node for name, node in devices.items() if not nodes[node]["ro"]}
        if not chosen:
            raise BackupError("the emulator has no device with a writable disk: name nodes with --disk")
    else:
        chosen = {}
        for name in names:
            node = devices.get(name, name)
            if node not in nodes:
                known = ", ".join(sorted(name for name in {*devices, *nodes} if not name.startswith("#")))
                raise BackupError(f"the emulator has no disk or node '{name}'; it has: {known}")
            chosen[name] = node
    return [_disk(name, nodes[node]) for name, node in chosen.items()]


async def places_of(qmp: QmpClient, bitmaps: Collection[str]) -> list[tuple[str, str]]:
    """Where bitmaps of these names are: node and name."""
    nodes = await qmp.execute("query-named-block-nodes", flat=True)
    return [
        (info["node-name"], bitmap["name"])
        for info in nodes
        for bitmap in info.get("dirty-bitmaps", [])
        if bitmap.get("name") in bitmaps
    ]


async def _devices(qmp: QmpClient) -> dict[str, str]:
    """Names of devices with a disk, and the node that each is on."""
    try:
        found = await qmp.execute("query-block")
    except QmpError as error:
        if error.kind == "CommandNotFound":  # a storage daemon: it has no devices
            return {}
        raise
    devices = {}
    for info in found:
        node = info.get("inserted", {}).get("node-name")
        name = info["device"] or info.get("qdev", "").removeprefix("/machine/peripheral/").split("/")[0]
        if node and name:
            devices[name] = node
    return devices


def _disk(name: str, info: dict[str, Any]) -> Disk:
    image = info["image"]
    specific = image.get("format-specific", {})
    keeps = specific.get("type") == "qcow2" and specific["data"].get("compat") != "0.10" and not info["ro"]
    return Disk(
        name,
        info["node-name"],
        image["virtual-size"],
        info["ro"],
        keeps,
        image.get("actual-size") if "backing-filename" not in image else None,
        {bitmap["name"]: bitmap for bitmap in info.get("dirty-bitmaps", []) if "name" in bitmap},
    )


async def quietly(qmp: QmpClient, command: str, **arguments: Any) -> str | None:
    """Run a command that may well find nothing to do; returns the error's text, or None. Raises ConnectionLost."""
    try:
        await qmp.execute(command, **arguments)
    except QmpError as error:
        return str(error)
    return None


async def jobs_of(qmp: QmpClient) -> dict[str, dict[str, Any]]:
    """All jobs by id."""
    return {job["id"]: job for job in await qmp.execute("query-jobs")}


async def finish_jobs(qmp: QmpClient, ids: Sequence[str], seen: Callable[[dict[str, Any]], None]) -> dict[str, str]:
    """Wait until all these jobs, which do not dismiss themselves, are concluded, or one has failed; dismiss those that are.
    ``seen`` is shown each JobInfo now and then. Returns errors by job."""
    while True:
        jobs = await jobs_of(qmp)
        mine = [jobs[name] for name in ids if name in jobs]
        for job in mine:
            seen(job)
        ended = [job for job in mine if job["status"] == "concluded"]
        if len(ended) == len(mine) or any("error" in job for job in ended):
            break
        await asyncio.sleep(POLL)
    errors = {name: "it is gone" for name in ids if name not in jobs}
    for job in ended:
        if "error" in job:
            errors[job["id"]] = job["error"]
        await quietly(qmp, "job-dismiss", id=job["id"])
    return errors


async def end_job(qmp: QmpClient, name: str) -> None:
    """Cancel a job, if it is there, and wait until it is gone."""
    while (job := (await jobs_of(qmp)).get(name)) is not None:
        if job["status"] == "concluded":
            await quietly(qmp, "job-dismiss", id=name)
        elif await quietly(qmp, "block-job-cancel", device=name, force=True) is not None:
            await quietly(qmp, "job-cancel", id=name)
        await asyncio.sleep(POLL / 4)


async def create_image(qmp: QmpClient, path: str, node: str, size: int, backing: str | None) -> None:
    """Make a qcow2 image at ``path`` with the emulator's own hands, and open it as ``node``. Raises BackupError, QmpError."""
    below = f"{node}-f"
    await _create(qmp, f"{node}-c", {"driver": "file", "filename": path, "size": 0})
    await qmp.call("blockdev-add", {"driver": "file", "node-name": below, "filename": path})
    try:
        options: dict[str, Any] = {"driver": "qcow2", "file": below, "size": size}
        if backing is not None:
            options |= {"backing-file": backing, "backing-fmt": "qcow2"}
        await _create(qmp, f"{node}-c", options)
    finally:
        await quietly(qmp, "blockdev-del", node_name=below)
    options = {"driver": "qcow2", "node-name": node, "discard": "unmap", "file": {"driver": "file", "filename": path}}
    await qmp.call("blockdev-add", options)


async def _create(qmp: QmpClient, job: str, options: dict[str, Any]) -> None:
    await qmp.call("blockdev-create", {"job-id": job, "options": options})
    errors = await finish_jobs(qmp, [job], lambda _: None)
    if errors:
        raise BackupError(f"making {options.get('filename', 'an image')} failed: {errors[job]}")
