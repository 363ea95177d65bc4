"""Python annotations read as QAPI types: the one tree that input checks, introspection and completion walk.

`describe` turns an annotation into a node:

    Scalar     str, number, boolean, null, any
    Integer    an integer with a kind (`qapi.INTEGERS`)
    Enum       a closed set of strings, from `enum.Enum` or `Literal`
    Array      a list of one type
    Object     a Struct: members in order of declaration, base class first; with a tag, a union: the members of all,
               then those of the variant that the tag names
    Alternate  told apart by the JSON type of the value

Nodes are made once an annotation and are lazy where they refer to others, because types refer to themselves (a node's
file child is a node). A type that QAPI has no word for raises TypeError, naming it: at import in our own tests, never
at a user's.
"""

from __future__ import annotations

import enum
import inspect
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias

import msgspec

from livedisk.emulator.qmp.qapi import ALTERNATES, INTEGERS, UNIONS, IntegerKind


class Scalar(msgspec.Struct, frozen=True):
    """``json`` is the JSON type's name in introspection; for ``any`` it is "value"."""

    name: str
    json: str


class Integer(msgspec.Struct, frozen=True):
    kind: IntegerKind


class Enum(msgspec.Struct, frozen=True, eq=False):
    """``values`` maps the string on the wire to the Python value that a Struct holds."""

    values: Mapping[str, Any]


class Array(msgspec.Struct, frozen=True, eq=False):
    element: Type
    build: type[list[Any]] | type[tuple[Any, ...]] = list


class Alternate(msgspec.Struct, frozen=True, eq=False):
    """``branches`` by JSON type: "string", "object", "array", "number", "boolean", "null"."""

    name: str
    branches: Mapping[str, Type]


class Member(msgspec.Struct, frozen=True, eq=False):
    """A member of an object: ``name`` on the wire, ``attribute`` in Python."""

    name: str
    attribute: str
    annotation: Any
    optional: bool
    features: tuple[str, ...] = ()

    @property
    def type(self) -> Type:
        return describe(self.annotation, optional=self.optional)


class Object(msgspec.Struct, eq=False, dict=True):
    """A Struct, or (with ``union``) a base class and its variants."""

    cls: type[msgspec.Struct]
    union: tuple[str, Any] | None = None
    """Wire name of the discriminating member, and a callable that gives the variants' classes by tag value."""

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Members common to all variants. Base class members come first, as QAPI visits them."""
        infos = {info.name: info for info in msgspec.structs.fields(self.cls)}
        # msgspec puts a base's keyword-only fields last.
        lineage = reversed(self.cls.__mro__)
        names = dict.fromkeys(name for cls in lineage for name in inspect.get_annotations(cls) if name in infos)
        return tuple(_member(self.cls, infos[name]) for name in names)

    @property
    def tag(self) -> str | None:
        return self.union[0] if self.union else None

    @property
    def variants(self) -> Mapping[str, type[msgspec.Struct]]:
        """Classes by tag value, as known at this moment."""
        known: Mapping[str, type[msgspec.Struct]] = self.union[1]() if self.union else {}
        return known

    def variant_members(self, cls: type[msgspec.Struct]) -> tuple[Member, ...]:
        """What a variant adds to `members`."""
        common = {member.name for member in self.members}
        return tuple(member for member in plain_object(cls).members if member.name not in common)

    @cached_property
    def features(self) -> tuple[str, ...]:
        return tuple(getattr(self.cls, "__qapi_features__", ()))


Type: TypeAlias = Scalar | Integer | Enum | Array | Alternate | Object

STR = Scalar("str", "string")
NUMBER = Scalar("number", "number")
BOOL = Scalar("bool", "boolean")
NULL = Scalar("null", "null")
ANY = Scalar("any", "value")
DICT = Scalar("dict", "object")
"""An object with free members; introspection calls it any."""

_SCALARS: dict[Any, Type] = {
    str: STR,
    float: NUMBER,
    bool: BOOL,
    None: NULL,
    types.NoneType: NULL,
    Any: ANY,
    int: Integer(INTEGERS["int"]),
    dict: DICT,
    Mapping: DICT,
}

_known: dict[tuple[Any, bool], Type] = {}
_objects: dict[type[msgspec.Struct], Object] = {}


def describe(annotation: Any, *, optional: bool = False) -> Type:
    """The QAPI type of a Python annotation.

    ``optional``: the annotation belongs to a member with a default, so that None in it only says "absent". Raises
    TypeError for what QAPI cannot express.
    """
    key = (annotation, optional)
    found = _known.get(key)
    if found is None:
        found = _known[key] = _describe(annotation, optional)
    return found


def plain_object(cls: type[msgspec.Struct]) -> Object:
    """The class as a struct of its own, even where it is also the base of a union."""
    found = _objects.get(cls)
    if found is None:
        found = _objects[cls] = Object(cls)
    return found


def _describe(annotation: Any, optional: bool) -> Type:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _annotated(annotation, optional)
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if origin in (typing.Union, types.UnionType):
        return _union(typing.get_args(annotation), optional)
    if origin is Literal:
        return Enum({str(value): value for value in typing.get_args(annotation)})
    if origin in (list, Sequence, tuple):
        return Array(describe(typing.get_args(annotation)[0]), tuple if origin is tuple else list)
    if origin in (dict, Mapping):
        return DICT
    if isinstance(annotation, typing.NewType):
        return describe(annotation.__supertype__, optional=optional)
    if isinstance(annotation, type):
        return _class(annotation)
    raise TypeError(f"not a type that QAPI can express: {annotation!r}")


def _class(cls: type[Any]) -> Type:
    if issubclass(cls, enum.Enum):
        return Enum({str(member.value): member for member in cls})
    if not issubclass(cls, msgspec.Struct):
        raise TypeError(f"not a type that QAPI can express: {cls!r}")
    if cls in UNIONS:
        return Object(cls, (UNIONS[cls].tag, UNIONS[cls].variants))
    if cls.__struct_config__.tag_field is not None:
        return _tagged((cls,))
    return plain_object(cls)


def _annotated(annotation: Any, optional: bool) -> Type:
    inner, *metadata = typing.get_args(annotation)
    name = next((extra["qapi"] for extra in _extras(metadata) if "qapi" in extra), None)
    if name is None:
        return describe(inner, optional=optional)
    if name in INTEGERS:
        return Integer(INTEGERS[name])
    if inner is Any:
        if name not in ALTERNATES:
            raise TypeError(f"no alternate was defined by the name {name!r}")
        return _alternate(name, ALTERNATES[name])
    if typing.get_origin(inner) in (typing.Union, types.UnionType):
        return _alternate(name, _present(typing.get_args(inner)))
    return describe(inner, optional=optional)


def _extras(metadata: Iterable[Any]) -> Iterable[dict[str, Any]]:
    return [item.extra for item in metadata if isinstance(item, msgspec.Meta) and item.extra]


def _present(branches: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(branch for branch in branches if branch is not msgspec.UnsetType)


def _union(branches: tuple[Any, ...], optional: bool) -> Type:
    rest = _present(branches)
    if optional:
        rest = tuple(branch for branch in rest if branch is not types.NoneType)
    if len(rest) == 1:
        return describe(rest[0], optional=optional)
    if all(isinstance(branch, type) and issubclass(branch, msgspec.Struct) for branch in rest):
        return _tagged(rest)
    raise TypeError(f"an alternate needs a name, Meta(extra={{'qapi': ...}}): {rest!r}")


def _tagged(classes: tuple[type[msgspec.Struct], ...]) -> Object:
    """A union of Structs that carry msgspec's tag. Their nearest common base class has the members of all."""
    fields = {cls.__struct_config__.tag_field for cls in classes}
    if len(fields) != 1 or None in fields:
        raise TypeError(f"the Structs of a union need one tag_field: {classes!r}")
    common = next(
        base for base in classes[0].__mro__ if base not in classes and all(issubclass(cls, base) for cls in classes)
    )
    if not issubclass(common, msgspec.Struct):
        raise TypeError(f"no common base: {classes!r}")
    by_tag = {str(cls.__struct_config__.tag): cls for cls in classes}
    return Object(common, (str(fields.pop()), lambda: by_tag))


_JSON_OF: dict[type[Any], str] = {Integer: "number", Enum: "string", Array: "array", Object: "object"}


def _alternate(name: str, branches: Iterable[Any]) -> Alternate:
    by_json: dict[str, Type] = {}
    for branch in _present(branches):
        node = describe(branch)
        json = node.json if isinstance(node, Scalar) else _JSON_OF[type(node)]
        if json in by_json:
            raise TypeError(f"two branches of {name} are a JSON {json}")
        by_json[json] = node
    return Alternate(name, by_json)


def _member(cls: type[msgspec.Struct], info: msgspec.structs.FieldInfo) -> Member:
    features: tuple[str, ...] = ()
    kind = info.type
    if isinstance(kind, types.MemberDescriptorType):
        # A member named as its own type ("str: str"): inside the class the name means the member.
        owner = next(base for base in cls.__mro__ if info.name in inspect.get_annotations(base))
        kind = eval(inspect.get_annotations(owner)[info.name], vars(sys.modules[owner.__module__]))
    for annotation in (kind, *typing.get_args(kind)):
        if typing.get_origin(annotation) is typing.Annotated:
            for extra in _extras(typing.get_args(annotation)[1:]):
                features += tuple(extra.get("features", ()))
    return Member(info.encode_name, info.name, kind, not info.required, features)
