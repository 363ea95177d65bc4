"""Introspection: well-formed, the same types that check the input, and for the monitor's commands the same as QEMU's."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import Any

import pytest

from kit.peers import peer
from livedisk.emulator.qmp import blockdev, control
from livedisk.emulator.qmp.events import EVENTS, known_events
from livedisk.emulator.qmp.qapi import QapiStruct, define_alternate, define_union
from livedisk.emulator.qmp.registry import Context, Registry, registry
from livedisk.emulator.qmp.schema import schema

assert blockdev
assert control

Entry = dict[str, Any]

OWN = [
    "qmp_capabilities",
    "query-version",
    "query-commands",
    "query-name",
    "quit",
    "human-monitor-command",
    "query-yank",
    "yank",
    "query-qmp-schema",
]


@pytest.fixture(scope="module")
def ours() -> list[Entry]:
    """As it leaves the process: plain JSON."""
    found: list[Entry] = json.loads(json.dumps(schema(registry, known_events())))
    return found


@pytest.fixture(scope="module")
def theirs() -> list[Entry]:
    script = '{"execute":"qmp_capabilities"}{"execute":"query-qmp-schema"}{"execute":"quit"}'
    command = [peer("qemu-system-x86_64"), "-machine", "none", "-display", "none", "-nodefaults", "-qmp", "stdio"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(script)
        process.stdin.flush()
        lines = [json.loads(line) for line in process.stdout]
    replies = [line["return"] for line in lines if isinstance(line.get("return"), list)]
    found: list[Entry] = replies[0]
    return found


def resolved(entries: list[Entry], name: str, seen: tuple[str, ...] = ()) -> Any:
    """A type with the names of types replaced by what they stand for."""
    entry = next(entry for entry in entries if entry["name"] == name and entry["meta-type"] not in ("command", "event"))
    if name in seen or entry["meta-type"] == "builtin":
        return entry.get("json-type", "recursive")
    seen = (*seen, name)
    if entry["meta-type"] == "array":
        return [resolved(entries, entry["element-type"], seen)]
    if entry["meta-type"] == "enum":
        return sorted(entry["values"])
    members = [{**member, "type": resolved(entries, member["type"], seen)} for member in entry.get("members", [])]
    members.sort(key=lambda member: member.get("name", str(member)))
    variants = {variant["case"]: resolved(entries, variant["type"], seen) for variant in entry.get("variants", [])}
    return {"members": members, "tag": entry.get("tag"), "variants": variants}


def find(entries: list[Entry], name: str) -> Entry:
    return next(entry for entry in entries if entry["name"] == name)


@pytest.mark.parametrize("name", OWN)
def test_the_monitors_commands_are_typed_as_qemus(name: str, ours: list[Entry], theirs: list[Entry]) -> None:
    mine, other = find(ours, name), find(theirs, name)
    assert mine.get("allow-oob") == other.get("allow-oob")
    for key in ("arg-type", "ret-type"):
        assert resolved(ours, mine[key]) == resolved(theirs, other[key])


def test_the_shutdown_event_is_one_of_qemus(ours: list[Entry], theirs: list[Entry]) -> None:
    mine = resolved(ours, find(ours, "SHUTDOWN")["arg-type"])
    other = resolved(theirs, find(theirs, "SHUTDOWN")["arg-type"])
    assert [member["name"] for member in mine["members"]] == [member["name"] for member in other["members"]]
    # We know fewer causes than a machine has.
    assert set(mine["members"][1]["type"]) <= set(other["members"][1]["type"])


def test_every_type_is_there_once_and_every_reference_leads_somewhere(ours: list[Entry]) -> None:
    kinds = {entry["name"]: entry["meta-type"] for entry in ours}
    assert len(kinds) == len(ours)
    for entry in ours:
        references = [entry.get("arg-type"), entry.get("ret-type"), entry.get("element-type")]
        references += [member["type"] for member in entry.get("members", []) if "type" in member]
        references += [variant["type"] for variant in entry.get("variants", [])]
        for name in filter(None, references):
            assert kinds[name] not in ("command", "event")
        if entry["meta-type"] in ("enum", "object", "alternate"):
            assert entry["name"].isdigit()
        if "variants" in entry:
            tag = next(member for member in entry["members"] if member["name"] == entry["tag"])
            assert [item["case"] for item in entry["variants"]] == find(ours, tag["type"])["values"]


def test_all_commands_and_events_are_in_it(ours: list[Entry]) -> None:
    assert {entry["name"] for entry in ours if entry["meta-type"] == "command"} == {known.name for known in registry}
    assert {entry["name"] for entry in ours if entry["meta-type"] == "event"} == set(EVENTS)


class Node(QapiStruct):
    kind: str
    name: str | None = None


class Leaf(Node, kw_only=True):
    size: int


define_union(Node, "kind", lambda: {"leaf": Leaf, "bare": Node})
define_alternate("NodeRef", str, Node, None)


class Arguments(QapiStruct):
    nodes: list[Node]
    sizes: list[int] = []


def test_unions_arrays_and_features() -> None:
    own = Registry()

    @own.command("x-plant", allow_oob=True, features=("unstable",))
    async def plant(ctx: Context, args: Arguments) -> list[Node]:
        return args.nodes

    entries = schema(own, [])
    command = find(entries, "x-plant")
    assert command["allow-oob"] is True
    assert command["features"] == ["unstable"]
    arguments = resolved(entries, command["arg-type"])
    assert [member["name"] for member in arguments["members"]] == ["nodes", "sizes"]
    assert "default" not in arguments["members"][0]
    assert arguments["members"][1]["default"] is None
    (node,) = arguments["members"][0]["type"]
    assert node["tag"] == "kind"
    assert node["members"] == [
        {"name": "kind", "type": ["bare", "leaf"]},
        {"name": "name", "type": "string", "default": None},
    ]
    assert node["variants"]["leaf"]["members"] == [{"name": "size", "type": "int"}]
    assert node["variants"]["bare"]["members"] == []
    assert arguments["members"][1]["type"] == ["int"]
    # The list of nodes and the list of ints are types by those names.
    assert find(entries, "[int]")["element-type"] == "int"


# -- all commands -------------------------------------------------------------------------------------------------------

OURS_ALONE = {
    # QEMU's is a union by format; ours takes the key only to say that encryption is missing.
    ("blockdev-add", "<qcow2>.encrypt"),
    ("blockdev-reopen", ".options[]<qcow2>.encrypt"),
    # QEMU documents this name and knows neither it nor the schema's (authz-listfile).
    ("object-add", "<authz-list-file>"),
    # The guest is not to lose its writes to a backup's target.
    *(
        (command, f"{path}.{member}")
        for command, path in (
            ("blockdev-backup", ""),
            ("drive-backup", ""),
            ("transaction", ".actions[]<blockdev-backup>.data"),
            ("transaction", ".actions[]<drive-backup>.data"),
        )
        for member in ("on-cbw-error", "cbw-timeout")
    ),
    # What goes with a guest that has no memory: `livedisk migrate` says it.
    ("migrate", ".x-hand-over"),
    ("x-query-nbd-server", ""),
}


def surplus(mine: Any, other: Any, path: str) -> list[str]:
    """Arguments of ours that QEMU does not know, or whose being optional differs."""
    if isinstance(mine, list) and isinstance(other, list) and len(mine) == len(other) == 1:
        return surplus(mine[0], other[0], f"{path}[]")
    if not (isinstance(mine, dict) and isinstance(other, dict)):
        return []
    theirs = {member["name"]: member for member in other["members"] if "name" in member}
    found: list[str] = []
    for member in mine["members"]:
        if "name" not in member:
            continue
        where = f"{path}.{member['name']}"
        if member["name"] not in theirs or ("default" in member) != ("default" in theirs[member["name"]]):
            found.append(where)
        else:
            found += surplus(member["type"], theirs[member["name"]]["type"], where)
    for case, variant in mine["variants"].items():
        where = f"{path}<{case}>"
        found += surplus(variant, other["variants"][case], where) if case in other["variants"] else [where]
    return found


def test_arguments_of_all_commands_are_qemus(theirs: list[Entry]) -> None:
    # The composition root imports all that register commands and drivers.
    # In a process of its own: other tests register drivers that are theirs alone.
    ask = "import json, livedisk.emulator.daemon\n"
    ask += "from livedisk.emulator.qmp.events import known_events\n"
    ask += "from livedisk.emulator.qmp.registry import registry\n"
    ask += "from livedisk.emulator.qmp.schema import schema\n"
    ask += "print(json.dumps(schema(registry, known_events())))"
    entries: list[Entry] = json.loads(
        subprocess.run([sys.executable, "-c", ask], capture_output=True, check=True).stdout
    )
    known = {entry["name"]: entry for entry in theirs if entry["meta-type"] in ("command", "event")}
    found = []
    for entry in entries:
        if entry["meta-type"] not in ("command", "event"):
            continue
        if entry["name"] not in known:
            found.append((entry["name"], "no such command or event"))
            continue
        mine, other = resolved(entries, entry["arg-type"]), resolved(theirs, known[entry["name"]]["arg-type"])
        found += [(entry["name"], path) for path in surplus(mine, other, "")]
    assert [
        item for item in found if not any(item[0] == name and item[1].startswith(at) for name, at in OURS_ALONE)
    ] == []


def test_features_of_commands_are_qemus(theirs: list[Entry]) -> None:
    importlib.import_module("livedisk.emulator.daemon")
    importlib.import_module("livedisk.jobs.plugin")
    entries = schema(registry, known_events())
    known = {entry["name"]: entry.get("features", []) for entry in theirs if entry["meta-type"] == "command"}
    # savevm, which the feature is about, is not ours.
    known["human-monitor-command"] = []
    mine = {entry["name"]: entry.get("features", []) for entry in entries if entry["meta-type"] == "command"}
    ours_alone = {name for name, _ in OURS_ALONE}
    assert {name: known[name] for name in mine if name in known} == {
        name: features for name, features in mine.items() if name in known or name not in ours_alone
    }


def test_the_file_driver_tells_its_feature() -> None:
    importlib.import_module("livedisk.emulator.daemon")
    entries = schema(registry, known_events())
    union = find(entries, find(entries, "blockdev-add")["arg-type"])
    for case in ("file", "host_device"):
        variant = next(variant["type"] for variant in union["variants"] if variant["case"] == case)
        assert find(entries, variant)["features"] == ["dynamic-auto-read-only"]
