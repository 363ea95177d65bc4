"""Stream, commit and mirror while a client writes: what it reads never differs, and the images are what was promised.

The chain A <- B <- C <- D is made by live snapshots under the same client, so that every layer holds some of its writes. Its
clusters are as small as those writes, or the top would soon hold all there is.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon
from kit.qemu import check, create, info, read_all
from kit.qmp import Qmp, QmpError
from kit.writer import History, Writer, now

SIZE = 64 << 20
SMALL = "cluster_size=4096"


class Setup:
    """A daemon with the chain, D exported and being written to."""

    def __init__(self, folder: Path, daemon: Daemon, qmp: Qmp, writer: Writer) -> None:
        self.folder, self.daemon, self.qmp, self.writer = folder, daemon, qmp, writer

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.qcow2"

    def wait(self, status: str, job: str = "j") -> None:
        self.qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data == {"id": job, "status": status}, timeout=60)

    def chain(self, name: str) -> list[str]:
        return [Path(entry["filename"]).stem for entry in info(self.path(name), "--backing-chain")]

    def add(self, name: str, size: int = SIZE, **options: Any) -> None:
        create(self.path(name), size)
        file = {"driver": "file", "filename": str(self.path(name))}
        self.qmp.execute("blockdev-add", driver="qcow2", node_name=name, file=file, **options)

    def completed(self) -> dict[str, Any]:
        data = self.qmp.wait_event("BLOCK_JOB_COMPLETED", timeout=60)
        self.wait("null")
        return data

    def finish(self) -> History:
        """Let the client write on for a while, end it and the daemon."""
        time.sleep(0.2)
        history = self.writer.finish()
        self.daemon.stop(expect=0)
        return history


@pytest.fixture
def setup(short_path: Path) -> Iterator[Setup]:
    create(short_path / "A.qcow2", SIZE, options=SMALL)
    options = ["--blockdev", f"qcow2,node-name=A,discard=unmap,file.driver=file,file.filename={short_path}/A.qcow2"]
    options += ["--export", "nbd,id=disk,node-name=A,name=disk,writable=on"]
    with (
        Daemon(short_path, *options) as daemon,
        daemon.qmp(timeout=60) as qmp,
        Writer(daemon.uri("disk"), SIZE, short_path) as writer,
    ):
        made = Setup(short_path, daemon, qmp, writer)
        for old, new in itertools.pairwise("ABCD"):
            time.sleep(0.1)
            create(made.path(new), SIZE, options=f"{SMALL},backing_file={made.path(old)},backing_fmt=qcow2")
            qmp.execute(
                "blockdev-snapshot-sync",
                node_name=old,
                snapshot_file=str(made.path(new)),
                snapshot_node_name=new,
                mode="existing",
            )
        yield made


def check_image(setup: Setup, name: str, chain: str, history: History, scratch: Path) -> None:
    """The image is sound, stands on what it should, and holds all that the client wrote."""
    assert setup.chain(name) == list(chain)
    for layer in chain:
        check(setup.path(layer))
    history.check_final(read_all(setup.path(name), scratch))


STREAMS: dict[str, tuple[dict[str, Any], str]] = {
    "all": ({"device": "D"}, "D"),
    "base by node": ({"device": "D", "base-node": "B"}, "DBA"),
    "bottom": ({"device": "D", "bottom": "B"}, "DA"),
    "intermediate": ({"device": "C", "base-node": "A"}, "DCA"),
    "intermediate whole": ({"device": "B"}, "DCB"),
    "slow at first": ({"device": "D", "base-node": "A", "speed": 4 << 20}, "DA"),
    "nothing to do": ({"device": "A"}, "DCBA"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_stream(name: str, setup: Setup, tmp_path: Path) -> None:
    arguments, left = STREAMS[name]
    setup.qmp.call("block-stream", {"job-id": "j", **arguments})
    if "speed" in arguments:
        time.sleep(0.3)
        setup.qmp.execute("job-pause", id="j")
        setup.wait("paused")
        setup.qmp.execute("job-resume", id="j")
        setup.qmp.execute("block-job-set-speed", device="j", speed=0)
    assert "error" not in setup.completed()
    check_image(setup, "D", left, setup.finish(), tmp_path)


def test_stream_by_file_name_records_the_name_that_was_given(setup: Setup, tmp_path: Path) -> None:
    base = str(setup.path("B"))
    setup.qmp.execute("block-stream", job_id="j", device="D", base=base, backing_file="./B.qcow2")
    setup.completed()
    history = setup.finish()
    assert info(setup.path("D"))["backing-filename"] == "./B.qcow2"
    check_image(setup, "D", "DBA", history, tmp_path)


def test_a_cancelled_stream_leaves_the_chain(setup: Setup, tmp_path: Path) -> None:
    setup.qmp.execute("block-stream", job_id="j", device="D", speed=1 << 20)
    time.sleep(0.2)
    setup.qmp.execute("block-job-cancel", device="j")
    setup.qmp.wait_event("BLOCK_JOB_CANCELLED")
    setup.wait("null")
    check_image(setup, "D", "DCBA", setup.finish(), tmp_path)


def test_the_filter_copies_what_the_guest_reads(setup: Setup, tmp_path: Path) -> None:
    """While a stream stands still, reads through the export fill the image."""
    setup.qmp.execute("block-stream", job_id="j", device="D", speed=1, filter_node_name="flt")
    setup.qmp.execute("job-pause", id="j")
    assert "flt" in {node["node-name"] for node in setup.qmp.execute("query-named-block-nodes")}
    time.sleep(0.3)
    setup.qmp.execute("job-cancel", id="j")
    setup.wait("null")
    assert "flt" not in {node["node-name"] for node in setup.qmp.execute("query-named-block-nodes")}
    check_image(setup, "D", "DCBA", setup.finish(), tmp_path)


COMMITS: dict[str, tuple[dict[str, Any], str]] = {
    "C into B": ({"device": "D", "top-node": "C", "base-node": "B"}, "DBA"),
    "C into A": ({"device": "D", "top-node": "C", "base-node": "A"}, "DA"),
    "B into A": ({"device": "D", "top-node": "B", "base-node": "A"}, "DCA"),
    "slow at first": ({"device": "D", "top-node": "C", "base-node": "A", "speed": 4 << 20}, "DA"),
}


@pytest.mark.parametrize("name", COMMITS)
def test_commit(name: str, setup: Setup, tmp_path: Path) -> None:
    arguments, left = COMMITS[name]
    setup.qmp.call("block-commit", {"job-id": "j", **arguments})
    if "speed" in arguments:
        time.sleep(0.3)
        setup.qmp.execute("block-job-set-speed", device="j", speed=0)
    assert "error" not in setup.completed()
    check_image(setup, "D", left, setup.finish(), tmp_path)


def test_commit_by_file_names(setup: Setup, tmp_path: Path) -> None:
    top, base = str(setup.path("C")), str(setup.path("A"))
    setup.qmp.execute("block-commit", job_id="j", device="D", top=top, base=base, backing_file="./A.qcow2")
    setup.completed()
    history = setup.finish()
    assert info(setup.path("D"))["backing-filename"] == "./A.qcow2"
    check_image(setup, "D", "DA", history, tmp_path)


def test_a_cancelled_commit_leaves_the_chain(setup: Setup, tmp_path: Path) -> None:
    setup.qmp.execute("block-commit", job_id="j", device="D", top_node="C", base_node="A", speed=1 << 20)
    time.sleep(0.2)
    setup.qmp.execute("block-job-cancel", device="j")
    setup.wait("null")
    check_image(setup, "D", "DCBA", setup.finish(), tmp_path)


@pytest.mark.parametrize("base", ["C", "A"])
def test_active_commit_moves_the_guest_to_the_base(base: str, setup: Setup, tmp_path: Path) -> None:
    setup.qmp.execute("block-commit", job_id="j", device="D", base_node=base)
    setup.qmp.wait_event("BLOCK_JOB_READY")
    time.sleep(0.2)
    setup.qmp.execute("block-job-complete", device="j")
    setup.completed()
    check_image(setup, base, "CBA" if base == "C" else "A", setup.finish(), tmp_path)


def test_active_commit_cancelled_when_ready_leaves_the_guest_on_top(setup: Setup, tmp_path: Path) -> None:
    setup.qmp.execute("block-commit", job_id="j", device="D", base_node="B")
    setup.qmp.wait_event("BLOCK_JOB_READY")
    setup.qmp.execute("block-job-cancel", device="j")
    assert "error" not in setup.completed()
    check_image(setup, "D", "DCBA", setup.finish(), tmp_path)


@pytest.mark.parametrize("mode", ["background", "write-blocking", "switched"])
def test_mirror_moves_the_guest_to_the_target(mode: str, setup: Setup, tmp_path: Path) -> None:
    setup.add("T")
    first = "background" if mode == "switched" else mode
    setup.qmp.execute("blockdev-mirror", job_id="j", device="D", target="T", sync="full", copy_mode=first)
    if mode == "switched":
        setup.qmp.execute("block-job-change", id="j", type="mirror", copy_mode="write-blocking")
    setup.qmp.wait_event("BLOCK_JOB_READY", timeout=60)
    if mode != "background":
        assert setup.qmp.execute("query-block-jobs")[0]["actively-synced"] is True
    time.sleep(0.3)
    setup.qmp.execute("block-job-complete", device="j")
    setup.completed()
    check_image(setup, "T", "T", setup.finish(), tmp_path)


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_mirror_cancelled_when_ready_is_a_copy_of_that_moment(mode: str, setup: Setup, tmp_path: Path) -> None:
    setup.add("T")
    setup.qmp.execute("blockdev-mirror", job_id="j", device="D", target="T", sync="full", copy_mode=mode)
    setup.qmp.wait_event("BLOCK_JOB_READY", timeout=60)
    time.sleep(0.3)
    before = now()
    setup.qmp.execute("block-job-cancel", device="j")
    setup.completed()
    after = now()
    history = setup.finish()
    history.check_moment(read_all(setup.path("T"), tmp_path), before, after)
    check_image(setup, "D", "DCBA", history, tmp_path)


def test_a_pending_mirror_lets_the_guest_write_on(setup: Setup, tmp_path: Path) -> None:
    setup.add("T")
    setup.qmp.execute("blockdev-mirror", job_id="j", device="D", target="T", sync="full", auto_finalize=False)
    setup.qmp.wait_event("BLOCK_JOB_READY", timeout=60)
    setup.qmp.execute("job-complete", id="j")
    setup.wait("pending")
    time.sleep(0.3)
    setup.qmp.execute("job-finalize", id="j")
    setup.completed()
    check_image(setup, "T", "T", setup.finish(), tmp_path)


@pytest.mark.parametrize(("sync", "left"), [("full", "T"), ("top", "TCBA"), ("none", "TDCBA")])
def test_drive_mirror_makes_its_target(sync: str, left: str, setup: Setup, tmp_path: Path) -> None:
    target = str(setup.path("T"))
    setup.qmp.execute("drive-mirror", job_id="j", device="D", target=target, sync=sync, node_name="T")
    setup.qmp.wait_event("BLOCK_JOB_READY", timeout=60)
    time.sleep(0.2)
    setup.qmp.execute("job-complete", id="j")
    setup.completed()
    check_image(setup, "T", left, setup.finish(), tmp_path)


def test_drive_mirror_to_an_existing_overlay_opens_its_backing_file(setup: Setup, tmp_path: Path) -> None:
    create(setup.path("T"), SIZE, options=f"backing_file={setup.path('C')},backing_fmt=qcow2")
    target = str(setup.path("T"))
    setup.qmp.execute(
        "drive-mirror", job_id="j", device="D", target=target, sync="top", mode="existing", format="qcow2"
    )
    setup.qmp.wait_event("BLOCK_JOB_READY", timeout=60)
    setup.qmp.execute("job-complete", id="j")
    setup.completed()
    check_image(setup, "T", "TCBA", setup.finish(), tmp_path)


def test_a_mirror_to_a_full_target_costs_the_guest_nothing(setup: Setup, tmp_path: Path) -> None:
    setup.add("small", SIZE // 2)
    setup.qmp.execute("blockdev-mirror", job_id="j", device="D", target="small", sync="full")
    assert setup.completed()["error"] == "Source and target image have different sizes"
    check_image(setup, "D", "DCBA", setup.finish(), tmp_path)


def test_jobs_on_disjoint_parts_of_a_chain_run_beside_each_other(setup: Setup, tmp_path: Path) -> None:
    setup.qmp.execute("block-stream", job_id="one", device="D", base_node="B", speed=65536)
    setup.qmp.execute("block-stream", job_id="two", device="B", speed=65536)
    with pytest.raises(QmpError, match="block device is in use by block job: stream"):
        setup.qmp.execute("block-stream", job_id="three", device="D")
    for job in ("one", "two"):
        setup.qmp.execute("block-job-set-speed", device=job, speed=0)
    for job in ("one", "two"):
        setup.wait("null", job)
    check_image(setup, "D", "DB", setup.finish(), tmp_path)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("block-stream", {"device": "D", "speed": -1}),
    ("block-stream", {"device": "B", "filter-node-name": "A"}),
    ("block-stream", {"device": "D", "job-id": "1"}),
    ("block-commit", {"device": "D", "top-node": "C", "speed": -1}),
    ("block-commit", {"device": "D", "top-node": "C", "filter-node-name": "A"}),
    ("block-commit", {"device": "D", "top-node": "B", "job-id": "1"}),
    ("block-commit", {"device": "D", "filter-node-name": "A"}),
    ("block-commit", {"device": "D", "speed": -1}),
    ("blockdev-mirror", {"device": "D", "target": "T", "sync": "full", "speed": -1}),
    ("blockdev-mirror", {"device": "D", "target": "T", "sync": "full", "filter-node-name": "A"}),
    ("drive-mirror", {"device": "D", "target": "/nonexistent/t", "sync": "full"}),
]


def test_what_is_refused_changes_nothing(setup: Setup, tmp_path: Path) -> None:
    setup.add("T")

    def picture() -> tuple[Any, ...]:
        graph = setup.qmp.execute("x-debug-query-block-graph")
        names = {node["id"]: node["name"] or node["type"] for node in graph["nodes"]}
        edges = [
            (names[e["parent"]], e["name"], names[e["child"]], sorted(e["perm"]), sorted(e["shared-perm"]))
            for e in graph["edges"]
        ]
        nodes = setup.qmp.execute("query-named-block-nodes", flat=True)
        return sorted(edges), sorted((node["node-name"], node["ro"]) for node in nodes), setup.qmp.execute("query-jobs")

    before = picture()
    for command, arguments in REFUSED:
        with pytest.raises(QmpError):
            setup.qmp.call(command, {"job-id": "j", **arguments})
        assert picture() == before, (command, arguments)
    setup.qmp.execute("block-commit", job_id="j", device="D", top_node="C", base_node="A")
    setup.completed()
    check_image(setup, "D", "DA", setup.finish(), tmp_path)


def act_at_random(setup: Setup, seed: int) -> None:
    """Pause, resume, other speeds. A verb that the state refuses is no mistake."""
    chance = random.Random(seed)
    for _ in range(12):
        speed = chance.choice([0, 1 << 20, 8 << 20])
        verb, arguments = chance.choice(
            [
                ("job-pause", {"id": "j"}),
                ("job-resume", {"id": "j"}),
                ("block-job-set-speed", {"device": "j", "speed": speed}),
            ]
        )
        with contextlib.suppress(QmpError):
            setup.qmp.call(verb, arguments)
        time.sleep(chance.random() / 20)


@pytest.mark.parametrize("seed", range(3))
def test_verbs_at_random_moments(seed: int, setup: Setup, tmp_path: Path) -> None:
    setup.qmp.execute("block-commit", job_id="j", device="D", speed=8 << 20)
    act_at_random(setup, seed)
    setup.qmp.execute("block-job-set-speed", device="j", speed=0)
    with contextlib.suppress(QmpError):  # it may not be paused at the end
        setup.qmp.execute("job-resume", id="j")
    setup.qmp.wait_event("BLOCK_JOB_READY", timeout=60)
    setup.qmp.execute("block-job-complete", device="j")
    setup.completed()
    history = setup.finish()
    check_image(setup, "A", "A", history, tmp_path)
