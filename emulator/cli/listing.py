"""What ``-device help``, ``-object help`` and the like print: from the same types that check the arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from livedisk.emulator.block.driver import DRIVERS
from livedisk.emulator.device.options import MODELS, DeviceOptions
from livedisk.emulator.qmp.chardev import BACKENDS
from livedisk.emulator.qmp.model import Alternate, Array, Enum, Integer, Object, Type, plain_object
from livedisk.emulator.qmp.object_commands import OBJECT_TYPES


def listing(option: str, values: dict[str, Any]) -> str:
    """The answer to ``help`` in the argument of ``option``; ``values``: what else was given."""
    listing_of = _LISTINGS.get(option)
    return listing_of(values) if listing_of else f"No list for -{option}; see 'livedisk daemon --help'."


def _devices(values: dict[str, Any]) -> str:
    if values.get("driver") in MODELS:
        return _properties(str(values["driver"]), DeviceOptions)
    return _names("Devices:", MODELS)


def _objects(values: dict[str, Any]) -> str:
    kind = values.get("qom-type")
    if kind in OBJECT_TYPES:
        return _properties(str(kind), OBJECT_TYPES[str(kind)][0])
    return _names("List of user creatable objects:", OBJECT_TYPES)


def _drivers(values: dict[str, Any]) -> str:
    kind = values.get("driver")
    if kind in DRIVERS:
        return _properties(str(kind), DRIVERS[str(kind)].Options)
    return _names("Drivers:", DRIVERS)


def _chardevs(values: dict[str, Any]) -> str:
    return _names("Available chardev backend types:", BACKENDS)


_LISTINGS: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "device": _devices,
    "object": _objects,
    "blockdev": _drivers,
    "chardev": _chardevs,
}


def _names(title: str, names: Iterable[str]) -> str:
    return "\n".join([title, *(f"  {name}" for name in sorted(names))])


def _properties(name: str, cls: type[msgspec.Struct]) -> str:
    rows = sorted(f"  {member.name}=<{_word(member.type)}>" for member in plain_object(cls).members)
    return "\n".join([f"{name} options:", *rows])


def _word(node: Type) -> str:
    """A type in a word, for people."""
    if isinstance(node, Enum):
        return "|".join(node.values)
    if isinstance(node, Array):
        return f"list of {_word(node.element)}"
    if isinstance(node, Alternate):
        return node.name
    if isinstance(node, Object):
        return node.cls.__name__
    return node.kind.name if isinstance(node, Integer) else node.name
