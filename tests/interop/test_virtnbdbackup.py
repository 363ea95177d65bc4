"""The NBD reader of Debian's virtnbdbackup, unmodified: it reads allocation and dirty extents from us as from QEMU, and a full
copy with increments made from what it reads is the disk."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.libnbd import script
from kit.livedisk import Daemon
from kit.peers import DOWNLOADS
from kit.qemu import StorageDaemon, create, qemu_io, read_all
from kit.qmp import Qmp

MIB = 1 << 20
SIZE = 16 * MIB
BITMAP = "qemu:dirty-bitmap:since"

READER = """
import base64
sys.path.insert(0, package)
from libvirtnbdbackup import nbdcli
from libvirtnbdbackup.extenthandler import ExtentHandler
kind = nbdcli.Unix(export, context, socket)
client = nbdcli.client(kind)
connected = client.connect()
extents = ExtentHandler(connected, kind).queryBlockStatus()
data = []
for extent in extents:
    if extent.data:
        for offset in range(extent.offset, extent.offset + extent.length, client.maxRequestSize):
            length = min(client.maxRequestSize, extent.offset + extent.length - offset)
            data.append([offset, base64.b64encode(connected.nbd.pread(length, offset)).decode()])
client.disconnect()
result = {"extents": [[e.data, e.offset, e.length] for e in extents], "data": data}
"""


def package() -> Path:
    path = DOWNLOADS / "virtnbdbackup"
    if not (path / "libvirtnbdbackup").is_dir():
        pytest.fail(f"{path} is missing: scripts/test downloads Debian's virtnbdbackup", pytrace=False)
    return path


def read_by_virtnbdbackup(daemon: StorageDaemon, export: str, context: str = "") -> dict[str, Any]:
    """What it reads of an export: extents (whether to be copied, offset, length), and the bytes of those."""
    values = {"package": str(package()), "export": export, "context": context, "socket": str(daemon.nbd_socket)}
    found: dict[str, Any] = script(None, READER, **values)
    return found


def apply(read: dict[str, Any], copy: bytearray) -> None:
    for offset, text in read["data"]:
        data = base64.b64decode(text)
        copy[offset : offset + len(data)] = data


def asked(peer: type[StorageDaemon], folder: Path, scene: Callable[[StorageDaemon, Qmp], Any]) -> Any:
    folder.mkdir()
    path = create(folder / "disk.qcow2", SIZE)
    qemu_io(path, "write -P 1 0 3M", "write -P 2 5M 100k", "write -z 6M 1M")
    file = {"driver": "file", "filename": str(path), "node-name": "file"}
    options = ["--blockdev", json.dumps({"driver": "qcow2", "node-name": "disk", "file": file})]
    with peer(folder, *options) as daemon, daemon.qmp(timeout=20) as qmp:
        return scene(daemon, qmp)


def test_a_full_copy_and_an_increment_are_read_as_from_qemu(short_path: Path, tmp_path: Path) -> None:
    copies: list[bytes] = []

    def scene(daemon: StorageDaemon, qmp: Qmp) -> Any:
        qmp.execute("block-dirty-bitmap-add", node="disk", name="since")
        qmp.execute("block-export-add", type="nbd", id="w", node_name="disk", name="w", writable=True)
        full = read_by_virtnbdbackup(daemon, "w")
        copy = bytearray(SIZE)
        apply(full, copy)
        qemu_io(daemon.uri("w"), "write -P 7 1M 64k", "write -P 8 12M 130k", "write -z 2M 64k", format="raw")
        qmp.execute("block-dirty-bitmap-disable", node="disk", name="since")
        qmp.execute("block-export-add", type="nbd", id="r", node_name="disk", name="r", bitmaps=["since"])
        increment = read_by_virtnbdbackup(daemon, "r", BITMAP)
        apply(increment, copy)
        assert bytes(copy) == read_all(daemon.uri("r"), tmp_path, "-f", "raw")
        copies.append(bytes(copy))
        return full, increment

    ours = asked(Daemon, short_path / "l", scene)
    theirs = asked(StorageDaemon, short_path / "q", scene)
    assert ours == theirs
    assert copies[0] == copies[1]
    assert [one[1:] for one in ours[1]["extents"] if one[0]] == [[MIB, 65536], [2 * MIB, 65536], [12 * MIB, 196608]]
