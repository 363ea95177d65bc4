"""Changes of the graph while clients work: snapshots, transactions, reopen, resize, thresholds, over QMP and NBD."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon
from kit.qemu import assert_same, check, create, info, measure_map, qemu_img, qemu_io, read_all
from kit.qmp import Qmp, QmpError
from kit.writer import Writer, now

SIZE = 8 << 20


class Setup:
    """A daemon with node-A (qcow2) exported for writing, and its monitor."""

    def __init__(self, folder: Path, daemon: Daemon, qmp: Qmp) -> None:
        self.folder, self.daemon, self.qmp = folder, daemon, qmp
        self.uri = daemon.uri("disk")

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.qcow2"

    def snapshot(self, node: str, overlay: str) -> None:
        self.qmp.execute(
            "blockdev-snapshot-sync",
            node_name=node,
            snapshot_file=str(self.path(overlay)),
            snapshot_node_name=overlay,
        )

    def nodes(self) -> dict[str, Any]:
        """Every node by name, but for what changes with each write."""
        found = self.qmp.execute("query-named-block-nodes", flat=True)
        for node in found:
            node["image"].pop("actual-size", None)
            if node["drv"] == "file":
                node["image"].pop("virtual-size")
        return {node["node-name"]: node for node in found}


@pytest.fixture
def setup(short_path: Path) -> Iterator[Setup]:
    create(short_path / "A.qcow2", SIZE)
    options = ["--blockdev", f"qcow2,node-name=A,discard=unmap,file.driver=file,file.filename={short_path}/A.qcow2"]
    options += ["--export", "nbd,id=disk,node-name=A,name=disk,writable=on"]
    with Daemon(short_path, *options) as daemon, daemon.qmp() as qmp:
        yield Setup(short_path, daemon, qmp)
        daemon.stop(expect=0)


def open_files(pid: int) -> list[str]:
    """What the process has open."""
    return [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]


def action(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": {name.replace("_", "-"): value for name, value in data.items()}}


def sync(setup: Setup, node: str, overlay: str) -> dict[str, Any]:
    return action(
        "blockdev-snapshot-sync",
        node_name=node,
        snapshot_file=str(setup.path(overlay)),
        snapshot_node_name=overlay,
    )


def test_a_chain_of_snapshots_under_load_is_a_series_of_moments(setup: Setup, tmp_path: Path) -> None:
    names = ["A", "B", "C", "D"]
    moments = []
    with Writer(setup.uri, SIZE, setup.folder) as writer:
        for node, overlay in pairwise(names):
            time.sleep(0.3)
            before = now()
            setup.snapshot(node, overlay)
            moments.append((before, now()))
        time.sleep(0.3)
        history = writer.finish()
    setup.daemon.stop(expect=0)
    for name, (before, after) in zip(names, moments, strict=False):
        check(setup.path(name))
        history.check_moment(read_all(setup.path(name), tmp_path), before, after)
    check(setup.path("D"))
    history.check_final(read_all(setup.path("D"), tmp_path))
    assert [entry["filename"] for entry in info(setup.path("D"), "--backing-chain")] == [
        str(setup.path(name)) for name in reversed(names)
    ]


def test_a_transaction_that_fails_leaves_no_trace_under_load(setup: Setup, tmp_path: Path) -> None:
    nodes, graph = setup.nodes(), setup.qmp.execute("x-debug-query-block-graph")
    with Writer(setup.uri, SIZE, setup.folder) as writer:
        for number in range(10):
            actions = [sync(setup, "A", f"B{number}"), sync(setup, f"B{number}", f"C{number}"), action("abort")]
            with pytest.raises(QmpError, match="Transaction aborted using Abort action"):
                setup.qmp.execute("transaction", actions=actions)
        assert setup.nodes() == nodes
        assert setup.qmp.execute("x-debug-query-block-graph") == graph
        images = {Path(name).name for name in open_files(setup.daemon.pid) if name.endswith(".qcow2")}
        assert images == {"A.qcow2"}
        history = writer.finish()
    setup.daemon.stop(expect=0)
    check(setup.path("A"))
    check(setup.path("B0"))  # the images stay, as with QEMU
    history.check_final(read_all(setup.path("A"), tmp_path))


def test_a_transaction_switches_all_its_disks_in_one_step(short_path: Path, tmp_path: Path) -> None:
    options: list[str] = []
    for name in ("one", "two"):
        create(short_path / f"{name}.qcow2", SIZE)
        file = f"file.driver=file,file.filename={short_path}/{name}.qcow2"
        options += ["--blockdev", f"qcow2,node-name={name},{file}"]
        options += ["--export", f"nbd,id={name},node-name={name},writable=on"]
    with Daemon(short_path, *options) as daemon, daemon.qmp() as qmp:
        setup = Setup(short_path, daemon, qmp)
        writers = [Writer(daemon.uri(name), SIZE, short_path, name=f"w-{name}") for name in ("one", "two")]
        time.sleep(0.3)
        before = now()
        qmp.execute("transaction", actions=[sync(setup, "one", "one-2"), sync(setup, "two", "two-2")])
        after = now()
        time.sleep(0.2)
        histories = [writer.finish() for writer in writers]
        daemon.stop(expect=0)
    for name, history in zip(("one", "two"), histories, strict=True):
        history.check_moment(read_all(setup.path(name), tmp_path), before, after)
        history.check_final(read_all(setup.path(f"{name}-2"), tmp_path))


def test_the_snapshotted_image_is_free_for_readers_and_keeps_its_bytes(setup: Setup) -> None:
    qemu_io(setup.uri, "write -P 1 0 1M", format="raw")
    setup.snapshot("A", "B")
    frozen = setup.path("A").read_bytes()
    qemu_io(setup.uri, "write -P 2 0 1M", "discard 2M 1M", "flush", format="raw")
    assert setup.path("A").read_bytes() == frozen
    # Opened read-only and shared: another process may read it, but not write.
    qemu_io(setup.path("A"), "read -P 1 0 1M", options=["-r"])
    assert "lock" in qemu_img_fails("resize", setup.path("A"), "1G")


def qemu_img_fails(*arguments: Any) -> str:
    from kit.peers import run

    return run(["qemu-img", *arguments], expect=1).stderr


def test_an_overlay_prepared_with_blockdev_add_takes_over(setup: Setup) -> None:
    qemu_io(setup.uri, "write -P 1 0 64k", format="raw")
    backing = ["-b", setup.path("A"), "-F", "qcow2"]
    qemu_img("create", "-q", "-f", "qcow2", "-u", *backing, setup.path("B"), str(SIZE))
    file = {"driver": "file", "filename": str(setup.path("B"))}
    setup.qmp.execute("blockdev-add", driver="qcow2", node_name="B", file=file, backing=None)
    setup.qmp.execute("blockdev-snapshot", node="A", overlay="B")
    qemu_io(setup.uri, "read -P 1 0 64k", "write -P 2 0 64k", format="raw")
    for name in ("A", "B"):
        with pytest.raises(QmpError, match=r"is in use|is busy"):
            setup.qmp.execute("blockdev-del", node_name=name)
    setup.daemon.stop(expect=0)
    qemu_io(setup.path("A"), "read -P 1 0 64k", options=["-r"])
    qemu_io(setup.path("B"), "read -P 2 0 64k", options=["-r"])


def test_a_snapshot_of_a_node_without_users_belongs_to_the_user(setup: Setup) -> None:
    setup.qmp.execute("block-export-del", id="disk")
    setup.snapshot("A", "B")
    setup.snapshot("B", "C")
    assert {"A", "B", "C"} <= set(setup.nodes())
    for name in ("C", "B", "A"):
        setup.qmp.execute("blockdev-del", node_name=name)
    assert setup.nodes() == {}


def test_change_backing_file_records_the_format_in_use(setup: Setup) -> None:
    raw = setup.folder / "base.raw"
    raw.write_bytes(b"\5" * SIZE)
    (setup.folder / "moved.raw").write_bytes(b"\5" * SIZE)
    qemu_img("create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", setup.path("top"))
    file = {"driver": "file", "filename": str(setup.path("top"))}
    setup.qmp.execute("blockdev-add", driver="qcow2", node_name="top", file=file)
    setup.qmp.execute("change-backing-file", device="top", image_node_name="top", backing_file="moved.raw")
    setup.qmp.execute("blockdev-del", node_name="top")
    recorded = info(setup.path("top"))
    assert recorded["backing-filename"] == "moved.raw"
    assert recorded["backing-filename-format"] == "raw"
    assert_same(setup.path("top"), raw, "-f", "qcow2", "-F", "raw")


def test_change_backing_file_below_the_top_leaves_it_read_only(setup: Setup) -> None:
    setup.snapshot("A", "B")
    setup.snapshot("B", "C")
    setup.qmp.execute("change-backing-file", device="C", image_node_name="B", backing_file="A.qcow2")
    assert [setup.nodes()[name]["ro"] for name in "ABC"] == [True, True, False]
    assert info(setup.path("B"), "-U")["backing-filename"] == "A.qcow2"


def test_resize_is_for_nodes_that_are_not_exported(setup: Setup) -> None:
    with pytest.raises(QmpError, match="Permission conflict on node 'A': permissions 'resize' are both required"):
        setup.qmp.execute("block_resize", node_name="A", size=2 * SIZE)
    setup.qmp.execute("block-export-del", id="disk")
    for size in (2 * SIZE, SIZE // 2, SIZE):
        setup.qmp.execute("block_resize", node_name="A", size=size)
        assert setup.nodes()["A"]["image"]["virtual-size"] == size
    setup.qmp.execute("block-export-add", type="nbd", id="again", node_name="A", name="disk", writable=True)
    qemu_io(setup.uri, f"write -P 6 {SIZE - 65536} 64k", f"read -P 6 {SIZE - 65536} 64k", format="raw")
    setup.daemon.stop(expect=0)
    check(setup.path("A"))
    assert info(setup.path("A"))["virtual-size"] == SIZE


def test_reopen_replaces_the_backing_file_under_load(setup: Setup) -> None:
    """Nothing of the overlay is taken from the new backing file but what it does not have itself."""
    for name, byte in (("old", 1), ("new", 2)):
        qemu_io(create(setup.path(name), SIZE), f"write -P {byte} 0 {SIZE}")
        file = {"driver": "file", "filename": str(setup.path(name))}
        setup.qmp.execute("blockdev-add", driver="qcow2", node_name=name, file=file, read_only=True)
    top = {
        "driver": "qcow2",
        "node-name": "A",
        "discard": "unmap",
        "file": setup.qmp.execute("query-blockstats", query_nodes=True)[0]["node-name"],
    }
    setup.qmp.execute("blockdev-reopen", options=[{**top, "backing": "old"}])
    qemu_io(setup.uri, "write -P 9 0 1M", "read -P 1 1M 1M", format="raw")
    failures: list[BaseException] = []

    def keep_reading() -> None:
        try:
            for _ in range(3):
                qemu_io(setup.uri, *["read -P 9 0 1M"] * 50, format="raw")
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=keep_reading)
    reader.start()
    for _ in range(20):
        for name in ("new", "old"):
            setup.qmp.execute("blockdev-reopen", options=[{**top, "backing": name}])
    reader.join()
    assert not failures
    setup.qmp.execute("blockdev-reopen", options=[{**top, "backing": "new"}])
    qemu_io(setup.uri, "read -P 9 0 1M", "read -P 2 1M 1M", format="raw")
    setup.qmp.execute("blockdev-reopen", options=[{**top, "backing": None}])
    setup.qmp.execute("blockdev-del", node_name="new")
    qemu_io(setup.uri, "read -P 9 0 1M", "read -P 0 1M 1M", format="raw")


def test_reopen_of_several_nodes_is_all_or_nothing(setup: Setup) -> None:
    setup.qmp.execute("blockdev-add", driver="null-co", node_name="n", read_zeroes=True)
    setup.qmp.execute("blockdev-add", driver="raw", node_name="r", file="n")
    before, graph = setup.nodes(), setup.qmp.execute("x-debug-query-block-graph")
    good = {"driver": "raw", "node-name": "r", "file": "n", "detect-zeroes": "on", "read-only": True, "size": 512}
    for bad, message in (
        ({"driver": "null-co", "node-name": "n", "size": 512}, "Cannot change the option 'size'"),
        ({"driver": "qcow2", "node-name": "A", "file": "r", "backing": None}, "(?i)conflict|read-only|not in qcow2"),
        ({"driver": "qcow2", "node-name": "A", "file": "n", "read-only": True}, "(?i)read-only"),
    ):
        with pytest.raises(QmpError, match=message):
            setup.qmp.execute("blockdev-reopen", options=[good, bad])
        assert setup.nodes() == before
        assert setup.qmp.execute("x-debug-query-block-graph") == graph
    qemu_io(setup.uri, "write -P 3 0 64k", "read -P 3 0 64k", format="raw")
    setup.qmp.execute("blockdev-reopen", options=[good])
    assert setup.nodes()["r"]["ro"] is True
    assert setup.nodes()["r"]["image"]["virtual-size"] == 512


@pytest.mark.parametrize("watched", ["A", "its file"])
def test_a_write_beyond_the_threshold_is_told_once(setup: Setup, watched: str) -> None:
    file = setup.qmp.execute("query-blockstats", query_nodes=True)[0]["node-name"]
    name = "A" if watched == "A" else file
    qemu_io(setup.uri, "write 0 64k", format="raw")
    setup.qmp.execute("block-set-write-threshold", node_name=name, write_threshold=1 << 20)
    assert setup.nodes()[name]["write_threshold"] == 1 << 20
    qemu_io(setup.uri, "write 0 64k", format="raw")
    assert not [event for event in setup.qmp.events if event["event"] == "BLOCK_WRITE_THRESHOLD"]
    qemu_io(setup.uri, "write 64k 4M", "write 0 4M", format="raw")
    told = setup.qmp.wait_event("BLOCK_WRITE_THRESHOLD")
    assert told["node-name"] == name
    assert told["write-threshold"] == 1 << 20
    assert told["amount-exceeded"] > 0
    assert setup.nodes()[name]["write_threshold"] == 0
    with pytest.raises(TimeoutError):
        setup.qmp.wait_event("BLOCK_WRITE_THRESHOLD", timeout=0.2)


def test_a_device_can_be_named_where_qemu_wants_its_node(short_path: Path) -> None:
    create(short_path / "A.qcow2", SIZE)
    options = ["-blockdev", f"qcow2,node-name=A,file.driver=file,file.filename={short_path}/A.qcow2"]
    options += ["-device", '{"driver": "virtio-blk-pci", "drive": "A", "id": "virtio0", "serial": "7"}']
    with Daemon(short_path, *options) as daemon, daemon.qmp() as qmp:
        qmp.execute("nbd-server-add", device="virtio0", writable=True)
        qemu_io(daemon.uri("virtio0"), "write -P 1 0 64k", format="raw")
        overlay = str(short_path / "B.qcow2")
        qmp.execute("blockdev-snapshot-sync", device="virtio0", snapshot_file=overlay)
        [disk] = qmp.execute("query-block")
        assert disk["inserted"]["file"] == overlay
        assert disk["inserted"]["node-name"].startswith("#block")
        qemu_io(daemon.uri("virtio0"), "read -P 1 0 64k", "write -P 2 0 64k", format="raw")
        qmp.execute("block-export-del", id="virtio0")
        qmp.execute("block_resize", device="virtio0", size=2 * SIZE)
        daemon.stop(expect=0)
    qemu_io(short_path / "A.qcow2", "read -P 1 0 64k", options=["-r"])
    assert info(short_path / "B.qcow2")["virtual-size"] == 2 * SIZE


def test_damage_found_while_serving_is_announced_and_stops_the_writes(setup: Setup) -> None:
    qemu_io(setup.uri, "write -P 1 0 128k", "flush", format="raw")
    setup.daemon.stop(expect=0)
    image = setup.path("A")
    table = next(run["offset"] for run in measure_map(image) if run["data"]) // 65536
    with image.open("r+b") as file:
        # The second L2 entry, in the cluster before the data that the first write allocated: point it into the header.
        file.seek((table - 1) * 65536 + 8)
        file.write((1 << 63 | 512).to_bytes(8, "big"))
    options = ["--blockdev", f"qcow2,node-name=A,file.driver=file,file.filename={image}"]
    options += ["--export", "nbd,id=disk,node-name=A,name=disk,writable=on"]
    with Daemon(setup.folder, *options, name="again") as daemon, daemon.qmp() as qmp:
        qemu_io(daemon.uri("disk"), "read 64k 64k", format="raw", expect=1)
        told = qmp.wait_event("BLOCK_IMAGE_CORRUPTED")
        assert told["node-name"] == "A"
        assert told["fatal"] is True
        assert told["device"] == ""
        qemu_io(daemon.uri("disk"), "write 0 4k", format="raw", expect=1)
