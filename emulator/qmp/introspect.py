"""What a client can learn from ``query-qmp-schema``: which arguments a command takes, and of what type.

The shell completes by it, and turns ``port=10809`` into a string where the server wants one. Works on QEMU's schema
as on ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Entry = dict[str, Any]


class Introspection:
    """A schema to look things up in."""

    def __init__(self, schema: Sequence[Entry]) -> None:
        self._types = {entry["name"]: entry for entry in schema if entry["meta-type"] not in ("command", "event")}
        self._commands = {entry["name"]: entry for entry in schema if entry["meta-type"] == "command"}

    @property
    def commands(self) -> list[str]:
        return sorted(self._commands)

    def arguments(self, command: str, given: dict[str, Any]) -> list[str]:
        """Names of arguments of ``command`` as they are written in a shell, nested ones dotted; ``given`` says which
        variants count."""
        if command not in self._commands:
            return []
        return self._names(self._types[self._commands[command]["arg-type"]], given, "", 3)

    def values(self, command: str, key: str, given: dict[str, Any]) -> list[str]:
        """Values that argument ``key`` may have, if they are few: enums and booleans."""
        entry = self._commands.get(command)
        node = self._types[entry["arg-type"]] if entry else None
        for part in key.split("."):
            node = self._member(node, part, given) if node is not None else None
            given = given.get(part, {}) if isinstance(given, dict) else {}
        if node is None:
            return []
        if node["meta-type"] == "alternate":
            options = [self._types[member["type"]] for member in node["members"]]
            node = next((option for option in options if option["meta-type"] == "enum"), node)
        return ["true", "false"] if node["name"] == "bool" else list(node.get("values", ()))

    def coerce(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments with numbers and booleans made strings where only a string is taken."""
        if command not in self._commands:
            return arguments
        value = self._coerce(self._types[self._commands[command]["arg-type"]], arguments)
        assert isinstance(value, dict)
        return value

    # -- inside
    # -------------------------------------------------------------------------------------------------------

    def _members(self, node: Entry, given: Any) -> list[Entry]:
        members = list(node.get("members", ())) if node["meta-type"] == "object" else []
        tag = given.get(node.get("tag")) if isinstance(given, dict) else None
        for variant in node.get("variants", ()):
            if variant["case"] == tag:
                members += self._types[variant["type"]]["members"]
        return members

    def _object(self, node: Entry) -> Entry | None:
        """The object that a node is, or that an alternate may be."""
        if node["meta-type"] == "alternate":
            options = (self._types[member["type"]] for member in node["members"])
            return next((option for option in options if option["meta-type"] == "object"), None)
        return node if node["meta-type"] == "object" else None

    def _member(self, node: Entry, name: str, given: Any) -> Entry | None:
        inner = self._object(node)
        for member in self._members(inner, given) if inner is not None else ():
            if member["name"] == name:
                return self._types[member["type"]]
        return None

    def _names(self, node: Entry, given: Any, prefix: str, depth: int) -> list[str]:
        names = []
        for member in self._members(node, given):
            name = f"{prefix}{member['name']}"
            names.append(name)
            inner = self._object(self._types[member["type"]])
            if inner is not None and depth:
                below = given.get(member["name"], {}) if isinstance(given, dict) else {}
                names += self._names(inner, below, f"{name}.", depth - 1)
        return names

    def _coerce(self, node: Entry, value: Any) -> Any:
        if isinstance(value, dict):
            inner = self._object(node)
            types = {member["name"]: member["type"] for member in self._members(inner, value)} if inner else {}
            return {
                name: self._coerce(self._types[types[name]], item) if name in types else item
                for name, item in value.items()
            }
        if isinstance(value, list) and node["meta-type"] == "array":
            return [self._coerce(self._types[node["element-type"]], item) for item in value]
        takes_text = node["meta-type"] == "enum" or node["name"] == "str"
        if takes_text and isinstance(value, bool | int | float):
            return str(value).lower() if isinstance(value, bool) else str(value)
        return value
