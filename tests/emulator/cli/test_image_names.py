"""What images are called besides paths: ``json:{...}``, filters' names, URIs of exports. As QEMU takes them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon, Serve, livedisk
from kit.nbdkit import Nbdkit
from kit.peers import run
from kit.places import short_folder
from kit.qemu import QemuNbd, create, info, qemu_img, qemu_io
from kit.qmp import Qmp, QmpError
from kit.side_by_side import Human, Job, Step, compare, step

NESTED = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}'
DOTTED = 'json:{"driver":"qcow2","file.driver":"file","file.filename":"a.qcow2"}'
STORAGE = 'json:{"driver":"file","filename":"a.qcow2"}'
VERIFY = "blkverify:a.raw:a.qcow2"
NAMES = (
    NESTED,
    DOTTED,
    STORAGE,
    "blkdebug::a.qcow2",
    "blkdebug:rules:a.qcow2",
    VERIFY,
    "file:a.qcow2",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create(tmp_path / "a.qcow2", "1M")
    create(tmp_path / "a.raw", "1M", format="raw")
    qemu_io(tmp_path / "a.qcow2", "write -P 5 64k 64k")
    qemu_io(tmp_path / "a.raw", "write -P 5 64k 64k", format="raw")
    (tmp_path / "rules").write_text('[inject-error]\nevent = "cow_read"\n')
    return tmp_path


def both(folder: Path, *arguments: str) -> tuple[str, str]:
    """What qemu-img and ours print."""
    theirs = run(["qemu-img", *arguments], expect=None, cwd=folder)
    ours = livedisk("img", *arguments, expect=None, cwd=folder)
    return theirs.stdout + theirs.stderr, ours.stdout + ours.stderr.replace("livedisk img", "qemu-img")


@pytest.mark.parametrize("name", NAMES)
def test_info_and_snapshots_of_what_is_named(name: str, folder: Path) -> None:
    theirs, ours = both(folder, "info", name)
    assert ours.splitlines()[:4] == theirs.splitlines()[:4]
    if name != VERIFY:  # of which ours says that it is no qcow2 image
        theirs, ours = both(folder, "snapshot", "-l", name)
        assert ours == theirs


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (STORAGE, VERIFY)])
def test_maps_of_what_is_named(name: str, folder: Path) -> None:
    theirs, ours = both(folder, "map", name)
    assert ours == theirs


@pytest.mark.parametrize("name", ["json:[1]", 'json:{"driver":"qcow2","file":{"driver":"file","filename":"none"}}'])
def test_names_that_are_none(name: str, folder: Path) -> None:
    theirs, ours = both(folder, "info", name)
    assert ours.removesuffix("\n").endswith(theirs.removesuffix("\n").rpartition(": ")[2])


def test_a_check_of_what_json_names(folder: Path) -> None:
    for name in (NESTED, DOTTED):
        assert "No errors were found" in livedisk("img", "check", name, cwd=folder).stdout


def test_backing_files_by_json(folder: Path) -> None:
    livedisk("img", "create", "-q", "-b", NESTED, "-F", "qcow2", "o.qcow2", cwd=folder)
    assert info(folder / "o.qcow2")["backing-filename"] == NESTED
    # The name is relative to the working folder of whoever opens it, as QEMU has it.
    shown = subprocess.run(
        ["qemu-io", "-c", "read -P 5 64k 64k", "o.qcow2"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert "Pattern verification failed" not in shown.stdout
    theirs, ours = both(folder, "map", "--output=json", "o.qcow2")
    assert json.loads(ours) == json.loads(theirs)


def test_no_file_is_made_of_a_name_that_is_no_path(folder: Path) -> None:
    for name, why in ((STORAGE, "Unknown protocol 'json'"), ("nbd:unix:none", "does not support creating new images")):
        done = livedisk("img", "create", name, "1M", cwd=folder, expect=1)
        assert why in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["a.qcow2", "a.raw", "rules"]


def test_a_file_whose_name_looks_like_another_kind_is_still_a_file(folder: Path) -> None:
    (folder / "a.qcow2").rename(folder / "nbd:odd.qcow2")
    assert "file format: qcow2" in livedisk("img", "info", "nbd:odd.qcow2", cwd=folder).stdout


def test_images_on_exports(folder: Path, short_path: Path) -> None:
    create(folder / "e.raw", "2M", format="raw")
    with QemuNbd(short_path, folder / "e.raw", "-e", "3") as server:
        livedisk("img", "create", "-q", server.uri, "1M")
        assert "file format: qcow2" in livedisk("img", "info", server.uri).stdout
        qemu_img("check", "-f", "qcow2", server.uri)


@pytest.mark.parametrize("name", [NESTED, DOTTED, "blkdebug::a.qcow2", "file:a.qcow2", VERIFY])
def test_serving_what_is_named(name: str, folder: Path, short_path: Path) -> None:
    with Serve(short_path, name, cwd=folder) as served:
        qemu_io(served.uri, "read -P 5 64k 64k", "read -P 0 0 64k", "write -P 6 0 4k", format="raw")


@pytest.mark.parametrize("name", [NESTED, "blkdebug::a.qcow2", VERIFY, "file:a.qcow2"])
def test_drives_by_name(name: str, folder: Path, short_path: Path) -> None:
    drive = f"file={name.replace(',', ',,')},id=d,if=none"
    drive += "" if name.startswith("json:") else f",format={'raw' if 'verify' in name else 'qcow2'}"
    with Daemon(short_path, "-drive", drive, cwd=folder) as daemon, Qmp(daemon.qmp_socket) as qmp:
        assert qmp.execute("query-block")[0]["inserted"]["image"]["virtual-size"] == 1 << 20
        qmp.human('qemu-io d "read -P 5 64k 64k"')


# -- commands that make or take images by name -------------------------------------------------------------------------
A = ["-blockdev", "qcow2,node-name=a,file.driver=file,file.filename=a.qcow2", "-device", "virtio-blk-pci,drive=a,id=v"]
OVERLAY = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"o.qcow2"}}'


def prepare(folder: Path) -> None:
    create(folder / "a.qcow2", "1M")
    create(folder / "t.raw", "1M", format="raw")
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "a.qcow2", "-F", "qcow2", folder / "o.qcow2", "1M")


SCRIPTS: dict[str, list[Step]] = {
    "snapshots": [
        step("blockdev-snapshot-sync", node_name="a", snapshot_file=STORAGE, snapshot_node_name="s"),
        step("blockdev-snapshot-sync", node_name="a", snapshot_file=OVERLAY, snapshot_node_name="s", mode="existing"),
        Human("info block -n s"),
        step("change-backing-file", device="s", image_node_name="s", backing_file=NESTED),
        step("query-named-block-nodes"),
    ],
    "targets": [
        step("drive-mirror", job_id="j", device="a", target=STORAGE, sync="full", format="raw"),
        step("drive-backup", job_id="j", device="a", target=STORAGE, sync="full", format="raw"),
        step(
            "drive-backup",
            job_id="j",
            device="a",
            target='json:{"driver":"raw","file":{"driver":"file","filename":"t.raw"}}',
            sync="full",
            format="raw",
            mode="existing",
        ),
        Job("j", "null"),
    ],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_as_qemu(name: str, short_path: Path) -> None:
    options = ["-M", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-S", *A]
    compare(short_path, SCRIPTS[name], prepare=prepare, options=options)


@contextmanager
def exports(folder: Path, *sizes: str) -> Iterator[list[str]]:
    """Raw disks of these sizes by qemu-nbd; the last is read-only."""
    with short_folder() as place:
        servers = []
        for number, size in enumerate(sizes):
            create(folder / f"{number}.raw", size, format="raw")
            more = ("-r",) if number + 1 == len(sizes) else ()
            servers.append(QemuNbd(place, folder / f"{number}.raw", "-e", "5", *more, name=f"s{number}"))
        try:
            yield [server.uri for server in servers]
        finally:
            for server in servers:
                server.kill()


def outcome(qmp: Qmp, command: str, **arguments: Any) -> str:
    """ "done", or what went wrong, of a job that is ended when it is ready."""
    qmp.execute(command, job_id="j", device="a", **arguments)
    while True:
        event = qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data["status"] in ("ready", "null"))
        if event["status"] == "null":
            break
        qmp.execute("block-job-cancel", device="j")
    completed = [one for one in qmp.events if one["event"] in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")]
    qmp.events.clear()
    error: str = completed[-1]["data"].get("error", "done")
    return error


@pytest.mark.parametrize("command", ["drive-mirror", "drive-backup"])
def test_exports_as_targets(command: str, folder: Path, short_path: Path) -> None:
    with (
        exports(folder, "1M", "2M", "1M") as (same, larger, closed),
        Daemon(short_path, "-blockdev", A[1], cwd=folder) as daemon,
        Qmp(daemon.qmp_socket) as qmp,
    ):
        for fmt in ("raw", "nbd"):
            assert outcome(qmp, command, target=same, sync="full", format=fmt) == "done"
            qemu_io(same, "read -P 5 64k 64k", format="raw")
        assert outcome(qmp, command, target=larger, sync="full", format="qcow2") == "done"
        qemu_img("compare", "-f", "qcow2", "-F", "qcow2", "-U", folder / "a.qcow2", larger)
        for fmt, target in (("raw", closed), ("qcow2", closed), ("raw", same.replace("s0", "none"))):
            with pytest.raises(
                QmpError, match="Protocol driver 'nbd' does not support creating new images, so an existing"
            ):
                outcome(qmp, command, target=target, sync="full", format=fmt)
        with pytest.raises(QmpError, match="Unknown protocol 'none'"):
            outcome(qmp, command, target="none:x", sync="full", format="raw")


def test_a_snapshot_on_an_export(folder: Path, short_path: Path) -> None:
    with (
        exports(folder, "2M", "1M") as (overlay, _),
        Daemon(short_path, *A, cwd=folder) as daemon,
        Qmp(daemon.qmp_socket) as qmp,
    ):
        qmp.execute("blockdev-snapshot-sync", node_name="a", snapshot_file=overlay, snapshot_node_name="s")
        assert qmp.execute("query-block")[0]["inserted"]["node-name"] == "s"
        qmp.human('qemu-io s "read -P 5 64k 64k"')


FAILING = {
    "pread": [
        ("compare", "-f", "raw", "-F", "raw", "URI", "a.raw"),
        ("convert", "-f", "raw", "-O", "raw", "URI", "copy"),
    ],
    "extents": [("map", "-f", "raw", "URI"), ("measure", "-f", "raw", "-O", "qcow2", "URI")],
}


@pytest.mark.parametrize("request_", FAILING)
def test_an_export_that_fails_is_told_in_qemu_imgs_words(request_: str, folder: Path, short_path: Path) -> None:
    fault = ("error=ENOSPC", f"error-{request_}-rate=100%")
    with Nbdkit(short_path, "--filter=error", "pattern" if request_ == "pread" else "memory", "1M", *fault) as server:
        for line in FAILING[request_]:
            theirs, ours = both(folder, *(server.uri if word == "URI" else word for word in line))
            assert ours == theirs.removeprefix("Offset          Length          Mapped to       File\n")


def test_a_raw_image_is_made_of_an_export_without_n(folder: Path, short_path: Path) -> None:
    with Nbdkit(short_path, "memory", "2M") as server:
        for line in (
            ("convert", "-f", "raw", "-O", "raw", "a.raw", server.uri),
            ("compare", "-f", "raw", "-F", "raw", "a.raw", server.uri),
            ("create", "-f", "raw", server.uri, "1M"),
            ("create", "-q", "-f", "raw", server.uri, "3M"),
            ("info", "-f", "raw", server.uri),
        ):
            theirs, ours = both(folder, *line)
            assert ours == theirs
        assert livedisk("img", "compare", "-f", "raw", "-F", "raw", "a.raw", server.uri, cwd=folder).returncode == 0


def test_an_export_that_cannot_be_written_to_is_named(folder: Path, short_path: Path) -> None:
    with Nbdkit(short_path, "-r", "memory", "1M") as server:
        told = both(folder, "convert", "-n", "-f", "raw", "-O", "raw", "a.raw", server.uri)[1]
    assert told == f"qemu-img: Could not open '{server.uri}': Block node is read-only\n"
