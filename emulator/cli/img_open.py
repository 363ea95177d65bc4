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
    from livedisk.emulator.block.node import Node
    from livedisk.emulator.block.throttle import Member
    from livedisk.emulator.cli.img_options import CacheMode

LANES: Final = 8
"""Copies under way at once where nobody says how many: qemu-img's number of coroutines."""


class Images:
    """The images of one command. ``graph``: where they are open."""

    def __init__(self) -> None:
        from livedisk.emulator.cli.img_options import objects
        from livedisk.emulator.daemon import Daemon
        from livedisk.emulator.qmp.keyval import parse_option
        from livedisk.emulator.qmp.object_commands import ObjectOptions
        from livedisk.emulator.qmp.registry import load_plugins

        load_plugins()
        self._daemon = Daemon()
        self.graph: Graph = self._daemon.graph
        self._backends: list[BlockBackend] = []
        self._through: set[BlockBackend] = set()
        for text in objects():
            self._daemon.objects.add(parse_option(ObjectOptions, text, "qom-type"))

    async def open(
        self,
        name: str,
        fmt: str | None,
        *,
        writable: bool = False,
        force_share: bool = False,
        cache: CacheMode | None = None,
        **options: Any,
    ) -> BlockBackend:
        """Open the image that ``name`` means (``images.py``); ``fmt`` None is what it looks like, "file" what it is stored in.
        ``options``: more of the format's, where it has them. Raises LiveDiskError, OSError."""
        from livedisk.emulator.block.backend import BlockBackend
        from livedisk.emulator.block.options import CacheOptions
        from livedisk.emulator.block.permissions import Perm
        from livedisk.emulator.cli.images import image_options

        try:
            given = await image_options(self._daemon, name, fmt)
            more = {key: value for key, value in options.items() if hasattr(given, key)}
            if cache is not None:
                more["cache"] = CacheOptions(direct=cache.direct, no_flush=cache.no_flush)
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
        if cache is not None and cache.through:
            self._through.add(backend)
        perm = Perm.CONSISTENT_READ | (Perm.WRITE | Perm.RESIZE if writable else Perm.NONE)
        # Who looks at the bare file of a format shares it as the format would: with nobody who writes.
        bare = fmt == "file" and not force_share
        shared = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED if bare else Perm.ALL
        try:
            self.graph.attach_root(backend, node, perm, shared)
        except BlockError as error:
            raise type(error)(f"Could not open '{name}': {error}", hint=error.hint) from None
        return backend

    def write_as(self, image: BlockBackend, backend: BlockBackend) -> None:
        """What is written to ``backend`` is held back no longer than what is written to ``image``."""
        if image in self._through:
            self._through.add(backend)

    async def settle(self, backend: BlockBackend) -> None:
        """Something was written: where no write is to be held back, it is on stable storage on return."""
        if backend in self._through:
            await backend.flush()

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


async def show_snapshot(node: Node, words: str) -> None:
    """What ``-l`` says: let the image read as one of its internal snapshots kept it. ``words`` are its id or name, or
    ``snapshot.id=...,snapshot.name=...``. Raises LiveDiskError in qemu-img's words."""
    from livedisk.emulator.qmp.keyval import split_fields

    found = list(node.driver.snapshots())
    if words.startswith("snapshot."):
        given = dict(field.partition("=")[::2] for field in split_fields(words))
        for name in given:
            if name not in ("snapshot.id", "snapshot.name"):
                raise ParameterError(
                    f"Invalid parameter '{name}'", hint=f"livedisk img: Failed in parsing snapshot param '{words}'"
                )
        wanted = {name.removeprefix("snapshot."): value for name, value in given.items()}
        found = [one for one in found if all(one[name] == value for name, value in wanted.items())]
    else:
        found = [one for one in found if one["id"] == words] or [one for one in found if one["name"] == words]
    if not found:
        raise BlockError("Failed to load snapshot: Can't find snapshot")
    try:
        await node.driver.snapshot_show(found[0]["id"])
    except OSError as error:
        raise BlockError(f"Failed to load snapshot: {error.strerror}") from None


def rate_limit(text: str | None) -> Member | None:
    """What ``-r`` says, to be asked before anything is written; None: no limit. Raises ParameterError in qemu-img's words."""
    from livedisk.emulator.block.throttle import HIGHEST, Bucket, Limit, Limits, Member, ThrottleGroup
    from livedisk.emulator.qmp.visit import parse_size

    if text is None:
        return None
    rate = parse_size(text)
    if rate is None:
        raise ParameterError(f"Invalid rate limit specified: '{text}'.")
    return Member(ThrottleGroup("rate", Limits({Bucket.BPS_WRITE: Limit(min(rate, HIGHEST))}))) if rate else None


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
