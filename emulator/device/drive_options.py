"""The options of ``-drive`` and drive_add, read as QEMU reads them, in its order of checks and with its words.

Legacy words (``if``, ``index``, ``cache``, ``aio``, ``readonly``, ``snapshot``, ``werror``, ``throttling.*``) are taken out;
what is left describes the node as ``-blockdev`` does, with dots for members of members. ``file`` is a file's name, a URI or
``json:{...}``. Without a format the content is looked at: it is what its header says; a header that leads to other files is only
believed where the file is named like an image of its format (a guest can write a header into a raw disk).

Where we differ: ``if=ide`` and other buses than virtio are refused, and ``if`` absent is virtio: there is no machine with
another bus. ``media=cdrom`` and write protection by guessing do not exist here. Source: QEMU ``blockdev.c`` (drive_new,
blockdev_init, extract_common_blockdev_options), ``block.c`` (bdrv_parse_cache_mode).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from livedisk.emulator.block.driver import DRIVERS
from livedisk.emulator.block.gate import looks_like, nested, protocol_options, with_storage
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.block.throttle import Bucket, Limit, Limits
from livedisk.emulator.block.types import DetectZeroes
from livedisk.emulator.device.drives import DriveSpec
from livedisk.emulator.device.policy import OnError
from livedisk.emulator.errors import BlockError, ParameterError
from livedisk.emulator.qmp.visit import JSON, KEYVAL, Syntax, parse_integer, parse_size, visit

_BUSES: Final = ("none", "ide", "scsi", "floppy", "pflash", "mtd", "sd", "virtio", "xen")
CACHE_MODES: Final[dict[str, tuple[bool, bool, bool]]] = {
    "none": (True, False, True), "off": (True, False, True), "directsync": (True, False, False),
    "writeback": (False, False, True), "unsafe": (False, True, True), "writethrough": (False, False, False),
}  # fmt: skip
"""Mode: direct, no-flush, write cache."""
_LIMITS: Final = tuple(bucket.value for bucket in Bucket)


class _Given:
    """The options as they stand; each is taken once."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def take(self, name: str, default: str | None = None) -> str | None:
        found: str | None = self.values.pop(name, default)
        return found

    def switch(self, name: str, *, default: bool = False) -> bool:
        text = self.take(name)
        if text is None:
            return default
        if text not in ("on", "off", "yes", "no", "true", "false", "y", "n"):
            raise ParameterError(f"Parameter '{name}' expects 'on' or 'off'")
        return text in ("on", "yes", "true", "y")

    def number(self, name: str) -> int | None:
        text = self.take(name)
        if text is None:
            return None
        value = parse_integer(text)
        if value is None or value < 0:
            raise ParameterError(f"Parameter '{name}' expects a number")
        return value


_ALIASES: Final = {
    **{
        f"{unit}{way}{burst}": f"throttling.{unit}-{name}{burst.replace('_', '-')}"
        for unit in ("iops", "bps")
        for burst in ("", "_max")
        for way, name in (("", "total"), ("_rd", "read"), ("_wr", "write"))
    },
    "iops_size": "throttling.iops-size",
    "group": "throttling.group",
    "readonly": "read-only",
}
"""Words of older versions, in QEMU's order."""


async def read(
    graph: Graph, values: dict[str, Any], present: Iterable[DriveSpec], warn: Callable[[str], None]
) -> DriveSpec:
    """What ``key=value``s describe. ``present``: the drives that there are; ``warn``: told of a guessed format.

    Raises ParameterError, BlockError or OSError.
    """
    given = _Given(dict(values))
    for old, new in _ALIASES.items():
        if old in given.values:
            if new in given.values:
                raise ParameterError(f"'{new}' and its alias '{old}' can't be used at the same time")
            given.values[new] = given.values.pop(old)
    media = given.take("media")
    _check_media(media)
    bus = given.take("if", "virtio")
    if bus not in _BUSES:
        raise BlockError(f"unsupported bus type '{bus}'")
    if bus not in ("none", "virtio"):
        raise BlockError(f"if={bus}: there is no such bus here; use if=virtio, or if=none and -device")
    name, bus_number, unit = _name(given, str(bus), list(present))
    write_cache = _cache(given)
    error = {kind: _policy(given, kind) for kind in ("werror", "rerror")}
    snapshot, copy_on_read = given.switch("snapshot"), given.switch("copy-on-read")
    group, limits = given.take("throttling.group") or "", _limits(given)
    account = {name: given.switch(f"stats-{name}", default=True) for name in ("account-invalid", "account-failed")}
    detect_zeroes = _detect_zeroes(given)
    node = await _node(graph, given, warn)
    if copy_on_read and node is not None and node.read_only is True:
        warn("disabling copy-on-read on read-only drive")
    limits.check()
    return DriveSpec(
        name=name,
        interface=str(bus),
        bus=bus_number,
        unit=unit,
        node=node,
        write_cache=write_cache,
        rerror=error["rerror"],
        werror=error["werror"],
        copy_on_read=copy_on_read,
        snapshot=snapshot,
        detect_zeroes=detect_zeroes,
        limits=limits if limits.any else None,
        group=group,
        account_invalid=account["account-invalid"],
        account_failed=account["account-failed"],
    )


def _check_media(media: str | None) -> None:
    if media not in (None, "disk", "cdrom"):
        raise BlockError(f"'{media}' invalid media")
    if media == "cdrom":
        raise BlockError("media=cdrom: there are no removable media here; readonly=on makes a disk that is only read")


def _name(given: _Given, interface: str, present: list[DriveSpec]) -> tuple[str, int, int]:
    """The drive's name, the number of its bus, and its own number there."""
    index, unit, bus = given.number("index"), given.number("unit"), given.number("bus") or 0
    if index is not None and (bus or unit is not None):
        raise BlockError("index cannot be used with bus and unit")
    name = given.take("id")
    if any(one.name == name for one in present):
        raise BlockError(f"Duplicate ID '{name}' for drive")
    place = index if index is not None else unit
    used = {one.unit for one in present if (one.interface, one.bus) == (interface, bus)}
    if place is None:
        place = next(number for number in range(len(used) + 1) if number not in used)
    if place in used:
        raise BlockError(f"drive with bus={bus}, unit={place} (index={-1 if index is None else index}) exists")
    return name or f"{interface}{place}", bus, place


def _cache(given: _Given) -> bool:
    """Put the parts of a cache mode in their places. Returns whether there is a write cache."""
    mode = given.take("cache")
    write_cache = given.switch("cache.writeback", default=True)
    if mode is not None:
        if mode not in CACHE_MODES:
            raise BlockError("invalid cache option")
        direct, no_flush, writeback = CACHE_MODES[mode]
        given.values.setdefault("cache.direct", "on" if direct else "off")
        given.values.setdefault("cache.no-flush", "on" if no_flush else "off")
        write_cache = write_cache and writeback
    return write_cache


def _policy(given: _Given, kind: str) -> OnError:
    text = given.take(kind)
    if text is None:
        return OnError.AUTO
    allowed = ("ignore", "report", "stop", *(("enospc",) if kind == "werror" else ()))
    if text not in allowed:
        raise BlockError(f"'{text}' invalid {'write' if kind == 'werror' else 'read'} error action")
    return OnError(text)


def _detect_zeroes(given: _Given) -> DetectZeroes:
    text = given.take("detect-zeroes") or "off"
    if text not in list(DetectZeroes):
        raise BlockError(f"invalid parameter value: {text}")
    return DetectZeroes(text)


def _limits(given: _Given) -> Limits:
    found: dict[Bucket, Limit] = {}
    for bucket in Bucket:
        average, maximum, length = (given.number(f"throttling.{bucket}{end}") for end in ("", "-max", "-max-length"))
        found[bucket] = Limit(average or 0, maximum or 0, 1 if length is None else length)
    return Limits(found, given.number("throttling.iops-size") or 0)


# -- the node ----------------------------------------------------------------------------------------------------------
async def _node(graph: Graph, given: _Given, warn: Callable[[str], None]) -> BlockdevOptions | None:
    filename, fmt, driver, aio = given.take("file"), given.take("format"), given.take("driver"), given.take("aio")
    if fmt is not None and driver is not None:
        raise BlockError("Cannot specify both 'driver' and 'format'")
    fmt = fmt or driver
    if aio not in (None, "threads", "native", "io_uring"):
        raise BlockError("invalid aio option")
    if given.values.get("discard") not in (None, "ignore", "off", "unmap", "on"):
        raise BlockError("Invalid discard option")
    if "discard" in given.values:
        given.values["discard"] = {"off": "ignore", "on": "unmap"}.get(given.values["discard"], given.values["discard"])
    if filename is None and fmt is None and not _describes_more(given.values):
        return None
    if fmt is not None and (fmt not in DRIVERS or DRIVERS[fmt].internal):
        raise BlockError(f"Unknown driver '{fmt}'")
    rest = with_storage(nested(given.values))
    backing = rest.get("backing")
    if isinstance(backing, dict) and "driver" not in backing:
        backing["driver"] = await _guess_described(graph, backing, KEYVAL, warn)
    if filename is not None and filename.startswith("json:"):
        return await _from_json(graph, filename, fmt, rest, warn)
    if filename is None:
        return typed({"driver": fmt or await _guess_described(graph, rest, KEYVAL, warn), **rest})
    below = rest.pop("file", {})
    file = _file(graph, filename, below, aio)
    if fmt is None:
        fmt = await _guess(graph, filename, file, warn)
    if fmt == file.driver:
        return msgspec.structs.replace(file, **_generic(rest))
    if not DRIVERS[fmt].is_format:
        raise BlockError(f"Block format '{fmt}' does not support the option 'file'")
    return msgspec.structs.replace(typed({"driver": fmt, **rest, "file": "-"}), file=file)


def _describes_more(values: Iterable[str]) -> bool:
    """Whether an option is there that would have no meaning for a drive without medium."""
    return any(not name.startswith(("cache.", "discard", "read-only", "auto-read-only")) for name in values)


def typed(options: dict[str, Any]) -> BlockdevOptions:
    """Options of a node as strings, of `-drive` or ``--image-opts``: sizes may have suffixes. Raises BlockError, ParameterError
    in QEMU's words."""
    try:
        return visit(BlockdevOptions, options, KEYVAL)
    except ParameterError as error:
        number = re.fullmatch(r"Parameter '([^']*)' expects integer", str(error))
        sized = _sized(options, number[1].split(".")) if number is not None else None
        if sized is not None:
            return typed(sized)  # here every number may have a suffix
        unknown = re.fullmatch(r"Parameter '([^']*)' is unexpected", str(error))
        if unknown is not None:
            raise BlockError(
                f"Block format '{options['driver']}' does not support the option '{unknown[1]}'"
            ) from error
        missing = re.fullmatch(r"Parameter 'file' is missing", str(error))
        if missing is not None:
            raise BlockError('A block device must be specified for "file"') from error
        raise


def _sized(options: Any, path: list[str]) -> Any:
    """The options with the size at ``path`` as a plain number; None if there is no size, or a plain number already."""
    if not path:
        size = parse_size(options) if isinstance(options, str) and not options.isdigit() else None
        return None if size is None else str(size)
    member, *below = path
    index = int(member) if isinstance(options, list) else member
    inner = _sized(options[index], below)
    if inner is None:
        return None
    if isinstance(options, list):
        return [inner if place == index else one for place, one in enumerate(options)]
    return {**options, index: inner}


def _generic(rest: dict[str, Any]) -> dict[str, Any]:
    """Options that every node takes, typed."""
    options = visit(BlockdevOptions, {"driver": "null-co", **rest}, KEYVAL)
    names = [name for name in BlockdevOptions.__struct_fields__ if name != "driver"]
    return {name: getattr(options, name) for name in names if getattr(options, name) is not msgspec.UNSET}


async def _from_json(
    graph: Graph, filename: str, fmt: str | None, rest: dict[str, Any], warn: Callable[[str], None]
) -> BlockdevOptions:
    try:
        described = json.loads(filename[5:])
    except ValueError as error:
        raise BlockError(f"Could not parse the JSON options: {error}") from None
    if not isinstance(described, dict):
        raise BlockError("Invalid JSON object given")
    described = with_storage(nested(described))
    if "driver" not in described:
        described["driver"] = fmt or await _guess_described(graph, described, JSON, warn)
    options = visit(BlockdevOptions, described, JSON)
    return msgspec.structs.replace(options, **_generic(rest))


def _file(graph: Graph, filename: str, below: Any, aio: str | None) -> BlockdevOptions:
    """The protocol node: of the name, with what ``file.*`` adds."""
    file = protocol_options(graph, filename)
    more = dict(below) if isinstance(below, dict) else {}
    if aio is not None and "aio" in type(file).__struct_fields__:
        more.setdefault("aio", aio)
    if not more:
        return file
    if "filename" not in type(file).__struct_fields__:
        names = ", ".join(f"file.{name}" for name in more)
        raise BlockError(f"'{filename}' says all of its node; {names} cannot be added to it")
    return typed({"driver": file.driver, "filename": file.filename, **more})  # type: ignore[attr-defined]


async def _guess_described(graph: Graph, options: dict[str, Any], syntax: Syntax, warn: Callable[[str], None]) -> str:
    """The format of an image of which nothing but its file is described."""
    file = options.get("file")
    if not isinstance(file, dict):
        raise BlockError("Must specify either driver or file")
    return await _guess(graph, str(file.get("filename", "")), visit(BlockdevOptions, file, syntax), warn)


async def _guess(graph: Graph, filename: str, file: BlockdevOptions, warn: Callable[[str], None]) -> str:
    look = await graph.open(msgspec.structs.replace(file, read_only=True, node_name=msgspec.UNSET))
    try:
        start = bytearray(min(look.size, 2 << 20))
        await look.read(0, memoryview(start))
    finally:
        await graph.release(look)
    claimed = looks_like(bytes(start[:512]))
    if claimed is None:
        warn(
            f"Image format was not specified for '{filename}' and probing guessed raw.\n"
            "         Specify the 'raw' format explicitly: a guest could make its disk look like another format."
        )
        return "raw"
    if claimed not in DRIVERS:
        raise BlockError(f"'{filename}' looks like {claimed}, which is not supported; say format=raw if it is raw data")
    leads_on = int.from_bytes(start[8:16], "big") or start[79:80] > b"\x03"
    if claimed == "qcow2" and leads_on and not filename.endswith((".qcow2", ".qcow")):
        raise BlockError(
            f"'{filename}' starts with a qcow2 header that names another file",
            hint="A guest could have written it into a raw disk: say format=qcow2 if you trust it, else format=raw.",
        )
    return claimed
