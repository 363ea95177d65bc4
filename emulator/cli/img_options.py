"""What commands of ``livedisk img`` have in common on their command lines: qemu-img's options that more than one of them takes.

``--image-opts`` says that images are named by the options of their nodes, as ``-blockdev`` has them, and not by file names.
``--object`` makes objects that these options refer to (TLS credentials, limits). Both are kept with the command's context, and
looked up where images are opened (`img_open.py`): no command does anything about them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

import click

from livedisk.emulator.cli.images import ImageOptions
from livedisk.emulator.errors import ParameterError

F = TypeVar("F", bound=Callable[..., Any])

_BY_OPTIONS: Final = "livedisk.image-opts"
_OBJECTS: Final = "livedisk.objects"


def _keep(key: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        context.meta[key] = value

    return keep


def objects() -> tuple[str, ...]:
    """What ``--object`` said in the command that runs."""
    context = click.get_current_context(silent=True)
    found: tuple[str, ...] = context.meta.get(_OBJECTS, ()) if context is not None else ()
    return found


def image_name(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """The callback of an argument or option that names an image (or, repeated, several)."""
    if not context.meta.get(_BY_OPTIONS) or value is None:
        return value
    return tuple(map(ImageOptions, value)) if isinstance(value, tuple) else ImageOptions(value)


def _format_of_name(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and context.meta.get(_BY_OPTIONS):
        raise click.UsageError("--image-opts and --format are mutually exclusive")
    return value


def image_options(command: F) -> F:
    """``--image-opts``, ``--object``."""
    command = click.option(
        "--object",
        metavar="TYPE,id=ID,...",
        multiple=True,
        expose_value=False,
        callback=_keep(_OBJECTS),
        help="An object that IMAGE's options refer to (repeatable).",
    )(command)
    return click.option(
        "--image-opts",
        "--source-image-opts",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_keep(_BY_OPTIONS),
        help="IMAGE is the options of a node, as -blockdev's.",
    )(command)


def format_option(
    *names: str, help: str = "The image's format; what its header says if not given."
) -> Callable[[F], F]:
    """The format of an image that is there."""
    return click.option(*names, metavar="FORMAT", callback=_format_of_name, help=help)


FORMAT: Final = format_option("-f", "--format", "fmt")
QUIET: Final = click.option("-q", "--quiet", "quiet", is_flag=True, help="Print nothing but errors.")
PROGRESS: Final = click.option("-p", "--progress", "progress", is_flag=True, help="Show how far it has come.")


SNAPSHOT: Final = click.option(
    "-l",
    "--source-snapshot",
    "--snapshot",
    "snapshot",
    metavar="SNAPSHOT",
    help="Take IMAGE as the internal snapshot of this name or id kept it; also as snapshot.id=ID,snapshot.name=NAME.",
)
RATE: Final = click.option("-r", "--rate", "rate", metavar="BYTES", help="Write so many bytes a second at most.")


def cache_option(*names: str, of: str = "IMAGE") -> Callable[[F], F]:
    """A cache mode; `cache_mode` checks it."""
    return click.option(
        *names, metavar="MODE", help=f"How {of} is cached: writeback, none, writethrough, directsync or unsafe."
    )


class CacheMode(NamedTuple):
    """What a cache mode means. ``through``: what was written is on stable storage before more is."""

    direct: bool
    no_flush: bool
    through: bool


def cache_mode(name: str | None, what: str = "cache") -> CacheMode | None:
    """None: what is the default. Raises ParameterError in qemu-img's words, in which the option is called ``what``."""
    from livedisk.emulator.device.drive_options import CACHE_MODES

    if name is None:
        return None
    if name not in CACHE_MODES:
        raise ParameterError(f"Invalid {what} option: {name}")
    direct, no_flush, write_cache = CACHE_MODES[name]
    return CacheMode(direct, no_flush, not write_cache)


CACHE: Final = cache_option("-t", "--cache", "cache")
SOURCE_CACHE: Final = cache_option("-T", "--cache", "cache")
