"""The typed walker: parsed JSON or ``key=value`` in, Structs out, complaints in QEMU's words.

One walk serves QMP arguments and command line options; they differ only in how a scalar is read, which is what a
`Syntax` holds:

* `JSON`: values have types. ``Invalid parameter type for 'size', expected: integer``.
* `KEYVAL`: every leaf is a string that becomes what the member's type asks for. ``Parameter 'size' expects integer``,
  ``Parameter 'read-only' expects 'on' or 'off'``, sizes with suffixes.

What is visited in what order, and so which complaint comes first, is QEMU's: members in order of declaration, base
first, the union's tag where the base declares it, then the variant's, and at the end whatever is left over
(``Parameter 'x' is unexpected``). Names in messages are whole paths (``file.filename``, ``actions[0].data``;
``bitmaps.1.name`` in key=value), but for enums, alternates and integer ranges, where QEMU gives the last name alone,
or 'null' inside a list.

Where we differ: of several unexpected members we name the first as written; QEMU names whichever its hash table
yields first.

Source: QEMU ``qapi/qobject-input-visitor.c``, ``qapi/qapi-visit-core.c``, ``util/cutils.c`` (qemu_strtosz); every
message was asked from QEMU 10.0.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import msgspec

from livedisk.emulator.errors import ParameterError
from livedisk.emulator.qmp.model import Alternate, Array, Enum, Integer, Member, Object, Scalar, Type, describe
from livedisk.emulator.qmp.qapi import INTEGERS, IntegerKind

T = TypeVar("T")
_MISSING: Final = object()


class Place(msgspec.Struct, frozen=True):
    """Where the walk stands: a chain of names and list positions up to the root."""

    parent: Place | None = None
    name: str | None = None
    """The member's name; None for the root and for list elements."""
    index: int | None = None

    def member(self, name: str) -> Place:
        return Place(self, name)

    def element(self, index: int) -> Place:
        return Place(self, None, index)

    @property
    def short(self) -> str:
        """The name as QEMU's core visitor knows it."""
        return self.name if self.name is not None else "null"


class Syntax(msgspec.Struct, frozen=True):
    """How leaves are written. Readers take ``(walk, value, place)`` and raise ParameterError."""

    element_format: str
    """How a list position stands in a path."""
    scalars: Mapping[str, Callable[[Syntax, Any, Place], Any]]
    """Reader by the scalar's name."""
    integer: Callable[[Syntax, Any, Place, IntegerKind], int]

    def path(self, place: Place) -> str:
        """The whole name, for messages."""
        parts: list[str] = []
        step: Place | None = place
        while step is not None:
            if step.index is not None:
                parts.append(self.element_format.format(step.index))
            elif step.name is not None:
                parts.append(f".{step.name}")
            step = step.parent
        return "".join(reversed(parts)).removeprefix(".") or "<anonymous>"


def visit(annotation: type[T], value: Any, syntax: Syntax) -> T:
    """Check ``value`` against a type and build what it describes. Raises ParameterError in QEMU's words."""
    result: T = read(describe(annotation), value, Place(), syntax)
    return result


def read(node: Type, value: Any, place: Place, syntax: Syntax) -> Any:
    """Read one value of a type. Raises ParameterError."""
    if isinstance(node, Scalar):
        return syntax.scalars[node.name](syntax, value, place)
    if isinstance(node, Integer):
        return syntax.integer(syntax, value, place, node.kind)
    if isinstance(node, Object):
        return _object(node, value, place, syntax)
    if isinstance(node, Enum):
        return _enum(node, value, place, syntax)
    if isinstance(node, Array):
        return _array(node, value, place, syntax)
    return _alternate(node, value, place, syntax)


def wrong_type(syntax: Syntax, place: Place, expected: str) -> ParameterError:
    return ParameterError(f"Invalid parameter type for '{syntax.path(place)}', expected: {expected}")


def _object(node: Object, value: Any, place: Place, syntax: Syntax) -> Any:
    if not isinstance(value, dict):
        raise wrong_type(syntax, place, "object")
    cls, members = node.cls, node.members
    kwargs: dict[str, Any] = {}
    if node.tag is not None:
        tag, cls = _variant(node, value, place, syntax)
        for member in members:
            if member.name == node.tag:
                kwargs[member.attribute] = tag
        members = (*members, *node.variant_members(cls))
    for member in members:
        if member.attribute not in kwargs:
            _read_member(member, value, place, syntax, kwargs)
    expected = {member.name for member in members} | {node.tag}
    for name in value:
        if name not in expected:
            raise ParameterError(f"Parameter '{syntax.path(place.member(name))}' is unexpected")
    return cls(**kwargs)


def _variant(node: Object, value: dict[str, Any], place: Place, syntax: Syntax) -> tuple[str, type[msgspec.Struct]]:
    assert node.tag is not None
    inner = place.member(node.tag)
    if node.tag not in value:
        raise _missing(syntax, inner)
    text = syntax.scalars["str"](syntax, value[node.tag], inner)
    variants = node.variants
    if text not in variants:
        raise _not_accepted(inner, text, variants)
    return text, variants[text]


def _read_member(member: Member, value: dict[str, Any], place: Place, syntax: Syntax, kwargs: dict[str, Any]) -> None:
    inner = value.get(member.name, _MISSING)
    if inner is not _MISSING:
        kwargs[member.attribute] = read(member.type, inner, place.member(member.name), syntax)
    elif not member.optional:
        raise _missing(syntax, place.member(member.name))


def _missing(syntax: Syntax, place: Place) -> ParameterError:
    return ParameterError(f"Parameter '{syntax.path(place)}' is missing")


def _not_accepted(place: Place, text: str, known: Mapping[str, Any]) -> ParameterError:
    return ParameterError(
        f"Parameter '{place.short}' does not accept value '{text}'",
        hint=f"Accepted values: {', '.join(sorted(known))}",
    )


def _enum(node: Enum, value: Any, place: Place, syntax: Syntax) -> Any:
    text = syntax.scalars["str"](syntax, value, place)
    if text not in node.values:
        raise _not_accepted(place, text, node.values)
    return node.values[text]


def _array(node: Array, value: Any, place: Place, syntax: Syntax) -> Any:
    if not isinstance(value, list):
        raise wrong_type(syntax, place, "array")
    return node.build(read(node.element, item, place.element(index), syntax) for index, item in enumerate(value))


_JSON_TYPES: Final[dict[type[Any], str]] = {
    str: "string",
    dict: "object",
    list: "array",
    bool: "boolean",
    int: "number",
    float: "number",
    type(None): "null",
}


def _alternate(node: Alternate, value: Any, place: Place, syntax: Syntax) -> Any:
    branch = node.branches.get(_JSON_TYPES[type(value)])
    if branch is None:
        raise ParameterError(f"Invalid parameter type for '{place.short}', expected: {node.name}")
    return read(branch, value, place, syntax)


# -- JSON: values have types
# -------------------------------------------------------------------------------------------


def _json_of(kind: type[Any], expected: str) -> Callable[[Syntax, Any, Place], Any]:
    def reader(syntax: Syntax, value: Any, place: Place) -> Any:
        if not isinstance(value, kind):
            raise wrong_type(syntax, place, expected)
        return value

    return reader


def _json_number(syntax: Syntax, value: Any, place: Place) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(syntax, place, "number")
    return float(value)


def _json_integer(syntax: Syntax, value: Any, place: Place, kind: IntegerKind) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind.signed:
        if not whole or not -(2**63) <= value < 2**63:
            raise wrong_type(syntax, place, "integer")
        return _in_range(value, place, kind)
    if not whole or not -(2**63) <= value < 2**64:
        raise ParameterError(f"Parameter '{syntax.path(place)}' expects uint64")
    return _in_range(value % 2**64, place, kind)


def _in_range(value: int, place: Place, kind: IntegerKind) -> int:
    if value < 0 and kind == INTEGERS["natural"]:
        raise ParameterError(f"Value '{value}' is out of range for parameter '{place.short}'")
    if not kind.low <= value <= kind.high:
        raise ParameterError(f"Parameter '{place.short}' expects {kind.word}")
    return value


def _as_it_is(syntax: Syntax, value: Any, place: Place) -> Any:
    return value


JSON: Final = Syntax(
    element_format="[{}]",
    scalars={
        "str": _json_of(str, "string"),
        "bool": _json_of(bool, "boolean"),
        "null": _json_of(type(None), "null"),
        "dict": _json_of(dict, "object"),
        "number": _json_number,
        "any": _as_it_is,
    },
    integer=_json_integer,
)
"""Values that came as JSON. Unsigned members take negative numbers modulo 2**64, as QEMU does for old clients."""

# -- key=value: leaves are strings
# -------------------------------------------------------------------------------------

_BOOLEANS: Final = {
    "on": True,
    "yes": True,
    "true": True,
    "y": True,
    "off": False,
    "no": False,
    "false": False,
    "n": False,
}
_INTEGER: Final = re.compile(r"[ \t\n\v\f\r]*([+-]?)(0[xX][0-9a-fA-F]+|[0-9]+)\Z")
_SIZE: Final = re.compile(
    r"[ \t\n\v\f\r]*\+?(?:(0[xX][0-9a-fA-F]+)|([0-9]+)(\.[0-9]*)?|(\.[0-9]+))([bkmgtpeBKMGTPE]?)\Z"
)
_SHIFTS: Final = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


def _text(syntax: Syntax, value: Any, place: Place) -> str:
    if not isinstance(value, str):
        raise ParameterError(f"Parameters '{syntax.path(place)}.*' are unexpected")
    return value


def _expects(syntax: Syntax, place: Place, what: str) -> ParameterError:
    return ParameterError(f"Parameter '{syntax.path(place)}' expects {what}")


def _keyval_bool(syntax: Syntax, value: Any, place: Place) -> bool:
    text = _text(syntax, value, place)
    if text not in _BOOLEANS:
        raise _expects(syntax, place, "'on' or 'off'")
    return _BOOLEANS[text]


def _keyval_number(syntax: Syntax, value: Any, place: Place) -> float:
    text = _text(syntax, value, place)
    try:
        number = float(text)
    except ValueError:
        raise wrong_type(syntax, place, "number") from None
    if not math.isfinite(number) or "_" in text or text != text.rstrip():
        raise wrong_type(syntax, place, "number")
    return number


def _keyval_null(syntax: Syntax, value: Any, place: Place) -> None:
    raise wrong_type(syntax, place, "null")


def parse_integer(text: str) -> int | None:
    """A whole number as C's ``strtoll(..., 0)`` reads it: decimal, 0x hexadecimal, 0 octal; None if it is none."""
    match = _INTEGER.match(text)
    if match is None:
        return None
    sign, digits = match.groups()
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits.startswith("0") else 10
    try:
        value = int(digits, base)
    except ValueError:
        return None
    return -value if sign == "-" else value


def parse_size(text: str) -> int | None:
    """Bytes, from a number with an optional suffix (k, M, G, T, P, E; b for bytes); None if it is none or exceeds 64
    bits.

    A fraction needs a suffix; hexadecimal takes none (``0x10B`` ends in the digit B). Source: QEMU ``util/cutils.c``,
    do_strtosz.
    """
    match = _SIZE.match(text)
    if match is None:
        return None
    hexadecimal, whole, fraction, bare_fraction, suffix = match.groups()
    if hexadecimal is not None:
        value = int(hexadecimal, 16)
        return value if not suffix and value < 2**64 else None
    shift = _SHIFTS[suffix.upper()]
    part = fraction or bare_fraction or ""
    digits = part[1:]
    if digits.strip("0") and not shift:
        return None
    value = int(whole or "0") << shift
    if digits:
        # Rounded half up on exact numbers; QEMU does the same on a long double.
        scale = 10 ** len(digits)
        value += ((int(digits) << shift) * 2 + scale) // (2 * scale)
    return value if value < 2**64 else None


def _keyval_integer(syntax: Syntax, value: Any, place: Place, kind: IntegerKind) -> int:
    text = _text(syntax, value, place)
    if kind.name == "size":
        size = parse_size(text)
        if size is None:
            raise _expects(syntax, place, "a size value")
        return size
    number = parse_integer(text)
    if kind.signed:
        if number is None or not -(2**63) <= number < 2**63:
            raise _expects(syntax, place, "integer")
        return _in_range(number, place, kind)
    if number is None or not -(2**64) < number < 2**64:
        raise _expects(syntax, place, "integer")
    return _in_range(number % 2**64, place, kind)


KEYVAL: Final = Syntax(
    element_format=".{}",
    scalars={
        "str": _text,
        "bool": _keyval_bool,
        "null": _keyval_null,
        "dict": _json_of(dict, "object"),
        "number": _keyval_number,
        "any": _as_it_is,
    },
    integer=_keyval_integer,
)
"""Values that `keyval` parsed: leaves are strings."""
