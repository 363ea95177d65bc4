"""Jobs on disks with filters on them, and on quorums: which nodes they take, and where the guest is at their end; with QEMU beside.

Each script (`kit.script`) starts with these nodes, all of 8 MiB:

    virtio0 -> F (throttle) -> R (raw)          virtio1 -> Q (quorum) -> Q0, Q1 (raw)          T, U (raw)
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from kit.qemu import create
from kit.script import Script, compare, play

# ruff: noqa: E501 - a command is a line
SCRIPTS: Final[dict[str, str]] = {
    "what devices and nodes did": """
(QEMU) query-blockstats
(QEMU) query-blockstats query-nodes=true
(QEMU) x-blockdev-change parent=Q child=children.1
(QEMU) query-blockstats
""",
    "into itself": """
(QEMU) blockdev-mirror device=F job-id=j target=R sync=full
(QEMU) blockdev-mirror device=F job-id=j target=F sync=full
(QEMU) block-commit device=F job-id=j
(QEMU) block-commit device=F job-id=j base-node=R
(QEMU) block-stream device=F job-id=j base-node=R
""",
    "a quorum's child is replaced": """
(QEMU) blockdev-mirror device=Q0 job-id=j target=T sync=full
(QEMU) blockdev-mirror device=Q job-id=j target=T sync=full replaces=R
(QEMU) blockdev-mirror device=Q job-id=j target=T sync=full replaces=Q1
(event) BLOCK_JOB_READY device=j
(look)
(QEMU) block-job-complete device=j
(event) BLOCK_JOB_COMPLETED device=j
(QEMU) x-blockdev-change parent=Q child=children.0
(look)
""",
    "a quorum's child is gone before it is replaced": """
(QEMU) blockdev-add node-name=P driver=quorum vote-threshold=1 children=[{"driver":"null-co","size":8388608,"read-zeroes":true},{"driver":"null-co","size":8388608,"read-zeroes":true,"node-name":"P1"}]
(QEMU) blockdev-mirror device=P job-id=j target=T sync=full replaces=P1
(event) BLOCK_JOB_READY device=j
(QEMU) x-blockdev-change parent=P child=children.1
(QEMU) block-job-complete device=j
(look)
(QEMU) block-job-cancel device=j
(event) JOB_STATUS_CHANGE id=j status="null"
(look)
""",
    "a node to be replaced is no longer the quorum's child": """
(QEMU) blockdev-mirror device=Q job-id=j target=T sync=full replaces=Q1
(event) BLOCK_JOB_READY device=j
(QEMU) x-blockdev-change parent=Q child=children.1
(QEMU) block-job-complete device=j
(event) JOB_STATUS_CHANGE id=j status="null"
(look)
""",
    "a filter turns to another node": """
(QEMU) blockdev-reopen options=[{"driver":"throttle","node-name":"F","throttle-group":"g","file":"U"}]
(QEMU) query-blockstats
(QEMU) query-blockstats query-nodes=true
(QEMU) blockdev-mirror device=F job-id=j target=R sync=full
(event) BLOCK_JOB_READY device=j
(QEMU) job-complete id=j
(event) BLOCK_JOB_COMPLETED device=j
(look)
""",
    "who needs what a job does not share": """
(QEMU) blockdev-add node-name=O driver=qcow2 file={"driver":"file","filename":"o.qcow2"} backing=R
(QEMU) block-stream device=O job-id=j
""",
}


def prepare(folder: Path) -> str:
    """Images in ``folder``; returns the start of each script."""
    names = ("r", "q0", "q1", "t", "u")
    for name in names:
        create(folder / f"{name}.raw", "8M", format="raw")
    create(folder / "o.qcow2", "8M")
    line = (
        "livedisk daemon -display none -nodefaults -qmp unix:./qmp-sock,server=on,wait=off -object throttle-group,id=g"
    )
    for name in names:
        line += f" -blockdev driver=raw,node-name={name.upper()},file.driver=file,file.filename={name}.raw"
    line += " -blockdev driver=throttle,node-name=F,throttle-group=g,file=R"
    line += " -blockdev driver=quorum,node-name=Q,vote-threshold=1,children.0=Q0,children.1=Q1"
    return f"$ {line} -device virtio-blk,drive=F,id=virtio0 -device virtio-blk,drive=Q,id=virtio1"


def run(name: str, folder: Path, *, ours: bool) -> Script:
    folder.mkdir()
    return play(folder, [prepare(folder), *SCRIPTS[name].strip().splitlines()], ours=ours)


@pytest.mark.parametrize("name", SCRIPTS)
def test_as_qemu(name: str, short_path: Path) -> None:
    theirs, ours = (run(name, short_path / peer, ours=peer == "ours") for peer in ("theirs", "ours"))
    found = compare(theirs, ours)
    assert not found, "\n".join(found)
