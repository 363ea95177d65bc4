"""qom-list, qom-get and qom-set on the objects that users made (``/objects/ID``, or the id alone).

What has properties here: throttle groups, whose ``limits`` can be changed while they work; of every object its ``type``.
Devices and the machine are not in this tree. Source: QEMU ``qapi/qom.json``, ``qom/qom-qmp-cmds.c``; messages asked from
QEMU 10.0.2.
"""

from __future__ import annotations

from typing import Any

from livedisk.emulator.block.throttle import ThrottleGroup
from livedisk.emulator.errors import DeviceNotFound, LiveDiskError
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.object_commands import Iothread, Secret
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.emulator.qmp.registry import command
from livedisk.emulator.qmp.throttle_commands import ThrottleGroupQom, ThrottleLimits
from livedisk.emulator.qmp.visit import JSON, visit

_TYPES: dict[type, str] = {ThrottleGroup: "throttle-group", Iothread: "iothread", Secret: "secret"}
_FOLDERS = ("/objects", "objects", "/objects/")


class QomPath(QapiStruct):
    """An object."""

    path: str


class QomProperty(QapiStruct):
    """A property of an object."""

    path: str
    property: str


class QomSet(QapiStruct):
    """A property of an object, and its new value."""

    path: str
    property: str
    value: Any


class ObjectPropertyInfo(QapiStruct, kw_only=True):
    """A property, or (of type ``child<TYPE>``) an object below."""

    name: str
    type: str
    description: str | UnsetType = UNSET
    default_value: Any = UNSET


def _find(ctx: Context, path: str) -> Any:
    name = path.removeprefix("/objects/")
    if name not in ctx.daemon.objects:
        raise DeviceNotFound(f"Device '{path}' not found")
    return ctx.daemon.objects[name]


def _type(thing: Any) -> str:
    return _TYPES.get(type(thing), type(thing).__name__)


def _properties(thing: Any) -> dict[str, str]:
    own = ThrottleGroupQom.names() if isinstance(thing, ThrottleGroup) else {}
    return {"type": "string", **own}


def _check(thing: Any, name: str) -> None:
    if name not in _properties(thing):
        raise LiveDiskError(f"Property '{_type(thing)}.{name}' not found")


@command("qom-list", allow_preconfig=True)
async def qom_list(ctx: Context, args: QomPath) -> list[ObjectPropertyInfo]:
    """The properties of an object; of ``/objects``, the objects."""
    if args.path in _FOLDERS:
        objects = ctx.daemon.objects
        children = [ObjectPropertyInfo(name=name, type=f"child<{_type(objects[name])}>") for name in objects]
        return [ObjectPropertyInfo(name="type", type="string"), *children]
    found = _properties(_find(ctx, args.path))
    return [ObjectPropertyInfo(name=name, type=kind) for name, kind in found.items()]


@command("qom-get", allow_preconfig=True)
async def qom_get(ctx: Context, args: QomProperty) -> Any:
    """The value of a property."""
    thing = _find(ctx, args.path)
    _check(thing, args.property)
    return _type(thing) if args.property == "type" else ThrottleGroupQom.get(thing, args.property)


@command("qom-set", allow_preconfig=True)
async def qom_set(ctx: Context, args: QomSet) -> None:
    """Change a property."""
    thing = _find(ctx, args.path)
    _check(thing, args.property)
    if args.property == "type":
        raise LiveDiskError(f"Property '{_type(thing)}.type' is not writable")
    value = visit(_Limits, {"limits": args.value}, JSON).limits if args.property == "limits" else None
    ThrottleGroupQom.set(thing, args.property, value)


class _Limits(QapiStruct):
    """So that messages name what is wrong as QEMU does."""

    limits: ThrottleLimits
