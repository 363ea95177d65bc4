"""host_device: a block or character device of the host, as `file` in all but what a device cannot do.

Its size is the device's, and cannot be changed. Zeroes and discards go through the block device ioctls, which take whole
sectors. Source: QEMU ``block/file-posix.c`` (bdrv_host_device).
"""

from __future__ import annotations

import errno
import os
import stat

from livedisk.emulator.block import fallocate
from livedisk.emulator.block.driver import register
from livedisk.emulator.block.hostfile import in_thread
from livedisk.emulator.block.types import SECTOR, Preallocation, ZeroFlags
from livedisk.emulator.drivers.file import FileDriver
from livedisk.emulator.errors import BlockError


class HostDevice(FileDriver):
    """A device node such as /dev/sdb."""

    name = "host_device"

    @classmethod
    def create_options(cls) -> None:
        """Devices are there or not."""
        return

    def _check_type(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            raise BlockError(
                f"'{self.name}' driver requires '{self.options.filename}' to be either a character or block device"
            )
        self._is_block = stat.S_ISBLK(mode)

    def _measure(self) -> int:
        return fallocate.device_size(self.host.fd) if self._is_block else os.lseek(self.host.fd, 0, os.SEEK_END)

    def data_run(self, offset: int, length: int) -> tuple[bool, int]:
        return True, length  # devices do not tell

    async def allocated_size(self) -> int:
        return 0

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        if not self._is_block or (offset | length) % SECTOR:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        await in_thread(fallocate.device_zero, self.host.fd, offset, length)

    async def discard(self, offset: int, length: int) -> None:
        start, stop = -(-offset // SECTOR) * SECTOR, (offset + length) // SECTOR * SECTOR
        if self._is_block and start < stop:
            try:
                await in_thread(fallocate.device_discard, self.host.fd, start, stop - start)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):  # a hint that this device does not take
                    raise

    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        if prealloc is not Preallocation.OFF:
            raise BlockError(f"Preallocation mode '{prealloc}' unsupported for this non-regular file")
        current = self._measure()
        if size != current and exact:
            raise BlockError("Cannot resize device files")
        if size > current:
            raise BlockError("Cannot grow device files")


register(HostDevice)
