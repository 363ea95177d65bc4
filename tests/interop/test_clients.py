"""Other projects' clients on our server: every disk through every client, and the images checked afterwards.

The disks are a raw file, a qcow2 image and a chain of three; the doors are ``livedisk serve`` and the export of a
node and of a device in ``livedisk daemon``. Clients are libnbd (nbdsh scripts, nbdinfo, nbdcopy), qemu-io, qemu-img and fio.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kit import libnbd, qemu
from kit.fio import fio
from kit.livedisk import Daemon, Serve, livedisk
from kit.peers import PeerFailed, run
from kit.places import free_port, pattern, write_file

SIZE = 32 << 20
HALF = SIZE // 2
CLUSTER = 65536


@dataclass(frozen=True)
class Disk:
    """An image on disk and what a guest reads from it."""

    path: Path
    format: str
    content: bytes

    @property
    def files(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"disk*.{self.format}"))


def make_raw(folder: Path) -> Disk:
    data = pattern(3 * CLUSTER)
    return Disk(write_file(folder / "disk.raw", data, size=SIZE), "raw", data.ljust(SIZE, b"\0"))


def make_qcow2(folder: Path) -> Disk:
    source = make_raw(folder)
    path = folder / "disk.qcow2"
    qemu.qemu_img("convert", "-f", "raw", "-O", "qcow2", source.path, path)
    return Disk(path, "qcow2", source.content)


def make_chain(folder: Path) -> Disk:
    """Three images; the upper ones cover parts of what is below, with data and with zeroes."""
    base = make_qcow2(folder)
    content = bytearray(base.content)
    below = base.path
    for layer in (1, 2):
        path = folder / f"disk{layer}.qcow2"
        qemu.create(path, SIZE, backing=below)
        at, gone = layer * CLUSTER, HALF - layer * CLUSTER
        qemu.qemu_io(path, f"write -P {layer} {at} {CLUSTER}", f"write -z {gone} 4k", f"write -P {layer} 20M 1M")
        content[at : at + CLUSTER] = bytes([layer]) * CLUSTER
        content[20 << 20 : 21 << 20] = bytes([layer]) * (1 << 20)
        below = path
    return Disk(below, "qcow2", bytes(content))


MAKERS = {"raw": make_raw, "qcow2": make_qcow2, "chain": make_chain}


@pytest.fixture(params=MAKERS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    made: Disk = MAKERS[request.param](tmp_path)
    return made


@contextmanager
def serve(disk: Disk, folder: Path) -> Iterator[str]:
    with Serve(folder, disk.path, format=disk.format) as server:
        yield server.uri
        server.stop()


def blockdev(disk: Disk) -> str:
    return f"driver={disk.format},node-name=disk,discard=unmap,file.driver=file,file.filename={disk.path}"


@contextmanager
def node_export(disk: Disk, folder: Path) -> Iterator[str]:
    export = "type=nbd,id=export,node-name=disk,writable=on,allocation-depth=on"
    with Daemon(folder, "--blockdev", blockdev(disk), "--export", export) as daemon:
        yield daemon.uri("disk")
        daemon.stop()


@contextmanager
def device_export(disk: Disk, folder: Path) -> Iterator[str]:
    with Daemon(folder, "--blockdev", blockdev(disk), "--device", "virtio-blk,drive=disk,id=virtio0") as daemon:
        with daemon.qmp() as qmp:
            qmp.execute("nbd-server-add", device="virtio0", writable=True)
        yield daemon.uri("virtio0")
        daemon.stop()


DOORS = {"serve": serve, "node": node_export, "device": device_export}


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@contextmanager
def served(door: str, disk: Disk, folder: Path) -> Iterator[str]:
    """The NBD URI of the disk behind one of `DOORS`; when it closes, the server has ended in order and the images
    are sound."""
    with DOORS[door](disk, folder) as uri:
        yield uri
    if disk.format == "qcow2":
        for path in disk.files:
            qemu.check(path)


def assert_holds(disk: Disk, content: bytes, scratch: Path) -> None:
    assert qemu.read_all(disk.path, scratch, "-f", disk.format) == content


def test_nbdinfo_sees_size_and_abilities(door: str, disk: Disk, short_path: Path) -> None:
    with served(door, disk, short_path) as uri:
        found = libnbd.nbdinfo(uri)
    assert found["export-size"] == SIZE
    assert found["is_read_only"] is False
    for ability in (
        "can_flush",
        "can_fua",
        "can_trim",
        "can_zero",
        "can_fast_zero",
        "can_multi_conn",
        "can_df",
        "can_cache",
    ):
        assert found[ability] is True, ability
    assert "base:allocation" in found["contexts"]
    assert found["block_size_minimum"] in (1, 512)
    assert found["block_size_maximum"] == 32 << 20


def test_nbdinfo_map_agrees_with_qemu_img_map(door: str, disk: Disk, short_path: Path) -> None:
    expected = []
    for extent in qemu.measure_map(disk.path, "-f", disk.format):
        kind = (extent["start"], extent["length"], not extent["data"] or extent["zero"])
        # A zero run of several layers is one run to a client of NBD.
        if expected and expected[-1][2] == kind[2]:
            kind = (expected[-1][0], expected[-1][1] + kind[1], kind[2])
            expected.pop()
        expected.append(kind)
    with served(door, disk, short_path) as uri:
        found = [(e["offset"], e["length"], e["type"] & 2 == 2) for e in libnbd.nbdinfo_map(uri)]
    assert found == expected


def test_nbdcopy_out_and_in(door: str, disk: Disk, short_path: Path, tmp_path: Path) -> None:
    out, replacement = tmp_path / "out", write_file(tmp_path / "in", pattern(HALF, seed=2), size=SIZE)
    with served(door, disk, short_path) as uri:
        libnbd.nbdcopy(uri, str(out))
        assert out.read_bytes() == disk.content
        libnbd.nbdcopy(str(replacement), uri, "--connections=4", "--requests=16")
    assert_holds(disk, replacement.read_bytes(), tmp_path)


def test_qemu_img_converts_from_and_to_the_export(door: str, disk: Disk, short_path: Path, tmp_path: Path) -> None:
    replacement = write_file(tmp_path / "in", pattern(HALF, seed=3), size=SIZE)
    with served(door, disk, short_path) as uri:
        qemu.qemu_img("convert", "-f", "raw", "-O", "qcow2", uri, tmp_path / "out.qcow2")
        assert qemu.read_all(tmp_path / "out.qcow2", tmp_path) == disk.content
        qemu.qemu_img("convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", replacement, uri)
        qemu.assert_same(uri, replacement, "-f", "raw", "-F", "raw")
    assert_holds(disk, replacement.read_bytes(), tmp_path)


def test_qemu_io_reads_what_it_wrote(door: str, disk: Disk, short_path: Path, tmp_path: Path) -> None:
    content = bytearray(disk.content)
    content[512 : 512 + 70000] = b"\x11" * 70000
    content[CLUSTER : CLUSTER + 4096] = bytes(4096)
    content[HALF : HALF + (1 << 20)] = b"\x22" * (1 << 20)
    content[HALF + 65536 : HALF + 131072] = bytes(65536)
    commands = [
        "write -P 0x11 512 70000",
        "read -P 0x11 512 70000",
        f"write -z -u {CLUSTER} 4k",
        f"write -f -P 0x22 {HALF} 1M",
        f"write -z {HALF + 65536} 64k",
        f"read -P 0 {HALF + 65536} 64k",
        f"aio_write -P 0x33 {SIZE - 8192} 4k",
        f"aio_write -P 0x44 {SIZE - 4096} 4k",
        "aio_flush",
        "flush",
    ]
    content[SIZE - 8192 :] = b"\x33" * 4096 + b"\x44" * 4096
    with served(door, disk, short_path) as uri:
        printed = qemu.qemu_io(uri, *commands, format="raw")
        assert "failed" not in printed.lower(), printed
    assert_holds(disk, bytes(content), tmp_path)


def test_nbdsh_script_of_every_request(door: str, disk: Disk, short_path: Path, tmp_path: Path) -> None:
    content = bytearray(disk.content)
    content[1 << 20 : (1 << 20) + 3] = b"abc"
    content[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
    code = """
        h.pwrite(b"abc", 1 << 20, nbd.CMD_FLAG_FUA)
        h.zero(cluster, cluster, nbd.CMD_FLAG_NO_HOLE)
        h.cache(cluster, 0)
        h.flush()
        runs = []
        h.block_status(cluster, cluster, lambda context, offset, entries, error: runs.append(list(entries)) or 0,
                       nbd.CMD_FLAG_REQ_ONE)
        chunks = []
        def chunk(data, offset, status, error):
            chunks.append([offset, len(data), status])
            return 0
        whole = bytes(h.pread_structured(3 * cluster, 0, chunk))
        result = dict(abc=h.pread(3, 1 << 20).decode(), runs=runs, covered=sum(c[1] for c in chunks), whole=whole.hex(),
                      hole_reads_zero=not any(h.pread(4096, cluster)))
    """
    with served(door, disk, short_path) as uri:
        found = libnbd.script(uri, code, contexts=["base:allocation"], cluster=CLUSTER)
    assert found["abc"] == "abc"
    assert found["hole_reads_zero"]
    assert found["covered"] == 3 * CLUSTER
    assert bytes.fromhex(found["whole"]) == content[: 3 * CLUSTER]
    assert len(found["runs"]) == 1
    assert len(found["runs"][0]) == 2, "REQ_ONE is one extent"
    assert_holds(disk, bytes(content), tmp_path)


def test_nbdsh_trim_leaves_the_rest_alone(door: str, disk: Disk, short_path: Path, tmp_path: Path) -> None:
    with served(door, disk, short_path) as uri:
        libnbd.script(uri, "h.trim(cluster, cluster); h.flush()", cluster=CLUSTER)
    after = qemu.read_all(disk.path, tmp_path, "-f", disk.format)
    assert after[:CLUSTER] == disk.content[:CLUSTER]
    assert after[2 * CLUSTER :] == disk.content[2 * CLUSTER :]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ("h.pread(512, size)", "EINVAL"),
        ("h.pwrite(bytes(1024), size - 512)", "ENOSPC"),
        ("h.zero(1024, size - 512)", "ENOSPC"),
        ("h.trim(1024, size - 512)", "EINVAL"),
    ],
)
def test_request_beyond_the_end_is_refused_and_the_connection_lives(
    short_path: Path, tmp_path: Path, request_: str, error: str
) -> None:
    code = f"""
        h.set_strict_mode(0)
        try:
            {request_}
            result = "accepted"
        except nbd.Error as refusal:
            result = refusal.errno
        assert len(h.pread(512, 0)) == 512
    """
    with served("node", make_qcow2(tmp_path), short_path) as uri:
        assert libnbd.script(uri, code, size=SIZE) == error


def test_fio_verifies_random_writes(door: str, disk: Disk, short_path: Path, tmp_path: Path) -> None:
    with served(door, disk, short_path) as uri:
        common = {"size": SIZE, "verify": "crc32c", "verify_fatal": 1, "end_fsync": 1}
        result = fio(uri, tmp_path, rw="randwrite", bsrange="512-128k", blockalign="512", iodepth=32, **common)
        assert result.write.moved >= SIZE
        fio(uri, tmp_path, rw="randrw", bs="4k", iodepth=8, io_size="8m", **common)


@pytest.mark.slow
def test_fio_verifies_over_four_connections(disk: Disk, short_path: Path, tmp_path: Path) -> None:
    with served("device", disk, short_path) as uri:
        fio(
            uri,
            tmp_path,
            rw="randwrite",
            bs="4k",
            iodepth=32,
            numjobs=4,
            size=SIZE // 4,
            offset_increment=SIZE // 4,
            verify="crc32c",
            verify_fatal=1,
        )


def test_serve_says_how_to_attach(short_path: Path, tmp_path: Path) -> None:
    disk = make_qcow2(tmp_path)
    with Serve(short_path, disk.path) as server:
        server.wait_for_output("nbdcopy")
        printed = server.output()
        assert f"nbd+unix:///?socket={server.nbd_socket}" in printed.replace("'", "")
        assert "qemu-nbd" in printed
        assert "qemu-system" in printed
        server.stop()


def test_serve_read_only_refuses_writes(short_path: Path, tmp_path: Path) -> None:
    disk = make_qcow2(tmp_path)
    before = disk.path.read_bytes()
    with Serve(short_path, disk.path, "--read-only") as server:
        assert libnbd.nbdinfo(server.uri)["is_read_only"] is True
        code = 'h.set_strict_mode(0)\ntry: h.pwrite(b"x" * 512, 0)\nexcept nbd.Error as refusal: result = refusal.errno'
        assert libnbd.script(server.uri, code) == "EPERM"
        server.stop()
    assert disk.path.read_bytes() == before


def test_serve_snapshot_takes_writes_and_keeps_the_image(short_path: Path, tmp_path: Path) -> None:
    disk = make_chain(tmp_path)
    before = [path.read_bytes() for path in disk.files]
    with Serve(short_path, disk.path, "--snapshot") as server:
        qemu.qemu_io(server.uri, "write -P 7 0 1M", "read -P 7 0 1M", format="raw")
        server.stop()
    assert [path.read_bytes() for path in disk.files] == before


def test_serve_never_takes_guest_data_for_a_format(short_path: Path, tmp_path: Path) -> None:
    # A guest writes a qcow2 header that names a secret into its raw disk. Served as raw it must stay bytes.
    secret = write_file(tmp_path / "secret", b"secret" * 1000)
    trap = tmp_path / "trap.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", secret, "-F", "raw", trap, "1M")
    header = trap.read_bytes()[:CLUSTER]
    disk = write_file(tmp_path / "disk.raw", bytes(SIZE))
    with Serve(short_path, disk, format="raw") as server:
        libnbd.nbdcopy(str(write_file(tmp_path / "in", header, size=SIZE)), server.uri)
        server.stop()
    with Serve(short_path, disk, format="raw", name="again") as server:
        assert libnbd.nbdinfo(server.uri)["export-size"] == SIZE
        assert bytes.fromhex(libnbd.script(server.uri, "result = h.pread(512, 0).hex()")) == header[:512]
        server.stop()


def test_tcp_on_ipv4_and_ipv6(short_path: Path, tmp_path: Path) -> None:
    disk = make_raw(tmp_path)
    with Daemon(short_path, "--blockdev", blockdev(disk), nbd=False) as daemon, daemon.qmp() as qmp:
        for host, shown in (("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")):
            port = free_port(host)
            address = {"type": "inet", "data": {"host": host, "port": str(port)}}
            qmp.execute("nbd-server-start", addr=address)
            qmp.execute("nbd-server-add", device="disk")
            assert libnbd.nbdinfo(f"nbd://{shown}:{port}/disk")["export-size"] == SIZE
            qmp.execute("nbd-server-stop")
        daemon.stop()


def test_image_in_use_is_refused_both_ways(short_path: Path, tmp_path: Path) -> None:
    disk = make_qcow2(tmp_path)
    with Serve(short_path, disk.path):
        with pytest.raises(PeerFailed) as refusal:
            qemu.qemu_io(disk.path, "read 0 512")
        assert "Failed to get" in refusal.value.completed.stderr
        assert "lock" in refusal.value.completed.stderr
        qemu.info(disk.path, "-U")
    with qemu.QemuNbd(short_path, disk.path, format="qcow2") as holder:
        done = livedisk("serve", disk.path, "--socket", short_path / "never.nbd", expect=1)
        assert 'Failed to get "write" lock' in done.stderr
        # The process that holds it is what the user wants to know.
        assert str(holder.pid) in done.stderr
    assert not (short_path / "never.nbd").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["serve"], 2, "IMAGE"),
        (["serve", "missing.qcow2"], 1, "missing.qcow2"),
        (["serve", "missing.qcow2", "--frobnicate"], 2, "--frobnicate"),
        (["daemon", "--frobnicate"], 2, "frobnicate"),
        (["daemon", "--blockdev", "driver=nonsense,node-name=x"], 1, "nonsense"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_exit_codes_and_messages(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    done = livedisk(*arguments, expect=code, cwd=tmp_path)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [[], ["serve"], ["daemon"], ["qmp"]])
def test_help_reads_like_a_manual_page(command: list[str]) -> None:
    text = livedisk(*command, "--help").stdout
    assert len(text.splitlines()) > 10
    assert "exit" in text.lower()


def test_public_qmp_shell_drives_the_daemon(short_path: Path, tmp_path: Path) -> None:
    disk = make_qcow2(tmp_path)
    with Daemon(short_path, "--blockdev", blockdev(disk)) as daemon:
        shell = Path(sys.executable).with_name("qmp-shell")
        done = run([shell, daemon.qmp_socket], input="query-version\nquery-named-block-nodes flat=true\n", expect=None)
        assert '"qemu"' in done.stdout
        assert '"node-name": "disk"' in done.stdout
        daemon.stop()
