"""nbdkit, with our plugin, against its clients."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from kit import libnbd, qemu
from kit.nbdkit import Nbdkit, python_site_packages
from kit.peers import run
from kit.places import pattern
from livedisk.emulator import exports

PLUGIN = str(Path(exports.__file__).parent / "nbdkit_plugin.py")
MIB = 1 << 20


def serve(folder: Path, *parameters: str) -> Nbdkit:
    return Nbdkit(folder, "python", PLUGIN, f"path={python_site_packages()}", *parameters)


def test_a_qcow2_image_is_written_and_read_back(short_path: Path) -> None:
    image = qemu.create(short_path / "a.qcow2", "8M")
    source = short_path / "source.raw"
    source.write_bytes(pattern(3 * MIB) + bytes(2 * MIB) + pattern(3 * MIB, 2))
    with serve(short_path, f"file={image}", "format=qcow2") as nbdkit:
        run(["nbdcopy", "--flush", source, nbdkit.uri], timeout=60)
        info = libnbd.nbdinfo(nbdkit.uri)
        assert info["export-size"] == 8 * MIB
        assert (info["can_multi_conn"], info["can_fua"], info["can_fast_zero"], info["can_cache"]) == (True,) * 4
        assert info["description"] == "qcow2 node disk"
        assert qemu.qemu_io(nbdkit.uri, "read -P 0 3M 2M", "write -P 7 100 3000", "read -P 7 100 3000", format="raw")
        extents = libnbd.script(
            nbdkit.uri,
            """
            result = []
            def extent(context, offset, entries, error):
                result.extend(entries)
            h.block_status(h.get_size(), 0, extent)
            """,
            contexts=["base:allocation"],
        )
        assert extents == [3 * MIB, 0, 2 * MIB, 3, 3 * MIB, 0]
        assert nbdkit.stop() == 0
    qemu.check(image)
    expected = bytearray(source.read_bytes())
    expected[100:3100] = b"\7" * 3000
    assert qemu.read_all(image, short_path) == bytes(expected)


def test_every_named_node_is_an_export(short_path: Path) -> None:
    base = short_path / "base.raw"
    base.write_bytes(pattern(MIB))
    overlay = short_path / "top.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay)
    with serve(
        short_path,
        f"blockdev=raw,node-name=base,read-only=on,file.driver=file,file.filename={base}",
        f"blockdev=driver=qcow2,node-name=top,backing=base,file.driver=file,file.filename={overlay}",
    ) as nbdkit:
        listing = run(["nbdinfo", "--list", "--json", nbdkit.uri]).stdout
        assert '"base"' in listing
        assert '"top"' in listing
        digest = "import hashlib; result = [hashlib.sha256(h.pread(65536, 0)).hexdigest(), h.is_read_only()]"
        below = nbdkit.uri.replace(":///", ":///base")
        assert libnbd.script(nbdkit.uri, "h.pwrite(b'x' * 512, 0); h.flush()") is None
        (top, top_ro), (under, under_ro) = libnbd.script(nbdkit.uri, digest), libnbd.script(below, digest)
        assert top != under
        assert (top_ro, under_ro) == (False, True)
    assert base.read_bytes() == pattern(MIB)


def test_requests_run_beside_each_other(short_path: Path) -> None:
    image = short_path / "a.raw"
    image.write_bytes(bytes(MIB))
    with serve(short_path, f"file={image}", "format=raw") as nbdkit:
        got = libnbd.script(
            nbdkit.uri,
            """
            buffers = [nbd.Buffer(4096) for _ in range(64)]
            for n in range(64):
                h.aio_pwrite(bytes([n]) * 4096, n * 4096)
            left = 64
            while left:
                h.poll(-1)
                while left and (cookie := h.aio_peek_command_completed()) > 0:
                    h.aio_command_completed(cookie)
                    left -= 1
            h.zero(4096, 4096, nbd.CMD_FLAG_FAST_ZERO)
            h.trim(65536, 65536)
            h.cache(65536, 0)
            result = [h.pread(1, n * 4096)[0] for n in range(16)]
            """,
        )
        assert got == [0, 0, *range(2, 16)]
    with Nbdkit(
        short_path, "-r", "python", PLUGIN, f"path={python_site_packages()}", f"file={image}", "format=raw", name="ro"
    ) as readonly:
        assert libnbd.script(readonly.uri, "result = h.is_read_only()") is True


def test_an_error_reaches_the_client_with_its_number(short_path: Path) -> None:
    base = short_path / "base.raw"
    base.write_bytes(pattern(MIB))
    old = short_path / "old.qcow2"  # version 2 has no zero clusters, so zeroes over a backing file are slow
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "-b", base, "-F", "raw", old)
    with serve(short_path, f"file={old}", "format=qcow2") as nbdkit:
        got = libnbd.script(
            nbdkit.uri,
            """
            try:
                h.zero(65536, 0, nbd.CMD_FLAG_FAST_ZERO)
            except nbd.Error as error:
                result = error.errno
            h.zero(65536, 0)
            """,
        )
        assert got in ("ENOTSUP", "EOPNOTSUPP")
        assert qemu.qemu_io(nbdkit.uri, "read -P 0 0 64k", format="raw")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ((), "give either file=PATH format=FORMAT, or blockdev=OPTIONS"),
        (("file=/nonexistent",), "file= and format= go together"),
        (("file=/nonexistent", "format=raw"), "Could not open '/nonexistent': No such file or directory"),
        (("file=/nonexistent", "format=nope"), "Parameter 'driver' does not accept value 'nope'"),
        (("blockdev=raw,node-name=x",), "Parameter 'file' is missing"),
        (("blockdev=null-co",), "'node-name' must be specified for the root node"),
        (("size=3",), "unknown parameter 'size'"),
    ],
)
def test_bad_parameters_are_named_at_start(short_path: Path, parameters: tuple[str, ...], message: str) -> None:
    command = ["nbdkit", "-f", "-U", short_path / "s", "python", PLUGIN, f"path={python_site_packages()}"]
    done = run([*command, *parameters], expect=1, timeout=30)
    assert message in done.stderr


def test_an_installed_plugin_finds_its_own_package(short_path: Path) -> None:
    # As pip installs it: the plugin stands inside the package, whose folder is site-packages.
    package = Path(exports.__file__).parents[1]
    shutil.copytree(package, short_path / "site" / "livedisk" / "emulator")
    shutil.copytree(package.parent / "nbd", short_path / "site" / "livedisk" / "nbd")
    plugin = short_path / "site" / "livedisk" / "emulator" / "exports" / "nbdkit_plugin.py"
    # PYTHONPATH gives the libraries, but does not make an editable installation work.
    libraries = {"PYTHONPATH": str(python_site_packages())}
    parameter = "blockdev=null-co,node-name=n,size=4096"
    with Nbdkit(short_path, "python", str(plugin), parameter, environment=libraries) as nbdkit:
        assert libnbd.script(nbdkit.uri, "result = h.get_size()") == 4096


def test_it_goes_into_the_background(short_path: Path) -> None:
    image = qemu.create(short_path / "a.qcow2", "1M")
    pidfile, socket = short_path / "pid", short_path / "s"
    command = ["nbdkit", "-P", pidfile, "-U", socket, "python", PLUGIN, f"path={python_site_packages()}"]
    run([*command, f"file={os.path.relpath(image)}", "format=qcow2"], timeout=30)
    deadline = time.monotonic() + 30
    while not (
        pidfile.exists() and pidfile.read_text().endswith("\n")
    ):  # the child writes it after the parent has gone
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pid = int(pidfile.read_text())
    try:
        uri = f"nbd+unix:///?socket={socket}"
        assert libnbd.script(uri, "h.pwrite(b'q' * 512, 0); h.flush(); result = h.pread(1, 0).decode()") == "q"
    finally:
        os.kill(pid, 15)
