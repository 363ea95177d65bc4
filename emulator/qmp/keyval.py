"""``key=value,...`` on the command line: QEMU's newer ``keyval`` syntax, its older ``QemuOpts`` syntax, and JSON.

* `parse_keyval`: dotted keys make objects, numeric fragments make lists (``actions.0.type=abort``), ``,,`` is a comma
  in a value, the first key may be implied. For ``-blockdev``, ``-object``, ``-device``, ``--export``,
  ``--nbd-server``, ``--monitor``.
* `parse_opts`: flat; a key without value is ``on`` (``nokey`` is ``key=off``), which is deprecated with a warning.
  For ``-chardev`` and ``-mon``, whose options people still write as ``server,nowait``.
* `parse_option`: what an option's argument is visited with: JSON if it starts with ``{``, else keyval.

All leaves are strings; `visit` with its KEYVAL syntax makes numbers, booleans and sizes of them. ``help`` or ``?`` as
a key asks for help: `HelpRequested`.

Source: QEMU ``util/keyval.c`` (grammar in its head), ``util/qemu-option.c`` (opts_do_parse); messages asked from QEMU
10.0.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

from livedisk.emulator.errors import ParameterError
from livedisk.emulator.qmp.visit import JSON, KEYVAL, Syntax, visit

T = TypeVar("T")

MAX_FRAGMENT: Final = 127
"""Characters in one fragment of a dotted key."""
_INT_MAX: Final = 2**31 - 1

_NAME: Final = re.compile(r"(__[a-z0-9.-]+_)?[a-z][a-z0-9_-]*", re.IGNORECASE)
"""A QAPI name, with the prefix of downstream extensions (``__com.example_x``)."""
_DIGITS: Final = re.compile(r"[0-9]+")


class HelpRequested(Exception):
    """The argument asks for help (``help`` or ``?``). ``values`` holds what else was given."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__("help")
        self.values = values


def parse_option(annotation: type[T], text: str, implied: str | None = None) -> T:
    """The argument of an option, checked and typed: JSON when it starts with ``{``, else `parse_keyval`.

    Raises ParameterError in QEMU's words; HelpRequested where help was asked for.
    """
    value, syntax = parse_text(text, implied)
    return visit(annotation, value, syntax)


def parse_text(text: str, implied: str | None = None) -> tuple[dict[str, Any], Syntax]:
    """As `parse_option`, before the types: the parsed value and the syntax to visit it with."""
    if text.startswith("{"):
        # Imported here: the command line mostly uses key=value, and start-up counts.
        from livedisk.emulator.qmp.wire import parse_one

        value = parse_one(text.encode(errors="surrogateescape"))
        assert isinstance(value, dict)
        return value, JSON
    return parse_keyval(text, implied), KEYVAL


def split_fields(text: str) -> list[str]:
    """Split at single commas; ``,,`` becomes a comma within a field. One trailing comma is ignored."""
    fields = [""]
    position = 0
    while True:
        comma = text.find(",", position)
        if comma < 0:
            fields[-1] += text[position:]
            break
        fields[-1] += text[position:comma]
        if text.startswith(",", comma + 1):
            fields[-1] += ","
            position = comma + 2
        else:
            fields.append("")
            position = comma + 1
    if len(fields) > 1 and not fields[-1]:
        fields.pop()
    return fields


# -- keyval
# ------------------------------------------------------------------------------------------------------------


def parse_keyval(text: str, implied: str | None = None) -> dict[str, Any]:
    """Nested dicts and lists with strings for leaves. Raises ParameterError; HelpRequested for ``help`` or ``?``.

    ``implied``: the key of a first value that stands without one.
    """
    root: dict[str, Any] = {}
    position, asked = 0, False
    while position < len(text):
        position, is_help = _parse_one(root, text, position, implied)
        asked |= is_help
        implied = None
    value = _listify(root, ())
    assert isinstance(value, dict), "the first fragment of a key is a name"
    if asked:
        raise HelpRequested(value)
    return value


def _parse_one(root: dict[str, Any], text: str, position: int, implied: str | None) -> tuple[int, bool]:
    """Parse one ``key=value`` at ``position``. Returns where the next starts, and whether this one asked for help."""
    end = _key_end(text, position)
    key, has_value = text[position:end], text.startswith("=", end)
    if key and not has_value:
        if key in ("help", "?"):
            return min(end + 1, len(text)), True
        if implied is not None:
            # A value without its key ends at the first comma; here ",," is not an escape.
            root[implied] = key
            return min(end + 1, len(text)), False
    fragments = _fragments(key)
    if not has_value:
        raise ParameterError(f"Expected '=' after parameter '{key}'")
    value, position = _value(text, end + 1)
    _put(root, fragments, key, value)
    return position, False


def _key_end(text: str, position: int) -> int:
    while position < len(text) and text[position] not in "=,":
        position += 1
    return position


def _fragments(key: str) -> list[str]:
    """The fragments of a dotted key: names, or digits anywhere but first."""
    fragments: list[str] = []
    position = 0
    while True:
        match = (_DIGITS.match(key, position) if fragments else None) or _NAME.match(key, position)
        end = match.end() if match else position
        if end == position or (end < len(key) and key[end] != "."):
            raise ParameterError(f"Invalid parameter '{key}'")
        if end - position > MAX_FRAGMENT:
            word = "Parameter" if (position, end) == (0, len(key)) else "Parameter fragment"
            raise ParameterError(f"{word} '{key[position:end]}' is too long")
        fragments.append(key[position:end])
        if end == len(key):
            return fragments
        position = end + 1


def _value(text: str, position: int) -> tuple[str, int]:
    """The value at ``position`` up to a single comma, and where the next key starts."""
    parts: list[str] = []
    while True:
        comma = text.find(",", position)
        if comma < 0:
            parts.append(text[position:])
            return "".join(parts), len(text)
        parts.append(text[position:comma])
        if not text.startswith(",", comma + 1):
            return "".join(parts), comma + 1
        parts.append(",")
        position = comma + 2


def _put(root: dict[str, Any], fragments: list[str], key: str, value: str) -> None:
    """Store a leaf; of several for one key the last counts. An object and a leaf by one name contradict each
    other."""
    current = root
    for depth, fragment in enumerate(fragments[:-1], 1):
        inner = current.setdefault(fragment, {})
        if not isinstance(inner, dict):
            raise ParameterError(f"Parameters '{'.'.join(fragments[:depth])}.*' used inconsistently")
        current = inner
    if isinstance(current.get(fragments[-1]), dict):
        raise ParameterError(f"Parameters '{key}.*' used inconsistently")
    current[fragments[-1]] = value


def _listify(current: dict[str, Any], prefix: tuple[str, ...]) -> dict[str, Any] | list[Any]:
    """Make lists of the dicts whose keys are all list positions, inside out."""
    for key, inner in current.items():
        if isinstance(inner, dict):
            current[key] = _listify(inner, (*prefix, key))
    positions = [key for key in current if key[0].isdigit()]
    dotted = "".join(f"{key}." for key in prefix)
    if not positions:
        return current
    if len(positions) < len(current):
        raise ParameterError(f"Parameters '{dotted}*' used inconsistently")
    by_index = {min(int(key), _INT_MAX): value for key, value in current.items()}
    for index in range(len(current)):
        if index not in by_index and index <= max(by_index):
            raise ParameterError(f"Parameter '{dotted}{index}' missing")
    return [by_index[index] for index in sorted(by_index)]


# -- QemuOpts
# ----------------------------------------------------------------------------------------------------------

_IDENTIFIER: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
IDENTIFIER_HINT: Final = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."


def parse_opts(
    text: str, implied: str | None = None, *, warn: Callable[[str], None] = lambda message: None
) -> dict[str, Any]:
    """Flat ``key=value``s as QemuOpts takes them; ``warn`` is told of deprecated spellings.

    ``key`` alone is ``key=on``, ``nokey`` alone ``key=off``; the last of several wins. Raises ParameterError for an
    ill-formed ``id``, HelpRequested for ``help`` or ``?``.
    """
    values: dict[str, Any] = {}
    position, asked, first = 0, False, True
    while position < len(text):
        end = _key_end(text, position)
        key, has_value = text[position:end], text.startswith("=", end)
        if has_value:
            value, position = _value(text, end + 1)
        elif first and implied is not None:
            key, (value, position) = implied, _value(text, position)
        else:
            position = min(end + 1, len(text))
            if key in ("help", "?"):
                asked = True
                continue
            key, value = _short_form(key, warn)
        first = False
        if key == "id" and not _IDENTIFIER.match(value):
            raise ParameterError("Parameter 'id' expects an identifier", hint=IDENTIFIER_HINT)
        values[key] = value
    if asked or (implied is not None and values.get(implied) in ("help", "?")):
        raise HelpRequested(values)
    return values


def _short_form(key: str, warn: Callable[[str], None]) -> tuple[str, str]:
    name, value = (key[2:], "off") if key.startswith("no") else (key, "on")
    # As QEMU: "no" comes off whatever starts with it, but for the one option that does so by name.
    if key == "nodelay":
        name, value = key, "on"
    warn(f"short-form boolean option '{key}' deprecated\nPlease use {name}={value} instead")
    return name, value
