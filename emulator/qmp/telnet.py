"""The little of telnet that a monitor needs (``-monitor telnet:HOST:PORT,server=on``).

We offer to echo, to suppress go-ahead and to be binary, so that a telnet client goes to character mode; its commands are
taken out of what it sends. Source: QEMU ``chardev/char-socket.c`` (tcp_chr_telnet_init, tcp_chr_process_IAC_bytes).
"""

from __future__ import annotations

from typing import Final

_IAC: Final = 255
OFFERS: Final = bytes((_IAC, 251, 1, _IAC, 251, 3, _IAC, 251, 0, _IAC, 253, 0))
"""WILL echo, WILL suppress go-ahead, WILL binary, DO binary."""


class Telnet:
    """What one client sends. A command is IAC and two bytes, wherever the pieces of the stream are cut; IAC twice is the byte."""

    def __init__(self) -> None:
        self._seen = 0

    def take(self, data: bytes) -> bytes:
        """The bytes that are no commands."""
        if not self._seen and _IAC not in data:
            return data
        plain = bytearray()
        for byte in data:
            if not self._seen:
                if byte == _IAC:
                    self._seen = 1
                else:
                    plain.append(byte)
            elif self._seen == 1 and byte == _IAC:
                plain.append(byte)
                self._seen = 0
            else:
                self._seen = (self._seen + 1) % 3
        return bytes(plain)
