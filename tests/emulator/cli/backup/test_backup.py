"""``livedisk backup`` on livedisk and on QEMU: full, incremental, verify, restore, and what interrupted runs leave."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon, executable, livedisk
from kit.places import pattern
from kit.process import Process
from kit.qemu import StorageDaemon, check, create, qemu_img, qemu_io, read_all

SIZE = 8 << 20
DAEMONS = {"livedisk": Daemon, "qemu": StorageDaemon}


class Site:
    """A daemon with two disks, "disk0" and "disk1", that are exported writable, and a folder for backups."""

    def __init__(self, kind: type[StorageDaemon], short: Path, tmp: Path) -> None:
        self.kind = kind
        self.short = short
        self.tmp = tmp
        self.folder = tmp / "to" / "backups"
        self.images = [create(tmp / f"disk{n}.qcow2", SIZE) for n in range(2)]
        self.start()

    def start(self, *more: str) -> None:
        options = list(more)
        for n, image in enumerate(self.images):
            options += ["--blockdev", f"driver=qcow2,node-name=disk{n},file.driver=file,file.filename={image}"]
            options += ["--export", f"type=nbd,id=e{n},node-name=disk{n},name=disk{n},writable=on"]
        self.daemon = self.kind(self.short, *options)

    def write(self, disk: int, *commands: str) -> None:
        qemu_io(self.daemon.uri(f"disk{disk}"), *commands, format="raw")

    def backup(self, *arguments: str, expect: int = 0) -> str:
        result = livedisk("backup", *arguments, expect=expect)
        return result.stdout + result.stderr

    def take(self, kind: str, *more: str, expect: int = 0) -> str:
        return self.backup(
            kind,
            str(self.daemon.qmp_socket),
            str(self.folder),
            "--disk",
            "disk0",
            "--disk",
            "disk1",
            *more,
            expect=expect,
        )

    def content(self, disk: int) -> bytes:
        return read_all(self.daemon.uri(f"disk{disk}"), self.tmp, "-f", "raw")

    def manifest(self) -> Any:
        return json.loads((self.folder / "manifest.json").read_text())

    def restored(self, disk: int, number: int) -> bytes:
        output = self.tmp / "restored.raw"
        output.unlink(missing_ok=True)
        self.backup("restore", str(self.folder), str(output), "--disk", f"disk{disk}", "--checkpoint", str(number))
        return output.read_bytes()

    def bitmaps(self) -> dict[str, list[str]]:
        with self.daemon.qmp() as qmp:
            nodes = qmp.execute("query-named-block-nodes", flat=True)
        return {
            node["node-name"]: [bitmap["name"] for bitmap in node.get("dirty-bitmaps", [])]
            for node in nodes
            if node["node-name"].startswith("disk")
        }


@pytest.fixture(params=DAEMONS)
def site(request: pytest.FixtureRequest, short_path: Path, tmp_path: Path) -> Iterator[Site]:
    site = Site(DAEMONS[request.param], short_path, tmp_path)
    yield site
    site.daemon.stop()


@pytest.fixture
def ours(short_path: Path, tmp_path: Path) -> Iterator[Site]:
    site = Site(Daemon, short_path, tmp_path)
    yield site
    site.daemon.stop()


def test_a_chain_of_backups_restores_each_checkpoint(site: Site) -> None:
    expected: dict[tuple[int, int], bytes] = {}
    site.write(0, "write -P 1 0 1M", "write -P 2 3M 64k")
    for number, kind in ((1, "full"), (2, "incremental"), (3, "incremental")):
        for disk in range(2):
            site.write(disk, f"write -P {16 * number + disk} {number}M 100k", f"write -z {number * 256}k 64k")
        site.take(kind)
        for disk in range(2):
            expected[disk, number] = site.content(disk)
    for (disk, number), content in expected.items():
        assert site.restored(disk, number) == content
        image = site.folder / f"disk{disk}.{number:04}.qcow2"
        check(image)
        # Without us: the increments are an ordinary chain.
        assert read_all(image, site.tmp, "-f", "qcow2") == content
    images = [checkpoint["images"] for checkpoint in site.manifest()["checkpoints"]]
    assert [image["disk0"]["kind"] for image in images] == ["full", "incremental", "incremental"]
    assert [image["disk1"].get("parent") for image in images] == [None, "disk1.0001.qcow2", "disk1.0002.qcow2"]
    # An increment holds what changed, not the disk.
    assert images[1]["disk0"]["copied"] <= 5 * 65536
    # Only the newest checkpoint's bitmap is left in the emulator.
    assert all(len(names) == 1 and names[0].endswith("-3") for names in site.bitmaps().values())


def test_verify_finds_the_live_disk_the_same_where_it_was_not_written(site: Site) -> None:
    site.write(0, "write -P 7 0 2M")
    site.take("full")
    site.write(0, "write -P 8 1M 64k")
    with site.daemon.qmp() as qmp:  # verify starts the server itself, and there can be one only
        qmp.execute("nbd-server-stop")
    told = site.backup("verify", str(site.folder), "--against", str(site.daemon.qmp_socket))
    assert "2 files checked" in told
    assert re.search(r"live disks: .* the same, 64\.0 KiB written since", told)
    assert all(len(names) == 1 for names in site.bitmaps().values())
    with site.daemon.qmp() as qmp:
        assert qmp.execute("query-jobs") == []
        assert qmp.execute("query-block-exports") == []
        assert {node["node-name"] for node in qmp.execute("query-named-block-nodes")} >= {"disk0", "disk1"}


def test_verify_says_where_a_disk_differs(ours: Site) -> None:
    ours.write(0, "write -P 7 0 1M")
    ours.take("full")
    ours.daemon.stop()
    bitmaps = qemu_img("info", "--output=json", ours.images[0])
    assert "livedisk-" in bitmaps  # the bitmap was stored
    # Somebody changes the disk behind the bitmap's back.
    host = json.loads(qemu_img("map", "--output=json", ours.images[0]))[0]["offset"]
    with open(ours.images[0], "r+b") as file:
        file.seek(host + 4096)
        file.write(b"changed")
    ours.start()
    with ours.daemon.qmp() as qmp:
        qmp.execute("nbd-server-stop")
    told = ours.backup("verify", str(ours.folder), "--against", str(ours.daemon.qmp_socket), expect=1)
    assert "'disk0' differs from its backup between bytes 0 and 1048576" in told


def test_verify_uses_a_server_that_runs(ours: Site) -> None:
    ours.take("full")
    refused = ours.backup("verify", str(ours.folder), "--against", str(ours.daemon.qmp_socket), expect=1)
    assert "NBD server is running: say with --nbd-socket" in refused
    socket = str(ours.daemon.nbd_socket)
    ours.backup("verify", str(ours.folder), "--against", str(ours.daemon.qmp_socket), "--nbd-socket", socket)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_files_are_found_and_not_restored(damage: str, ours: Site) -> None:
    ours.write(0, "write -P 7 0 1M")
    ours.take("full")
    ours.take("incremental")
    path = ours.folder / "disk0.0001.qcow2"
    if damage == "flip":
        with open(path, "r+b") as file:
            file.seek(-4096, os.SEEK_END)
            file.write(b"x")
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 512)
    else:
        path.unlink()
    assert "disk0.0001.qcow2" in ours.backup("verify", str(ours.folder), expect=1)
    output = ours.tmp / "out.raw"
    ours.backup("restore", str(ours.folder), str(output), "--disk", "disk0", expect=1)
    assert not output.exists()


def test_an_increment_that_cannot_be_is_a_full_backup_with_its_reason(ours: Site) -> None:
    told = ours.take("incremental")
    assert "full (the first backup of this disk)" in told
    [name], [other] = (ours.bitmaps()[disk] for disk in ("disk0", "disk1"))
    with ours.daemon.qmp() as qmp:
        qmp.execute("block-dirty-bitmap-remove", node="disk0", name=name)
        qmp.execute("block-dirty-bitmap-disable", node="disk1", name=other)
    told = ours.take("incremental")
    assert f"disk0: full (tracking was lost: bitmap '{name}' is not on node 'disk0' any more)" in told
    assert f"disk1: full (tracking was lost: bitmap '{other}' was disabled)" in told
    (ours.folder / "disk0.0002.qcow2").unlink()
    told = ours.take("incremental")
    assert "disk0: full (the chain is broken: disk0.0002.qcow2" in told
    assert "disk1: incremental" in told
    reasons = [checkpoint["images"]["disk0"]["reason"] for checkpoint in ours.manifest()["checkpoints"]]
    assert reasons[1].startswith("tracking was lost")


def test_tracking_goes_on_through_a_restart(site: Site) -> None:
    site.write(0, "write -P 1 0 1M")
    site.take("full")
    site.daemon.stop()
    site.start()
    site.write(0, "write -P 2 512k 64k")
    told = site.take("incremental")
    assert told.count("incremental (") == 2
    assert site.restored(0, 2) == site.content(0)


def test_a_raw_disk_is_told_that_tracking_ends_with_the_emulator(short_path: Path, tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(pattern(SIZE))
    daemon = Daemon(short_path, "--blockdev", f"driver=raw,node-name=disk,file.driver=file,file.filename={raw}")
    with daemon:
        result = livedisk("backup", "full", daemon.qmp_socket, tmp_path / "b", "--disk", "disk")
        assert "tracking ends with the emulator" in result.stderr
        result = livedisk("backup", "incremental", daemon.qmp_socket, tmp_path / "b", "--disk", "disk")
        assert "disk: incremental" in result.stdout
        daemon.stop()


class Drives(Site):
    """The same with ``-drive``, whose nodes have made-up names, new ones at every start."""

    def start(self, *more: str) -> None:
        options = list(more)
        for n, image in enumerate(self.images):
            options += ["-drive", f"file={image},format=qcow2,id=disk{n},if=none"]
            options += ["-device", f"virtio-blk-pci,drive=disk{n},share-rw=on"]
        self.daemon = self.kind(self.short, *options)
        with self.daemon.qmp() as qmp:
            for n in range(2):
                qmp.execute("nbd-server-add", device=f"disk{n}", name=f"disk{n}", writable=True)

    def nodes(self) -> dict[str, list[str]]:
        """Bitmaps of the images' nodes."""
        with self.daemon.qmp() as qmp:
            nodes = qmp.execute("query-named-block-nodes", flat=True)
        return {
            node["node-name"]: [one["name"] for one in node.get("dirty-bitmaps", [])]
            for node in nodes
            if node["drv"] == "qcow2"
        }


def test_disks_whose_nodes_have_other_names_after_a_restart_are_tracked_on(short_path: Path, tmp_path: Path) -> None:
    site = Drives(Daemon, short_path, tmp_path)
    site.write(0, "write -P 1 0 4M")
    site.take("full")
    before = site.nodes().keys()
    site.write(0, "write -P 2 1M 128k")
    site.daemon.kill()
    # A run that was killed together with the emulator: what it left goes, wherever it is now.
    manifest = site.manifest()
    number = manifest["checkpoints"][0]["images"]["disk0"]["bitmap"]
    left = f"{number.rpartition('-')[0]}-2"
    assert number.endswith("-disk0-1")
    node = next(iter(before))
    manifest["pending"] = {"files": [], "jobs": [], "nodes": [], "bitmaps": [[node, left]]}
    (site.folder / "manifest.json").write_text(json.dumps(manifest))
    site.start()
    assert not before & site.nodes().keys()
    with site.daemon.qmp() as qmp:
        qmp.execute("block-dirty-bitmap-add", node="disk0", name=left)
    told = site.take("incremental")
    assert told.count(": incremental (changes since") == 2
    assert site.restored(0, 2) == site.content(0)
    assert [len(names) for names in site.nodes().values()] == [1, 1]
    site.backup("incremental", str(site.daemon.qmp_socket), str(site.folder), "--disk", "disk1")
    with site.daemon.qmp() as qmp:
        qmp.execute("nbd-server-stop")
    told = site.backup("verify", str(site.folder), "--against", str(site.daemon.qmp_socket))
    assert re.search(r"live disks: 16\.0 MiB the same", told), "each disk at its own newest checkpoint"
    site.daemon.stop()


def test_disks_whose_images_were_exchanged_are_not_taken_for_each_other(ours: Site) -> None:
    ours.write(0, "write -P 1 0 4M")
    ours.take("full")
    ours.daemon.stop()
    ours.images.reverse()
    ours.start()
    told = ours.take("incremental")
    assert told.count(": full (tracking was lost: bitmap") == 2
    assert ours.restored(0, 2) == ours.content(0)


def test_a_dry_run_changes_nothing(ours: Site) -> None:
    assert "disk0: full into disk0.0001.qcow2, at most" in ours.take("full", "--dry-run")
    assert not ours.folder.exists()
    ours.write(0, "write -P 1 0 4M")
    ours.take("full")
    ours.write(0, "write -P 1 0 128k")
    before = ours.bitmaps()
    rows = json.loads(ours.take("incremental", "--dry-run", "--json"))
    assert rows[0] | {"seconds": 0} == {
        "disk": "disk0",
        "kind": "incremental",
        "reason": "changes since checkpoint file disk0.0001.qcow2",
        "file": "disk0.0002.qcow2",
        "bytes": 131072,
        "seconds": 0,
    }
    assert rows[0]["seconds"] > 0
    assert ours.bitmaps() == before
    assert len(ours.manifest()["checkpoints"]) == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_loses_nothing(how: signal.Signals, site: Site) -> None:
    site.write(0, "write -P 1 0 8M")
    site.take("full")
    site.write(0, "write -P 2 0 4M")
    arguments = [executable(), "backup", "incremental", str(site.daemon.qmp_socket), str(site.folder)]
    arguments += ["--disk", "disk0", "--disk", "disk1", "--bandwidth", "65536"]
    with Process(arguments, log=site.short / "log") as run:
        manifest = site.folder / "manifest.json"
        run.wait_until(lambda: "pending" in json.loads(manifest.read_text()), "the manifest says what is under way")
        run.wait_until((site.folder / "disk0.0002.qcow2").exists, "the increment's image is there")
        run.signal(how)
        run.wait(expect=130 if how is signal.SIGINT else -how)
    if how is signal.SIGINT:
        assert "pending" not in site.manifest()
        assert not (site.folder / "disk0.0002.qcow2").exists()
        assert all(len(names) == 1 for names in site.bitmaps().values())
    told = site.take("incremental")
    assert "checkpoint 2: disk0: incremental" in told
    assert site.restored(0, 2) == site.content(0)
    assert all(len(names) == 1 for names in site.bitmaps().values())
    with site.daemon.qmp() as qmp:
        assert qmp.execute("query-jobs") == []


def test_checkpoint_exports_one_moment_of_several_disks(ours: Site) -> None:
    ours.write(0, "write -P 1 0 1M")
    with ours.daemon.qmp() as qmp:
        for node in ("disk0", "disk1"):
            qmp.execute("block-dirty-bitmap-add", node=node, name="since")
        qmp.execute("nbd-server-stop")
    script = f"nbdinfo --map=qemu:dirty-bitmap:since 'nbd+unix:///disk0?socket={ours.short}/x' > {ours.tmp}/map"
    told = ours.backup(
        "checkpoint",
        str(ours.daemon.qmp_socket),
        *("--disk", "disk0", "--disk", "disk1", "--since", "since", "--new", "next"),
        *("--socket-path", f"{ours.short}/x", "--exec", script),
    )
    assert f"disk0: nbd+unix:///disk0?socket={ours.short}/x  qemu:dirty-bitmap:since" in told
    assert (ours.tmp / "map").read_text().split()[:3] == ["0", str(SIZE), "0"]
    with ours.daemon.qmp() as qmp:
        assert qmp.execute("query-jobs") == []
        states = {
            bitmap["name"]: bitmap["recording"]
            for node in qmp.execute("query-named-block-nodes", flat=True)
            if node["node-name"] == "disk1"
            for bitmap in node["dirty-bitmaps"]
        }
    assert states == {"since": False, "next": True}


def test_usage_and_refusals(ours: Site) -> None:
    assert "there is no manifest.json" in ours.backup("list", str(ours.tmp / "nothing"), expect=1)
    (ours.tmp / "full").mkdir()
    (ours.tmp / "full" / "other").touch()
    socket = str(ours.daemon.qmp_socket)
    told = ours.backup("full", socket, str(ours.tmp / "full"), "--disk", "disk0", expect=1)
    assert "holds other files" in told
    told = ours.backup("full", socket, str(ours.folder), "--disk", "nope", expect=1)
    assert "no disk or node 'nope'; it has: disk0, disk1" in told
    assert "no device with a writable disk" in ours.backup("full", socket, str(ours.folder), expect=1)
    ours.backup("full", socket, expect=2)
    ours.take("full")
    assert "no checkpoint 9; there are: 1" in ours.backup(
        "restore", str(ours.folder), "x", "--checkpoint", "9", expect=1
    )
    assert "--disk is needed" in ours.backup("restore", str(ours.folder), "x", expect=2)
    listed = ours.backup("list", str(ours.folder))
    assert "disk1.0001.qcow2" in listed


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'{"livedisk-backup": 2, "id": "00000000"}',
        b'{"livedisk-backup": 1}',
        b'{"livedisk-backup": 1, "id": "0", "unknown": 1}',
        b'{"livedisk-backup": 1, "id": "0", "pending": {"files": ["../../etc/passwd"]}}',
        b'{"livedisk-backup": 1, "id": "0", "pending": {"files": ["manifest.json"]}}',
        b"\xff\xfe",
    ],
)
def test_a_manifest_that_is_none_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    result = livedisk("backup", "list", tmp_path, expect=1)
    assert str(tmp_path / "manifest.json") in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [("list",), ("verify",), ("restore", "out.raw")])
def test_a_folder_without_a_backup_is_told_and_left_alone(command: tuple[str, ...], tmp_path: Path) -> None:
    verb, *more = command
    for folder in (tmp_path, tmp_path / "missing"):
        said = livedisk("backup", verb, folder, *more, expect=1).stderr
        assert f"{folder} holds no backup" in said
    assert list(tmp_path.iterdir()) == []
