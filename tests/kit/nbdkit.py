"""nbdkit in the foreground, with any plugin, on a Unix socket."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from kit.peers import DOWNLOADS, SYSTEM_PYTHON, peer, run
from kit.process import Process


class Nbdkit(Process):
    """``nbdkit ARGUMENTS...``: plugin, filters and their parameters. ``folder`` is a short folder for the socket and
    the log."""

    def __init__(
        self, folder: Path, *arguments: str, name: str = "nbdkit", environment: Mapping[str, str] | None = None
    ) -> None:
        self.socket = folder / f"{name}.nbd"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        super().__init__(
            [peer("nbdkit"), "-f", "-U", str(self.socket), *arguments],
            log=folder / f"{name}.log",
            environment=environment,
        )
        try:
            self.wait_for_socket(self.socket)
        except BaseException:
            self.kill()
            raise


def python_environment() -> Path:
    """The environment whose modules nbdkit's Python plugin can load.

    The plugin embeds Debian's Python. If the tests run under the same version, theirs will do; otherwise
    ``scripts/test`` has made one beside it.
    """
    embedded = run([SYSTEM_PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).stdout.strip()
    if embedded == "{}.{}".format(*sys.version_info[:2]):
        return Path(sys.prefix)
    environment = DOWNLOADS / "nbdkit-venv"
    if not environment.exists():
        raise AssertionError(f"nbdkit embeds Python {embedded} and {environment} is missing: run scripts/test")
    return environment


def python_site_packages() -> Path:
    """The folder of modules to put on the plugin's path, for example with ``PYTHONPATH``.

    An editable installation works by a ``.pth`` file there, which only ``site.addsitedir`` reads: a plugin that
    imports livedisk must call that, or be started with a path that `site` handles.
    """
    folders = sorted((python_environment() / "lib").glob("python3.*/site-packages"))
    return folders[0]
