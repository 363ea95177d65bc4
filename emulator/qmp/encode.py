"""JSON as QEMU prints it, byte for byte: order of members, spaces, escapes, numbers.

QEMU keeps objects in a hash table of 512 buckets and prints them bucket by bucket; scripts compare such replies as
text, so we order members the same way. ASCII only; ``\\uXXXX`` in capitals. Lines end in CR LF, as everything does
that QEMU's monitors print.

Source: QEMU ``qobject/qdict.c`` (tdb_hash), ``qobject/json-writer.c``, ``monitor/monitor.c`` (monitor_puts). Where we
differ: an infinite number, which QEMU prints as ``inf``, is printed as 1e999, which JSON parsers can read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

_BUCKETS: Final = 512
_WORD: Final = 2**32
_SPECIAL: Final = re.compile(r"[^\x20\x21\x23-\x5b\x5d-\x7e]")
_ESCAPES: Final = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def encode(value: Any) -> bytes:
    """One line: the value and CR LF."""
    return (_compact(value) + "\r\n").encode("ascii")


def encode_pretty(value: Any) -> bytes:
    """Indented by four spaces a level, as ``-mon ...,pretty=on`` asks for."""
    return ("".join(_pretty(value, "\r\n")) + "\r\n").encode("ascii")


@lru_cache(maxsize=4096)
def bucket(key: str) -> int:
    """The bucket of QEMU's hash table that holds a member of this name."""
    data = key.encode("utf-8", "surrogatepass")
    value = (0x238F13AF * len(data)) % _WORD
    for index, byte in enumerate(data):
        value = (value + (byte << (index * 5 % 24))) % _WORD
    return (1103515243 * value + 12345) % _WORD % _BUCKETS


@lru_cache(maxsize=4096)
def ordered(keys: tuple[str, ...]) -> tuple[str, ...]:
    """The order in which QEMU prints members that were inserted in this order. In one bucket the last comes first."""
    latest_first = keys[::-1]
    return tuple(sorted(latest_first, key=bucket))


def text(value: str) -> str:
    """A string as JSON, in ASCII."""
    return f'"{_SPECIAL.sub(_escape, value)}"'


def number(value: float) -> str:
    if math.isfinite(value):
        return f"{value:.17g}"
    return "1e999" if value > 0 else "-1e999" if value < 0 else "null"


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character in _ESCAPES:
        return _ESCAPES[character]
    code = ord(character)
    if code < 0x10000:
        return f"\\u{code if not 0xD800 <= code < 0xE000 else 0xFFFD:04X}"
    code -= 0x10000
    return f"\\u{0xD800 | code >> 10:04X}\\u{0xDC00 | code & 0x3FF:04X}"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return text(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return number(value)
    raise TypeError(f"not a JSON value: {value!r}")


def _compact(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{text(key)}: {_compact(value[key])}" for key in ordered(tuple(value))) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_compact, value)) + "]"
    return _scalar(value)


def _pretty(value: Any, newline: str) -> Iterable[str]:
    inner = newline + "    "
    if isinstance(value, dict):
        yield "{"
        for index, key in enumerate(ordered(tuple(value))):
            yield f"{',' if index else ''}{inner}{text(key)}: "
            yield from _pretty(value[key], inner)
        yield newline + "}"
    elif isinstance(value, list | tuple):
        yield "["
        for index, item in enumerate(value):
            yield f"{',' if index else ''}{inner}"
            yield from _pretty(item, inner)
        yield newline + "]"
    else:
        yield _scalar(value)
