"""What ``info block`` prints, from what query-block and query-named-block-nodes answer.

Source: QEMU ``block/monitor/block-hmp-cmds.c`` (print_block_info), ``block/qapi.c`` (bdrv_node_info_dump,
bdrv_snapshot_dump), ``util/cutils.c`` (size_to_str). Compared with QEMU 10.0.2 by feeding its own answers through
this module.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from livedisk.emulator.qmp.encode import ordered

Wire = dict[str, Any]

_THROTTLES = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
_THROTTLE_MEMBERS = (
    *("bps", "bps_rd", "bps_wr", "bps_max", "bps_rd_max", "bps_wr_max"),
    *("iops", "iops_rd", "iops_wr", "iops_max", "iops_rd_max", "iops_wr_max", "iops_size"),
)


def print_block_info(device: Wire | None, inserted: Wire | None, *, verbose: bool) -> str:
    """One device (BlockInfo), or one node without a device; ``inserted`` is the BlockDeviceInfo of what is in it."""
    lines = [_headline(device, inserted)]
    if device is not None:
        lines += _device_lines(device)
    if inserted is not None:
        lines += _node_lines(inserted)
        if verbose:
            lines += ["", "Images:"]
            lines += _images(inserted["image"])
    return "".join(f"{line}\n" for line in lines)


def _headline(device: Wire | None, inserted: Wire | None) -> str:
    node_name = (inserted or {}).get("node-name")
    if device is not None and device["device"]:
        name = device["device"] + (f" ({node_name})" if node_name else "")
    else:
        name = node_name or (device or {}).get("qdev") or "<anonymous>"
    if inserted is None:
        return f"{name}: [not inserted]"
    notes = [inserted["drv"]]
    notes += ["read-only"] if inserted["ro"] else []
    notes += ["encrypted"] if inserted["encrypted"] else []
    notes += [] if inserted.get("active", True) else ["inactive"]
    return f"{name}: {inserted['file']} ({', '.join(notes)})"


def _device_lines(device: Wire) -> Iterator[str]:
    if "qdev" in device:
        yield f"    Attached to:      {device['qdev']}"
    if device.get("io-status", "ok") != "ok":
        yield f"    I/O status:       {device['io-status']}"
    if device["removable"]:
        locked = "" if device["locked"] else "not "
        tray = "open" if device.get("tray_open") else "closed"
        yield f"    Removable device: {locked}locked, tray {tray}"


def _node_lines(node: Wire) -> Iterator[str]:
    cache = node["cache"]
    mode = "writeback" if cache["writeback"] else "writethrough"
    mode += ", direct" if cache["direct"] else ""
    mode += ", ignore flushes" if cache["no-flush"] else ""
    yield f"    Cache mode:       {mode}"
    if "backing_file" in node:
        yield f"    Backing file:     {node['backing_file']} (chain depth: {node['backing_file_depth']})"
    if node["detect_zeroes"] != "off":
        yield f"    Detect zeroes:    {node['detect_zeroes']}"
    if any(node[name] for name in _THROTTLES):
        limits = " ".join(f"{name}={node.get(name, 0)}" for name in _THROTTLE_MEMBERS)
        yield f"    I/O throttling:   {limits} group={node.get('group')}"


def _images(image: Wire | None) -> Iterator[str]:
    """The image and those below it, as qemu-img info prints them."""
    while image is not None:
        yield from _image(image)
        image = image.get("backing-image")


def _image(image: Wire) -> Iterator[str]:
    yield f"image: {image['filename']}"
    yield f"file format: {image['format']}"
    yield f"virtual size: {human_size(image['virtual-size'])} ({image['virtual-size']} bytes)"
    yield f"disk size: {human_size(image['actual-size']) if 'actual-size' in image else 'unavailable'}"
    if image.get("encrypted"):
        yield "encrypted: yes"
    if "cluster-size" in image:
        yield f"cluster_size: {image['cluster-size']}"
    if image.get("dirty-flag"):
        yield "cleanly shut down: no"
    if "backing-filename" in image:
        yield _backing(image)
        if "backing-filename-format" in image:
            yield f"backing file format: {image['backing-filename-format']}"
    if image.get("snapshots"):
        yield "Snapshot list:"
        yield from snapshot_table(image["snapshots"])
    yield from specific_lines(image.get("format-specific"))


def specific_lines(specific: Mapping[str, Any] | None) -> Iterator[str]:
    """An image's format-specific information, below a heading; nothing where there is none."""
    data = (specific or {}).get("data")
    if data:
        yield "Format specific information:"
        yield from _tree(data, 1)


def _backing(image: Wire) -> str:
    name, full = image["backing-filename"], image.get("full-backing-filename")
    if full is None:
        return f"backing file: {name} (cannot determine actual path)"
    return f"backing file: {name}" + (f" (actual path: {full})" if full != name else "")


def _tree(value: Any, depth: int) -> Iterator[str]:
    """Objects and lists, indented; dashes in names become spaces."""
    items = [(f"[{index}]", item) for index, item in enumerate(value)] if isinstance(value, list) else []
    if isinstance(value, dict):
        items = [(key.replace("-", " "), value[key]) for key in ordered(tuple(value))]
    for name, item in items:
        if isinstance(item, dict | list):
            yield f"{'    ' * depth}{name}:"
            yield from _tree(item, depth + 1)
        else:
            yield f"{'    ' * depth}{name}: {_leaf(item)}"


def _leaf(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


def human_size(size: int) -> str:
    """Bytes in three digits and a binary unit: ``64 MiB``."""
    exponent = math.frexp(size / (1000.0 / 1024.0))[1] if size else 0
    step = max(0, (exponent - 1) // 10)
    return f"{size / (1 << (step * 10)):0.3g} {('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei')[step]}B"


def snapshot_table(snapshots: list[Wire]) -> Iterator[str]:
    """Internal snapshots, one a line below a heading."""
    layout = "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}"
    yield layout.format("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")
    for snapshot in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["date-sec"]))
        seconds, milliseconds = snapshot["vm-clock-sec"], snapshot["vm-clock-nsec"] // 1_000_000
        clock = f"{seconds // 3600:04d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{milliseconds:03d}"
        size = human_size(snapshot["vm-state-size"])
        icount = str(snapshot["icount"]) if "icount" in snapshot else "--"
        yield layout.format(snapshot["id"], snapshot["name"], size, date, clock, icount)
