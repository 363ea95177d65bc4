"""The tree of everything that has a path (QEMU's object model): devices, user-made objects, character devices.

    /            machine   peripheral, peripheral-anon (devices, each with its virtio-backend)
                 objects   what object-add made
                 chardevs  character devices

The tree is put together anew for each question, from what there is. A path is absolute, or the end of one (``virtio0``,
``virtio0/virtio-backend``), if only one object has such a path. A property has a type, a getter, and a setter where it can be
changed while the daemon runs: a device's ``drive`` moves it to another node, an iothread's numbers are only kept, a throttle
group's ``limits`` hold from then on.

Source: QEMU ``qom/object.c``, ``qom/qom-qmp-cmds.c``, ``hw/core/qdev-properties-system.c`` (set_drive); asked from QEMU 10.0.2.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from livedisk.emulator.block.throttle import ThrottleGroup
from livedisk.emulator.device.options import DeviceOptions
from livedisk.emulator.device.virtio_blk import VirtioBlk
from livedisk.emulator.errors import DeviceNotFound, LiveDiskError, NodeNotFound, ParameterError
from livedisk.emulator.qmp.context import Daemon
from livedisk.emulator.qmp.model import Array, Enum, Integer, Member, Scalar, plain_object
from livedisk.emulator.qmp.object_commands import OBJECT_TYPES, Iothread, IothreadOptions, ObjectOptions
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct
from livedisk.emulator.qmp.throttle_commands import ThrottleGroupQom, ThrottleLimits
from livedisk.emulator.qmp.visit import JSON, visit

Setter = Callable[[Any], Awaitable[None]]

DEVICE: Final = "virtio-blk-pci"
BACKEND: Final = "virtio-blk-device"
_QEMU_NAMES: Final = {
    "SecretFormat": "QCryptoSecretFormat",
    "Endpoint": "QCryptoTLSCredsEndpoint",
    "OnError": "BlockdevOnError",
    "Policy": "QAuthZListPolicy",
}
"""What QEMU calls an enumeration that has another name here."""
_OF_PCI: Final = frozenset((
    "bus", "addr", "acpi-index", "aer", "ats", "busnr", "class", "disable-legacy", "disable-modern", "failover_pair_id",
    "ioeventfd", "migrate-extra", "modern-pio-notify", "multifunction", "page-per-vq", "rombar", "romfile", "romsize",
    "vectors", "virtio-pci-bus-master-bug-migration",
))  # fmt: skip
"""Properties of the part that sits on a bus; the others belong to the virtio part below it."""
_NOT_PROPERTIES: Final = ("driver", "id", "bus")
_KINDS: Final = {
    "iothread": "link<iothread>",
    "busnr": "busnr",
    "iothread-vq-mapping": "IOThreadVirtQueueMappingList",
}
SWITCH: Final = "on/off"
DESCRIPTIONS: Final = {
    "addr": "Slot and optional function number, example: 06.0 or 06",
    "iothread-vq-mapping": 'IOThread virtqueue mapping list [{"iothread":"<id>", "vqs":[1,2,3,...]},...]',
    "drive": "Node name or ID of a block device to use as a backend",
    "werror": "Error handling policy (report/ignore/enospc/stop/auto)",
    "rerror": "Error handling policy (report/ignore/enospc/stop/auto)",
    "logical_block_size": "A power of two between 512 B and 2 MiB",
    "physical_block_size": "A power of two between 512 B and 2 MiB",
}
DEFAULTS: Final[dict[str, Any]] = {
    "addr": -1, "romsize": 0xFFFFFFFF, "rombar": -1, "acpi-index": 0, "migrate-extra": True, "vectors": 0xFFFFFFFF,
    "ioeventfd": True, "class": 0, "disable-legacy": "auto", "lcyls": 0, "lheads": 0, "lsecs": 0, "notify_on_empty": True,
    "use-disabled-flag": True, "use-started": True, "any_layout": True, "request-merging": True, "queue_reset": True,
    "indirect_desc": True, "event_idx": True, "backend_defaults": "auto",
}  # fmt: skip
"""QEMU's defaults of properties that have no effect here and so none of their own; a switch that is not named is off."""


@dataclass(frozen=True)
class Property:
    """One property. ``set``: None where it cannot be changed; ``refusal``: what a change is then answered."""

    type: str
    get: Callable[[], Any]
    set: Setter | None = None
    refusal: str = ""


@dataclass
class QomObject:
    """One object of the tree."""

    type: str
    properties: dict[str, Property] = field(default_factory=dict)
    children: dict[str, QomObject] = field(default_factory=dict)

    def find(self, name: str) -> Property:
        """Raises LiveDiskError in QEMU's words."""
        if name == "type":
            return Property("string", lambda: self.type)
        try:
            return self.properties[name]
        except KeyError:
            raise LiveDiskError(f"Property '{self.type}.{name}' not found") from None


# -- the tree ----------------------------------------------------------------------------------------------------------
def root(daemon: Daemon) -> QomObject:
    """The whole tree as it is now."""
    named, unnamed = QomObject("container"), QomObject("container")
    for device in daemon.devices:
        folder = named if device.id else unnamed
        folder.children[device.path.rpartition("/")[2]] = _device(daemon, device)
    machine = QomObject("none-machine", children={"peripheral": named, "peripheral-anon": unnamed})
    objects = QomObject("container")
    for name in daemon.objects:
        objects.children[name] = _made(daemon, name)
    chardevs = QomObject("container")
    for name, kind in daemon.chardevs():
        chardevs.children[name] = QomObject(f"chardev-{kind}")
    return QomObject("container", children={"machine": machine, "objects": objects, "chardevs": chardevs})


def resolve(daemon: Daemon, path: str) -> tuple[str, QomObject]:
    """The object at a path, or at the only one that ends so, and its absolute path. Raises DeviceNotFound or LiveDiskError."""
    top = root(daemon)
    steps = [step for step in path.split("/") if step]
    if path.startswith("/"):
        found: QomObject | None = top
        for step in steps:
            found = found.children.get(step) if found is not None else None
        matches = [(path.rstrip("/") or "/", found)] if found is not None else []
    else:
        matches = [one for one in walk(top) if steps and one[0].split("/")[-len(steps) :] == steps]
    if len(matches) > 1:
        raise LiveDiskError(f"Path '{path}' does not uniquely identify an object")
    if not matches:
        raise DeviceNotFound(f"Device '{path}' not found")
    return matches[0]


def walk(top: QomObject, path: str = "") -> Iterator[tuple[str, QomObject]]:
    """Every object at and below ``top``, parents first."""
    yield path or "/", top
    for name, child in top.children.items():
        yield from walk(child, f"{path}/{name}")


# -- user-made objects -------------------------------------------------------------------------------------------------
def _made(daemon: Daemon, name: str) -> QomObject:
    thing, options = daemon.objects[name], daemon.objects.given(name)
    found = QomObject(options.qom_type)
    if isinstance(thing, ThrottleGroup):
        for limit, kind in ThrottleGroupQom.names().items():
            found.properties[limit] = _throttle_property(thing, limit, kind)
        return found
    for member in own_members(type(options)):
        getter = _getter(options, member.attribute)
        setter = _iothread_setter(daemon, name, member) if isinstance(thing, Iothread) else None
        refusal = f"Property '{options.qom_type}.{member.name}' cannot be changed while the object is in use"
        found.properties[member.name] = Property(type_name(member, "string"), getter, setter, refusal)
    return found


def own_members(cls: type[ObjectOptions]) -> list[Member]:
    """The members of an object's options that are its properties."""
    return [member for member in plain_object(cls).members if member.name not in ("qom-type", "id")]


def object_properties(typename: str) -> Iterator[tuple[str, str]]:
    """Name and type of each property of a user-made object's type."""
    cls = OBJECT_TYPES[typename][0]
    if typename == "throttle-group":
        yield from ThrottleGroupQom.names().items()
        return
    for member in own_members(cls):
        yield member.name, type_name(member, "string")


def _getter(options: ObjectOptions, attribute: str) -> Callable[[], Any]:
    def get() -> Any:
        value = getattr(options, attribute)
        return "" if value is UNSET or value is None else msgspec.to_builtins(value)

    return get


def _throttle_property(group: ThrottleGroup, name: str, kind: str) -> Property:
    async def put(value: Any) -> None:
        limits = visit(_Limits, {"limits": value}, JSON).limits if name == "limits" else None
        ThrottleGroupQom.set(group, name, limits)

    return Property(kind, lambda: ThrottleGroupQom.get(group, name), put)


class _Limits(QapiStruct):
    """So that messages name what is wrong as QEMU does."""

    limits: ThrottleLimits


def _iothread_setter(daemon: Daemon, id: str, member: Member) -> Setter:
    async def put(value: Any) -> None:
        checked = _integer(member.name, value)
        if not checked >= 0:
            raise LiveDiskError(f"{member.name} value must be in range [0, {2**63 - 1}]")
        thing = daemon.objects[id]
        options: IothreadOptions = msgspec.structs.replace(thing.options, **{member.attribute: checked})
        daemon.objects.replace(id, Iothread(options), options)

    return put


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ParameterError(f"Invalid parameter type for '{name}', expected: integer")
    return value


# -- devices -----------------------------------------------------------------------------------------------------------
def _device(daemon: Daemon, device: VirtioBlk) -> QomObject:
    backend = QomObject(BACKEND, common_properties())
    found = QomObject(DEVICE, common_properties(), {"virtio-backend": backend})
    who = f"device '{device.id}'" if device.id else "anonymous device"
    for name, kind in device_properties():
        holder = f"{who} (type '{DEVICE}')" if of_pci(name) else f"anonymous device (type '{BACKEND}')"
        refusal = f"Attempt to set property '{name}' on {holder} after it was realized"
        setter = _drive_setter(daemon, device) if name == "drive" else None
        one = Property(kind, _device_getter(device, name), setter, refusal)
        found.properties[name] = one
        if not of_pci(name):
            backend.properties[name] = one
    return found


def of_pci(name: str) -> bool:
    """Whether a device's property belongs to the part that sits on a bus, not to the virtio part below it."""
    return name in _OF_PCI


def common_properties() -> dict[str, Property]:
    """What every device has."""

    def fixed(name: str, kind: str, value: Any) -> Property:
        return Property(kind, lambda: value, None, f"Property '{name}' of a device in use cannot be changed")

    return {
        "parent_bus": fixed("parent_bus", "link<bus>", ""),
        "realized": fixed("realized", "bool", True),
        "hotplugged": fixed("hotplugged", "bool", False),
        "hotpluggable": fixed("hotpluggable", "bool", True),
    }


def device_properties() -> Iterator[tuple[str, str]]:
    """Name and type of each property of the device model."""
    for member in plain_object(DeviceOptions).members:
        if member.name not in _NOT_PROPERTIES:
            yield member.name, _KINDS.get(member.name) or type_name(member, "str")


def device_default(name: str) -> Any:
    """The value of a property that was not given; UNSET for those that have none."""
    member = next(one for one in plain_object(DeviceOptions).members if one.name == name)
    value = next(info.default for info in msgspec.structs.fields(DeviceOptions) if info.encode_name == name)
    if value is UNSET:
        value = DEFAULTS.get(name, False if type_name(member, "str") == "bool" else UNSET)
    return msgspec.to_builtins(value) if value is not UNSET else UNSET


def _device_getter(device: VirtioBlk, name: str) -> Callable[[], Any]:
    attribute = next(info.name for info in msgspec.structs.fields(DeviceOptions) if info.encode_name == name)

    def get() -> Any:
        if name == "drive":
            return device.drive_name
        if name in ("logical_block_size", "physical_block_size"):
            return getattr(device, name)
        if name in ("cyls", "heads", "secs"):
            return dict(zip(("cyls", "heads", "secs"), device.geometry, strict=True))[name]
        if name == "num-queues":
            return device.queues
        value = getattr(device.options, attribute)
        if name == "iothread":
            return f"/objects/{value}" if isinstance(value, str) else ""
        if value is UNSET:
            value = device_default(name)
        return "" if value is UNSET else msgspec.to_builtins(value)

    return get


def _drive_setter(daemon: Daemon, device: VirtioBlk) -> Setter:
    async def put(value: Any) -> None:
        if not isinstance(value, str):
            raise ParameterError("Invalid parameter type for 'drive', expected: string")
        node = daemon.graph.nodes.get(value)
        if node is None:
            raise NodeNotFound(f"Cannot find device='' nor node-name='{value}'")
        await device.move(node)

    return put


# -- words -------------------------------------------------------------------------------------------------------------
def type_name(member: Member, string: str) -> str:
    """QOM's word for a member's type; ``string`` is the one for text, which has two."""
    kind = member.type
    if isinstance(kind, Integer):
        return kind.kind.name
    if isinstance(kind, Enum):
        example: Any = next(iter(kind.values.values()))
        name = type(example).__name__
        return _QEMU_NAMES.get(name, name) if isinstance(example, enum.Enum) else string
    if isinstance(kind, Scalar):
        return {"str": string}.get(kind.name, kind.name)
    if isinstance(kind, Array):
        return "QAuthZListRule"
    return "any"


PARENTS: Final[dict[str, str]] = {
    "container": "object", "none-machine": "machine", DEVICE: "virtio-blk-pci-base", BACKEND: "virtio-device",
    "iothread": "event-loop-base", "secret": "secret_common", "throttle-group": "object", "tls-creds-x509": "tls-creds",
    "tls-creds-psk": "tls-creds", "authz-simple": "authz", "authz-list": "authz",
    "authz-list-file": "authz", "authz-listfile": "authz", "chardev-socket": "chardev",
    "chardev-stdio": "chardev", "chardev-null": "chardev", "chardev-file": "chardev", "chardev-pipe": "chardev",
    "chardev-ringbuf": "chardev",
}  # fmt: skip
"""What types of the tree derive from."""
ABSTRACT: Final[dict[str, str | None]] = {
    "object": None, "machine": "object", "device": "object", "pci-device": "device", "virtio-pci": "pci-device",
    "virtio-blk-pci-base": "virtio-pci", "virtio-device": "device", "event-loop-base": "object", "secret_common": "object",
    "tls-creds": "object", "authz": "object", "chardev": "object",
}  # fmt: skip
"""Types of which there are no objects, and what they derive from."""


def types() -> dict[str, str | None]:
    """Every type, and what it derives from."""
    return {**dict.fromkeys(OBJECT_TYPES, "object"), **PARENTS, **ABSTRACT}
