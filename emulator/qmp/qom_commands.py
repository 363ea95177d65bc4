"""The tree of `qom` over QMP: qom-list, qom-get, qom-set, and what types there are and what they have.

Source: QEMU ``qapi/qom.json``, ``qapi/qdev.json``, ``qom/qom-qmp-cmds.c``; messages asked from QEMU 10.0.2.
"""

from __future__ import annotations

from typing import Any

from livedisk.emulator.device.options import MODELS
from livedisk.emulator.errors import BlockError, DeviceNotFound, LiveDiskError
from livedisk.emulator.qmp import qom
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.object_commands import OBJECT_TYPES
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.emulator.qmp.registry import command


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


_TYPE = ObjectPropertyInfo(name="type", type="string")
_BACKEND = ObjectPropertyInfo(name="virtio-backend", type=f"child<{qom.BACKEND}>")


@command("qom-list", allow_preconfig=True)
async def qom_list(ctx: Context, args: QomPath) -> list[ObjectPropertyInfo]:
    """The properties of an object, and the objects below it."""
    _, found = qom.resolve(ctx.daemon, args.path)
    own = [ObjectPropertyInfo(name=name, type=one.type) for name, one in found.properties.items()]
    below = [ObjectPropertyInfo(name=name, type=f"child<{one.type}>") for name, one in found.children.items()]
    return [_TYPE, *own, *below]


@command("qom-get", allow_preconfig=True)
async def qom_get(ctx: Context, args: QomProperty) -> Any:
    """The value of a property; of an object below, its path."""
    path, found = qom.resolve(ctx.daemon, args.path)
    if args.property in found.children:
        return f"{path.rstrip('/')}/{args.property}"
    return found.find(args.property).get()


@command("qom-set", allow_preconfig=True)
async def qom_set(ctx: Context, args: QomSet) -> None:
    """Change a property."""
    _, found = qom.resolve(ctx.daemon, args.path)
    if args.property in found.children:
        raise LiveDiskError(f"Property '{found.type}.{args.property}' is not writable")
    one = found.find(args.property)
    if one.set is None:
        raise LiveDiskError(one.refusal or f"Property '{found.type}.{args.property}' is not writable")
    await one.set(args.value)


class QomListTypes(QapiStruct):
    """``implements``: only what derives from that type; ``abstract``: also types of which there are no objects."""

    implements: str | UnsetType = UNSET
    abstract: bool = False


class ObjectTypeInfo(QapiStruct, kw_only=True):
    """A type, and what it derives from."""

    name: str
    abstract: bool | UnsetType = UNSET
    parent: str | UnsetType = UNSET


@command("qom-list-types", allow_preconfig=True)
async def qom_list_types(ctx: Context, args: QomListTypes) -> list[ObjectTypeInfo]:
    """The types that there are here."""
    known = qom.types()
    found = []
    for name, parent in known.items():
        abstract = name in qom.ABSTRACT
        if (abstract and not args.abstract) or not _implements(known, name, args.implements):
            continue
        found.append(ObjectTypeInfo(name=name, abstract=True if abstract else UNSET, parent=parent or UNSET))
    return found


def _implements(known: dict[str, str | None], name: str, wanted: str | UnsetType) -> bool:
    if not isinstance(wanted, str):
        return True
    if wanted == "user-creatable":
        return name in OBJECT_TYPES
    current: str | None = name
    while current is not None and current != wanted:
        current = known.get(current)
    return current is not None


class QomTypeName(QapiStruct):
    """A type."""

    typename: str


@command("qom-list-properties", allow_preconfig=True)
async def qom_list_properties(ctx: Context, args: QomTypeName) -> list[ObjectPropertyInfo]:
    """The properties that objects of a type have. Raises DeviceNotFound."""
    if args.typename not in qom.types():
        raise DeviceNotFound(f"Class '{args.typename}' not found")
    return [_TYPE, *_properties_of(args.typename)]


def _properties_of(typename: str) -> list[ObjectPropertyInfo]:
    if typename in OBJECT_TYPES:
        return [ObjectPropertyInfo(name=name, type=kind) for name, kind in qom.object_properties(typename)]
    if typename not in (qom.DEVICE, qom.BACKEND, "device"):
        return []
    common = [ObjectPropertyInfo(name=name, type=one.type) for name, one in qom.common_properties().items()]
    if typename == "device":
        return common
    own = [one for one in _of_device() if typename == qom.DEVICE or not qom.of_pci(one.name)]
    return [*common, *own, *([_BACKEND] if typename == qom.DEVICE else [])]


@command("device-list-properties", allow_preconfig=True)
async def device_list_properties(ctx: Context, args: QomTypeName) -> list[ObjectPropertyInfo]:
    """The properties that ``-device`` takes for a model. Raises DeviceNotFound, BlockError for the type of something else."""
    if args.typename not in MODELS:
        if args.typename in qom.types():
            raise BlockError("Parameter 'typename' expects a non-abstract device type")
        raise DeviceNotFound(f"Device '{args.typename}' not found")
    return [*_of_device(), _BACKEND]


def _of_device() -> list[ObjectPropertyInfo]:
    found = []
    for name, kind in qom.device_properties():
        default = qom.device_default(name)
        switch = {"bool": qom.SWITCH, "OnOffAuto": f"{qom.SWITCH}/auto"}.get(kind)
        description = qom.DESCRIPTIONS.get(name, switch or UNSET)
        found.append(ObjectPropertyInfo(name=name, type=kind, description=description, default_value=default))
    return found
