"""-drive: named block devices, as commands, jobs, events and the human monitor know them; compared with QEMU.

Differences that are meant: a device whose drive was taken away is listed last; a command that makes an image prints nothing; a
guessed format is warned of in other words; query-block-jobs tells more; buses that are not there are refused.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from kit.livedisk import Daemon, executable
from kit.qemu import assert_same, check, create, info, qemu_img, qemu_io
from kit.side_by_side import MACHINE, Host, Human, Job, Step, compare, step

DRIVES = [
    *("-drive", "if=virtio,id=d0,file=b.qcow2,format=qcow2,cache=none,aio=threads"),
    *("-drive", "if=none,id=d1,file=o.qcow2,format=qcow2,cache=unsafe,discard=unmap,detect-zeroes=on,node-name=n1"),
    *(
        "-drive",
        "if=none,id=d2,file=r.raw,format=raw,cache=writethrough,werror=stop,rerror=ignore,readonly=on,bus=1,unit=3",
    ),
    *(
        "-drive",
        "if=none,id=empty",
        "-drive",
        "driver=null-co,if=none,id=n,stats-account-invalid=off,stats-account-failed=off",
    ),
    *("-drive", 'if=virtio,file=json:{"driver":"qcow2",, "file":{"driver":"file",, "filename":"j.qcow2"}}'),
    *("-device", "virtio-blk-pci,drive=d2,id=vd2"),
]


def images(folder: Path) -> None:
    for name in ("a", "b", "j"):
        create(folder / f"{name}.qcow2", "8M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", folder / "o.qcow2", "8M")
    qemu_io(folder / "a.qcow2", "write -P 1 0 1M")
    qemu_io(folder / "o.qcow2", "write -P 2 512k 1M")
    for name in ("r", "r2"):
        create(folder / f"{name}.raw", "4M", format="raw")


def human(*lines: str) -> list[Step]:
    return [Human(line) for line in lines]


LOOK = [
    step("query-block"),
    step("query-blockstats"),
    Human("info block"),
    Human("info block -v d1"),
    Human("info blockstats"),
]
SCRIPTS: dict[str, list[Step]] = {
    "queries": [*LOOK, step("query-named-block-nodes", flat=True)],
    "commands": [
        step("block_resize", device="d1", size=16 << 20),
        step("block_resize", device="empty", size=16 << 20),
        step("block_resize", device="zz", size=16 << 20),
        step("blockdev-snapshot-internal-sync", device="d0", name="s"),
        step("blockdev-snapshot-delete-internal-sync", device="d0", name="s"),
        step("blockdev-snapshot-sync", device="d0", snapshot_file="s.qcow2"),
        step("change-backing-file", device="d1", image_node_name="n1", backing_file="x"),
        step("nbd-server-start", addr={"type": "unix", "data": {"path": "n.sock"}}),
        step("nbd-server-add", device="d0"),
        step("nbd-server-add", device="d1", name="w", writable=True),
        step("nbd-server-remove", name="w"),
        step("nbd-server-remove", name="d0"),
        step("blockdev-add", driver="null-co", node_name="d0"),
        step("blockdev-del", node_name="d1"),
        step("blockdev-del", node_name="n1"),
        step("device_del", id="zz"),
        *LOOK[:1],
    ],
    "jobs have the drive's name": [
        step("block-stream", device="d1"),
        Job("d1", "null"),
        step("drive-mirror", device="d0", target="m.qcow2", format="qcow2", sync="full"),
        Job("d0", "ready"),
        step("query-block-jobs"),
        step("block-job-complete", device="d0"),
        Job("d0", "null"),
        step("blockdev-snapshot-sync", device="d0", snapshot_file="s.qcow2"),
        step("block-commit", device="d0"),
        Job("d0", "ready"),
        step("block-job-cancel", device="d0"),
        Job("d0", "null"),
        step("drive-backup", device="d1", target="bk.qcow2", sync="full"),
        Job("d1", "null"),
        step("block-stream", device="n1", job_id="j"),
        Job("j", "null"),
        step("block-stream", device="zz"),
        *LOOK[:1],
    ],
    "the human monitor": [
        *human(
            "block_resize zz 1M", "block_resize d1 16M", "block_resize d1 8", "block_resize d1", "block_resize d1 x"
        ),
        *human("commit zz", "commit d0", "commit empty", "commit d1", "info block -v d1", "commit all"),
        Host(lambda folder: qemu_io(folder / "a.qcow2", "read -P 2 512k 1M", options=["-r", "-U"]).split("\n")[0]),
        *human(
            "block_stream zz",
            "block_job_cancel zz",
            "block_job_pause zz",
            "block_job_resume zz",
            "block_job_complete zz",
        ),
        *human("block_job_set_speed zz 4", "info block-jobs", "snapshot_blkdev zz x", "snapshot_blkdev d0"),
        *human("snapshot_blkdev d0 s.qcow2", "snapshot_blkdev -n d0 none.qcow2", "snapshot_blkdev d1 s2.qcow2 raw"),
        *human(
            "snapshot_blkdev_internal d0 i", "snapshot_blkdev_internal d0 i", "snapshot_delete_blkdev_internal d0 i 7"
        ),
        *human(
            "snapshot_delete_blkdev_internal d0 i",
            "drive_mirror zz m.raw raw",
            "drive_mirror d0",
            "drive_backup zz m raw",
        ),
        *human("nbd_server_stop", "nbd_server_add d0", "nbd_server_start foo", "nbd_server_start -w unix:n.sock"),
        *human(
            "nbd_server_start unix:n.sock", "nbd_server_start unix:n.sock", "nbd_server_add d0", "nbd_server_add zz"
        ),
        *human("nbd_server_add d0 again", "nbd_server_remove zz", "nbd_server_remove -f d0", "nbd_server_stop"),
        *human("block_set_io_throttle d1 0 0 0 100 0 0", "block_set_io_throttle zz 0 0 0 1 0 0", "info block d1"),
        *human(
            "block_set_io_throttle d1 0 0 0 0 0 0", "block_set_io_throttle d1 0 0 0 1 1 0", "eject zz", "change zz x"
        ),
    ],
    "drives come and go": [
        *human("drive_add 0 if=none,id=d5,file=r2.raw,format=raw", "drive_add 0 if=none,id=d5,file=r2.raw,format=raw"),
        *human("drive_add 0 file=none.raw,format=raw", "drive_add 0 if=virtio,file=r2.raw,format=raw", "drive_add 0"),
        *human("drive_add -n 0 driver=null-co,node-name=nn", "drive_add -n 0 driver=null-co", "drive_add 0 zz=3"),
        *human(
            "drive_add 0 if=none,file=j2.qcow2,format=qcow2",
            "info block",
            "drive_del zz",
            "drive_del nn",
            "drive_del d1",
        ),
        *human('qemu-io d5 "write -P 3 0 64k"', 'qemu-io d5 "read -P 3 0 64k"', 'qemu-io d5 "aio_read -i 0 1"'),
        *human('qemu-io zz "read 0 1"', "drive_del d5", "drive_del empty", "info block"),
        step("query-named-block-nodes", flat=True),
    ],
    "options of all kinds": [
        *(
            Human(f"drive_add 0 if=none,{options}")
            for options in (
                # a file by its name alone, in dotted keys and in JSON, here and below
                "id=f1,driver=qcow2,file.filename=j2.qcow2,backing.file.filename=a.qcow2,backing.driver=qcow2",
                "id=f2,driver=qcow2,file.filename=none.qcow2",
                "id=f3,filename=r.raw",
                "id=f4,driver=raw,file.driver=raw,file.file.filename=r.raw,file.size=64k,readonly=on",
                'id=f5,file=json:{"driver":"qcow2",,"file.filename":"none.qcow2"}',
                'id=f6,file=json:{"file":{"filename":"a.qcow2"}},readonly=on',
                'id=f7,file=json:{"filename":"a.qcow2"}',
                "id=f8,driver=quorum,vote-threshold=1,children.0.driver=raw,children.0.file.filename=r2.raw",
                'id=f9,file=json:{"driver":"quorum",,"vote-threshold":1,,"children.0.driver":"null-co"}',
                # older words for limits
                "id=t1,driver=null-co,iops=50,iops_max=100,iops_size=4096,bps_rd=100000,bps_rd_max=200000,group=gg",
                "id=t2,driver=null-co,iops_max=5",
                "id=t3,driver=null-co,iops_size=4096",
                "id=t4,driver=null-co,iops=5,throttling.iops-total=6",
                "id=z1,driver=null-co,detect-zeroes=foo",
                "id=z2,driver=null-co,detect-zeroes=unmap",
                "id=9,driver=null-co",
                "id=w,driver=null-co,readonly=on,copy-on-read=on",
            )
        ),
        *human("drive_del f4", "drive_del f8"),  # QEMU's names for them tell numbers as they were written
        *LOOK[:2],
        step("query-named-block-nodes", flat=True),
        Human("info block t1"),
        *human("block_set_io_throttle t1 0 100", "block_set_io_throttle t1 0 0 0 x 0 0", "block_job_set_speed t1"),
    ],
    "help": human(
        *(
            f"help {name}"
            for name in ("drive_add", "drive_del", "commit", "block_resize", "block_stream", "drive_mirror")
        ),
        *(f"help block_job_{name}" for name in ("set_speed", "cancel", "pause", "resume", "complete")),
        *(
            f"help {name}"
            for name in ("drive_backup", "snapshot_blkdev", "snapshot_blkdev_internal", "nbd_server_start")
        ),
        *(
            f"help {name}"
            for name in ("snapshot_delete_blkdev_internal", "nbd_server_add", "nbd_server_remove", "eject")
        ),
        *(f"help {name}" for name in ("nbd_server_stop", "block_set_io_throttle", "change")),
    ),
}


def even(text: str) -> str:
    text = re.sub(r"#block\d+", "#block", text)
    text = re.sub(r'"virtual-size": (?!8388608|4194304|16777216|1048576)\d+', '"virtual-size": 0', text)
    text = re.sub(r"disk size: [\d.]+ \w+", "disk size: 0", text)
    text = re.sub(r"Wrote: .*|idle_time_ns=\d+", "", text)
    text = re.sub(r'"idle_time_ns": \d+, ', "", text)
    text = re.sub(r', "x-[a-z-]+": (\d+|null|"[^"]*")', "", text)  # ours, of a mirror's convergence
    return re.sub(r'("[a-z_]+": )\d{3,}(?=[,}])(?<!8388608)(?<!4194304)(?<!1048576)', r"\g<1>0", text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_answers_are_those_of_qemu(name: str, tmp_path: Path) -> None:
    def prepare(folder: Path) -> None:
        images(folder)
        create(folder / "j2.qcow2", "8M")

    compare(tmp_path, SCRIPTS[name], prepare=prepare, options=[*MACHINE, *DRIVES], even_out=even, events=False)


REFUSED = [
    "if=zz,file=r.raw",
    "if=virtio,media=zz,file=r.raw,format=raw",
    "if=virtio,cache=zz,file=r.raw,format=raw",
    "if=virtio,format=zz,file=r.raw",
    "if=virtio,format=raw",
    "if=virtio,zz=3,format=raw,file=r.raw",
    "if=virtio,aio=zz,format=raw,file=r.raw",
    "if=virtio,aio=native,format=raw,file=r.raw",
    "if=virtio,discard=zz,format=raw,file=r.raw",
    "if=virtio,werror=zz,format=raw,file=r.raw",
    "if=virtio,rerror=enospc,format=raw,file=r.raw",
    "if=virtio,format=raw,file=none.raw",
    "if=virtio,index=1,unit=2,format=raw,file=r.raw",
    "if=virtio,format=raw,file=r.raw,id=1x",
    "if=virtio,format=raw,file=r.raw,throttling.bps-total=4,throttling.bps-read=3",
    "if=virtio,format=raw,file=r.raw,readonly=on,read-only=off",
    "if=virtio,driver=raw,format=raw,file=r.raw",
    "if=none,bus=1,unit=3,id=x -drive if=none,bus=1,unit=3",
    "if=none,index=3 -drive if=none,index=3",
    "if=none,index=3 -drive if=none,bus=1,unit=3",
    "if=none,id=x -drive if=none,id=x",
]


@pytest.mark.parametrize("drive", REFUSED)
def test_what_is_wrong_is_said_as_qemu_says_it(drive: str, tmp_path: Path) -> None:
    images(tmp_path)
    said = []
    for command in (["qemu-system-x86_64", *MACHINE], [executable(), "daemon"]):
        done = subprocess.run(
            [*command, "-drive", *drive.split()], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 1
        said.append(done.stderr.splitlines()[0].partition(": ")[2])
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("drive", "reason"),
    [
        ("if=ide,file=r.raw,format=raw", "if=ide: there is no such bus here"),
        ("media=cdrom,file=r.raw,format=raw", "media=cdrom: there are no removable media here"),
        ("file=disguised.raw", "starts with a qcow2 header that names another file"),
    ],
)
def test_what_is_not_here_is_refused_by_name(drive: str, reason: str, tmp_path: Path) -> None:
    images(tmp_path)
    (tmp_path / "disguised.raw").write_bytes((tmp_path / "o.qcow2").read_bytes())
    done = subprocess.run(
        [executable(), "daemon", "-drive", drive], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert reason in done.stderr


def test_a_guest_on_a_temporary_overlay_leaves_the_image_as_it_was_until_commit(short_path: Path) -> None:
    images(short_path)
    before = (short_path / "o.qcow2").read_bytes()
    drive = f"file={short_path / 'o.qcow2'},format=qcow2,snapshot=on,id=d"
    with Daemon(short_path, "-drive", drive) as daemon:
        with daemon.qmp() as qmp:
            device = next(one for one in qmp.execute("query-block") if one["device"] == "d")
            scratch = Path(device["inserted"]["file"].partition("/var/tmp/")[2].partition('"')[0])
            assert (Path("/var/tmp") / scratch).exists()
            qmp.human('qemu-io d "write -P 9 0 1M"')
            assert before == (short_path / "o.qcow2").read_bytes()
            qmp.human("commit d")
        daemon.stop()
    assert not (Path("/var/tmp") / scratch).exists()
    qemu_io(short_path / "o.qcow2", "read -P 9 0 1M")  # commit has written it into the image
    assert before != (short_path / "o.qcow2").read_bytes()


def test_a_drive_ends_with_its_device(short_path: Path) -> None:
    images(short_path)
    drive = f"if=none,file={short_path / 'b.qcow2'},format=qcow2,id=d"
    with Daemon(short_path, "-drive", drive, "-device", "virtio-blk,drive=d,id=v") as daemon, daemon.qmp() as qmp:
        assert qmp.execute("qom-get", path="v", property="drive") == "d"
        qmp.execute("device_del", id="v")
        assert qmp.execute("query-block") == []
        assert qmp.execute("query-named-block-nodes") == []
    check(short_path / "b.qcow2")


def test_what_is_read_from_below_is_kept(short_path: Path) -> None:
    images(short_path)
    drive = f"file={short_path / 'o.qcow2'},format=qcow2,copy-on-read=on,id=d"
    with Daemon(short_path, "-drive", drive) as daemon, daemon.qmp() as qmp:
        qmp.human('qemu-io d "read 0 512k"')
        assert qmp.execute("query-block")[0]["inserted"]["drv"] == "qcow2"
    assert info(short_path / "o.qcow2")["format"] == "qcow2"
    file = {"driver": "file", "filename": str(short_path / "o.qcow2")}
    alone = "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": file})
    qemu_io(alone, "read -P 1 0 512k", format=None)


def test_what_is_read_is_kept_in_a_temporary_overlay_too(short_path: Path) -> None:
    images(short_path)
    drive = f"file={short_path / 'a.qcow2'},format=qcow2,snapshot=on,copy-on-read=on,id=d"
    with Daemon(short_path, "-drive", drive) as daemon, daemon.qmp() as qmp:
        qmp.human('qemu-io d "read 0 512k"')
        [inserted] = [one["inserted"] for one in qmp.execute("query-block") if one["device"] == "d"]
        assert inserted["image"]["actual-size"] > 512 << 10


def test_a_device_counts_as_its_drive_says_unless_it_says_otherwise(short_path: Path) -> None:
    drives = [part for name in ("d", "e") for part in (
        "-drive", f"if=none,driver=null-co,id={name},stats-account-invalid=off,stats-account-failed=off"
    )]  # fmt: skip
    devices = ["-device", "virtio-blk,drive=d", "-device", "virtio-blk,drive=e,account-invalid=on"]
    with Daemon(short_path, *drives, *devices) as daemon, daemon.qmp() as qmp:
        stats = {one["device"]: one["stats"] for one in qmp.execute("query-blockstats")}
        assert [(one["account_invalid"], one["account_failed"]) for one in stats.values()] == [
            (False, False),
            (True, False),
        ]


def test_the_throttle_group_of_a_drive_ends_with_it(short_path: Path) -> None:
    with Daemon(short_path) as daemon, daemon.qmp() as qmp:
        for limit in (100, 200):
            qmp.human(f"drive_add 0 if=none,driver=null-co,id=d,throttling.iops-total={limit}")
            qmp.human("drive_del d")
            # A group that was left behind would not let an object have its name.
            qmp.execute("object-add", qom_type="throttle-group", id="d")
            qmp.execute("object-del", id="d")


def test_commit_is_that_of_qemu_img(tmp_path: Path) -> None:
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
        images(tmp_path / name)
    qemu_img("commit", "-q", "-f", "qcow2", tmp_path / "theirs" / "o.qcow2")
    drive = f"file={tmp_path / 'ours' / 'o.qcow2'},format=qcow2,id=d"
    with Daemon(tmp_path, "-drive", drive, nbd=False) as daemon, daemon.qmp() as qmp:
        assert qmp.human("commit d") == ""
    for name in ("a", "o"):
        check(tmp_path / "ours" / f"{name}.qcow2")
        assert_same(tmp_path / "ours" / f"{name}.qcow2", tmp_path / "theirs" / f"{name}.qcow2")
