"""``query-qmp-schema``: commands and events with their types, made from the very classes that check the input.

The rules are QEMU's (``docs/devel/qapi-code-gen.rst``, "Client JSON Protocol introspection"): names of types are
numbers, so that nobody relies on them; an array's name is ``[element]``; all integers are ``int``; an optional member
has ``"default": null``; a command without arguments takes the empty object type; equal types appear once. Clients
look up a command or event and walk down from there.
"""

from __future__ import annotations

import enum
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeAlias

import msgspec

from livedisk.emulator.qmp.events import EventKind
from livedisk.emulator.qmp.model import (
    DICT,
    Alternate,
    Array,
    Enum,
    Integer,
    Member,
    Object,
    Scalar,
    Type,
    describe,
    plain_object,
)
from livedisk.emulator.qmp.qapi import UNSET, Meta, QapiStruct, UnsetType
from livedisk.emulator.qmp.registry import Command, NoArguments

Entry = dict[str, Any]


class SchemaInfoBase(QapiStruct, tag_field="meta-type"):
    """An entry of the schema. These classes type the answer for introspection itself; entries are made as plain JSON."""

    name: str
    features: list[str] | UnsetType = UNSET


class EnumMember(QapiStruct):
    name: str
    features: list[str] | UnsetType = UNSET


class ObjectMember(QapiStruct):
    """``default`` is null for an optional member, absent for one that is not."""

    name: str
    type: str
    default: Any = UNSET
    features: list[str] | UnsetType = UNSET


class ObjectVariant(QapiStruct):
    case: str
    type: str


class AlternateMember(QapiStruct):
    type: str


class JsonType(enum.StrEnum):
    """JSONType; ``int`` is a number without fraction, ``value`` anything."""

    STRING = "string"
    NUMBER = "number"
    INT = "int"
    BOOLEAN = "boolean"
    NULL = "null"
    OBJECT = "object"
    ARRAY = "array"
    VALUE = "value"


class BuiltinInfo(SchemaInfoBase, tag="builtin", kw_only=True):
    json_type: JsonType


class EnumInfo(SchemaInfoBase, tag="enum", kw_only=True):
    members: list[EnumMember]
    values: Annotated[list[str], Meta(extra={"features": ("deprecated",)})]


class ArrayInfo(SchemaInfoBase, tag="array", kw_only=True):
    element_type: str


class ObjectInfo(SchemaInfoBase, tag="object", kw_only=True):
    members: list[ObjectMember]
    tag: str | UnsetType = UNSET
    variants: list[ObjectVariant] | UnsetType = UNSET


class AlternateInfo(SchemaInfoBase, tag="alternate", kw_only=True):
    members: list[AlternateMember]


class CommandEntry(SchemaInfoBase, tag="command", kw_only=True):
    arg_type: str
    ret_type: str
    allow_oob: bool | UnsetType = UNSET


class EventEntry(SchemaInfoBase, tag="event", kw_only=True):
    arg_type: str


SchemaInfo: TypeAlias = BuiltinInfo | EnumInfo | ArrayInfo | ObjectInfo | AlternateInfo | CommandEntry | EventEntry


def schema(commands: Iterable[Command], events: Iterable[EventKind]) -> list[Entry]:
    """The list that ``query-qmp-schema`` returns."""
    return _Schema().build(commands, events)


def _features(features: tuple[str, ...]) -> Entry:
    return {"features": list(features)} if features else {}


class _Schema:
    """Entries in the making: types get their name when they are first referred to, and their entry later."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._names: dict[Any, str] = {}
        self._todo: deque[Callable[[], Entry]] = deque()

    def build(self, commands: Iterable[Command], events: Iterable[EventKind]) -> list[Entry]:
        entries = [self._command(command) for command in sorted(commands, key=lambda command: command.name)]
        entries += [self._event(event) for event in events]
        while self._todo:
            entries.append(self._todo.popleft()())
        return entries

    def _command(self, command: Command) -> Entry:
        returns = self._type(command.returns) if command.returns is not None else self._type(plain_object(NoArguments))
        entry: Entry = {
            "name": command.name,
            "meta-type": "command",
            "arg-type": self._type(command.arguments),
            "ret-type": returns,
        }
        if command.allow_oob:
            entry["allow-oob"] = True
        return entry | _features(command.features)

    def _event(self, event: EventKind) -> Entry:
        arguments = self._type(plain_object(event.data))
        return {"name": event.name, "meta-type": "event", "arg-type": arguments} | _features(event.features)

    def _type(self, node: Type) -> str:
        """The name of a type; its entry is queued the first time."""
        if isinstance(node, Integer):
            return self._named("int", "int", lambda: {"name": "int", "meta-type": "builtin", "json-type": "int"})
        if node is DICT:
            return self._type(describe(Any))
        if isinstance(node, Scalar):
            builtin = {"name": node.name, "meta-type": "builtin", "json-type": node.json}
            return self._named(node.name, node.name, lambda: builtin)
        if isinstance(node, Array):
            element = self._type(node.element)
            array = {"name": f"[{element}]", "meta-type": "array", "element-type": element}
            return self._named(array["name"], array["name"], lambda: array)
        if isinstance(node, Enum):
            return self._enum(tuple(node.values))
        if isinstance(node, Alternate):
            return self._masked(("alternate", node.name), lambda name: self._alternate(name, node))
        return self._object(node)

    def _named(self, key: Any, name: str, entry: Callable[[], Entry]) -> str:
        if key not in self._names:
            self._names[key] = name
            self._todo.append(entry)
        return self._names[key]

    def _masked(self, key: Any, entry: Callable[[str], Entry]) -> str:
        """A type whose name is a number."""
        if key not in self._names:
            name = str(next(self._numbers))
            self._named(key, name, lambda: entry(name))
        return self._names[key]

    def _enum(self, values: tuple[str, ...]) -> str:
        members = [{"name": value} for value in values]
        return self._masked(
            ("enum", values),
            lambda name: {"name": name, "meta-type": "enum", "members": members, "values": list(values)},
        )

    def _alternate(self, name: str, node: Alternate) -> Entry:
        members = [{"type": self._type(branch)} for branch in node.branches.values()]
        return {"name": name, "meta-type": "alternate", "members": members}

    def _object(self, node: Object) -> str:
        return self._masked((node.cls, node.tag), lambda name: self._object_entry(name, node))

    def _object_entry(self, name: str, node: Object) -> Entry:
        entry: Entry = {"name": name, "meta-type": "object", "members": self._members(node.members, node)}
        if node.tag is not None:
            variants = node.variants
            if all(member.name != node.tag for member in node.members):
                entry["members"].insert(0, {"name": node.tag, "type": self._enum(tuple(variants))})
            entry |= {"tag": node.tag, "variants": self._variants(node, variants)}
        return entry | _features(node.features)

    def _variants(self, node: Object, variants: Mapping[str, type[msgspec.Struct]]) -> list[Entry]:
        return [{"case": case, "type": self._variant(node, cls)} for case, cls in variants.items()]

    def _variant(self, node: Object, cls: type[msgspec.Struct]) -> str:
        """What a variant adds: an object type of its own, the empty one if it adds nothing."""
        own = node.variant_members(cls)
        if not own:
            return self._object(plain_object(NoArguments))
        features = plain_object(cls).features
        return self._masked(
            ("variant", node.cls, cls),
            lambda name: {"name": name, "meta-type": "object", "members": self._members(own)} | _features(features),
        )

    def _members(self, members: Iterable[Member], union: Object | None = None) -> list[Entry]:
        entries = []
        for member in members:
            is_tag = union is not None and member.name == union.tag
            kind = self._enum(tuple(union.variants)) if union is not None and is_tag else self._type(member.type)
            entry: Entry = {"name": member.name, "type": kind}
            if member.optional and not is_tag:
                entry["default"] = None
            entries.append(entry | _features(member.features))
        return entries
