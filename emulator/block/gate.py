"""The one gate through which a file named inside an image is opened.

An image's header is data, and data may be hostile: a guest that wrote a qcow2 header into its raw disk must not make us open the
file it names. So an image's driver never opens a name itself; it asks here, and the gate keeps these rules:

* A node or options given by the user win; the header's name is only used where the user said nothing.
* A relative name is resolved against the directory of the image that names it, as QEMU does. ``json:{...}`` is parsed as
  options; ``file:`` is a path; any other ``protocol:`` is refused by name unless a driver of that name takes a filename.
* The format is the recorded one. Where none is recorded the content is *not* believed: QEMU probes (and warns), we open the file
  as raw only if it does not look like another format, and otherwise say how to record the format. Probing would let whoever
  wrote the first bytes of a raw disk choose what is opened.
* A file that is already in the chain above is refused: a loop would never end.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from livedisk.emulator.block.driver import DRIVERS, Driver, driver_class
from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.block.permissions import Role
from livedisk.emulator.errors import BlockError

if TYPE_CHECKING:
    from livedisk.emulator.block.graph import Graph

log = logging.getLogger(__name__)
UNSET = msgspec.UNSET
_PROTOCOL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_MAGICS: Final[tuple[tuple[str, int, bytes], ...]] = (
    ("qcow2", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format"),
)
"""Name, offset, magic: formats that QEMU's probe would find."""


def looks_like(start: bytes) -> str | None:
    """The format other than raw that the first bytes of a file claim, or None."""
    for name, at, magic in _MAGICS:
        if start[at : at + len(magic)] == magic:
            return name
    return None


def resolve(node: Node, filename: str) -> str:
    """The path or URI that ``filename`` means inside ``node``'s image: relative paths stand beside the image.

    Raises BlockError where the image's own place is not known.
    """
    if filename.startswith("json:") or (_PROTOCOL.match(filename) and not filename.startswith("file:")):
        return filename
    prefix, path = ("file:", filename[5:]) if filename.startswith("file:") else ("", filename)
    if os.path.isabs(path):
        return filename
    place = node
    while place.children and (edge := place.children.get("file") or place.filtered) is not None:
        place = edge.node
    own = place.driver.filename
    remote = next((driver for driver in DRIVERS.values() if own.partition(":")[0] in driver.protocols), None)
    if remote is not None:
        raise BlockError(
            f"Cannot generate a base directory for {remote.name.upper()} nodes",
            hint=f"Give what '{filename}' means as an option, or record it in the image as an absolute name.",
        )
    if own.startswith("json:") or not own:
        raise BlockError(
            f"Cannot generate a base directory for {place.options.driver} nodes",
            hint="Give the backing file or data file as an option instead.",
        )
    own = own.removeprefix("file:")
    return prefix + os.path.join(os.path.dirname(own), path)


def protocol_options(node: Node | Graph, filename: str) -> BlockdevOptions:
    """Options of the protocol node that a (resolved) name means. Raises BlockError, naming the protocol, if it is not known."""
    if filename.startswith("json:"):
        return _json_options(node, filename[5:])
    match = _PROTOCOL.match(filename)
    name = match.group(1) if match is not None else "file"
    for reader in DRIVERS.values():
        if name in reader.protocols:
            return reader.options_of(filename)
    path = filename[5:] if name == "file" and match is not None else filename
    if name == "file":
        name = "host_device" if _is_device(path) and "host_device" in DRIVERS else "file"
    cls = DRIVERS.get(name)
    given = cls.parse_filename(path.partition(":")[2]) if cls is not None else None
    if cls is not None and given is not None:
        return cls.Options(driver=name, **{key: _named_child(node, cls, key, value) for key, value in given.items()})
    if cls is None or "filename" not in cls.Options.__struct_fields__:
        raise BlockError(f"Unknown protocol '{name}'", hint=f"'{filename}' cannot be opened from inside an image.")
    make: Callable[..., BlockdevOptions] = cls.Options
    return make(driver=name, filename=path)


def image_options(node: Node, filename: str, fmt: str, **generic: Any) -> BlockdevOptions:
    """Options of an image of format ``fmt`` that a command gives by name, without its backing file; ``node`` is one of the same
    graph. ``generic``: further options. Raises BlockError in QEMU's words."""
    file = protocol_options(node, filename)
    if driver_class(file.driver).is_format and filename.startswith("json:"):
        if file.driver != fmt:
            raise BlockError(f"'{filename}' is of format '{file.driver}', not '{fmt}'")
        if driver_class(fmt).supports_backing and getattr(file, "backing", UNSET) is UNSET:
            generic["backing"] = None
        return msgspec.structs.replace(file, **generic)
    cls = DRIVERS.get(fmt)
    if cls is None or cls.internal:
        raise BlockError(f"Unknown driver '{fmt}'")
    if file.driver == fmt:
        return msgspec.structs.replace(file, **generic)
    if cls.supports_backing:
        generic["backing"] = None
    make: Callable[..., BlockdevOptions] = cls.Options
    return make(driver=fmt, file=file, **generic)


def _named_child(node: Node | Graph, cls: type[Driver], key: str, value: Any) -> Any:
    """A value that a file name gave: of a child, the options that its own file name means. A file that stands for an image is
    one of qcow2 if it says so and is named so; its name no guest can choose."""
    if key not in cls.filename_children:
        return value
    file = protocol_options(node, value)
    if key in cls.image_children and value.endswith((".qcow2", ".qcow")) and _starts_as_qcow2(value):
        make: Callable[..., BlockdevOptions] = driver_class("qcow2").Options
        return make(driver="qcow2", file=file)
    return file


def _starts_as_qcow2(path: str) -> bool:
    try:
        with open(path.removeprefix("file:"), "rb") as file:
            return looks_like(file.read(512)) == "qcow2"
    except OSError:
        return False  # whoever opens it will say why


def _is_device(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISBLK(mode) or stat.S_ISCHR(mode)


def _json_options(node: Node | Graph, text: str) -> BlockdevOptions:
    parse = node.graph.parse_options
    if parse is None:
        raise BlockError("json: filenames are not available here")
    try:
        options = json.loads(text)
    except ValueError as error:
        raise BlockError(f"Could not parse the JSON options: {error}") from None
    if not isinstance(options, dict):
        raise BlockError("Invalid JSON object given")
    return parse(with_storage(nested(options)))


def nested(options: dict[str, Any]) -> dict[str, Any]:
    """The options with ``{"server.path": ...}`` written as ``{"server": {"path": ...}}``, and ``{"children.0": ...}`` as
    ``{"children": [...]}``: QEMU takes and writes both."""
    return {name: _lists(value) for name, value in _nested(options).items()}


def _lists(value: Any) -> Any:
    if isinstance(value, list):
        return [_lists(one) for one in value]
    if not isinstance(value, dict):
        return value
    whole = {name: _lists(one) for name, one in value.items()}
    numbered = [str(index) for index in range(len(whole))]
    return [whole[index] for index in numbered] if whole and set(numbered) == set(whole) else whole


def _nested(options: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for name, value in options.items():
        *path, last = name.split(".")
        inner = whole
        for step in path:
            inner = inner.setdefault(step, {})
            if not isinstance(inner, dict):
                raise BlockError(f"Parameter '{name}' contradicts another one")
        if isinstance(value, list):
            value = [_nested(one) if isinstance(one, dict) else one for one in value]
        elif isinstance(value, dict):
            value = _nested(value)
            present = inner.get(last)
            if isinstance(present, dict):
                value = {**present, **value}
        inner[last] = value
    return whole


def with_storage(options: dict[str, Any]) -> dict[str, Any]:
    """The (nested) options with what QEMU fills in: a child of which only the ``filename`` is given is a file of the host, or a
    device of it. An image below an image has to be of some format, which a name does not tell."""
    whole: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, list):
            value = [with_storage(one) if isinstance(one, dict) else one for one in value]
        elif isinstance(value, dict):
            value = with_storage(value)
            filename = value.get("filename")
            if isinstance(filename, str) and "driver" not in value and name not in ("backing", "target"):
                value = {"driver": "host_device" if _is_device(filename) else "file", **value}
        whole[name] = value
    return whole


async def open_backing(node: Node, ref: Any, filename: str | None, fmt: str | None) -> Edge | None:
    """Attach the backing file of ``node``: ``ref`` is the user's option (UNSET: what the header names).

    Raises BlockError or OSError; what was opened is closed then.
    """
    role = Role.COW
    if ref == "":
        log.warning('Use of "backing": "" is deprecated; use "backing": null instead')
        ref = None
    if ref is None:
        return None
    if ref is UNSET and not filename:
        return None
    resolved = resolve(node, filename) if ref is UNSET and filename else None
    try:
        if ref is not UNSET:
            return await node.graph.open_child(node, ref, "backing", role)
        assert resolved is not None
        _refuse_loop(node, resolved)
        return await _open_named(node, resolved, fmt)
    except BlockError as error:
        raise BlockError(f"Could not open backing file: {error}", hint=error.hint) from error
    except OSError as error:
        raise BlockError(f"Could not open backing file: {error.strerror or error}") from error


async def _open_named(node: Node, filename: str, fmt: str | None) -> Edge:
    options = protocol_options(node, filename)
    if filename.startswith("json:") and driver_class(options.driver).is_format:
        return await node.graph.open_child(node, options, "backing", Role.COW)
    if fmt and not driver_class(fmt).is_format:
        return await node.graph.open_child(node, options, "backing", Role.COW)
    if not fmt:
        await _check_raw(node, options, filename)
    cls = driver_class(fmt or "raw")
    make: Callable[..., BlockdevOptions] = cls.Options
    return await node.graph.open_child(node, make(driver=cls.name, file=options), "backing", Role.COW)


async def claimed_format(node: Node, options: BlockdevOptions) -> str | None:
    """The format other than raw that the content of a protocol node claims; opened for the look as a backing file of ``node``."""
    look = await node.graph.open(
        msgspec.structs.replace(options, read_only=True, node_name=UNSET), parent=node, role=Role.COW
    )
    try:
        start = bytearray(min(512, look.size))
        await look.read(0, memoryview(start))
    finally:
        await node.graph.release(look)
    return looks_like(bytes(start))


async def _check_raw(node: Node, options: BlockdevOptions, filename: str) -> None:
    """Raise BlockError if a file without a recorded format looks like anything but raw data."""
    found = await claimed_format(node, options)
    if found is not None:
        raise BlockError(
            f"the format of backing file '{filename}' is not recorded in the image, and its content looks like {found}",
            hint=f"If it is {found}, record it: 'qemu-img rebase -u -b {filename} -F {found} IMAGE'; "
            f"or give backing.driver. A raw disk may have been made to look like {found} by its guest.",
        )


def _refuse_loop(node: Node, filename: str) -> None:
    """Raise BlockError if the file is one that the chain above is made of."""
    identity = _identity(filename)
    if identity is None:
        return
    for above in _chain_above(node):
        own = above.children.get("file")
        while own is not None:
            if _identity(own.node.driver.filename) == identity:
                raise BlockError(f"'{filename}' is already in use above in its own backing chain (a loop)")
            own = own.node.children.get("file")


def _chain_above(node: Node) -> Iterator[Node]:
    """The node, and the nodes inside whose options it is being opened as a backing file."""
    seen: set[int] = set()
    current: Node | None = node
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.opened_by


def _identity(filename: str) -> tuple[int, int] | None:
    """Which file a name means on this host; None where it is no local file."""
    try:
        found = os.stat(filename.removeprefix("file:"))
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


async def open_data_file(node: Node, ref: Any, filename: str | None) -> Edge:
    """Attach the external data file of ``node``: ``ref`` is the user's option (UNSET: what the header names)."""
    if ref is not UNSET:
        return await node.graph.open_child(node, ref, "data-file", Role.DATA)
    if not filename:
        raise BlockError("'data-file' is required for this image")
    try:
        options = protocol_options(node, resolve(node, filename))
        return await node.graph.open_child(node, options, "data-file", Role.DATA)
    except OSError as error:
        raise BlockError(f"Could not open '{filename}': {error.strerror or error}") from error
