"""The built-in drivers, one module or folder each. Importing this package registers them all."""

from livedisk.emulator.drivers import (
    blkdebug,
    blklogwrites,
    blkverify,
    compress,
    copy_before_write,
    copy_on_read,
    file,
    host_device,
    job_filters,
    null,
    preallocate,
    quorum,
    raw,
    snapshot_access,
    throttle,
)
from livedisk.emulator.drivers.nbd import driver as nbd
from livedisk.emulator.drivers.qcow2 import driver as qcow2

__all__ = [
    "blkdebug",
    "blklogwrites",
    "blkverify",
    "compress",
    "copy_before_write",
    "copy_on_read",
    "file",
    "host_device",
    "job_filters",
    "nbd",
    "null",
    "preallocate",
    "qcow2",
    "quorum",
    "raw",
    "snapshot_access",
    "throttle",
]
