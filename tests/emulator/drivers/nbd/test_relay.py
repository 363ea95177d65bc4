"""A livedisk whose disk is an export of another server: what its clients write and read passes through, and nothing else does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kit.cutter import Cutter
from kit.fio import fio
from kit.livedisk import Daemon
from kit.nbdkit import Nbdkit
from kit.qemu import QemuNbd, read_all
from kit.writer import Writer, now

SIZE = 32 << 20


def relay(folder: Path, socket: Path, *, driver: str = "nbd", delay: int = 0) -> Daemon:
    """A daemon with the export at ``socket`` as node ``disk``, exported again as ``disk``; or a raw image on it."""
    server = f"server.type=unix,server.path={socket},reconnect-delay={delay},discard=unmap"
    node = f"driver=nbd,node-name=disk,{server}"
    if driver == "raw":
        node = f"driver=raw,node-name=disk,discard=unmap,file.driver=nbd,{server.replace('server.', 'file.server.')}"
        node = node.replace(",reconnect", ",file.reconnect").replace(f"={delay},discard=unmap", f"={delay}")
    return Daemon(folder, "--blockdev", node, "--export", "nbd,id=e,node-name=disk,name=disk,writable=on", name="relay")


@pytest.mark.parametrize("driver", ["nbd", "raw"])
@pytest.mark.parametrize("block", ["4k", "64k-1m"])
def test_what_is_written_is_read(driver: str, block: str, short_path: Path) -> None:
    sizes = {"bs": block} if "-" not in block else {"bsrange": block}
    with Nbdkit(short_path, "memory", str(SIZE)) as server, relay(short_path, server.socket, driver=driver) as daemon:
        fio(daemon.uri("disk"), short_path, rw="randwrite", iodepth=16, size=SIZE, verify="crc32c", **sizes)
        direct = read_all(server.uri, short_path, "-f", "raw")
        assert any(direct)
        assert read_all(daemon.uri("disk"), short_path, "-f", "raw") == direct


@pytest.mark.slow
def test_clients_do_not_notice_outages_of_the_server_behind(short_path: Path) -> None:
    image = short_path / "image"
    image.write_bytes(bytes(SIZE))
    with (
        QemuNbd(short_path, image) as server,
        Cutter(short_path / "cut", server.socket, mean=3 << 20) as cutter,
        relay(short_path, short_path / "cut", delay=60) as daemon,
        Writer(daemon.uri("disk"), SIZE, short_path, depth=16) as writer,
    ):
        deadline = time.monotonic() + 60
        while cutter.cuts < 4:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        history = writer.finish()
        daemon.stop(expect=0)
    assert len(history.writes) > 100
    history.check_final(image.read_bytes())


def test_a_snapshot_is_a_moment_of_what_passes_through(short_path: Path) -> None:
    image = short_path / "image"
    image.write_bytes(bytes(SIZE))
    with QemuNbd(short_path, image) as server, relay(short_path, server.socket) as daemon, daemon.qmp() as qmp:
        with Writer(daemon.uri("disk"), SIZE, short_path) as writer:
            time.sleep(0.2)
            before = now()
            qmp.execute(
                "blockdev-snapshot-sync",
                node_name="disk",
                snapshot_file=str(short_path / "overlay"),
                snapshot_node_name="overlay",
            )
            after = now()
            time.sleep(0.2)
            history = writer.finish()
        daemon.stop(expect=0)
    history.check_moment(image.read_bytes(), before, after)


def test_an_error_of_the_server_behind_reaches_the_client(short_path: Path) -> None:
    trigger = short_path / "trigger"
    arguments = ("memory", str(SIZE), "error-pwrite=ENOSPC", "error-pwrite-rate=100%", f"error-pwrite-file={trigger}")
    with (
        Nbdkit(short_path, "--filter=error", *arguments) as server,
        relay(short_path, server.socket) as daemon,
        Writer(daemon.uri("disk"), SIZE, short_path) as writer,
    ):
        time.sleep(0.1)
        trigger.touch()
        writer.wait(expect=1)
        assert "failed with errno 28" in writer.output()
