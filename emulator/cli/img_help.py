"""``-o help``: the options with which images are made and amended, as qemu-img lists them.

What is said of an option is what QEMU says. What there is not (encryption, hints for XFS) is not in the lists.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_QCOW2: Final = {
    "backing_file": ("<str>", "File name of a base image"),
    "backing_fmt": ("<str>", "Image format of the base image"),
    "cluster_size": ("<size>", "qcow2 cluster size"),
    "compat": ("<str>", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    "compression_type": ("<str>", "Compression method used for image cluster compression"),
    "data_file": ("<str>", "File name of an external data file"),
    "data_file_raw": ("<bool (on/off)>", "The external data file must stay valid as a raw image"),
    "extended_l2": ("<bool (on/off)>", "Extended L2 tables"),
    "lazy_refcounts": ("<bool (on/off)>", "Postpone refcount updates"),
    "preallocation": ("<str>", "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    "refcount_bits": ("<num>", "Width of a reference count entry in bits"),
    "size": ("<size>", "Virtual disk size"),
}
_RAW: Final = {"size": _QCOW2["size"]}
_FILE: Final = {
    "nocow": ("<bool (on/off)>", "Turn off copy-on-write (valid only on btrfs)"),
    "preallocation": ("<str>", "Preallocation mode (allowed values: off, falloc, full)"),
    "size": _QCOW2["size"],
}
"""Those of the file that an image is made in."""
_AMENDED: Final = (
    "backing_file", "backing_fmt", "compat", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits", "size",
)  # fmt: skip
_COLUMN: Final = 24


def asks_for_help(words: Iterable[str]) -> bool:
    """Whether one of the ``-o`` is ``help`` or ``?``, alone or among others."""
    from livedisk.emulator.qmp.keyval import split_fields

    return any(field in ("help", "?") for text in words for field in split_fields(text))


def creation_help(fmt: str, *, in_file: bool) -> str:
    """The options with which an image of that format is made; ``in_file``: in a file whose name was given."""
    options = _QCOW2 if fmt == "qcow2" else _RAW
    if in_file:
        return _listed("Supported options:", _FILE | options if fmt == "qcow2" else options | _FILE)
    return (
        _listed(f"Supported {fmt} options:", options)
        + "\n\nThe protocol level may support further options.\nSpecify the target filename to include those options."
    )


def amend_help(fmt: str) -> str:
    """The options that `amend` takes; qcow2 alone has any."""
    return _listed(f"Amend options for '{fmt}':", {name: _QCOW2[name] for name in _AMENDED})


def _listed(title: str, options: dict[str, tuple[str, str]]) -> str:
    lines = [f"  {name}={kind}".ljust(_COLUMN) + f" - {text}" for name, (kind, text) in sorted(options.items())]
    return "\n".join([title, *lines])
