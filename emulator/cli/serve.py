"""``livedisk serve``: one image over NBD, with one line.

The format, where ``-f`` does not say: an image is taken for qcow2 if its header says so, else for raw, and what was
taken is printed. A raw disk's guest can write a qcow2 header into its first sector, and the next `serve` would believe
it; so a header is only believed as far as it can do no harm. One that names no other file shows nothing but the
image's own bytes. One that names a backing file or a data file, which could be any file of the host, is believed only
if the file's name, which no guest can choose, ends in .qcow2 or .qcow too; otherwise the command ends with an error
that says which ``-f`` to choose between.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click
import msgspec

from livedisk.emulator.errors import LiveDiskError, reason_of

if TYPE_CHECKING:
    from livedisk.emulator.daemon import Daemon

log = logging.getLogger(__name__)

HELP = """Serve IMAGE over NBD until interrupted (Ctrl-C or SIGTERM closes it cleanly).

Prints the NBD URI and how to attach it to this machine, to a virtual machine, and to a copy. Clients may come and go,
and there may be several at once.

Without -f, an image that starts with a qcow2 header is served as qcow2, any other as raw. Because a guest could have
written that header into a raw disk, a header that names further files (a backing file, a data file) is only believed if
the file's name ends in .qcow2; say -f to decide.

\b
Examples:
  livedisk serve disk.qcow2
  livedisk serve -f raw disk.img --port 10809 --bind 0.0.0.0
  livedisk serve disk.qcow2 --snapshot --qmp /tmp/disk.qmp

\b
Exit status:
  0  ended by a signal or by QMP's quit, the image closed
  1  the image could not be opened, served or closed
  2  the command line could not be understood
"""


@click.command("serve", help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("image", type=click.Path())
@click.option("-f", "--format", "fmt", metavar="FORMAT", help="The image's format: qcow2, raw, or any other driver's.")
@click.option("--socket", "path", type=click.Path(), metavar="PATH", help="Listen on a Unix socket at PATH.")
@click.option("--port", type=click.IntRange(0, 65535), metavar="N", help="Listen on TCP port N; 0 chooses a free one.")
@click.option("--bind", default="localhost", show_default=True, metavar="ADDR", help="Where --port listens.")
@click.option("--read-only", is_flag=True, help="Refuse writes.")
@click.option("--snapshot", is_flag=True, help="Let writes go to a temporary overlay that is dropped in the end.")
@click.option(
    "--tls", type=click.Path(), metavar="DIR", help="Require TLS, with the certificates of 'livedisk tls init DIR'."
)
@click.option("--qmp", type=click.Path(), metavar="PATH", help="Take QMP commands on a Unix socket at PATH.")
def serve(
    image: str,
    fmt: str | None,
    path: str | None,
    port: int | None,
    bind: str,
    read_only: bool,
    snapshot: bool,
    tls: str | None,
    qmp: str | None,
) -> None:
    if path is not None and port is not None:
        raise click.UsageError("--socket and --port are two places to listen on: choose one")
    if snapshot and read_only:
        raise click.UsageError("--snapshot takes writes, --read-only refuses them: choose one")
    from livedisk.emulator.cli.process import log_to_stderr, run_loop

    log_to_stderr()
    with tempfile.TemporaryDirectory(prefix="livedisk-") as scratch:
        if port is not None:
            address: dict[str, Any] = {"type": "inet", "host": bind, "port": str(port)}
        else:
            address = {"type": "unix", "path": os.path.abspath(path or Path(scratch, "nbd.sock"))}
        order = _Order(image, fmt, address, read_only=read_only, snapshot=snapshot, tls=tls, qmp=qmp, scratch=scratch)
        code = run_loop(order.run)
    raise SystemExit(code)


class _Order:
    """What is to be served, and how. ``scratch``: a folder that goes away afterwards."""

    def __init__(
        self,
        image: str,
        fmt: str | None,
        address: dict[str, Any],
        *,
        read_only: bool,
        snapshot: bool,
        tls: str | None,
        qmp: str | None,
        scratch: str,
    ) -> None:
        from livedisk.emulator.block.driver import DRIVERS
        from livedisk.emulator.daemon import Daemon
        from livedisk.emulator.qmp.registry import load_plugins

        load_plugins()
        formats = sorted(name for name, driver in DRIVERS.items() if driver.is_format)
        if fmt is not None and fmt not in DRIVERS:
            raise click.UsageError(f"-f {fmt}: no such format; there are {', '.join(formats)}")
        self._image = image
        self._format = fmt
        self._address = address
        self._read_only = read_only
        self._snapshot = snapshot
        self._tls = tls
        self._qmp = qmp
        self._scratch = scratch
        self._make = Daemon

    async def run(self) -> int:
        """Serve until told to end. Returns the exit code."""
        daemon = self._make(name=os.path.basename(self._image))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, daemon.quit, "host-signal")
        code = 0
        try:
            try:
                await self._open(daemon)
            except LiveDiskError as error:
                raise _of_image(error, self._image) from error
            uri = await self._listen(daemon)
            daemon.start()
            click.echo(_instructions(uri, self._headline(daemon), self._attach(uri), self._qmp))
            await daemon.serve()
        except (LiveDiskError, OSError) as error:
            code = _failed(error)
        finally:
            try:
                await daemon.close()
            except LiveDiskError as error:
                code = _failed(error)
        return code

    async def _open(self, daemon: Daemon) -> None:
        """Open the image, as the node "disk"."""
        from livedisk.emulator.block.types import Discard
        from livedisk.emulator.cli.images import image_options

        options = await image_options(daemon, self._image, self._format)
        self._format = options.driver
        if not self._snapshot:
            read_only = self._read_only or options.read_only is True
            options = msgspec.structs.replace(options, node_name="disk", read_only=read_only, discard=Discard.UNMAP)
            await daemon.add_blockdev(options)
            return
        await daemon.add_blockdev(msgspec.structs.replace(options, node_name="image", read_only=True))
        await self._overlay(daemon)

    async def _overlay(self, daemon: Daemon) -> None:
        """A temporary overlay on the image; its file has no name any more once it is open."""
        from livedisk.emulator.drivers.qcow2.create import CreateOptions, create_file

        path = str(Path(self._scratch, "overlay.qcow2"))
        await create_file(path, CreateOptions(size=daemon.graph.find("image").size))
        overlay = {
            "driver": "qcow2",
            "node-name": "disk",
            "discard": "unmap",
            "file": {"driver": "file", "filename": path, "cache": {"no-flush": True}},
            "backing": "image",
        }
        await daemon.add_blockdev(daemon.parse_options(overlay))
        os.unlink(path)

    async def _listen(self, daemon: Daemon) -> str:
        """Start the servers. Returns the NBD URI."""
        from livedisk.emulator.exports.options import NbdExportOptions, NbdServerOptions
        from livedisk.emulator.qmp.chardev import MonitorOptions, SocketChardev
        from livedisk.emulator.qmp.visit import JSON, visit

        listening: dict[str, Any] = {"addr": self._address, "max-connections": 0}
        if self._tls is not None:
            from livedisk.emulator.tls.credentials import TlsCredsX509Options

            listening["tls-creds"] = "tls"
            creds = {"qom-type": "tls-creds-x509", "id": "tls", "dir": self._tls, "endpoint": "server"}
            daemon.objects.add(visit(TlsCredsX509Options, creds, JSON))
        server_options = visit(NbdServerOptions, listening, JSON)
        server = await daemon.exports.start_server(server_options)
        writable = not self._read_only
        await daemon.exports.add(NbdExportOptions(id="disk", node_name="disk", name="", writable=writable))
        if self._qmp is not None:
            await daemon.open_chardev(SocketChardev(id="qmp", path=self._qmp, server=True, wait=False))
            daemon.add_monitor(MonitorOptions(chardev="qmp", mode="control"))
        return self._uri(server.addresses[0])

    def _uri(self, address: Any) -> str:
        scheme, query = "nbd", ""
        if self._tls is not None:
            scheme, query = "nbds", f"tls-certificates={quote(os.path.abspath(self._tls))}"
        if self._address["type"] == "unix":
            return f"{scheme}+unix:///?socket={quote(self._address['path'])}" + (f"&{query}" if query else "")
        host, port = address[:2]
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return f"{scheme}://{place}" + (f"/?{query}" if query else "")

    def _attach(self, uri: str) -> list[str]:
        """How to attach it, a line each."""
        quoted = shlex.quote(uri)
        lines = [f"    copy      nbdcopy {quoted} copy.raw"]
        if self._tls is None:
            return [
                *lines,
                f"    machine   qemu-system-x86_64 ... -drive file={quoted},format=raw,if=virtio",
                f"    host      sudo modprobe nbd && sudo qemu-nbd -f raw -c /dev/nbd0 {quoted}",
            ]
        creds = shlex.quote(
            f"tls-creds-x509,id=tls0,dir={os.path.abspath(self._tls).replace(',', ',,')},endpoint=client"
        )
        if self._address["type"] == "unix":
            node = f"driver=nbd,server.type=unix,server.path={self._address['path']},tls-hostname=localhost"
        else:
            host, _, port = uri.partition("://")[2].partition("/")[0].rpartition(":")
            node = f"driver=nbd,server.type=inet,server.host={host.strip('[]')},server.port={port}"
        node += ",tls-creds=tls0"
        return [
            *lines,
            f"    machine   qemu-system-x86_64 ... -object {creds} \\",
            f"                  -blockdev {shlex.quote(f'{node},node-name=d')} -device virtio-blk-pci,drive=d",
            f"    host      sudo modprobe nbd && sudo qemu-nbd --object {creds} \\",
            f"                  --image-opts -c /dev/nbd0 {shlex.quote(node)}",
        ]

    def _headline(self, daemon: Daemon) -> str:
        how = ", read-only" if self._read_only else ", writes are dropped in the end" if self._snapshot else ""
        return f"{self._image} ({self._format}, {daemon.graph.find('disk').size} bytes{how})"


def _instructions(uri: str, headline: str, attach: list[str], qmp: str | None) -> str:
    lines = [
        f"Serving {headline}:",
        "",
        f"    {uri}",
        "",
        *attach,
    ]
    if qmp is not None:
        lines.append(f"    control   livedisk qmp {shlex.quote(qmp)}")
    return "\n".join([*lines, "", "Ctrl-C ends it."])


def _of_image(error: LiveDiskError, image: str) -> LiveDiskError:
    """The error with the image that it is about."""
    if image in str(error):
        return error
    named = LiveDiskError(f"{image}: {error}")
    named.hint = getattr(error, "hint", "")
    return named


def _failed(error: Exception) -> int:
    click.echo(f"livedisk serve: {reason_of(error)}", err=True)
    hint = getattr(error, "hint", "")
    if hint:
        click.echo(hint, err=True)
    return 1
