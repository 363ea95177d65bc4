"""``livedisk migrate``: disks of a guest that writes, moved to another daemon; refusals, failures, and being killed."""

from __future__ import annotations

import random
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from kit import certificates
from kit.livedisk import Daemon, livedisk
from kit.moving import Move
from kit.nbdkit import Nbdkit
from kit.places import write_file
from kit.qemu import StorageDaemon, check, create, info, qemu_io, read_all
from kit.qmp import Qmp


def nothing_is_left(qmp: Qmp) -> None:
    """No job, node or export of a migration's own."""
    assert qmp.execute("query-jobs") == []
    names = [node["node-name"] for node in qmp.execute("query-named-block-nodes", flat=True)]
    names += [export["id"] for export in qmp.execute("query-block-exports")]
    assert [name for name in names if "migrate" in name] == []


def held_for(said: str) -> int:
    """Milliseconds."""
    found = re.search(r"held for (\d+) ms", said)
    assert found is not None
    return int(found[1])


@pytest.mark.slow
def test_three_disks_of_a_guest_that_writes(short_path: Path, tmp_path: Path) -> None:
    with Move(short_path, count=3) as move:
        writers = [move.writer(name, seed=seed) for seed, name in enumerate(move.names)]
        said = move.migrate().stdout
        assert "The guest is on the destination (running)" in said
        assert held_for(said) < 5000
        assert move.states() == ("postmigrate", "running")
        with move.source.qmp() as here, move.destination.qmp() as there:
            nothing_is_left(here)
            nothing_is_left(there)
            assert here.execute("query-block-exports") == []
            assert {export["id"] for export in there.execute("query-block-exports")} == set(move.names)
            devices = {entry["qdev"] for entry in there.execute("query-block")}
            assert devices == {f"/machine/peripheral/virtio{number}/virtio-backend" for number in range(3)}
        histories = [writer.finish() for writer in writers]
        move.destination.stop()
        move.source.stop()
        for name, history in zip(move.names, histories, strict=True):
            check(move.image(name))
            check(short_path / f"{name}.qcow2")
            history.check_final(read_all(move.image(name), tmp_path))


def test_the_image_is_like_the_one_before(short_path: Path) -> None:
    with Move(short_path) as move:
        with move.source.qmp() as qmp:
            qmp.execute(
                "blockdev-snapshot-sync",
                node_name="disk0",
                snapshot_file=f"{short_path}/o.qcow2",
                snapshot_node_name="over",
                format="qcow2",
            )
        assert "over: 16.0 MiB qcow2" in move.migrate().stdout
        made = info(f"{move.target}/o.qcow2", "-U")
        assert made["format"] == "qcow2"
        assert "backing-filename" not in made
        # A second guest cannot come to where one is, and the first is gone from where it was.
        again = move.migrate()
        assert "on the destination already" in again.stdout


def test_shallow_leaves_the_backing_files_where_they_are(short_path: Path, tmp_path: Path) -> None:
    with Move(short_path) as move:
        qemu_io(move.source.uri("disk0"), "write -P 1 0 1M", format="raw")
        with move.source.qmp() as qmp:
            qmp.execute(
                "blockdev-snapshot-sync",
                node_name="disk0",
                snapshot_file=f"{short_path}/o.qcow2",
                snapshot_node_name="over",
                format="qcow2",
            )
        qemu_io(move.source.uri("disk0"), "write -P 2 512k 64k", format="raw")
        move.migrate("--shallow")
        qemu_io(
            move.destination.uri("disk0"), "read -P 1 0 512k", "read -P 2 512k 64k", "write -P 3 0 4k", format="raw"
        )
        move.destination.stop()
        move.source.stop()
        made = info(f"{move.target}/o.qcow2")
        assert made["full-backing-filename"] == f"{short_path}/disk0.qcow2"
        assert made["actual-size"] < 1 << 20
        content = read_all(move.target / "o.qcow2", tmp_path)
        assert content[:4096] == b"\3" * 4096
        assert content[4096 : 512 << 10] == b"\1" * ((512 << 10) - 4096)


def test_a_disk_that_the_destination_has_is_used(short_path: Path, tmp_path: Path) -> None:
    with Move(short_path) as move:
        qemu_io(move.source.uri("disk0"), "write -P 1 1M 1M", format="raw")
        path = write_file(tmp_path / "old.raw", b"old" * 1000, size=16 << 20)
        with move.destination.qmp() as qmp:
            qmp.call(
                "blockdev-add",
                {"driver": "raw", "node-name": "disk0", "file": {"driver": "file", "filename": str(path)}},
            )
        assert "node 'disk0', which is there" in move.migrate().stdout
        move.destination.stop()
        assert path.read_bytes() == bytes(1 << 20) + b"\1" * (1 << 20) + bytes(14 << 20)


def test_bitmaps_and_the_write_cache_come_along(short_path: Path) -> None:
    with Move(short_path) as move:
        with move.source.qmp() as qmp:
            for name, more in {"plain": {}, "kept": {"persistent": True}, "still": {"disabled": True}}.items():
                qmp.call("block-dirty-bitmap-add", {"node": "disk0", "name": name, "granularity": 65536, **more})
        qemu_io(move.source.uri("disk0"), "write 1M 128k", format="raw")
        move.migrate()
        qemu_io(move.destination.uri("disk0"), "write 2M 64k", format="raw")
        with move.destination.qmp() as qmp:
            (entry,) = qmp.execute("query-block")
            found = {bitmap["name"]: bitmap for bitmap in entry["inserted"]["dirty-bitmaps"]}
        assert {name: bitmap["count"] for name, bitmap in found.items()} == {
            "plain": 192 << 10,
            "kept": 192 << 10,
            "still": 0,
        }
        assert {name: bitmap["recording"] for name, bitmap in found.items()} == {
            "plain": True,
            "kept": True,
            "still": False,
        }
        move.destination.stop()
        stored = info(move.image("disk0"))["format-specific"]["data"]["bitmaps"]
        assert [bitmap["name"] for bitmap in stored] == ["kept"]


def test_over_tls(short_path: Path, tmp_path: Path) -> None:
    folder = certificates.folder(tmp_path / "tls")
    with Move(short_path) as move:
        with move.destination.qmp() as qmp:
            qmp.execute("nbd-server-stop")
        qemu_io(move.source.uri("disk0"), "write -P 1 1M 1M", format="raw")
        # The exports then are TLS as well, on a server of its own.
        move.migrate("--tls", str(folder), "--nbd", f"unix:{short_path}/tls.nbd")
        assert move.states() == ("postmigrate", "running")
        with move.destination.qmp() as qmp:
            assert qmp.call("x-query-nbd-server")["tls"] is True
        move.destination.stop()
        qemu_io(move.image("disk0"), "read -P 1 1M 1M")


def test_over_tcp(short_path: Path) -> None:
    """The monitor's address says where the destination is; ports are chosen by the kernel."""
    image = create(short_path / "d.qcow2", 4 << 20)
    (short_path / "new").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    disk = (
        "--blockdev",
        f"driver=qcow2,node-name=d,file.driver=file,file.filename={image}",
        "--device",
        "virtio-blk,drive=d",
    )
    tcp = ("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off")
    with (
        Daemon(short_path, *disk, name="a", nbd=False) as source,
        Daemon(short_path, "-incoming", "defer", *tcp, name="b", nbd=False) as destination,
    ):
        destination.wait_for_port(port)
        ends = ("--from", str(source.qmp_socket), "--to", f"tcp:127.0.0.1:{port}")
        livedisk("migrate", *ends, "--target", short_path / "new")
        with destination.qmp() as qmp:
            assert qmp.execute("query-status")["running"]


# -- refusals: all that is wrong is told, and nothing is begun ---------------------------------------------------------------


def refused(move: Move, *options: str) -> str:
    done = move.migrate(*options, expect=1)
    assert move.states()[0] == "running"
    with move.source.qmp() as here, move.destination.qmp() as there:
        nothing_is_left(here)
        nothing_is_left(there)
        assert there.execute("query-named-block-nodes", flat=True) == []
    return done.stderr


def test_dry_run_changes_nothing(short_path: Path) -> None:
    with Move(short_path) as move:
        said = move.migrate("--dry-run").stdout
        assert "disk0: 16.0 MiB qcow2, " in said
        assert f"-> {move.image('disk0')} (to be made)" in said
        assert move.states() == ("running", "inmigrate")
        assert list(move.target.iterdir()) == []


def test_what_is_in_the_way_is_told_at_once(short_path: Path) -> None:
    with Move(short_path, count=2) as move:
        write_file(move.image("disk0"), b"precious")
        said = refused(move, "--disk", "disk0", "--disk", "nobody")
        assert (
            f"{move.image('disk0')} exists on the destination: choose another folder with --target, or remove it"
            in said
        )
        assert "no device on a node 'nobody'; its devices are on disk0, disk1" in said
        assert "more disks (disk1)" in said
        assert move.image("disk0").read_bytes() == b"precious"


def test_without_a_target_folder_the_sources_own_image_is_in_the_way(short_path: Path) -> None:
    with Move(short_path) as move:
        ends = ["--from", str(move.source.qmp_socket), "--to", str(move.destination.qmp_socket)]
        said = livedisk("migrate", *ends, expect=1).stderr
        assert f"{short_path}/disk0.qcow2 exists on the destination" in said


def test_a_folder_that_is_not_there(short_path: Path) -> None:
    with Move(short_path) as move:
        move.target.rmdir()
        assert f"{move.target} is no folder on the destination: make it" in refused(move)


def test_a_node_of_another_size(short_path: Path) -> None:
    with Move(short_path) as move, move.destination.qmp() as qmp:
        qmp.call("blockdev-add", {"driver": "null-co", "node-name": "disk0", "size": 4096})
        qmp.close()
        said = move.migrate(expect=1).stderr
        assert "node 'disk0' has 4096 bytes on the destination, 16777216 on the source: resize it" in said


def test_a_destination_that_does_not_wait_for_a_guest(short_path: Path) -> None:
    with Move(short_path) as move, Daemon(short_path, name="c", nbd=False) as other:
        ends = ["--from", str(move.source.qmp_socket), "--to", str(other.qmp_socket)]
        assert "start it with '-incoming defer'" in livedisk("migrate", *ends, expect=1).stderr


def test_ends_that_are_no_livedisk(short_path: Path) -> None:
    with Move(short_path) as move, StorageDaemon(short_path, name="q", nbd=False) as other:
        ends = ["--from", str(move.source.qmp_socket), "--to", str(other.qmp_socket)]
        assert "is no livedisk" in livedisk("migrate", *ends, expect=1).stderr
        ends = ["--from", str(move.source.qmp_socket), "--to", f"{short_path}/nobody"]
        assert "Failed to connect to" in livedisk("migrate", *ends, expect=1).stderr


@pytest.mark.parametrize(
    "option", [("--bandwidth", "much"), ("--downtime-limit", "0"), ("--nbd", "here"), ("--tls", "/nowhere")]
)
def test_options_that_make_no_sense(option: tuple[str, str]) -> None:
    livedisk("migrate", "--from", "a", "--to", "b", *option, expect=2)


def test_a_guest_that_went_elsewhere_is_not_started_again(short_path: Path) -> None:
    """The source is told to hand over to a second daemon what a first one runs."""
    with Move(short_path) as move:
        move.migrate()
        with Daemon(short_path, "-incoming", "defer", name="c") as other:
            ends = ["--from", str(move.source.qmp_socket), "--to", str(other.qmp_socket)]
            done = livedisk("migrate", *ends, "--target", move.target, expect=1)
            assert "handed its guest over already, to another daemon" in done.stderr
        assert move.states() == ("postmigrate", "running")


# -- interruptions and failures ------------------------------------------------------------------------------------------


def slow_down(move: Move) -> None:
    """Give the copying something to do for some seconds."""
    for name in move.names:
        qemu_io(move.source.uri(name), "write -P 7 0 16M", format="raw")


def still_there(move: Move, name: str = "disk0") -> None:
    """The guest runs on the source, and its disk is as it was."""
    qemu_io(move.source.uri(name), "read -P 7 0 16M", "write -P 7 0 64k", format="raw")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_copies(short_path: Path, number: signal.Signals) -> None:
    with Move(short_path) as move:
        slow_down(move)
        command = move.begin("--bandwidth", "2M")
        command.wait_for_output("left")
        command.signal(number)
        command.wait(expect=1)
        assert "interrupted: the guest is on the source, as before" in command.output()
        assert move.states() == ("running", "inmigrate")
        with move.source.qmp() as here, move.destination.qmp() as there:
            nothing_is_left(here)
            nothing_is_left(there)
        still_there(move)
        move.migrate()
        assert move.states() == ("postmigrate", "running")
        qemu_io(move.destination.uri("disk0"), "read -P 7 0 16M", format="raw")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_a_random_moment_and_run_again(short_path: Path, tmp_path: Path, seed: int) -> None:
    """However often it is killed: the guest writes on, one side at most runs, and the next run brings it over."""
    chance = random.Random(seed)
    with Move(short_path, count=2, size=8 << 20) as move:
        writers = [move.writer(name, seed=seed) for name in move.names]
        for _ in range(4):
            command = move.begin()
            time.sleep(chance.uniform(0.2, 2.0))
            command.kill()
            states = move.states()
            assert states.count("running") <= 1
            if states[1] == "running":
                break
        move.migrate()
        assert move.states() == ("postmigrate", "running")
        histories = [writer.finish() for writer in writers]
        move.destination.stop()
        move.source.stop()
        for name, history in zip(move.names, histories, strict=True):
            history.check_final(read_all(move.image(name), tmp_path))


@pytest.mark.slow
def test_the_destination_dies_while_it_copies(short_path: Path) -> None:
    with Move(short_path) as move:
        slow_down(move)
        command = move.begin("--bandwidth", "2M")
        command.wait_for_output("left")
        move.destination.kill()
        command.wait(expect=1)
        assert f"the destination at {move.destination.qmp_socket} is gone" in command.output()
        still_there(move)
        with move.source.qmp() as qmp:
            assert qmp.execute("query-status")["running"]
            qmp.execute("query-jobs")


@pytest.mark.slow
def test_the_source_dies_while_it_copies(short_path: Path) -> None:
    with Move(short_path) as move:
        slow_down(move)
        command = move.begin("--bandwidth", "2M")
        command.wait_for_output("left")
        move.source.kill()
        command.wait(expect=1)
        assert f"the source at {move.source.qmp_socket} is gone" in command.output()
        with move.destination.qmp() as qmp:
            assert qmp.execute("query-status")["status"] == "inmigrate"


@pytest.mark.slow
def test_the_destination_fills_up_while_it_copies(short_path: Path) -> None:
    """Its image, a qcow2 whose metadata has no room either, so that it cannot be flushed: what is to be done is told, and
    nothing is left that would keep the next run."""
    full = short_path / "full"
    image = create(short_path / "there.qcow2", 16 << 20)
    with image.open("ab") as file:  # an export does not grow
        file.truncate(24 << 20)
    faults = [f"error-{what}{more}" for what in ("pwrite", "zero") for more in ("-rate=100%", f"-file={full}")]
    with (
        Nbdkit(short_path, "--filter=error", "file", str(image), "error=ENOSPC", *faults) as storage,
        Move(short_path) as move,
    ):
        slow_down(move)
        with move.destination.qmp() as qmp:
            file = {"driver": "nbd", "server": {"type": "unix", "path": str(storage.socket)}}
            qmp.execute("blockdev-add", driver="qcow2", node_name="disk0", file=file)
        command = move.begin("--bandwidth", "4M")
        command.wait_for_output("left")
        full.touch()
        command.wait(expect=1)
        said = command.output()
        assert "copying 'disk0' failed, writing to the destination: No space left on device: make room there" in said
        assert "clearing up" not in said
        assert move.states() == ("running", "inmigrate")
        with move.source.qmp() as here, move.destination.qmp() as there:
            nothing_is_left(here)
            nothing_is_left(there)
        still_there(move)
        full.unlink()
        move.migrate()
        assert move.states() == ("postmigrate", "running")
        qemu_io(move.destination.uri("disk0"), "read -P 7 0 16M", format="raw")
        move.destination.stop()
        move.source.stop()


@pytest.mark.slow
def test_interrupted_while_the_destination_stalls(short_path: Path) -> None:
    with Move(short_path) as move:
        slow_down(move)
        command = move.begin("--bandwidth", "2M")
        command.wait_for_output("left")
        move.destination.signal(signal.SIGSTOP)
        time.sleep(0.5)
        command.signal(signal.SIGINT)
        time.sleep(0.5)
        still_there(move)
        move.destination.signal(signal.SIGCONT)
        command.wait(expect=1)
        assert "interrupted: the guest is on the source, as before" in command.output()
        with move.source.qmp() as here, move.destination.qmp() as there:
            nothing_is_left(here)
            nothing_is_left(there)
        move.migrate()
        assert move.states() == ("postmigrate", "running")
        qemu_io(move.destination.uri("disk0"), "read -P 7 0 16M", format="raw")


@pytest.mark.slow
def test_a_guest_that_writes_too_fast_is_slowed_down(short_path: Path) -> None:
    """The copy may be no faster than the guest; what is done about it is told."""
    with Move(short_path, size=64 << 20) as move:
        writer = move.writer("disk0", pause=0)
        said = move.migrate("--bandwidth", "4M").stdout
        assert "its writes now wait for the destination" in said
        writer.finish()
        with move.source.qmp() as here, move.destination.qmp() as there:
            for qmp in (here, there):
                (entry,) = qmp.execute("query-block")
                assert entry["inserted"]["bps_wr"] == 0
