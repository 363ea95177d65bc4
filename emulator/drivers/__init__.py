"""The built-in drivers, one module or folder each. Importing this package registers them all."""

from livedisk.emulator.drivers import file, host_device, null, raw

__all__ = ["file", "host_device", "null", "raw"]
