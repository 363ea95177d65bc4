"""The nbd driver by every way in, and on servers as they are: secured, slow, failing, with bitmaps, with room for several."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from contract.disks import opened, read

from kit import certificates
from kit.libnbd import nbdcopy
from kit.livedisk import Daemon, livedisk
from kit.nbdkit import Nbdkit
from kit.places import pattern, write_file
from kit.qemu import QemuNbd, StorageDaemon, create, qemu_img, qemu_io, read_all
from kit.qmp import Qmp, QmpError
from kit.writer import Writer

SIZE = 8 << 20
DATA = pattern(SIZE)


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates.folder(tmp_path_factory.mktemp("tls") / "good")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


# -- names with TLS --------------------------------------------------------------------------------------------------


def creds(folder: Path, endpoint: str) -> str:
    return f"tls-creds-x509,id=tls0,dir={folder},endpoint={endpoint}"


@contextmanager
def secured(folder: Path, certs: Path, image: Path, *, tcp: bool) -> Iterator[str]:
    """QEMU serves the image with TLS, on TCP or on a Unix socket: the complete name of the export."""
    port, path = free_port(), folder / "secured.nbd"
    address = f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}" if tcp else f"addr.type=unix,addr.path={path}"
    options = ("--object", creds(certs, "server"), "--nbd-server", f"{address},tls-creds=tls0")
    node = f"driver=raw,node-name=d,file.driver=file,file.filename={image}"
    export = "nbd,id=e,node-name=d,name=a disk,writable=on"
    with StorageDaemon(folder, *options, "--blockdev", node, "--export", export, nbd=False, name="far") as far:
        if tcp:
            far.wait_for_port(port)
            yield f"nbds://localhost:{port}/a%20disk?tls-creds=tls0"
        else:
            far.wait_for_socket(path)
            yield f"nbds+unix:///a%20disk?socket={path}&tls-creds=tls0&tls-hostname=localhost"


@pytest.mark.parametrize("tcp", [False, True])
def test_a_name_with_tls_is_a_disk_a_backing_file_and_a_target(tcp: bool, short_path: Path, certs: Path) -> None:
    image = write_file(short_path / "disk.raw", DATA)
    source = f"driver=null-co,node-name=source,size={SIZE},read-zeroes=on"
    overlay = short_path / "overlay"
    options = ("--object", creds(certs, "client"), "--blockdev", source)
    with (
        secured(short_path, certs, image, tcp=tcp) as name,
        Daemon(short_path, *options, "-drive", f"file={name},format=raw,if=none,id=disk") as daemon,
        daemon.qmp() as qmp,
    ):
        qmp.execute("block-export-add", type="nbd", id="e", node_name=node_of(qmp, "disk"), name="", writable=True)
        qemu_io(daemon.uri(), "read -P 7 0 0", "write -P 9 1M 1M", format="raw")
        nbdcopy(daemon.uri(), str(short_path / "copy"))
        expected = DATA[: 1 << 20] + b"\x09" * (1 << 20) + DATA[2 << 20 :]
        assert (short_path / "copy").read_bytes() == expected
        qmp.execute("block-export-del", id="e")
        qmp.wait_event("BLOCK_EXPORT_DELETED")

        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", overlay, str(SIZE))
        file = {"driver": "file", "filename": str(overlay)}
        qmp.execute("blockdev-add", driver="qcow2", node_name="above", file=file, read_only=True)
        qmp.execute("block-export-add", type="nbd", id="e", node_name="above", name="above")
        nbdcopy(daemon.uri("above"), str(short_path / "above"))
        assert (short_path / "above").read_bytes() == expected
        qmp.execute("block-export-del", id="e")
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        qmp.execute("blockdev-del", node_name="above")

        where = {"target": name, "format": "raw", "mode": "existing"}
        qmp.execute("drive-mirror", device="source", job_id="j", sync="full", **where)
        qmp.wait_event("BLOCK_JOB_READY", timeout=60)
        qmp.execute("block-job-cancel", device="j")
        qmp.wait_event("BLOCK_JOB_COMPLETED", timeout=60)
    assert image.read_bytes() == bytes(SIZE)


def node_of(qmp: Qmp, device: str) -> str:
    (found,) = [one for one in qmp.execute("query-block") if one["device"] == device]
    name: str = found["inserted"]["node-name"]
    return name


def test_a_name_with_tls_that_goes_wrong_says_how(short_path: Path, certs: Path) -> None:
    image = write_file(short_path / "disk.raw", DATA)
    with (
        secured(short_path, certs, image, tcp=False) as good,
        Daemon(short_path, "--object", creds(certs, "client")) as daemon,
        daemon.qmp() as qmp,
    ):
        qmp.execute("blockdev-add", driver="null-co", node_name="source", size=SIZE)

        def refused(name: str) -> str:
            with pytest.raises(QmpError) as error:
                qmp.execute("drive-mirror", device="source", target=name, format="raw", mode="existing", sync="full")
            return error.value.desc

        assert "does not say which TLS credentials to use" in refused(good.partition("&tls-creds")[0])
        assert "No TLS credentials with id 'nobody'" in refused(good.replace("tls0", "nobody"))
        assert "certificate" in refused(good.replace("=localhost", "=elsewhere.example"))
        plain = good.replace("nbds", "nbd").partition("&tls-creds")[0]
        assert "requires TLS" in refused(plain)
    shown = livedisk("img", "info", "-f", "raw", good, expect=1)
    assert "No TLS credentials with id 'tls0'" in shown.stderr


# -- a socket that somebody else connected ----------------------------------------------------------------------------


def test_a_socket_that_was_passed(short_path: Path) -> None:
    image = write_file(short_path / "disk.raw", DATA)
    with QemuNbd(short_path, image, "-e", "2") as server, Daemon(short_path) as daemon, daemon.qmp() as qmp:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(server.socket))
            qmp.call_with([sock.fileno()], "getfd", fdname="way")
        given = {"driver": "nbd", "node-name": "n", "server": {"type": "fd", "str": "way"}, "reconnect-delay": 1}
        qmp.call("blockdev-add", given)
        qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="", writable=True)
        qemu_io(daemon.uri(), "write -P 9 1M 1M", "flush", format="raw")
        assert read_all(daemon.uri(), short_path, "-f", "raw")[1 << 20 : 2 << 20] == b"\x09" * (1 << 20)
        with pytest.raises(QmpError, match="way"):
            qmp.call("blockdev-add", given | {"node-name": "again"})
        server.kill()
        # There is no way back: requests fail once the delay is over, and the daemon lives.
        assert "Input/output error" in qemu_io(daemon.uri(), "read 0 512", format="raw", expect=None)
        qmp.execute("block-export-del", id="e", mode="hard")
        qmp.execute("blockdev-del", node_name="n")
    assert image.read_bytes()[1 << 20 : 2 << 20] == b"\x09" * (1 << 20)


# -- a bitmap of QEMU's -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [StorageDaemon, Daemon])
def test_what_is_dirty_on_the_server_is_shown_as_qemu_shows_it(kind: type[StorageDaemon], short_path: Path) -> None:
    image = create(short_path / "disk.qcow2", SIZE)
    qemu_img("bitmap", "--add", "-g", "64k", image, "b")
    qemu_io(image, "write -P 1 64k 64k", "write -P 2 1M 200k", "write -P 3 7M 1M")
    node = f"driver=qcow2,node-name=d,file.driver=file,file.filename={image},read-only=on"
    with kind(short_path, "--blockdev", node, "--export", "nbd,id=e,node-name=d,name=d,bitmaps.0=b") as server:
        way = {"driver": "nbd", "server": {"type": "unix", "path": str(server.nbd_socket)}, "export": "d"}
        dirty = way | {"x-dirty-bitmap": "qemu:dirty-bitmap:b"}
        for options in (dirty, way):
            name = "json:" + json.dumps(options)
            theirs = json.loads(qemu_img("map", "--output=json", name))
            ours = json.loads(livedisk("img", "map", "-f", "raw", "--output=json", name).stdout)
            assert ours == theirs
            assert len(ours) > 3
        wrong = "json:" + json.dumps(way | {"x-dirty-bitmap": "qemu:dirty-bitmap:none"})
        assert "not found" in livedisk("img", "map", "-f", "raw", wrong, expect=1).stderr
        assert "not found" in livedisk("img", "map", wrong, expect=1).stderr


# -- servers that are slow and fail -----------------------------------------------------------------------------------


def test_a_mirror_to_a_server_that_is_slow_and_fails_is_whole_in_the_end(short_path: Path) -> None:
    """Some requests fail, for whatever reason, and all take their time; the guest writes on."""
    source = create(short_path / "source.qcow2", SIZE)
    target = write_file(short_path / "target.raw", bytes(SIZE))
    faults = ("error=EIO", "error-pwrite-rate=5%", "error-zero-rate=5%", "delay-write=3ms", "delay-zero=3ms")
    node = f"driver=qcow2,node-name=disk,file.driver=file,file.filename={source}"
    with (
        Nbdkit(short_path, "--filter=error", "--filter=delay", "file", str(target), *faults) as server,
        Daemon(short_path, "--blockdev", node, "--export", "nbd,id=e,node-name=disk,name=disk,writable=on") as daemon,
        daemon.qmp() as qmp,
    ):
        way = {"type": "unix", "path": str(server.socket)}
        qmp.execute("blockdev-add", driver="nbd", node_name="target", server=way)
        with Writer(daemon.uri("disk"), SIZE, short_path, pause=0.02) as writer:
            how = {"sync": "full", "on_target_error": "ignore", "job_id": "j"}
            qmp.execute("blockdev-mirror", device="disk", target="target", **how)
            failed = qmp.wait_event("BLOCK_JOB_ERROR", timeout=60)
            assert (failed["operation"], failed["action"]) == ("write", "ignore")
            qmp.wait_event("BLOCK_JOB_READY", timeout=120)
            history = writer.finish()
        qmp.execute("block-job-cancel", device="j")
        ended = qmp.wait_event("BLOCK_JOB_COMPLETED", timeout=120)
        if "error" in ended:  # what was left at the end failed, too: it is said, and the guest has its disk
            assert "Input/output error" in ended["error"]
        qmp.execute("quit")
        daemon.wait()
    history.check_final(read_all(source, short_path))
    if "error" not in ended:
        history.check_final(target.read_bytes())


def test_slow_requests_are_under_way_together_and_each_has_its_own_answer(short_path: Path) -> None:
    image = write_file(short_path / "disk.raw", DATA)
    arguments = ("--filter=delay", "file", str(image), "delay-read=150ms", "delay-write=150ms")

    async def test() -> None:
        async with opened({"driver": "nbd", "server": {"type": "unix", "path": str(server.socket)}}) as disk:
            link = disk.node.driver._link  # type: ignore[attr-defined]
            most = 0

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, sum(one.in_flight for one in link._connections))
                    await asyncio.sleep(0.01)

            watcher = asyncio.ensure_future(watch())
            pieces = await asyncio.gather(*(read(disk, 65536 * n, 65536) for n in range(12)))
            assert b"".join(pieces) == DATA[: 12 * 65536]
            await asyncio.gather(*(disk.write(65536 * n, memoryview(bytes([n]) * 65536)) for n in range(12)))
            await disk.flush()
            watcher.cancel()
            assert most == 12

    with Nbdkit(short_path, *arguments) as server:
        asyncio.run(test())
    assert image.read_bytes()[: 12 * 65536] == b"".join(bytes([n]) * 65536 for n in range(12))


def test_errors_of_a_server_reach_the_guest_as_they_are(short_path: Path) -> None:
    gate = short_path / "fail"
    arguments = ("--filter=error", "memory", "8M", "error=ENOSPC", "error-rate=100%", f"error-file={gate}")
    with (
        Nbdkit(short_path, *arguments) as server,
        Daemon(
            short_path,
            *("--blockdev", f"driver=nbd,node-name=n,server.type=unix,server.path={server.socket}"),
            *("--export", "nbd,id=e,node-name=n,name=,writable=on"),
        ) as daemon,
        daemon.qmp(),
    ):
        qemu_io(daemon.uri(), "write -P 5 0 1M", format="raw")
        gate.touch()
        for command in ("write 0 64k", "write 0 2M", "write -z 0 64k"):
            told = qemu_io(daemon.uri(), command, format="raw", expect=None)
            assert "No space left on device" in told, command
        gate.unlink()
        qemu_io(daemon.uri(), "read -P 5 0 1M", format="raw")


# -- several connections ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [1, 2, 8])
def test_as_many_connections_as_qemu_nbd_has_room_for(room: int, short_path: Path) -> None:
    image = write_file(short_path / "disk.raw", bytes(64 << 20))

    async def test() -> int:
        async with opened({"driver": "nbd", "server": {"type": "unix", "path": str(server.socket)}}) as disk:
            link = disk.node.driver._link  # type: ignore[attr-defined]
            most = 0
            for turn in range(1, 9):
                data = memoryview(bytes([turn]) * (2 << 20))
                writes = [asyncio.ensure_future(disk.write(n << 21, data)) for n in range(32)]
                while not all(write.done() for write in writes):
                    await asyncio.wait(writes, timeout=0.002)
                    most = max(most, len(link._connections))
                for write in writes:
                    write.result()
                await disk.flush()
            assert await read(disk, 0, 64 << 20) == bytes([8]) * (64 << 20)
            return most

    with QemuNbd(short_path, image, "-e", str(room)) as server:
        used = asyncio.run(test())
    assert used == min(room, 4)
    assert image.read_bytes() == bytes([8]) * (64 << 20)
