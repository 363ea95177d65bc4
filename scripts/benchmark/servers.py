"""The servers that are compared, each started afresh for every run on a Unix socket."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Self

ROOT: Final = Path(__file__).resolve().parents[2]


class ServerFailed(Exception):
    """A server ended or did not answer. The text has what it printed."""


class Server:
    """A running server of one disk, whose ``files`` are its chain, the active layer last; or (no files) of the disk that a server
    ``behind`` it has. ``uri`` is the export.

    Sub-classes say with which command line (`arguments`) and what they can serve (`serves`).
    """

    name: ClassVar[str]
    has_qmp: ClassVar[bool]

    def __init__(self, files: Sequence[Path], behind: Server | None = None) -> None:
        self.behind = behind
        self._folder = tempfile.TemporaryDirectory(prefix="ldbench", dir="/tmp")
        folder = Path(self._folder.name)
        self.nbd_socket = folder / "nbd"
        self.qmp_socket = folder / "qmp"
        self._log = folder / "log"
        self.uri = f"nbd+unix:///?socket={self.nbd_socket}"
        self.started = time.perf_counter()
        with self._log.open("wb") as log:
            self.child = subprocess.Popen(
                self.arguments(files), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            with self.connect(self.nbd_socket) as probe:
                probe.recv(1)
        except BaseException:
            self.stop()
            raise

    @staticmethod
    def serves(files: Sequence[Path]) -> bool:
        """Whether the server can serve this disk at all."""
        raise NotImplementedError

    def arguments(self, files: Sequence[Path]) -> list[str]:
        raise NotImplementedError

    def connect(self, path: Path, *, timeout: float = 20) -> socket.socket:
        """Connect as soon as the server listens. Raises `ServerFailed` if it never does."""
        while True:
            probe = socket.socket(socket.AF_UNIX)
            try:
                probe.connect(str(path))
            except OSError:
                probe.close()
                if self.child.poll() is not None or time.perf_counter() > self.started + timeout:
                    raise ServerFailed(f"{' '.join(map(str, self.child.args))}\n{self._log.read_text()}") from None  # type: ignore[arg-type]
                time.sleep(0.001)
            else:
                return probe

    def memory(self, field: str) -> int:
        """Resident memory in bytes: ``VmRSS`` now, ``VmHWM`` at its highest."""
        for line in Path(f"/proc/{self.child.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise ServerFailed(f"{self.name} has ended")

    def reset_peak(self) -> int:
        """Set ``VmHWM`` back to what is resident now, and tell that."""
        Path(f"/proc/{self.child.pid}/clear_refs").write_text("5")
        return self.memory("VmHWM")

    def cpu_seconds(self) -> float:
        """CPU time that the server has used."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.child.terminate()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class QemuStorageDaemon(Server):
    """The reference. Every file and image is its own ``--blockdev``, so that all files of a chain get the same ``aio``."""

    name = "qemu-storage-daemon"
    has_qmp = True

    @staticmethod
    def serves(files: Sequence[Path]) -> bool:
        return True

    @classmethod
    def executable(cls) -> list[str]:
        return ["qemu-storage-daemon"]

    def arguments(self, files: Sequence[Path]) -> list[str]:
        command = [*self.executable(), "--chardev", f"socket,id=c,path={self.qmp_socket},server=on,wait=off"]
        command += ["--monitor", "chardev=c"]
        for index, path in enumerate(files):
            protocol = {"driver": "file", "node-name": f"file{index}", "filename": str(path), "aio": qemu_aio()}
            image = {"driver": path.suffix[1:], "node-name": f"node{index}", "file": f"file{index}"}
            if index:
                image["backing"] = f"node{index - 1}"
            # A backing file is never written, and qemu-img made these read-only in all but name.
            read_only = {"read-only": True} if index < len(files) - 1 else {}
            command += ["--blockdev", json.dumps(protocol | read_only), "--blockdev", json.dumps(image | read_only)]
        top = f"node{len(files) - 1}"
        if self.behind is not None:
            top = "behind"
            way = {"type": "unix", "path": str(self.behind.nbd_socket)}
            command += ["--blockdev", json.dumps({"driver": "nbd", "node-name": top, "server": way})]
        command += ["--nbd-server", f"addr.type=unix,addr.path={self.nbd_socket},max-connections=16"]
        command += ["--export", f"type=nbd,id=e,node-name={top},name=,writable=on"]
        return command


class LiveDisk(QemuStorageDaemon):
    """livedisk, with the very same options."""

    name = "livedisk"

    @classmethod
    def executable(cls) -> list[str]:
        beside = Path(sys.executable).parent / "livedisk"
        return [str(beside if beside.exists() else ROOT / ".venv" / "bin" / "livedisk"), "daemon"]


class Nbdkit(Server):
    """nbdkit's file plugin: raw disks only."""

    name = "nbdkit"
    has_qmp = False

    @staticmethod
    def serves(files: Sequence[Path]) -> bool:
        return [path.suffix for path in files] == [".raw"]

    def arguments(self, files: Sequence[Path]) -> list[str]:
        return ["nbdkit", "-f", "-U", str(self.nbd_socket), "file", str(files[0])]


SERVERS: Final[tuple[type[Server], ...]] = (QemuStorageDaemon, Nbdkit, LiveDisk)


@functools.cache
def qemu_aio() -> str:
    """``io_uring`` if QEMU has it and the kernel lets it, else ``threads``: a container may forbid it."""
    with tempfile.NamedTemporaryFile() as scratch:
        scratch.truncate(1 << 20)
        # The storage daemon's tools open the file, look at it and end: no server to stop.
        node = {"driver": "file", "filename": scratch.name, "aio": "io_uring"}
        probe = subprocess.run(
            ["qemu-io", "-r", "-c", "read 0 4k", "json:" + json.dumps({"driver": "raw", "file": node})],
            capture_output=True,
            check=False,
        )
    return "io_uring" if probe.returncode == 0 else "threads"
