"""What libvirt sends for virsh blockcopy, blockcommit, blockpull, snapshots and push backups, to QEMU and to livedisk.

Storage and format are nodes of their own, jobs are kept until they are dismissed, and afterwards every image that is no longer
used is deleted: all replies, events and graphs must be those of QEMU. The sequences were written down from what libvirt's
documentation and QEMU's say of these operations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from kit.qemu import create, qemu_img
from kit.script import Script, compare, compare_chains, create_chain, play

# ruff: noqa: E501 - a command is a line
SCRIPTS: Final[dict[str, str]] = {
    "blockcopy": """
(QEMU) blockdev-add driver=file filename=large.qcow2 node-name=libvirt-5-storage auto-read-only=true discard=unmap
(QEMU) blockdev-create job-id=create-libvirt-5-format options={"driver":"qcow2","file":"libvirt-5-storage","size":8388608}
(event) JOB_STATUS_CHANGE id=create-libvirt-5-format status=concluded
(QEMU) query-jobs
(QEMU) job-dismiss id=create-libvirt-5-format
(QEMU) blockdev-add node-name=libvirt-5-format read-only=false discard=unmap driver=qcow2 file=libvirt-5-storage backing=null
(QEMU) blockdev-mirror job-id=copy-vda-libvirt-1-format device=libvirt-1-format target=libvirt-5-format sync=full auto-finalize=true auto-dismiss=false
(event) BLOCK_JOB_READY device=copy-vda-libvirt-1-format
(QEMU) query-block-jobs
(QEMU) job-complete id=copy-vda-libvirt-1-format
(event) JOB_STATUS_CHANGE id=copy-vda-libvirt-1-format status=concluded
(QEMU) query-jobs
(QEMU) job-dismiss id=copy-vda-libvirt-1-format
(look)
(QEMU) blockdev-del node-name=libvirt-1-format
(QEMU) blockdev-del node-name=libvirt-1-storage
(QEMU) blockdev-del node-name=libvirt-2-format
(QEMU) blockdev-del node-name=libvirt-2-storage
(QEMU) blockdev-del node-name=libvirt-3-format
(QEMU) blockdev-del node-name=libvirt-3-storage
(look)
""",
    "blockcopy shallow abort": """
(QEMU) blockdev-add driver=file filename=u.qcow2 node-name=libvirt-5-storage auto-read-only=true discard=unmap
(QEMU) blockdev-add node-name=libvirt-5-format read-only=false driver=qcow2 file=libvirt-5-storage backing=null
(QEMU) blockdev-mirror job-id=copy-vda device=libvirt-1-format target=libvirt-5-format sync=top auto-finalize=true auto-dismiss=false
(event) BLOCK_JOB_READY device=copy-vda
(QEMU) transaction actions=[{"type":"block-dirty-bitmap-add","data":{"node":"libvirt-5-format","name":"b"}}]
(QEMU) job-cancel id=copy-vda
(event) JOB_STATUS_CHANGE id=copy-vda status=concluded
(QEMU) query-jobs
(QEMU) job-dismiss id=copy-vda
(QEMU) blockdev-del node-name=libvirt-5-format
(QEMU) blockdev-del node-name=libvirt-5-storage
(look)
""",
    "blockcopy shallow pivot": """
(QEMU) blockdev-add driver=file filename=u.qcow2 node-name=libvirt-5-storage auto-read-only=true discard=unmap
(QEMU) blockdev-add node-name=libvirt-5-format read-only=false driver=qcow2 file=libvirt-5-storage backing=null
(QEMU) blockdev-mirror job-id=copy-vda device=libvirt-1-format target=libvirt-5-format sync=top auto-finalize=true auto-dismiss=false
(event) BLOCK_JOB_READY device=copy-vda
(QEMU) blockdev-snapshot node=libvirt-2-format overlay=libvirt-5-format
(QEMU) job-complete id=copy-vda
(event) JOB_STATUS_CHANGE id=copy-vda status=concluded
(QEMU) job-dismiss id=copy-vda
(look)
(QEMU) blockdev-del node-name=libvirt-1-format
(QEMU) blockdev-del node-name=libvirt-1-storage
(look)
""",
    "blockcommit": """
(QEMU) blockdev-reopen options=[{"driver":"qcow2","node-name":"libvirt-3-format","read-only":false,"file":"libvirt-3-storage","backing":"libvirt-4-format"}]
(QEMU) block-commit device=libvirt-1-format job-id=commit-vda top-node=libvirt-2-format base-node=libvirt-3-format backing-file=b.qcow2 auto-finalize=true auto-dismiss=false
(event) JOB_STATUS_CHANGE id=commit-vda status=concluded
(QEMU) query-jobs
(QEMU) job-dismiss id=commit-vda
(QEMU) blockdev-reopen options=[{"driver":"qcow2","node-name":"libvirt-3-format","read-only":true,"file":"libvirt-3-storage","backing":"libvirt-4-format"}]
(look)
(QEMU) blockdev-del node-name=libvirt-2-format
(QEMU) blockdev-del node-name=libvirt-2-storage
(look)
""",
    "blockcommit active": """
(QEMU) blockdev-reopen options=[{"driver":"qcow2","node-name":"libvirt-4-format","read-only":false,"file":"libvirt-4-storage","backing":null}]
(QEMU) block-commit device=libvirt-1-format job-id=commit-vda top-node=libvirt-1-format base-node=libvirt-4-format auto-finalize=true auto-dismiss=false
(event) BLOCK_JOB_READY device=commit-vda
(QEMU) query-block-jobs
(QEMU) query-jobs
(QEMU) job-complete id=commit-vda
(event) JOB_STATUS_CHANGE id=commit-vda status=concluded
(QEMU) job-dismiss id=commit-vda
(look)
(QEMU) blockdev-del node-name=libvirt-1-format
(QEMU) blockdev-del node-name=libvirt-1-storage
(QEMU) blockdev-del node-name=libvirt-2-format
(QEMU) blockdev-del node-name=libvirt-4-format
(look)
""",
    "blockpull": """
(QEMU) block-stream device=libvirt-1-format job-id=pull-vda speed=0 base-node=libvirt-3-format backing-file=b.qcow2 auto-finalize=true auto-dismiss=false
(event) JOB_STATUS_CHANGE id=pull-vda status=concluded
(QEMU) job-dismiss id=pull-vda
(look)
(QEMU) blockdev-del node-name=libvirt-2-format
(QEMU) blockdev-del node-name=libvirt-2-storage
(look)
""",
    "snapshot": """
(QEMU) blockdev-add driver=file filename=e.qcow2 node-name=libvirt-5-storage auto-read-only=true discard=unmap
(QEMU) blockdev-create job-id=create-libvirt-5-storage options={"driver":"file","filename":"e.qcow2","size":0}
(event) JOB_STATUS_CHANGE id=create-libvirt-5-storage status=concluded
(QEMU) job-dismiss id=create-libvirt-5-storage
(QEMU) blockdev-add driver=file filename=e.qcow2 node-name=libvirt-5-storage auto-read-only=true discard=unmap
(QEMU) blockdev-create job-id=create-libvirt-5-format options={"driver":"qcow2","file":"libvirt-5-storage","size":8388608,"backing-file":"d.qcow2","backing-fmt":"qcow2"}
(event) JOB_STATUS_CHANGE id=create-libvirt-5-format status=concluded
(QEMU) query-jobs
(QEMU) job-dismiss id=create-libvirt-5-format
(QEMU) blockdev-add node-name=libvirt-5-format read-only=false driver=qcow2 file=libvirt-5-storage backing=null discard=unmap
(QEMU) transaction actions=[{"type":"blockdev-snapshot","data":{"node":"libvirt-1-format","overlay":"libvirt-5-format"}}]
(look)
""",
    "backup push": """
(QEMU) blockdev-add driver=file filename=large.qcow2 node-name=libvirt-5-storage auto-read-only=true discard=unmap
(QEMU) blockdev-create job-id=c options={"driver":"qcow2","file":"libvirt-5-storage","size":8388608}
(event) JOB_STATUS_CHANGE id=c status=concluded
(QEMU) job-dismiss id=c
(QEMU) blockdev-add node-name=libvirt-5-format read-only=false driver=qcow2 file=libvirt-5-storage
(QEMU) transaction actions=[{"type":"blockdev-backup","data":{"device":"libvirt-1-format","job-id":"backup-vda-libvirt-1-format","target":"libvirt-5-format","sync":"full","auto-finalize":true,"auto-dismiss":false}}]
(event) JOB_STATUS_CHANGE id=backup-vda-libvirt-1-format status=concluded
(QEMU) query-jobs
(QEMU) job-dismiss id=backup-vda-libvirt-1-format
(QEMU) blockdev-del node-name=libvirt-5-format
(QEMU) blockdev-del node-name=libvirt-5-storage
(look)
""",
}


def prepare(folder: Path) -> list[str]:
    """A <- B <- C <- D, which libvirt calls 4 to 1, and targets; returns the start of each script."""
    create_chain(folder)
    create(folder / "large.qcow2", "16M")
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "c.qcow2", "-F", "qcow2", folder / "u.qcow2", "8M")
    nodes: list[dict[str, Any]] = []
    for index, name in enumerate("abcd"):
        storage, image = f"libvirt-{4 - index}-storage", f"libvirt-{4 - index}-format"
        below_it = f"libvirt-{5 - index}-format" if index else None
        file = {"driver": "file", "filename": f"{name}.qcow2", "auto-read-only": True, "discard": "unmap"}
        nodes.append({"node-name": storage, **file})
        nodes.append(
            {"node-name": image, "read-only": name != "d", "driver": "qcow2", "file": storage, "backing": below_it}
        )
    line = "livedisk daemon -display none -no-user-config -nodefaults -qmp unix:./qmp-sock,server=on,wait=off"
    line += "".join(f" -blockdev {json.dumps(node, separators=(',', ':'))}" for node in nodes)
    return [f"$ {line} -device virtio-blk,drive=libvirt-1-format,id=virtio-disk0,write-cache=on"]


def run(name: str, folder: Path, *, ours: bool) -> Script:
    folder.mkdir()
    return play(folder, [*prepare(folder), *SCRIPTS[name].strip().splitlines()], ours=ours)


@pytest.mark.parametrize("name", SCRIPTS)
def test_sequence_is_as_on_qemu(name: str, short_path: Path) -> None:
    theirs, ours = (run(name, short_path / peer, ours=peer == "ours") for peer in ("theirs", "ours"))
    found = [*compare(theirs, ours), *compare_chains(theirs, ours)]
    assert not found, "\n".join(found)
