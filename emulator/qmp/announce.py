"""The line on standard output that tells of an image which a command makes, as QEMU prints it.

    Formatting 'b.qcow2', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib size=1048576 ...

People who watch a daemon in a terminal see what their snapshot and mirror commands create; scripts look for the line. Source:
QEMU ``block.c`` (bdrv_img_create), ``util/qemu-option.c`` (qemu_opts_print); asked from QEMU 10.0.2.
"""

from __future__ import annotations

import sys
from contextlib import suppress


def announce(path: str, fmt: str, size: int, backing: str | None = None, backing_fmt: str | None = None) -> None:
    """Print the line for an image of ``size`` bytes with all other options at their defaults."""
    words = [f"fmt={fmt}"]
    if fmt == "qcow2":
        words += ["cluster_size=65536", "extended_l2=off", "compression_type=zlib"]
    words.append(f"size={size}")
    if backing is not None:
        words += [f"backing_file={backing.replace(',', ',,')}", f"backing_fmt={backing_fmt}"]
    if fmt == "qcow2":
        words += ["lazy_refcounts=off", "refcount_bits=16"]
    with suppress(OSError, ValueError, AttributeError):  # standard output may be closed: a daemon's mostly is
        sys.stdout.write(f"Formatting '{path}', {' '.join(words)}\n")
        sys.stdout.flush()
