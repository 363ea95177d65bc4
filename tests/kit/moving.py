"""Two livedisk daemons and a guest's disks that move from one to the other, with a proxy that the guest stays with."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from kit.livedisk import Daemon, executable, livedisk
from kit.process import Process
from kit.qemu import create
from kit.writer import Writer


class Move:
    """``count`` disks of ``size`` bytes on a source, and a destination that waits for a guest.

    ``folder`` is short. Writers go through a proxy each, so that they follow.
    """

    def __init__(self, folder: Path, *, count: int = 1, size: int = 16 << 20, options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.size = size
        self.names = [f"disk{number}" for number in range(count)]
        self.target = folder / "new"
        self.target.mkdir()
        given: list[str] = []
        for number, name in enumerate(self.names):
            path = create(folder / f"{name}.qcow2", size)
            given += ["--blockdev", f"driver=qcow2,node-name={name},file.driver=file,file.filename={path}"]
            given += ["--device", f"virtio-blk,drive={name},id=virtio{number}"]
        self.source = Daemon(folder, *given, *options, name="a")
        self.destination = Daemon(folder, "-incoming", "defer", *options, name="b")
        with self.source.qmp() as qmp:
            for number, name in enumerate(self.names):
                qmp.call("nbd-server-add", {"device": f"virtio{number}", "name": name, "writable": True})
        self._proxies: list[Process] = []

    def image(self, name: str) -> Path:
        """The destination's image of a disk."""
        return self.target / f"{name}.qcow2"

    def proxy(self, name: str) -> str:
        """The URI of a proxy for a disk's export."""
        path = self.folder / f"{name}.sock"
        places = [daemon.uri(name) for daemon in (self.source, self.destination)]
        proxy = Process([executable(), "proxy", "--socket", path, *places], log=self.folder / f"{name}.proxy.log")
        self._proxies.append(proxy)
        proxy.wait_for_socket(path)
        return f"nbd+unix:///{name}?socket={path}"

    def proxy_socket(self, name: str) -> Path:
        """The socket of a proxy for a disk's export."""
        self.proxy(name)
        return self.folder / f"{name}.sock"

    def writer(self, name: str, *, seed: int = 1, pause: float = 0.002) -> Writer:
        """A guest that writes without pause, through a proxy."""
        return Writer(self.proxy(name), self.size, self.folder, seed=seed, pause=pause, name=f"{name}.writer")

    def arguments(self, *options: str) -> list[str]:
        """The command line of the migration."""
        ends = ["--from", str(self.source.qmp_socket), "--to", str(self.destination.qmp_socket)]
        return ["migrate", *ends, "--target", str(self.target), *options]

    def migrate(self, *options: str, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return livedisk(*self.arguments(*options), expect=expect, timeout=120)

    def begin(self, *options: str) -> Process:
        """Start the command."""
        number = len(list(self.folder.glob("migrate*.log")))
        return Process([executable(), *self.arguments(*options)], log=self.folder / f"migrate{number}.log")

    def states(self) -> tuple[str, str]:
        """The run states of source and destination."""
        with self.source.qmp() as here, self.destination.qmp() as there:
            return here.execute("query-status")["status"], there.execute("query-status")["status"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (*self._proxies, self.source, self.destination):
            process.__exit__(kind, error, trace)
