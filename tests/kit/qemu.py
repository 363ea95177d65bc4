"""QEMU's tools and its storage daemon: the reference peer for images, QMP and NBD."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from kit.peers import peer, run
from kit.process import Process
from kit.qmp import Qmp

Target = str | os.PathLike[str]
"""An image's file name, an NBD URI or a ``json:{...}`` node description."""


def qemu_img(*arguments: Target, expect: int | None = 0, timeout: float = 120) -> str:
    """Run qemu-img; returns what it printed on stdout. Raises `kit.peers.PeerFailed` on another exit code than
    ``expect``."""
    return run(["qemu-img", *arguments], expect=expect, timeout=timeout).stdout


def create(
    path: Path, size: int | str, *, format: str = "qcow2", options: str = "", backing: Path | None = None
) -> Path:
    """``qemu-img create``; ``size`` in bytes or with a suffix. ``backing`` is taken to be of the same format."""
    extra: list[Target] = ["-o", options] if options else []
    if backing is not None:
        extra += ["-b", backing, "-F", format]
    qemu_img("create", "-q", "-f", format, *extra, path, str(size))
    return path


def info(target: Target, *arguments: str) -> Any:
    """``qemu-img info`` as data; with ``--backing-chain`` a list from the active layer down."""
    return json.loads(qemu_img("info", "--output=json", *arguments, target))


def measure_map(target: Target, *arguments: str) -> list[dict[str, Any]]:
    """``qemu-img map`` as data."""
    extents: list[dict[str, Any]] = json.loads(qemu_img("map", "--output=json", *arguments, target))
    return extents


def check(path: Target, *, leaks: bool = False, format: str = "qcow2") -> dict[str, Any]:
    """``qemu-img check``: fails on any corruption, and on leaked clusters unless ``leaks`` allows them. Returns the
    report."""
    done = run(["qemu-img", "check", "-f", format, "--output=json", path], expect=None, timeout=120)
    allowed = (0, 3) if leaks else (0,)
    if done.returncode not in allowed:
        raise AssertionError(f"qemu-img check {path}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def assert_same(one: Target, other: Target, *arguments: str) -> None:
    """``qemu-img compare``: fails unless both read the same, backing files included."""
    run(["qemu-img", "compare", *arguments, one, other], timeout=120)


def read_all(target: Target, scratch: Path, *arguments: str) -> bytes:
    """What a guest would read from the whole of ``target``, by way of a raw copy in the folder ``scratch``."""
    copy = scratch / "read-all.raw"
    qemu_img("convert", *arguments, "-O", "raw", target, copy)
    data = copy.read_bytes()
    copy.unlink()
    return data


def qemu_io(
    target: Target, *commands: str, format: str | None = "qcow2", options: Sequence[str] = (), expect: int = 0
) -> str:
    """Run qemu-io's commands on ``target``; fails when one fails or a pattern differs. ``format=None`` lets
    ``target`` say it."""
    arguments: list[Target] = ["qemu-io", *options]
    if format is not None:
        arguments += ["-f", format]
    for command in commands:
        arguments += ["-c", command]
    return run([*arguments, target], expect=expect).stdout


class StorageDaemon(Process):
    """qemu-storage-daemon with a QMP socket and an NBD server on a Unix socket.

    ``folder`` is a short folder (`kit.places.short_folder`) that takes both sockets and the log. ``options`` are the
    daemon's own, for example ``"--blockdev", "driver=file,..."``. With ``nbd`` false no NBD server is started.
    """

    command: ClassVar[Sequence[str]] = ("qemu-storage-daemon",)

    def __init__(self, folder: Path, *options: str, nbd: bool = True, name: str = "daemon", **how: Any) -> None:
        self.folder = folder
        self.qmp_socket = folder / f"{name}.qmp"
        self.nbd_socket = folder / f"{name}.nbd"
        arguments = [*self.executable(), "--chardev", f"socket,id=kit,path={self.qmp_socket},server=on,wait=off"]
        arguments += ["--monitor", "chardev=kit"]
        if nbd:
            arguments += ["--nbd-server", f"addr.type=unix,addr.path={self.nbd_socket}"]
        super().__init__([*arguments, *options], log=folder / f"{name}.log", **how)
        try:
            self.wait_for_socket(self.qmp_socket)
            if nbd:
                self.wait_for_socket(self.nbd_socket)
        except BaseException:
            self.kill()
            raise

    @classmethod
    def executable(cls) -> list[str]:
        return [peer(cls.command[0]), *cls.command[1:]]

    def qmp(self, **how: Any) -> Qmp:
        """A new connection to the monitor, which serves one client at a time."""
        return Qmp(self.qmp_socket, **how)

    def uri(self, export: str = "") -> str:
        """The NBD URI of an export."""
        return f"nbd+unix:///{export}?socket={self.nbd_socket}"


class QemuNbd(Process):
    """``qemu-nbd IMAGE``, persistent and for several clients, on a Unix socket in ``folder``."""

    def __init__(self, folder: Path, image: Target, *options: str, format: str = "raw", name: str = "qemu-nbd") -> None:
        self.socket = folder / f"{name}.nbd"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        arguments = [
            peer("qemu-nbd"),
            "-t",
            "-e",
            "16",
            "-f",
            format,
            "-k",
            str(self.socket),
            *options,
            os.fspath(image),
        ]
        super().__init__(arguments, log=folder / f"{name}.log")
        try:
            self.wait_for_socket(self.socket)
        except BaseException:
            self.kill()
            raise
