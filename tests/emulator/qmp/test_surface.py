"""The commands and events that QEMU has: they are here, or docs/surface.md says why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kit.livedisk import Daemon, executable
from kit.peers import ROOT, peer
from kit.qemu import StorageDaemon
from kit.side_by_side import MACHINE, session

DOCUMENT = ROOT / "docs" / "surface.md"


def schema(qmp: object) -> dict[str, set[str]]:
    """Names of commands and of events."""
    found: dict[str, set[str]] = {"command": set(), "event": set()}
    for one in qmp.execute("query-qmp-schema"):  # type: ignore[attr-defined]
        found.setdefault(one["meta-type"], set()).add(one["name"])
    return found


def named() -> set[str]:
    """What the document names in its part on commands."""
    part = DOCUMENT.read_text().partition("## Commands of a machine")[2].partition("\n## ")[0]
    return set(re.findall(r"`([A-Za-z_0-9-]+)`", part))


def test_every_command_of_the_storage_daemon_is_here(short_path: Path) -> None:
    with StorageDaemon(short_path, name="theirs") as theirs, theirs.qmp() as qmp:
        wanted = schema(qmp)
    with Daemon(short_path, name="ours") as ours, ours.qmp() as qmp:
        found = schema(qmp)
    assert wanted["command"] <= found["command"]
    assert wanted["event"] - found["event"] == {"VSERPORT_CHANGE"}


@pytest.mark.parametrize("kind", ["command", "event"])
def test_what_a_machine_has_more_is_named_with_its_reason(kind: str, tmp_path: Path) -> None:
    found = []
    for name, command in (("theirs", [peer("qemu-system-x86_64")]), ("ours", [executable(), "daemon"])):
        (tmp_path / name).mkdir()
        with session(command, tmp_path / name, MACHINE) as qmp:
            found.append(schema(qmp)[kind])
    theirs, ours = found
    assert theirs - ours <= named(), "build it, or say in docs/surface.md why not"
    assert not named() & ours & theirs - {"blockdev-snapshot-internal-sync", "migrate"}, "it is here by now"
