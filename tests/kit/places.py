"""Places for sockets and images.

A Unix socket's path may have 107 bytes, and pytest's own temporary folders easily exceed that: sockets live in short
folders of their own below the system's temporary folder.
"""

from __future__ import annotations

import os
import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def short_folder() -> Iterator[Path]:
    """A new folder with a path short enough for sockets, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="ld", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now. Prefer port 0 where the peer can tell what it got: this one may be
    taken again."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def pattern(length: int, seed: int = 1) -> bytes:
    """``length`` reproducible bytes that do not compress and never repeat at a cluster's distance."""
    return random.Random(seed).randbytes(length)


def write_file(path: Path, data: bytes, *, size: int | None = None) -> Path:
    """Make a file that starts with ``data`` and, if ``size`` (bytes) is given, continues as a hole."""
    path.write_bytes(data)
    if size is not None:
        os.truncate(path, size)
    return path
