"""The other side of ``-qtest``: a client that drives a virtual machine from outside its guest.

Machinery around QEMU (its Python package ``qemu.machine``) starts every machine with ``-accel qtest -qtest unix:path=...``
and waits for the connection; most of it never says a word there. Here is no processor, memory or virtual clock to drive,
so each command is answered as QEMU answers one that it does not have: ``FAIL Unknown command 'clock_step'``. The guest of
this emulator is whoever is connected to it, whatever is said here.

Source: QEMU ``system/qtest.c`` (qtest_process_command). A line of nothing is answered, too; QEMU aborts.
"""

from __future__ import annotations

import os
import time
from typing import Final

from livedisk.emulator.qmp.monitor import Port

LONGEST: Final = 64 << 10
"""Bytes of a line at most; a longer one is answered without being kept."""


class Qtest:
    """The frontend. ``log``: a descriptor that gets a copy of what is said, in QEMU's form; None: nobody wants it."""

    def __init__(self, log: int | None = None) -> None:
        self._log = log
        self._port: Port | None = None
        self._began = time.monotonic()
        self._rest = b""

    def opened(self, port: Port) -> None:
        self._port = port
        self._began = time.monotonic()
        self._rest = b""
        self._tell("[I 0.000000] OPENED")

    def received(self, data: bytes) -> None:
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[:LONGEST]
        for line in lines:
            self._answer(line.decode(errors="replace").rstrip("\r"))

    def closed(self) -> None:
        self._port = None
        self._tell(f"[I +{self._since():.6f}] CLOSED")

    def _answer(self, line: str) -> None:
        self._tell(f"[R +{self._since():.6f}] {line}")
        reply = f"FAIL Unknown command '{line.split(' ', 1)[0]}'"
        self._tell(f"[S +{self._since():.6f}] {reply}")
        if self._port is not None:
            self._port.write(reply.encode() + b"\n")

    def _since(self) -> float:
        return time.monotonic() - self._began

    def _tell(self, text: str) -> None:
        if self._log is not None:
            os.write(self._log, text.encode() + b"\n")
