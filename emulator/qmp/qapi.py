"""The vocabulary in which commands, events and options are typed: msgspec Structs plus QAPI's own ideas.

A type is written once, as a `msgspec.Struct`; `model` reads it, and from the model come the input checks (`visit`),
the introspection (`schema`) and the shell's completion. What the Python type system has no word for is said with
``msgspec.Meta(extra=...)``:

* ``{"qapi": "uint32"}``  an integer of that width (the names of `INTEGERS`); a bare ``int`` is QAPI's ``int`` (64 bit
  signed);
* ``{"qapi": "BlockdevRef"}`` on a union of types, or on ``Any`` for a name given to `define_alternate`: an
  *alternate*, told apart by the JSON type of the value. The name appears in error messages;
* ``{"features": ("deprecated",)}``  the features of a member, for introspection.

Rules for members:

* A member with a default is optional. Absent leaves the default: ``UNSET`` where the reader must know, else the value
  QEMU documents.
* ``None`` in a type with a default only says "absent": JSON ``null`` is accepted by alternates that name it
  (`StrOrNull`), nowhere else, as in QAPI.
* ``None`` and ``UNSET`` defaults are left out of replies and events (`QapiStruct` sets ``omit_defaults``).
* A union: either ``A | B`` of Structs with msgspec's ``tag_field``, or a base class declared with `define_union`,
  whose variants may still grow (drivers register while they are imported).

Source: QEMU ``docs/devel/qapi-code-gen.rst``, "Schema syntax"; the integers from "Built-in Types".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType


class QapiStruct(msgspec.Struct, rename="kebab", kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base for arguments, results and events: ``node_name`` in Python is ``node-name`` on the wire.

    A member with an underscore on the wire says so: ``msgspec.field(name="backing_file")``. A class with a required
    member behind an optional one says ``kw_only=True``, which msgspec does not inherit.
    """


class IntegerKind(msgspec.Struct, frozen=True):
    """An integer of QAPI: its name, its range, and the word an out-of-range message uses for it."""

    name: str
    low: int
    high: int
    word: str

    @property
    def signed(self) -> bool:
        return self.name.startswith("int")


def _kinds() -> dict[str, IntegerKind]:
    kinds = {
        "int": IntegerKind("int", -(2**63), 2**63 - 1, "int64_t"),
        "natural": IntegerKind("int", 0, 2**63 - 1, "int64_t"),
        "size": IntegerKind("size", 0, 2**64 - 1, "uint64_t"),
    }
    for bits in (8, 16, 32, 64):
        kinds[f"int{bits}"] = IntegerKind(f"int{bits}", -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, f"int{bits}_t")
        kinds[f"uint{bits}"] = IntegerKind(f"uint{bits}", 0, 2**bits - 1, f"uint{bits}_t")
    return kinds


INTEGERS: Final = _kinds()
"""QAPI's integer types by name. ``size`` takes suffixes (K, M, G...) in ``key=value`` syntax. ``natural`` is ours: QAPI's
``int`` where QEMU's drivers refuse what is below zero."""

Int8 = Annotated[int, Meta(extra={"qapi": "int8"})]
Int16 = Annotated[int, Meta(extra={"qapi": "int16"})]
Int32 = Annotated[int, Meta(extra={"qapi": "int32"})]
Int64 = Annotated[int, Meta(extra={"qapi": "int64"})]
UInt8 = Annotated[int, Meta(extra={"qapi": "uint8"})]
UInt16 = Annotated[int, Meta(extra={"qapi": "uint16"})]
UInt32 = Annotated[int, Meta(extra={"qapi": "uint32"})]
UInt64 = Annotated[int, Meta(extra={"qapi": "uint64"})]
Size = Annotated[int, Meta(extra={"qapi": "size"})]

StrOrNull = Annotated[str | UnsetType | None, Meta(extra={"qapi": "StrOrNull"})]
"""A string, or an explicit null. Give it the default UNSET to make it optional."""

ALTERNATES: dict[str, tuple[Any, ...]] = {}
"""Branches of the alternates that are declared away from the annotation that names them."""


class OpenUnion(msgspec.Struct, frozen=True):
    """A union over a base class: the member that discriminates, and the variants as they are at the time of
    asking."""

    tag: str
    variants: Callable[[], Mapping[str, type[msgspec.Struct]]]


UNIONS: dict[type[msgspec.Struct], OpenUnion] = {}
"""Base classes that stand for the union of their variants wherever they are used as a type."""


def define_alternate(name: str, *branches: Any) -> None:
    """Say what ``Annotated[Any, Meta(extra={"qapi": name})]`` takes. ``None`` as a branch is JSON null."""
    ALTERNATES[name] = branches


def define_union(
    base: type[msgspec.Struct], tag: str, variants: Callable[[], Mapping[str, type[msgspec.Struct]]]
) -> None:
    """Make ``base`` a union discriminated by its wire member ``tag``.

    ``variants()`` is asked each time, so that what registers later is known. A variant derives from ``base`` (or is
    ``base`` itself, where it adds no members). Where ``base`` has a field for the tag, the instance carries it.
    """
    UNIONS[base] = OpenUnion(tag, variants)


__all__ = [
    "UNSET",
    "Int8",
    "Int16",
    "Int32",
    "Int64",
    "IntegerKind",
    "Meta",
    "QapiStruct",
    "Size",
    "StrOrNull",
    "UInt8",
    "UInt16",
    "UInt32",
    "UInt64",
    "UnsetType",
    "define_alternate",
    "define_union",
]
