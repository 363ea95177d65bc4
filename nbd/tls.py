"""TLS on a non-blocking socket, with the methods of a socket: what `connection` and the handshakes read and write through.

`TlsStream` is OpenSSL between two memory buffers (`ssl.MemoryBIO`); the socket moves large pieces of ciphertext, so that a
batch of replies costs one system call as it does without TLS, where `ssl.SSLSocket` makes two a record of 16 KiB.

    recv_into  socket --recv, up to 256 KiB--> incoming --decrypt, record by record--> the caller's buffer
    send       the caller's pieces --joined, up to 128 KiB--> encrypt --> outgoing --send--> socket

It behaves as a non-blocking socket does, with two additions that whoever waits for readiness has to know:

* ``more`` says that data was received that the last `recv_into` had no room for: the socket may never become readable again
  for it.
* A `send` that raises BlockingIOError, or takes less than it was given, may have encrypted the beginning of the rest already:
  the next call has to begin with the same bytes (OpenSSL's rule for SSL_write). They are told as taken once the socket took
  all of it, so that "everything was sent" means what it means without TLS.

Which certificates, versions and ciphers are good is the `ssl.SSLContext`'s business, which somebody else made; who may come in is
decided by `ServerTls.admit` after the handshake.
"""

from __future__ import annotations

import enum
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, cast

from .client_handshake import NegotiationFailed
from .readiness import readable, writable

_RECEIVE: Final = 256 << 10
"""Bytes of ciphertext taken from the socket at once, and of plaintext handed over before the caller gets its turn."""
_ENCRYPT: Final = 128 << 10
"""Bytes of plaintext encrypted before they are sent."""


class Want(enum.Enum):
    """What the TLS handshake waits for."""

    NOTHING = 0
    READ = 1
    WRITE = 2


class TlsStream:
    """A TLS session on ``sock``, which it owns from now on (``sock`` must be non-blocking).

    ``received`` is ciphertext that was read from the socket before. With ``server_hostname`` it is the client's end.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        received: bytes = b"",
    ) -> None:
        self.more = False
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )
        # They take any buffer; their published types say less.
        self._read: Callable[[int, memoryview], int] = cast(Any, self._tls.read)
        self._write: Callable[[bytes | bytearray | memoryview], int] = cast(Any, self._tls.write)
        self._received = memoryview(bytearray(_RECEIVE))
        self._backlog = memoryview(b"")  # ciphertext that the socket did not take yet
        self._taken = 0  # bytes of plaintext in it that were not told as taken
        self._ended = False
        if received:
            self._incoming.write(received)

    # What a socket has.

    def fileno(self) -> int:
        """The socket's descriptor; -1 once it is closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Say goodbye as far as the socket takes it at once, and close it."""
        if self._sock.fileno() < 0:
            return
        if not self._backlog:
            with suppress(OSError, ValueError):
                self._tls.unwrap()
            with suppress(OSError):
                self._push()
        self._sock.close()

    def recv(self, size: int) -> bytes:
        """Up to ``size`` bytes, b"" at the end. Raises BlockingIOError and what sockets raise; ssl.SSLError is an OSError."""
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.recv_into(memoryview(buffer))])

    def recv_into(self, target: memoryview) -> int:
        """Fill as much of ``target`` as there is data for; 0 at the end. Raises as `recv`."""
        room = min(len(target), _RECEIVE)
        filled = 0
        self.more = False
        while filled < room:
            try:
                count = self._read(room - filled, target[filled:room])
            except ssl.SSLWantReadError:
                if self._ended or not self._fetch():
                    break
                continue
            except ssl.SSLZeroReturnError:
                count = 0
            if not count:
                self._ended = True
                self.more = filled > 0  # the end is still to be told
                break
            filled += count
        else:
            self.more = True
        if self._outgoing.pending and not self._backlog:
            self._push()  # the answer to a key update
        if filled or self._ended:
            return filled
        raise BlockingIOError

    def send(self, data: bytes | memoryview) -> int:
        """Send some of ``data``; how much was taken. See the module's docstring for what the next call must begin with."""
        sent = 0
        with memoryview(data) as view:
            while sent < len(view):
                try:
                    sent += self.sendmsg((view[sent : sent + _ENCRYPT],))
                except BlockingIOError:
                    if sent:
                        break
                    raise
        return sent

    def sendmsg(self, pieces: Sequence[bytes | bytearray | memoryview]) -> int:
        """As `send`, for the concatenation of ``pieces``."""
        if self._backlog:
            if not self._push():
                raise BlockingIOError
            if self._taken:
                taken, self._taken = self._taken, 0
                return taken
        plain = _first(pieces, _ENCRYPT)
        if not plain:
            return 0
        count = self._write(plain)
        if not self._push():
            self._taken = count
            raise BlockingIOError
        return count

    # TLS.

    def handshake(self) -> Want:
        """Go as far as the socket allows. `Want.NOTHING` once the session is up; else call again when the socket is ready.

        Raises ssl.SSLError (after the alert was sent, where possible), or OSError where the connection is gone.
        """
        while True:
            if self._backlog and not self._push():
                return Want.WRITE
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                if not self._push():
                    return Want.WRITE
                if not self._fetch():
                    if self._ended:
                        raise ConnectionResetError("connection closed during the TLS handshake") from None
                    return Want.READ
            except OSError:
                with suppress(OSError):
                    self._push()
                raise
            else:
                return Want.NOTHING if self._push() else Want.WRITE

    def peer_certificate(self) -> bytes | None:
        """The other end's certificate in DER, or None where it sent none."""
        return self._tls.getpeercert(binary_form=True)

    def version(self) -> str:
        """The version in use, as ``TLSv1.3``."""
        return self._tls.version() or "none"

    # Inside.

    def _fetch(self) -> bool:
        """Take ciphertext from the socket; whether there was any. Notes the end."""
        try:
            count = self._sock.recv_into(self._received)
        except (BlockingIOError, InterruptedError):
            return False
        if not count:
            # Without a goodbye, as many clients end: the protocol above has its own, and knows what it still expected.
            self._ended = True
            return False
        self._incoming.write(self._received[:count])
        return True

    def _push(self) -> bool:
        """Send what is encrypted; whether all of it went out."""
        if self._outgoing.pending:
            fresh = self._outgoing.read()
            self._backlog = memoryview(bytes(self._backlog) + fresh if self._backlog else fresh)
        while self._backlog:
            try:
                self._backlog = self._backlog[self._sock.send(self._backlog) :]
            except (BlockingIOError, InterruptedError):
                return False
        return True


def _first(pieces: Sequence[bytes | bytearray | memoryview], limit: int) -> bytes | bytearray | memoryview:
    """The first ``limit`` bytes of the concatenation, copied only where they are in several pieces."""
    head = pieces[0]
    if len(pieces) == 1 or len(head) >= limit:
        return head if len(head) <= limit else memoryview(head)[:limit]
    chosen: list[bytes | bytearray | memoryview] = []
    for piece in pieces:
        if len(piece) >= limit:
            chosen.append(memoryview(piece)[:limit])
            break
        chosen.append(piece)
        limit -= len(piece)
    return b"".join(chosen)


def reason_of(error: OSError) -> str:
    """Why TLS failed, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verification failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return error.strerror or str(error)


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What a server needs for TLS, which it then requires of every client.

    ``admit`` is given the certificate (DER; None where it sent none) of a client whose handshake succeeded, and raises
    PermissionError to turn it away.
    """

    context: ssl.SSLContext
    admit: Callable[[bytes | None], None] | None = None


@dataclass(frozen=True, slots=True)
class ClientTls:
    """What a client needs for TLS, which it then insists on. ``hostname``: whom the server's certificate must be for;
    None where the context does not check it."""

    context: ssl.SSLContext
    hostname: str | None = None

    async def secure(self, sock: socket.socket) -> TlsStream:
        """Do the handshake on a connected, non-blocking socket, which stays the caller's if it fails.

        Raises `NegotiationFailed`.
        """
        stream = TlsStream(sock, self.context, server_side=False, server_hostname=self.hostname)
        try:
            while (want := stream.handshake()) is not Want.NOTHING:
                await (readable if want is Want.READ else writable)(sock.fileno())
        except OSError as error:
            raise NegotiationFailed(f"TLS handshake failed: {reason_of(error)}") from error
        return stream
