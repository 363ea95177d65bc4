"""The built-in drivers, one module or folder each. Importing this package registers them all."""

from livedisk.emulator.drivers import file, host_device, null, raw
from livedisk.emulator.drivers.qcow2 import driver as qcow2

__all__ = ["file", "host_device", "null", "qcow2", "raw"]
