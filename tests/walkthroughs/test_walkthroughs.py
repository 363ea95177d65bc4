"""The walkthroughs of docs/walkthroughs.md, run on QEMU and on livedisk: the same replies, events, graphs and images.

A section of that page is a script (`kit.script`). What the page prints below a command must be what livedisk answers. After each
command that no running job may race with, the jobs, the devices and the nodes are asked for, and compared.

No difference remains. Not compared (`kit.machine`): times, names that were generated, the space that images take on the host,
members of ours that begin with x-, how far a running job is at a moment, and pauses that nobody asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from kit import qemu
from kit.peers import ROOT
from kit.script import compare, play
from kit.side_by_side import differences

PAGE: Final = ROOT / "docs" / "walkthroughs.md"

UNEQUAL: Final = {"A mirror cancelled before it is ready": "e.qcow2"}
"""Images whose content depends on who is faster."""


def scripts() -> dict[str, list[str]]:
    """The page's sections by title: the lines of their code."""
    found: dict[str, list[str]] = {}
    title = ""
    inside = False
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        elif line == "```":
            inside = not inside
        elif inside:
            found.setdefault(title, []).append(line)
    return found


SCRIPTS: Final = scripts()
CHAIN: Final = "The chain"


def images(folder: Path, scratch: Path) -> dict[str, Any]:
    """Every image: sound, its chain, what it reads as."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.qcow2")):
        qemu.check(path)
        chain = qemu.info(path, "--backing-chain")
        found[path.name] = {
            "chain": [[one["filename"].replace(str(folder), ""), one.get("backing-filename-format")] for one in chain],
            "size": chain[0]["virtual-size"],
            "bytes": qemu.read_all(path, scratch),
        }
    return found


@pytest.mark.parametrize("title", [title for title in SCRIPTS if title != CHAIN])
def test_walkthrough_is_as_on_qemu(title: str, short_path: Path, tmp_path: Path) -> None:
    played = []
    for name, ours in (("theirs", False), ("ours", True)):
        folder = short_path / name
        folder.mkdir()
        played.append(play(folder, [*SCRIPTS[CHAIN], *SCRIPTS[title]], ours=ours))
    theirs, ours_ = played
    found = compare(theirs, ours_)
    for (name, one), (_, other) in zip(
        images(theirs.folder, tmp_path).items(), images(ours_.folder, tmp_path).items(), strict=True
    ):
        if one.pop("bytes") != other.pop("bytes") and UNEQUAL.get(title) != name:
            found.append(f"{name} reads differently")
        found += differences(name, one, other)
    assert not found, "\n".join(found)
