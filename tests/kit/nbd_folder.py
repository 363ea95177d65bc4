"""A folder whose files are exports of a real NBD server, for tests that need many exports: one server a test process."""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit.nbdkit import Nbdkit

_numbers = itertools.count()


@functools.cache
def _served(*filters: str) -> tuple[Path, Nbdkit]:
    """The folder, and nbdkit's file plugin with these filters and their parameters. Ends with the test process."""
    folder = Path(tempfile.mkdtemp(prefix="ld-", dir="/tmp"))
    exports = folder / "exports"
    exports.mkdir()
    options = [one for one in filters if one.startswith("--")]
    parameters = [one for one in filters if not one.startswith("--")]
    server = Nbdkit(folder, *options, "file", f"dir={exports}", *parameters)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    return exports, server


def exported(content: Callable[[int], bytes], *filters: str, **options: Any) -> Callable[[Path, int], dict[str, Any]]:
    """What makes an `nbd` node's options for a new export, the same one each time it is asked with the same folder."""

    def make(folder: Path, size: int) -> dict[str, Any]:
        exports, server = _served(*filters)
        note = folder / "export-name"
        if not note.exists():
            note.write_text(f"disk{next(_numbers)}")
            (exports / note.read_text()).write_bytes(content(size))
        address = {"type": "unix", "path": str(server.socket)}
        return {"driver": "nbd", "server": address, "export": note.read_text(), "discard": "unmap", **options}

    return make
