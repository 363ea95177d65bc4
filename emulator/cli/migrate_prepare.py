"""Before and after the copying: targets and exports on the destination, mirrors on the source, and clearing all that away.

Everything that is made has a name of `migrate_plan.MARK`, so that `clear` finds what an attempt left that was killed.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Final

from livedisk.emulator.cli.migrate_plan import MADE, MARK, Disk, End, Plan, Refused
from livedisk.emulator.qmp.client import ConnectionLost

_LOOK: Final = 0.05
"""Seconds between two looks at a job that is about to end."""


async def clear(source: End, destination: End) -> None:
    """Take away what a migration made for itself: jobs, nodes and limits on the source, exports on the destination.

    The destination's images stay. Raises Refused, ConnectionLost.
    """
    await _clear_jobs(source)
    for name in await _made(source):
        # A flush may fail, of a copy that nobody wants any more: the node is closed all the same.
        with suppress(Refused):
            await source.call("blockdev-del", {"node-name": name})
    for entry in await source.call("query-block"):
        if entry.get("inserted", {}).get("group") == MARK:
            await throttle(source, entry["qdev"], 0)
    for export in await destination.call("query-block-exports"):
        if MADE.match(export["id"]):
            await destination.call("block-export-del", {"id": export["id"], "mode": "hard"})
    for name in await _made(source):
        await source.call("blockdev-del", {"node-name": name})


async def _made(source: End) -> list[str]:
    """The nodes that a migration made on the source."""
    nodes = await source.call("query-named-block-nodes", {"flat": True})
    return [node["node-name"] for node in nodes if MADE.match(node["node-name"])]


async def _clear_jobs(end: End) -> None:
    """End our jobs; what is ready is cancelled by force, so that the guest stays where it is."""
    while ours := [job for job in await end.call("query-jobs") if MADE.match(job["id"])]:
        for job in ours:
            with suppress(Refused):  # it may end between two looks
                await end.call("job-dismiss" if job["status"] == "concluded" else "job-cancel", {"id": job["id"]})
        await asyncio.sleep(_LOOK)


async def throttle(source: End, device: str, bytes_per_second: int) -> None:
    """Limit what the guest writes to a device; 0 lifts the limit."""
    limits = dict.fromkeys(("bps", "bps_rd", "iops", "iops_rd", "iops_wr"), 0)
    arguments: dict[str, Any] = {"id": device, "bps_wr": bytes_per_second, **limits}
    if bytes_per_second:
        arguments["group"] = MARK
    await source.call("block_set_io_throttle", arguments)


# -- the destination ---------------------------------------------------------------------------------------------------


async def secure(source: End, destination: End, folder: str) -> None:
    """Credentials for both ends, from a folder that both have (``livedisk tls init``)."""
    for end, endpoint in ((source, "client"), (destination, "server")):
        with suppress(Refused):
            await end.call("object-del", {"id": f"{MARK}-tls"})
        creds = {"qom-type": "tls-creds-x509", "id": f"{MARK}-tls", "dir": folder, "endpoint": endpoint}
        await end.call("object-add", creds)


async def serve(destination: End, listen: str | None, *, tls: bool) -> dict[str, Any]:
    """The destination's NBD server, started if need be. Returns its address, as the source reaches it."""
    running = await destination.call("x-query-nbd-server")
    if not running:
        arguments: dict[str, Any] = {"addr": _address(destination, listen), "max-connections": 0}
        if tls:
            arguments["tls-creds"] = f"{MARK}-tls"
        await destination.call("nbd-server-start", arguments)
        running = await destination.call("x-query-nbd-server")
    if running["tls"] is not tls:
        have, option = ("with TLS", "add --tls") if running["tls"] else ("without TLS", "stop it (nbd-server-stop)")
        raise Refused(f"the destination's NBD server runs {have} already: {option}")
    found: dict[str, Any] = running["addresses"][0]
    if found["type"] == "inet" and found["host"] in ("::", "0.0.0.0", ""):
        found["host"] = destination.host or "localhost"
    return found


def _address(destination: End, listen: str | None) -> dict[str, Any]:
    """nbd-server-start's, from ``--nbd`` or what suits the monitor's address."""
    if listen is not None:
        kind, _, rest = listen.partition(":")
        if kind == "unix":
            return {"type": "unix", "data": {"path": rest}}
        host, _, port = rest.rpartition(":")
        return {"type": "inet", "data": {"host": host.strip("[]"), "port": port}}
    if destination.host is None:
        return {"type": "unix", "data": {"path": str(destination.folder / f"{MARK}.nbd")}}
    return {"type": "inet", "data": {"host": destination.host, "port": "0"}}


async def listen_for_guest(destination: End, *, tls: bool) -> str:
    """Let the destination wait for the guest. Returns the URI that the source migrates to."""
    state = await destination.call("query-migrate")
    if state.get("status") != "setup":
        creds = f"{MARK}-tls" if tls else ""
        await destination.call("migrate-set-parameters", {"tls-creds": creds})
        uri = f"unix:{destination.folder / MARK}.guest" if destination.host is None else f"tcp:{destination.host}:0"
        await destination.call("migrate-incoming", {"uri": uri, "exit-on-error": False})
        state = await destination.call("query-migrate")
    where = state["socket-address"][0]
    if where["type"] == "unix":
        return f"unix:{where['path']}"
    host = destination.host if where["host"] in ("::", "0.0.0.0") else where["host"]
    return f"tcp:[{host}]:{where['port']}" if ":" in (host or "") else f"tcp:{host}:{where['port']}"


async def make_target(destination: End, disk: Disk, *, shallow: bool) -> None:
    """The disk's image and node on the destination, and the export that fills it."""
    if disk.target is not None:
        await _make_image(destination, disk, disk.target, shallow=shallow)
    export = {"type": "nbd", "id": disk.name, "name": disk.name, "node-name": disk.node, "writable": True}
    await destination.call("block-export-add", export)


async def _make_image(destination: End, disk: Disk, path: str, *, shallow: bool) -> None:
    job = f"{disk.name}-create"
    plain = disk.driver in ("raw", "file")
    with suppress(Refused):
        await destination.call("job-dismiss", {"id": job})
    options = {"driver": "file", "filename": path, "size": disk.size if plain else 0}
    await destination.call("blockdev-create", {"job-id": job, "options": options})
    await _created(destination, job, path)
    file: Any = {"driver": "file", "filename": path}
    if disk.driver == "qcow2":
        made = f"{job}-image"
        with suppress(Refused):
            await destination.call("job-dismiss", {"id": made})
        await destination.call("blockdev-create", {"job-id": made, "options": _qcow2(disk, file, shallow=shallow)})
        await _created(destination, made, path)
        await destination.call("job-dismiss", {"id": made})
    node: dict[str, Any] = {"driver": disk.driver, "node-name": disk.node, "discard": "unmap"}
    node |= {"filename": path} if disk.driver == "file" else {"file": {**file, "discard": "unmap"}}
    await destination.call("blockdev-add", node)
    # Only now: until here the job says that the file is ours.
    await destination.call("job-dismiss", {"id": job})


def _qcow2(disk: Disk, file: Any, *, shallow: bool) -> dict[str, Any]:
    """blockdev-create's options for an image like the source's."""
    data = disk.image.get("format-specific", {}).get("data", {})
    options = {"driver": "qcow2", "file": file, "size": disk.size}
    options["cluster-size"] = disk.image.get("cluster-size", 65536)
    options["version"] = "v2" if data.get("compat") == "0.10" else "v3"
    for name in ("extended-l2", "refcount-bits", "compression-type", "lazy-refcounts"):
        if name in data and options["version"] == "v3":
            options[name] = data[name]
    if shallow and "full-backing-filename" in disk.image:
        options["backing-file"] = disk.image["full-backing-filename"]
        options["backing-fmt"] = disk.image["backing-filename-format"]
    return options


async def _created(destination: End, name: str, path: str) -> None:
    """Wait for a blockdev-create to end. Raises Refused with its error."""
    while True:
        job = next(one for one in await destination.call("query-jobs") if one["id"] == name)
        if job["status"] == "concluded":
            break
        await asyncio.sleep(_LOOK)
    if "error" in job:
        await destination.call("job-dismiss", {"id": name})
        raise Refused(f"destination: {path} could not be made: {job['error']}")


# -- the source --------------------------------------------------------------------------------------------------------


async def start_mirror(
    source: End, disk: Disk, server: dict[str, Any], *, shallow: bool, tls: bool, speed: int
) -> None:
    """Begin to copy a disk to the destination."""
    node: dict[str, Any] = {
        "driver": "nbd",
        "node-name": disk.name,
        "server": server,
        "export": disk.name,
        "reconnect-delay": 30,
        "discard": "unmap",
        "detect-zeroes": "unmap",
    }
    if tls:
        node["tls-creds"] = f"{MARK}-tls"
        node["tls-hostname"] = server["host"] if server["type"] == "inet" else "localhost"
    await source.call("blockdev-add", node)
    mirror = {"job-id": disk.name, "device": disk.node, "target": disk.name, "sync": "top" if shallow else "full"}
    await source.call("blockdev-mirror", {**mirror, "speed": speed, "auto-dismiss": False})


async def hand_over(source: End, plan: Plan, uri: str, *, tls: bool) -> dict[str, Any]:
    """Let the source hand the guest over; the answer of query-migrate when that is over. Not to be interrupted."""
    creds = f"{MARK}-tls" if tls else ""
    await source.call(
        "migrate-set-parameters", {"tls-creds": creds, "tls-hostname": "localhost" if uri[0] == "u" else ""}
    )
    await source.call("migrate-set-capabilities", {"capabilities": [{"capability": "dirty-bitmaps", "state": True}]})
    names = [disk.name for disk in plan.disks]
    over = {"mirrors": names, "ends": names, "exports": plan.exports}
    await source.call("migrate", {"uri": uri, "x-hand-over": over})
    while True:
        state: dict[str, Any] = await source.call("query-migrate")
        if state["status"] in ("completed", "failed", "cancelled"):
            return state
        await asyncio.sleep(0.01)


async def forget(source: End) -> None:
    """After the hand-over: the source needs its end of the mirrors no more."""
    with suppress(Refused, ConnectionLost):
        await _clear_jobs(source)
        for name in await _made(source):
            await source.call("blockdev-del", {"node-name": name})
