"""Our own commands, run as a user runs them: the installed ``livedisk``, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.peers import run
from kit.process import Process
from kit.qemu import StorageDaemon, Target


def executable() -> str:
    """The ``livedisk`` of the environment that runs the tests."""
    # Not resolved: an environment's python is a link, and its scripts stand beside the link.
    found = Path(sys.executable).parent / "livedisk"
    if not found.exists():
        pytest.fail(f"{found} is missing: install this checkout (pip install -e .), or run scripts/test", pytrace=False)
    return str(found)


def livedisk(*arguments: Target, expect: int | None = 0, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of ours to its end. ``expect`` is the exit code that is no failure; ``how`` as in
    `kit.peers.run`."""
    return run([executable(), *arguments], expect=expect, **how)


class Daemon(StorageDaemon):
    """``livedisk daemon``, which takes qemu-storage-daemon's options and those of a QEMU command line."""

    @classmethod
    def executable(cls) -> list[str]:
        return [executable(), "daemon"]


class Serve(Process):
    """``livedisk serve IMAGE`` on a Unix socket in the short folder ``folder``, with a QMP socket beside it."""

    def __init__(
        self, folder: Path, image: Target, *options: str, format: str | None = None, name: str = "serve", **how: Any
    ) -> None:
        self.nbd_socket = folder / f"{name}.nbd"
        self.qmp_socket = folder / f"{name}.qmp"
        self.uri = f"nbd+unix:///?socket={self.nbd_socket}"
        arguments = [executable(), "serve", os.fspath(image)]
        arguments += ["-f", format] if format is not None else []
        arguments += ["--socket", str(self.nbd_socket), "--qmp", str(self.qmp_socket), *options]
        super().__init__(arguments, log=folder / f"{name}.log", **how)
        try:
            self.wait_for_socket(self.nbd_socket)
            self.wait_for_socket(self.qmp_socket)
        except BaseException:
            self.kill()
            raise
