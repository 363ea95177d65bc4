"""The client's half of fixed newstyle negotiation: bytes in, bytes and one result out. No sockets.

`ClientHandshake` asks for the best a server offers, one option after the other, and takes no for an answer where it can:

    greeting -> [STARTTLS] -> EXTENDED_HEADERS -> STRUCTURED_REPLY -> SET_META_CONTEXT -> GO -----------> done
                                     | granted: skip ---^     (if contexts are wanted) '-> ERR_UNSUP: EXPORT_NAME -> done

What a reply to each option means is a table, `_ANSWERS`; which option comes next is decided in `_next`.

With ``tls`` nothing else is said before TLS is up: when the server agreed, `starting_tls` is true, the caller does the TLS
handshake on the connection and calls `secured`. Bytes that came in plain behind the server's agreement are a failure: somebody
put them there.

The server is not trusted: what it says of the export is checked before anybody relies on it (`_check_export`).

Source: proto.md, "Fixed newstyle negotiation", "Option types"; the texts of refusals are those of QEMU ``nbd/client.c``
(nbd_handle_reply_err), which clients of ours may match.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from .constants import (
    INIT_MAGIC,
    MAX_PAYLOAD,
    MAX_STRING,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    REP_ERROR,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    ReplyMode,
    TransmissionFlag,
    spoken,
)
from .messages import (
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION_REPLY,
    U16,
    U32,
    counted,
    option,
)


class NegotiationFailed(Exception):
    """The server refused, or did not speak the protocol. ``hint``: the server's own words, or what to do."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


@dataclass(slots=True)
class ExportInfo:
    """What the server told about the export. Sizes are bytes, ``flags`` are `TransmissionFlag`s.

    ``contexts`` maps the negotiated context ids to names; ``mode`` is the form of headers and replies in use. ``sized``: the
    server told its block sizes; otherwise they are what the specification lets a client assume.
    """

    size: int = 0
    flags: int = 0
    description: str = ""
    min_block: int = 1
    preferred_block: int = 4096
    max_payload: int = MAX_PAYLOAD
    sized: bool = False
    mode: ReplyMode = ReplyMode.SIMPLE
    contexts: dict[int, str] = field(default_factory=dict)


class ClientHandshake:
    """Negotiates one export.

    ``name`` is the export's, ``contexts`` the meta contexts wanted, ``best`` the most that is asked for, ``tls`` whether TLS is
    required. ``info`` is filled as answers come; once `receive` returned True it is final, and ``leftover`` holds what arrived
    behind the handshake.
    """

    def __init__(
        self,
        name: str = "",
        *,
        contexts: Sequence[str] = (),
        best: ReplyMode = ReplyMode.EXTENDED,
        tls: bool = False,
    ) -> None:
        self.info = ExportInfo()
        self.leftover = b""
        self.starting_tls = False
        self._tls = tls
        self._name = name.encode(errors="surrogateescape")
        self._wanted = tuple(contexts)
        self._best = best
        self._pending = bytearray()
        self._output = bytearray()
        self._step: Callable[[], bool] = self._read_greeting
        self._sent: Option | None = None
        self._no_zeroes = False
        self._done = False

    def take_output(self) -> bytes:
        """Bytes to send, in order; empties the store."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def receive(self, data: bytes | memoryview) -> bool:
        """Go as far as ``data`` allows; True once the export is ours. Raises `NegotiationFailed`."""
        self._pending += data
        while not self._done and not self.starting_tls and self._step():
            pass
        if self._done:
            self.leftover = bytes(self._pending)
        return self._done

    def secured(self) -> None:
        """TLS is up: go on through it."""
        self.starting_tls = False
        self._next(Option.STARTTLS)

    def _consume(self, count: int) -> bytes:
        taken = bytes(self._pending[:count])
        del self._pending[:count]
        return taken

    def _read_greeting(self) -> bool:
        if len(self._pending) < GREETING.size:
            return False
        magic, style, raw_flags = GREETING.unpack(self._consume(GREETING.size))
        if magic != INIT_MAGIC:
            raise NegotiationFailed("Server does not speak NBD")
        if style != OPTION_MAGIC:
            raise NegotiationFailed("Server speaks oldstyle NBD, which is not supported")
        flags = raw_flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
        self._no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        self._output += CLIENT_FLAGS.pack(flags)
        if flags & HandshakeFlag.FIXED_NEWSTYLE:
            self._next(None)
        elif self._tls:
            raise NegotiationFailed("Server does not support STARTTLS")
        else:
            self._ask(Option.EXPORT_NAME, self._name)
        return True

    def _ask(self, number: Option, data: bytes = b"") -> None:
        self._sent = number
        self._output += option(number, data)
        self._step = self._read_export_reply if number == Option.EXPORT_NAME else self._read_reply

    def _next(self, answered: Option | None) -> None:
        """Ask for what comes after ``answered``."""
        if answered is None and self._tls:
            self._ask(Option.STARTTLS)
        elif answered in (None, Option.STARTTLS) and self._best == ReplyMode.EXTENDED:
            self._ask(Option.EXTENDED_HEADERS)
        elif (
            answered in (None, Option.STARTTLS, Option.EXTENDED_HEADERS)
            and self.info.mode == ReplyMode.SIMPLE
            and self._best >= ReplyMode.STRUCTURED
        ):
            self._ask(Option.STRUCTURED_REPLY)
        elif answered != Option.SET_META_CONTEXT and self._wanted and self.info.mode >= ReplyMode.STRUCTURED:
            queries = b"".join(counted(query.encode(errors="surrogateescape")) for query in self._wanted)
            self._ask(Option.SET_META_CONTEXT, counted(self._name) + U32.pack(len(self._wanted)) + queries)
        else:
            self._ask(Option.GO, counted(self._name) + U16.pack(1) + U16.pack(Info.BLOCK_SIZE))

    def _read_reply(self) -> bool:
        if len(self._pending) < OPTION_REPLY.size:
            return False
        magic, number, kind, length = OPTION_REPLY.unpack_from(self._pending)
        if magic != OPTION_REPLY_MAGIC or number != self._sent or length > _MAX_REPLY:
            raise NegotiationFailed(
                f"Unexpected reply to option {spoken(Option, self._sent or 0)}"
                f" (magic 0x{magic:x}, option {number}, length {length})"
            )
        if len(self._pending) < OPTION_REPLY.size + length:
            return False
        del self._pending[: OPTION_REPLY.size]
        _ANSWERS[number](self, kind, self._consume(length))
        return True

    def _read_export_reply(self) -> bool:
        size = EXPORT_NAME_REPLY.size + (0 if self._no_zeroes else len(EXPORT_NAME_PADDING))
        if len(self._pending) < size:
            return False
        self.info.size, self.info.flags = EXPORT_NAME_REPLY.unpack_from(self._consume(size))
        self._check_export()
        self._done = True
        return False

    def _check_export(self) -> None:
        """Raise `NegotiationFailed` where what the server said cannot be."""
        info = self.info
        if info.size >= 1 << 63:
            raise NegotiationFailed(f"Server claims an export of {info.size} bytes")
        if not info.sized:
            return
        smallest, preferred = info.min_block, info.preferred_block
        if smallest == 0 or smallest & (smallest - 1) or smallest > _MAX_MIN_BLOCK:
            raise NegotiationFailed(f"Server claims a minimum block size of {smallest} bytes")
        if preferred < smallest or preferred & (preferred - 1):
            raise NegotiationFailed(f"Server claims a preferred block size of {preferred} bytes")
        if info.max_payload < smallest:
            raise NegotiationFailed(f"Server claims a maximum block size of {info.max_payload} bytes")
        if info.size % smallest:
            raise NegotiationFailed(
                f"Server's export of {info.size} bytes is no multiple of its minimum block size, {smallest} bytes"
            )

    # The answers.

    def on_starttls(self, kind: int, data: bytes) -> None:
        if kind == OptionReply.ERR_UNSUP:
            raise NegotiationFailed("Server does not support STARTTLS")
        if kind & REP_ERROR:
            raise self._refused(kind, data)
        if kind != OptionReply.ACK:
            raise self._unexpected(kind)
        if self._pending:
            raise NegotiationFailed("Server sent plain text behind its agreement to start TLS")
        self.starting_tls = True

    def on_mode(self, kind: int, data: bytes) -> None:
        answered = self._sent
        if kind in (OptionReply.ERR_TLS_REQD, OptionReply.ERR_SHUTDOWN):
            raise self._refused(kind, data)
        if kind == OptionReply.ACK:
            extended = answered == Option.EXTENDED_HEADERS
            self.info.mode = ReplyMode.EXTENDED if extended else ReplyMode.STRUCTURED
        elif not kind & REP_ERROR:
            raise self._unexpected(kind)
        self._next(answered)

    def on_contexts(self, kind: int, data: bytes) -> None:
        if kind == OptionReply.META_CONTEXT:
            if not U32.size < len(data) <= U32.size + MAX_STRING or len(self.info.contexts) > len(self._wanted):
                raise self._unexpected(kind)
            self.info.contexts[U32.unpack_from(data)[0]] = data[U32.size :].decode(errors="surrogateescape")
            return
        if kind != OptionReply.ACK:
            if not kind & REP_ERROR:
                raise self._unexpected(kind)
            self.info.contexts.clear()
        self._next(Option.SET_META_CONTEXT)

    def on_go(self, kind: int, data: bytes) -> None:
        if kind == OptionReply.INFO:
            self._take_info(kind, data)
        elif kind == OptionReply.ACK:
            if not self.info.flags & TransmissionFlag.HAS_FLAGS:
                raise NegotiationFailed("Server sent no NBD_INFO_EXPORT")
            self._check_export()
            self._done = True
        elif kind == OptionReply.ERR_UNSUP:
            self._ask(Option.EXPORT_NAME, self._name)
        elif kind & REP_ERROR:
            raise self._refused(kind, data)
        else:
            raise self._unexpected(kind)

    def _take_info(self, kind: int, data: bytes) -> None:
        info = self.info
        if len(data) < U16.size:
            raise self._unexpected(kind)
        item = U16.unpack_from(data)[0]
        if item == Info.EXPORT and len(data) == INFO_EXPORT.size:
            _, info.size, info.flags = INFO_EXPORT.unpack(data)
        elif item == Info.BLOCK_SIZE and len(data) == INFO_BLOCK_SIZE.size:
            _, info.min_block, info.preferred_block, info.max_payload = INFO_BLOCK_SIZE.unpack(data)
            info.sized = True
        elif item == Info.DESCRIPTION:
            info.description = data[U16.size :].decode(errors="replace")

    def _refused(self, kind: int, data: bytes) -> NegotiationFailed:
        text = _REFUSALS.get(kind, "Unknown error code when asking for {}")
        number = self._sent or 0
        hints = [f"server reported: {data.decode(errors='replace')}"] if data else []
        if kind == OptionReply.ERR_TLS_REQD:
            hints.append("Did you forget a valid tls-creds?")
        return NegotiationFailed(text.format(f"option {int(number)} ({spoken(Option, number)})"), "\n".join(hints))

    def _unexpected(self, kind: int) -> NegotiationFailed:
        return NegotiationFailed(f"Unexpected reply type 0x{kind:x} to option {spoken(Option, self._sent or 0)}")


_MAX_REPLY: Final = 64 << 10
"""Bytes of a reply that is collected: more than any that the specification knows has."""
_MAX_MIN_BLOCK: Final = 64 << 10
"""Bytes: the largest minimum block size that the specification lets a server have."""

_REFUSALS: Final[dict[int, str]] = {
    OptionReply.ERR_POLICY: "Denied by server for {}",
    OptionReply.ERR_INVALID: "Invalid parameters for {}",
    OptionReply.ERR_PLATFORM: "Server lacks support for {}",
    OptionReply.ERR_TLS_REQD: "Server requires TLS for {}",
    OptionReply.ERR_UNKNOWN: "Requested export not available",
    OptionReply.ERR_SHUTDOWN: "Server shutting down before {}",
    OptionReply.ERR_BLOCK_SIZE_REQD: "Server requires INFO_BLOCK_SIZE for {}",
}

_ANSWERS: Final[dict[int, Callable[[ClientHandshake, int, bytes], None]]] = {
    Option.STARTTLS: ClientHandshake.on_starttls,
    Option.EXTENDED_HEADERS: ClientHandshake.on_mode,
    Option.STRUCTURED_REPLY: ClientHandshake.on_mode,
    Option.SET_META_CONTEXT: ClientHandshake.on_contexts,
    Option.GO: ClientHandshake.on_go,
}
