"""The syntax of ``livedisk qmp`` and its shell: qmp-shell's.

    blockdev-add driver=qcow2 node-name=a file.driver=file file.filename=a.qcow2
    block-dirty-bitmap-add node=a name=b granularity=65536 persistent=true
    transaction actions=[{'type': 'abort', 'data': {}}]
    transaction(
      blockdev-snapshot-sync node-name=a snapshot-file=b.qcow2
    )
    {"execute": "query-block"}

Values: whole numbers, ``true``, ``false``, ``null``, JSON or Python literals in brackets or braces, ``"quoted"``
strings, else strings as they stand. Dots in keys make objects, numeric parts lists.

Source: the qmp-shell of QEMU's Python package ``qemu.qmp``, whose lines all work here; quotes around values and
dotted keys into lists are ours.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

_PAIRS: Final = {"[": "]", "{": "}"}
_KEYWORDS: Final = {"true": True, "false": False, "null": None}


class ShellSyntaxError(Exception):
    """A line that cannot be understood; the text says why."""


def split_words(line: str) -> list[str]:
    """Split a line at spaces that are not inside quotes, brackets or braces."""
    words: list[str] = []
    position = 0
    while position < len(line):
        if line[position].isspace():
            position += 1
            continue
        end = _word_end(line, position)
        words.append(line[position:end])
        position = end
    return words


def _word_end(line: str, position: int) -> int:
    open_brackets: list[str] = []
    while position < len(line):
        character = line[position]
        if character.isspace() and not open_brackets:
            break
        if character in _PAIRS:
            open_brackets.append(_PAIRS[character])
        elif open_brackets and character == open_brackets[-1]:
            open_brackets.pop()
        elif character in "\"'" and (open_brackets or line[position - 1 : position] in ("=", " ", "")):
            position = _quote_end(line, position)
            continue
        position += 1
    if open_brackets:
        raise ShellSyntaxError(f"expected '{open_brackets[-1]}' at the end of the line")
    return position


def _quote_end(line: str, position: int) -> int:
    quote, start = line[position], position
    position += 1
    while position < len(line) and line[position] != quote:
        position += 2 if line[position] == "\\" else 1
    if position >= len(line):
        raise ShellSyntaxError(f"no end of the string that starts with {line[start : start + 16]}")
    return position + 1


def parse_value(text: str) -> Any:
    """A value as it is written in the shell."""
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    if text.lower() in _KEYWORDS:
        return _KEYWORDS[text.lower()]
    if text[:1] in ("[", "{") or (len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"):
        return _literal(text)
    return text


def _literal(text: str) -> Any:
    """JSON, or a Python literal in which JSON's true, false and null are known too."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        tree = _Keywords().visit(ast.parse(text, mode="eval"))
        return ast.literal_eval(ast.fix_missing_locations(tree))
    except (SyntaxError, ValueError, TypeError, RecursionError):
        if text[0] in "\"'":
            return text
        raise ShellSyntaxError(f"neither JSON nor a Python literal: {text}") from None


class _Keywords(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in _KEYWORDS:
            return ast.copy_location(ast.Constant(_KEYWORDS[node.id]), node)
        return node


def parse_arguments(words: list[str]) -> dict[str, Any]:
    """``key=value`` words as an object. Raises ShellSyntaxError."""
    arguments: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ShellSyntaxError(f"expected key=value, not '{word}'")
        _put(arguments, key, parse_value(text))
    result = _lists(arguments)
    assert isinstance(result, dict)
    return result


def _put(arguments: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    current = arguments
    for part in path:
        inner = current.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ShellSyntaxError(f"'{key}' contradicts another argument: '{part}' is not an object")
        current = inner
    if isinstance(value, dict) and isinstance(current.get(last), dict):
        current[last].update(value)
    elif last in current:
        raise ShellSyntaxError(f"'{key}' is given twice")
    else:
        current[last] = value


def _lists(value: Any) -> Any:
    """Objects whose members are numbered 0, 1, 2... become lists."""
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(item) for key, item in value.items()}
    if inner and set(inner) == {str(index) for index in range(len(inner))}:
        return [inner[str(index)] for index in range(len(inner))]
    return inner


@dataclass(frozen=True, slots=True)
class Request:
    """What to send. ``as_written``: it came as JSON, so its types are what the user wants."""

    message: dict[str, Any]
    as_written: bool = False


@dataclass
class LineReader:
    """Lines in, requests out; remembers an open ``transaction(``."""

    actions: list[dict[str, Any]] | None = field(default=None)

    def take(self, line: str) -> Request | None:
        """The request that a line makes (``execute`` and ``arguments``), or None if it makes none yet. Raises
        ShellSyntaxError."""
        words = split_words(line.strip())
        if not words or words[0].startswith("#"):
            return None
        if words[0].startswith("{") and self.actions is None:
            request = parse_value(line.strip())
            if not isinstance(request, dict) or not {"execute", "exec-oob"} & set(request):
                raise ShellSyntaxError("a JSON request needs the member 'execute'")
            return Request(request, as_written=True)
        if self.actions is not None:
            return self._in_transaction(words)
        if words[0] == "transaction(":
            self.actions = []
            return self._in_transaction(words[1:]) if len(words) > 1 else None
        return command_request(words[0], parse_arguments(words[1:]))

    def _in_transaction(self, words: list[str]) -> Request | None:
        assert self.actions is not None
        ends = words[-1] == ")"
        if words[0] == "transaction(":
            raise ShellSyntaxError("a transaction cannot be inside another; end it with ')'")
        action = words[:-1] if ends else words
        if action:
            self.actions.append({"type": action[0], "data": parse_arguments(action[1:])})
        if not ends:
            return None
        actions, self.actions = self.actions, None
        return command_request("transaction", {"actions": actions})


def command_request(command: str, arguments: dict[str, Any]) -> Request:
    return Request({"execute": command, "arguments": arguments} if arguments else {"execute": command})
