"""Images that ``livedisk img`` works on, several in one graph, so that data moves between them as in a daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from livedisk.emulator.errors import BlockError, LiveDiskError, ParameterError

if TYPE_CHECKING:
    from livedisk.emulator.block.backend import BlockBackend
    from livedisk.emulator.block.graph import Graph

LANES: Final = 8
"""Copies under way at once where nobody says how many: qemu-img's number of coroutines."""


class Images:
    """The images of one command. ``graph``: where they are open."""

    def __init__(self) -> None:
        from livedisk.emulator.daemon import Daemon
        from livedisk.emulator.qmp.registry import load_plugins

        load_plugins()
        self._daemon = Daemon()
        self.graph: Graph = self._daemon.graph
        self._backends: list[BlockBackend] = []

    async def open(
        self, name: str, fmt: str | None, *, writable: bool = False, force_share: bool = False, **options: Any
    ) -> BlockBackend:
        """Open the image that ``name`` means (``images.py``); ``fmt`` None is what it looks like, "file" what it is stored in.
        ``options``: more of the format's, where it has them. Raises LiveDiskError, OSError."""
        from livedisk.emulator.block.backend import BlockBackend
        from livedisk.emulator.block.permissions import Perm
        from livedisk.emulator.cli.images import image_options

        try:
            given = await image_options(self._daemon, name, fmt)
            more = {key: value for key, value in options.items() if hasattr(given, key)}
            given = msgspec.structs.replace(given, read_only=not writable, force_share=force_share, **more)
            node = await self.graph.open(given)
        except LiveDiskError as error:
            if str(error).startswith("Could not open"):
                raise
            raise BlockError(f"Could not open '{name}': {error}", hint=error.hint) from None
        except OSError as error:
            raise BlockError(f"Could not open '{name}': {error.strerror}") from None
        backend = BlockBackend(self.graph)
        self._backends.append(backend)
        perm = Perm.CONSISTENT_READ | (Perm.WRITE | Perm.RESIZE if writable else Perm.NONE)
        # Who looks at the bare file of a format shares it as the format would: with nobody who writes.
        bare = fmt == "file" and not force_share
        shared = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED if bare else Perm.ALL
        try:
            self.graph.attach_root(backend, node, perm, shared)
        except BlockError as error:
            raise type(error)(f"Could not open '{name}': {error}", hint=error.hint) from None
        return backend

    async def close(self) -> None:
        for backend in self._backends:
            await self.graph.detach_root(backend)
        await self.graph.close()


@asynccontextmanager
async def images() -> AsyncIterator[Images]:
    """For the images of one command; all are closed, and complete, at the end."""
    made = Images()
    try:
        yield made
    finally:
        await made.close()


def check_format(fmt: str, words: str) -> None:
    """Raise BlockError with ``words`` and the name if there is no such format."""
    from livedisk.emulator.block.driver import DRIVERS
    from livedisk.emulator.qmp.registry import load_plugins

    load_plugins()
    if fmt not in DRIVERS:
        raise BlockError(f"{words} '{fmt}'")


def number_of(text: str) -> int:
    """A size as qemu-img's options take it. Raises ParameterError, in its words."""
    from livedisk.emulator.qmp.visit import parse_size

    size = parse_size(text)
    if size is None or size >= 1 << 63:
        raise ParameterError(
            "Parameter 'size' expects a non-negative number below 2^64\n"
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
            "and exabytes, respectively."
        )
    return size


class Progress:
    """``-p``: how far a command has come, in qemu-img's form, on standard output."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._last = ""
        self.show(0, 1)

    def show(self, done: int, total: int) -> None:
        text = f"    ({100 * done / total if total else 100:.2f}/100%)"
        if self._shown and text != self._last:
            click.echo(text, nl=False)
            click.echo("\r", nl=False)
            self._last = text

    def end(self) -> None:
        """All is done."""
        self.show(1, 1)
        if self._shown:
            click.echo()


class Quit(LiveDiskError):
    """A failure with an exit code of its own."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code
