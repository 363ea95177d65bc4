"""Where the real peers are.

The suite is worth what its peers are worth, so a missing peer is a failure and never a skip. The failure names the
Debian package; ``scripts/test`` installs them all.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
"""The checkout."""

DOWNLOADS: Final = Path(os.environ.get("LIVEDISK_PEERS", ROOT / ".peers"))
"""Peers that ``scripts/test`` downloaded and unpacked without installing them."""

SYSTEM_PYTHON: Final = "/usr/bin/python3"
"""Debian's Python, the one that Debian's libnbd binding is built for."""

PACKAGES: Final[Mapping[str, str]] = {
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "nbdsh": "python3-libnbd",
    "nbdkit": "nbdkit",
    "nbd-server": "nbd-server",
    "fio": "fio",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
}
"""Command to the Debian package that has it."""

_PATH: Final = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def python_scripts() -> list[Path]:
    """Every Python program below ``scripts/``, those without suffix included."""
    files = [path for path in (ROOT / "scripts").rglob("*") if path.is_file() and path.suffix in ("", ".py")]
    return sorted(path for path in files if path.suffix or path.read_bytes().startswith(b"#!/usr/bin/env python"))


@functools.cache
def peer(command: str) -> str:
    """The path of a peer's executable; fails the test if there is none."""
    found = shutil.which(command, path=_PATH)
    if found is None:
        package = PACKAGES[command]
        pytest.fail(f"{command} is missing: install Debian's package {package}, or run scripts/test", pytrace=False)
    return found


class PeerFailed(AssertionError):
    """A peer ended with an exit code that the test did not expect. The text has everything it printed."""

    def __init__(self, completed: subprocess.CompletedProcess[str]) -> None:
        self.completed = completed
        super().__init__(
            f"{' '.join(map(str, completed.args))}\nexit code {completed.returncode}\n"
            f"--- stdout\n{completed.stdout}\n--- stderr\n{completed.stderr}"
        )


def run(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    expect: int | None = 0,
    input: str | None = None,
    timeout: float = 60,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    inherit: Sequence[int] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a peer to its end.

    ``arguments[0]`` may be a peer's name. ``expect`` is the exit code that is no failure, or ``None`` if any is.
    ``timeout`` is in seconds. ``environment`` is added to the test's own. ``inherit``: descriptors for it.
    Raises `PeerFailed`.
    """
    first, *rest = (os.fspath(argument) for argument in arguments)
    command = [peer(first) if first in PACKAGES else first, *rest]
    completed = subprocess.run(
        command,
        input=input,
        stdin=subprocess.DEVNULL if input is None else None,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        pass_fds=inherit,
        check=False,
    )
    if expect is not None and completed.returncode != expect:
        raise PeerFailed(completed)
    return completed
