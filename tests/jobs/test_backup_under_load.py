"""Backups while clients write: what they read never differs, and the target is what the disk was when the job started.

The disks are written to in blocks of 4 KiB through NBD; clusters of the images are as small, those that are copied larger, so
that copies hold more than what is written.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon
from kit.qemu import check, create, info, qemu_img, read_all
from kit.qmp import Qmp, QmpError
from kit.writer import History, Writer, now

SIZE = 24 << 20
SMALL = "cluster_size=4096"


class Setup:
    """A daemon with two disks, ``one`` over a backing file and ``two``, both being written to."""

    def __init__(self, folder: Path, daemon: Daemon, qmp: Qmp, writers: dict[str, Writer]) -> None:
        self.folder, self.daemon, self.qmp, self.writers = folder, daemon, qmp, writers
        self.histories: dict[str, History] = {}

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.qcow2"

    def wait(self, status: str, job: str = "j") -> None:
        self.qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data == {"id": job, "status": status}, timeout=60)

    def completed(self, job: str = "j") -> dict[str, Any]:
        data = self.qmp.wait_event("BLOCK_JOB_COMPLETED", lambda data: data["device"] == job, timeout=60)
        self.wait("null", job)
        return data

    def target(self, name: str, *, backing: Path | None = None, options: str = "", **node: Any) -> str:
        create(self.path(name), SIZE, backing=backing, options=options)
        file = {"driver": "file", "filename": str(self.path(name))}
        if backing is not None:
            node["backing"] = None
        self.qmp.execute("blockdev-add", driver="qcow2", node_name=name, file=file, **node)
        return name

    def backup(self, **more: Any) -> tuple[int, int]:
        """Start a backup of ``one``; the times around its start."""
        before = now()
        arguments = {"job_id": "j", "device": "one", "sync": "full", **more}
        self.qmp.execute("blockdev-backup", **arguments)
        return before, now()

    def finish(self) -> None:
        """Let the clients write on for a while, end them and the daemon; the disks are what was written."""
        time.sleep(0.2)
        self.histories = {name: writer.finish() for name, writer in self.writers.items()}
        self.daemon.stop(expect=0)

    def check(self, scratch: Path, moments: dict[str, tuple[str, tuple[int, int]]]) -> None:
        """Both disks hold what was written, and each target (by name: the disk, the times) one moment of its disk."""
        for name, history in self.histories.items():
            check(self.path(name))
            history.check_final(read_all(self.path(name), scratch))
        for target, (disk, (before, after)) in moments.items():
            check(self.path(target))
            self.histories[disk].check_moment(read_all(self.path(target), scratch), before, after)


@pytest.fixture
def setup(short_path: Path) -> Iterator[Setup]:
    create(short_path / "base.qcow2", SIZE, options=SMALL)
    create(short_path / "two.qcow2", SIZE, options=SMALL)
    options: list[str] = []
    for name in ("base", "two"):
        options += [
            "--blockdev",
            f"qcow2,node-name={name},discard=unmap,file.driver=file,file.filename={short_path}/{name}.qcow2",
        ]
        options += ["--export", f"nbd,id={name},node-name={name},name={name},writable=on"]
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(short_path, *options))
        qmp = stack.enter_context(daemon.qmp(timeout=60))
        writers = {
            name: stack.enter_context(
                Writer(daemon.uri(export), SIZE, short_path, depth=4, seed=seed, name=f"writer-{name}")
            )
            for seed, (name, export) in enumerate((("one", "base"), ("two", "two")))
        }
        time.sleep(0.2)
        qmp.execute("block-dirty-bitmap-add", node="two", name="two")
        create(short_path / "one.qcow2", SIZE, options=SMALL, backing=short_path / "base.qcow2")
        qmp.execute(
            "blockdev-snapshot-sync",
            node_name="base",
            snapshot_file=str(short_path / "one.qcow2"),
            snapshot_node_name="one",
            mode="existing",
        )
        time.sleep(0.2)
        yield Setup(short_path, daemon, qmp, writers)


BACKUPS: dict[str, dict[str, Any]] = {
    "full": {},
    "compressed": {"compress": True},
    "larger clusters": {"x_perf": {"min-cluster-size": 1 << 20}},
    "small chunks, one at a time": {"x_perf": {"max-chunk": 65536, "max-workers": 1}},
    "slow at first": {"speed": 4 << 20},
}


@pytest.mark.parametrize("name", BACKUPS)
def test_the_target_is_the_disk_at_the_start(name: str, setup: Setup, tmp_path: Path) -> None:
    setup.target("t", discard="unmap")
    times = setup.backup(target="t", **BACKUPS[name])
    if "speed" in BACKUPS[name]:
        time.sleep(0.3)
        setup.qmp.execute("job-pause", id="j")
        setup.wait("paused")
        time.sleep(0.1)
        setup.qmp.execute("job-resume", id="j")
        setup.qmp.execute("block-job-set-speed", device="j", speed=0)
    assert "error" not in setup.completed()
    setup.finish()
    setup.check(tmp_path, {"t": ("one", times)})


def test_top_copies_what_the_topmost_image_holds(setup: Setup, tmp_path: Path) -> None:
    setup.target("t", backing=setup.path("base"), options=SMALL)
    times = setup.backup(target="t", sync="top")
    assert setup.completed()["len"] <= SIZE
    setup.finish()
    setup.check(tmp_path, {"t": ("one", times)})
    assert [Path(one["filename"]).stem for one in info(setup.path("t"), "--backing-chain")] == ["t", "base"]


@pytest.mark.slow
def test_none_keeps_what_guests_overwrite(setup: Setup, tmp_path: Path) -> None:
    """Image fleecing: the target, over the disk, is exported while the filter works."""
    setup.target("t", backing=None, options=SMALL)
    setup.qmp.execute("blockdev-del", node_name="t")
    file = {"driver": "file", "filename": str(setup.path("t"))}
    setup.qmp.execute("blockdev-add", driver="qcow2", node_name="t", file=file, backing="one")
    times = setup.backup(target="t", sync="none")
    setup.qmp.call("block-export-add", {"type": "nbd", "id": "then", "node-name": "t", "name": "then"})
    copies = [tmp_path / "first.raw", tmp_path / "second.raw"]
    for copy in copies:
        qemu_img("convert", "-f", "raw", "-O", "raw", setup.daemon.uri("then"), copy)
        time.sleep(0.2)
    setup.qmp.execute("block-export-del", id="then")
    setup.qmp.wait_event("BLOCK_EXPORT_DELETED")
    setup.qmp.execute("block-job-cancel", device="j")
    setup.qmp.wait_event("BLOCK_JOB_CANCELLED")
    setup.finish()
    setup.check(tmp_path, {})
    assert copies[0].read_bytes() == copies[1].read_bytes()
    setup.histories["one"].check_moment(copies[0].read_bytes(), *times)


@pytest.mark.parametrize(("sync", "chain"), [("full", ["new"]), ("top", ["new", "base"])])
def test_drive_backup_makes_its_target(sync: str, chain: list[str], setup: Setup, tmp_path: Path) -> None:
    before = now()
    setup.qmp.execute("drive-backup", job_id="j", device="one", target=str(setup.path("new")), sync=sync)
    times = before, now()
    assert "error" not in setup.completed()
    setup.finish()
    setup.check(tmp_path, {"new": ("one", times)})
    assert [Path(one["filename"]).stem for one in info(setup.path("new"), "--backing-chain")] == chain


def test_several_disks_are_backed_up_at_one_instant(setup: Setup, tmp_path: Path) -> None:
    for name in ("t1", "t2"):
        setup.target(name)
    before = now()
    data = [
        {"device": disk, "target": f"t{number}", "job-id": disk, "sync": "full"}
        for number, disk in ((1, "one"), (2, "two"))
    ]
    setup.qmp.execute(
        "transaction",
        actions=[{"type": "blockdev-backup", "data": one} for one in data],
        properties={"completion-mode": "grouped"},
    )
    times = before, now()
    for job in ("one", "two"):
        assert "error" not in setup.completed(job)
    setup.finish()
    setup.check(tmp_path, {"t1": ("one", times), "t2": ("two", times)})
    both = [
        setup.histories[disk].check_moment(read_all(setup.path(target), tmp_path), *times)
        for disk, target in (("one", "t1"), ("two", "t2"))
    ]
    assert max(included for included, _ in both) <= min(excluded for _, excluded in both)


def test_increments_restore_each_moment(setup: Setup, tmp_path: Path) -> None:
    """A full backup and its bitmap in one transaction, then increments; one is cancelled, and made again."""
    setup.target("t0")
    moments: dict[str, tuple[str, tuple[int, int]]] = {}
    before = now()
    full = {"device": "two", "target": "t0", "job-id": "j", "sync": "full"}
    setup.qmp.execute(
        "transaction",
        actions=[
            {"type": "block-dirty-bitmap-clear", "data": {"node": "two", "name": "two"}},
            {"type": "blockdev-backup", "data": full},
        ],
    )
    moments["t0"] = "two", (before, now())
    setup.completed()
    for number in range(1, 5):
        time.sleep(0.15)
        name, below = f"t{number}", setup.path(f"t{number - 1}")
        setup.target(name, backing=below, options=SMALL)
        if number == 2:
            setup.backup(device="two", target=name, sync="incremental", bitmap="two", speed=65536)
            time.sleep(0.1)
            setup.qmp.execute("job-cancel", id="j")
            setup.wait("null")
            time.sleep(0.1)
        times = setup.backup(device="two", target=name, sync="incremental", bitmap="two")
        assert setup.completed()["len"] < SIZE
        moments[name] = "two", times
    setup.finish()
    setup.check(tmp_path, moments)


@pytest.mark.parametrize("ending", ["completes", "is cancelled"])
@pytest.mark.parametrize("mode", ["on-success", "never", "always"])
def test_a_bitmap_misses_nothing_whatever_becomes_of_the_backup(
    mode: str, ending: str, setup: Setup, tmp_path: Path
) -> None:
    """After any run the bitmap holds what a further increment needs, on top of what was copied."""
    setup.target("t0")
    full = {"device": "two", "target": "t0", "job-id": "j", "sync": "full"}
    clear = {"type": "block-dirty-bitmap-clear", "data": {"node": "two", "name": "two"}}
    setup.qmp.execute("transaction", actions=[clear, {"type": "blockdev-backup", "data": full}])
    setup.completed()
    setup.target("t1", backing=setup.path("t0"))
    setup.backup(
        device="two",
        target="t1",
        sync="bitmap",
        bitmap="two",
        bitmap_mode=mode,
        speed=0 if ending == "completes" else 1 << 20,
    )
    if ending == "completes":
        setup.completed()
    else:
        time.sleep(0.3)
        setup.qmp.execute("job-cancel", id="j")
        setup.wait("null")
    # What the run copied counts if its mode says so: then the next increment stands on it.
    kept = mode == "always" or (mode == "on-success" and ending == "completes")
    setup.target("t2", backing=setup.path("t1" if kept else "t0"))
    times = setup.backup(device="two", target="t2", sync="incremental", bitmap="two")
    setup.completed()
    setup.finish()
    setup.check(tmp_path, {"t2": ("two", times)})


@pytest.mark.parametrize("seed", range(2))
def test_verbs_at_random_moments(seed: int, setup: Setup, tmp_path: Path) -> None:
    chance = random.Random(seed)
    setup.target("t")
    times = setup.backup(target="t", speed=8 << 20)
    for _ in range(12):
        verb, arguments = chance.choice(
            [
                ("job-pause", {"id": "j"}),
                ("job-resume", {"id": "j"}),
                ("block-job-set-speed", {"device": "j", "speed": chance.choice([0, 1 << 20, 8 << 20])}),
            ]
        )
        with contextlib.suppress(QmpError):
            setup.qmp.call(verb, arguments)
        time.sleep(chance.random() / 20)
    with contextlib.suppress(QmpError):  # it may be over, or not paused at the end
        setup.qmp.execute("block-job-set-speed", device="j", speed=0)
    with contextlib.suppress(QmpError):
        setup.qmp.execute("job-resume", id="j")
    setup.completed()
    setup.finish()
    setup.check(tmp_path, {"t": ("one", times)})


def test_a_snapshot_under_the_filter_does_not_disturb_the_backup(setup: Setup, tmp_path: Path) -> None:
    setup.target("t")
    create(setup.path("over"), SIZE, options=SMALL, backing=setup.path("two"))
    file = {"driver": "file", "filename": str(setup.path("over"))}
    setup.qmp.execute("blockdev-add", driver="qcow2", node_name="over", file=file, backing=None)
    times = setup.backup(device="two", target="t", speed=4 << 20)
    time.sleep(0.2)
    setup.qmp.execute("blockdev-snapshot", node="two", overlay="over")
    setup.qmp.execute("block-job-set-speed", device="j", speed=0)
    assert "error" not in setup.completed()
    setup.finish()
    for name in ("two", "over", "t"):
        check(setup.path(name))
    setup.histories["two"].check_final(read_all(setup.path("over"), tmp_path))
    setup.histories["two"].check_moment(read_all(setup.path("t"), tmp_path), *times)


def test_two_backups_of_one_disk_each_have_their_own_moment(setup: Setup, tmp_path: Path) -> None:
    for name in ("t1", "t2"):
        setup.target(name)
    first = setup.backup(target="t1", job_id="first", speed=8 << 20)
    time.sleep(0.2)
    second = setup.backup(target="t2", job_id="second")
    assert "error" not in setup.completed("second")
    setup.qmp.execute("block-job-set-speed", device="first", speed=0)
    assert "error" not in setup.completed("first")
    setup.finish()
    setup.check(tmp_path, {"t1": ("one", first), "t2": ("one", second)})
