"""``livedisk proxy``: an export on a socket that stays, while its server goes and comes back elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kit import certificates
from kit.libnbd import nbdcopy, nbdinfo, nbdinfo_map
from kit.livedisk import executable, livedisk
from kit.peers import PeerFailed
from kit.places import pattern, write_file
from kit.process import Process
from kit.qemu import QemuNbd, qemu_io
from kit.writer import Writer

SIZE = 4 << 20


@contextmanager
def proxy(folder: Path, *arguments: str, name: str = "") -> Iterator[tuple[Process, str]]:
    """A proxy in ``folder``, and the URI of what it serves."""
    socket = folder / "stable.sock"
    with Process([executable(), "proxy", "--socket", socket, *arguments], log=folder / "proxy.log") as process:
        process.wait_for_socket(socket)
        yield process, f"nbd+unix:///{name}?socket={socket}"


def place(folder: Path, number: int) -> str:
    return f"nbd+unix:///?socket={folder}/place{number}.nbd"


def server(folder: Path, image: Path, number: int, *options: str) -> QemuNbd:
    return QemuNbd(folder, image, *options, name=f"place{number}")


def test_everything_goes_through(short_path: Path, tmp_path: Path) -> None:
    image = write_file(tmp_path / "d", pattern(1 << 20), size=SIZE)
    with server(short_path, image, 1), proxy(short_path, place(short_path, 1)) as (_, uri):
        info = nbdinfo(uri)
        assert info["export-size"] == SIZE
        assert (info["can_flush"], info["can_zero"], info["is_read_only"]) == (True, True, False)
        assert [(extent["offset"], extent["type"]) for extent in nbdinfo_map(uri)] == [(0, 0), (1 << 20, 3)]
        nbdcopy(uri, str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == image.read_bytes()
        steps = (
            "write -P 5 2M 1M",
            "write -f -P 6 0 512",
            "write -z 512k 64k",
            "discard 3M 64k",
            "flush",
            "read -P 5 2M 1M",
        )
        qemu_io(uri, *steps, format="raw")
    content = image.read_bytes()
    assert content[:512] == b"\6" * 512
    assert content[512 << 10 : 576 << 10] == bytes(64 << 10)


def test_a_writer_does_not_notice_that_its_server_moves(short_path: Path, tmp_path: Path) -> None:
    """Killed here and started there, on the same image: every acknowledged write is in it, and it goes on."""
    image = write_file(tmp_path / "d", b"", size=SIZE)
    with ExitStack() as stack:
        first = stack.enter_context(server(short_path, image, 1))
        places = (place(short_path, 1), place(short_path, 2))
        process, uri = stack.enter_context(proxy(short_path, *places))
        writer = Writer(uri, SIZE, short_path)
        for number in (2, 1, 2):
            first.kill()
            first = stack.enter_context(server(short_path, image, number))
            process.wait_for_output(f"the export is at {place(short_path, number)}")
        history = writer.finish()
    history.check_final(image.read_bytes())


def test_after_the_delay_requests_fail(short_path: Path, tmp_path: Path) -> None:
    image = write_file(tmp_path / "d", b"", size=SIZE)
    with server(short_path, image, 1) as only, proxy(short_path, place(short_path, 1), "--delay", "0.2") as (_, uri):
        qemu_io(uri, "read 0 512", format="raw")
        only.kill()
        assert "Input/output error" in qemu_io(uri, "read 0 512", format="raw", expect=1)
        with server(short_path, image, 1):
            qemu_io(uri, "write -P 1 0 512", format="raw")


def test_another_size_is_another_export(short_path: Path, tmp_path: Path) -> None:
    image = write_file(tmp_path / "d", b"", size=SIZE)
    other = write_file(tmp_path / "other", b"", size=SIZE // 2)
    places = (place(short_path, 1), place(short_path, 2))
    with (
        server(short_path, image, 1) as first,
        proxy(short_path, *places, "--delay", "1") as (_, uri),
        server(short_path, other, 2),
    ):
        first.kill()
        with pytest.raises(PeerFailed):
            qemu_io(uri, "write 0 512", format="raw")
    assert other.read_bytes() == bytes(SIZE // 2)


def test_tls_towards_the_server(short_path: Path, tmp_path: Path) -> None:
    folder = certificates.folder(tmp_path / "tls")
    image = write_file(tmp_path / "d", pattern(4096), size=SIZE)
    creds = f"tls-creds-x509,id=t,dir={folder},endpoint=server"
    with server(short_path, image, 1, "--object", creds, "--tls-creds", "t"):
        refused = livedisk("proxy", "--socket", f"{short_path}/s", place(short_path, 1), expect=1)
        assert "requires" in refused.stderr
        with proxy(short_path, place(short_path, 1), "--tls", str(folder)) as (_, uri):
            nbdcopy(uri, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


@pytest.mark.parametrize("uri", ["nbd+unix:///?socket=/nowhere", "http://localhost/", "nbd://"])
def test_what_cannot_be_served(short_path: Path, uri: str) -> None:
    refused = livedisk("proxy", "--socket", f"{short_path}/s", uri, expect=1)
    assert refused.stderr.startswith("livedisk proxy: ")


def test_tls_is_never_dropped_in_silence(short_path: Path, tmp_path: Path) -> None:
    image = write_file(tmp_path / "d", b"", size=SIZE)
    with server(short_path, image, 1):
        uri = place(short_path, 1)
        named = uri.replace("nbd+unix", "nbds+unix") + "&tls-creds=t"
        refused = livedisk("proxy", "--socket", f"{short_path}/s", named, expect=1)
        assert f"'{named}': not supported here" in refused.stderr
        assert "--tls DIR" in refused.stderr
        refused = livedisk("proxy", "--socket", f"{short_path}/s", uri, "--tls-hostname", "x", expect=2)
        assert "--tls-hostname: only with --tls" in refused.stderr
