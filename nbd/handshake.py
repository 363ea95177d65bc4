"""The server's half of fixed newstyle negotiation: bytes in, events and bytes out. No sockets, no clock.

`ServerHandshake.receive` takes whatever arrived, in pieces of any size, and returns events; what has to be sent is
fetched with `take_output`. The last event of a handshake is one of `Chosen`, `Aborted` and `Violation`; bytes that came behind it
are in ``leftover`` and belong to the transmission phase.

    FLAGS --4 bytes--> OPTION <--reply-- DATA (the option's handler runs) | SKIP (data thrown away, then an error)
                          '--------> DONE (chosen, aborted, or the client broke a rule)

What can be negotiated is a table, `OPTIONS`: a row is an option's number, its handler and how much data it may carry. Adding an
option is a row and a function.

With ``tls`` the server requires TLS (proto.md's FORCEDTLS; there is no optional TLS, which anybody in the middle could take
away): until STARTTLS succeeded, nothing else but ABORT is answered with more than NBD_REP_ERR_TLS_REQD. STARTTLS ends the
plain part with the event `StartTls`; the caller sends the output, wraps the connection, and says `secured`. What stood
behind the option goes to TLS (`leftover`), never into the negotiation: text that somebody slipped in before is not obeyed.

Invariants: at most `MAX_OPTION_DATA` bytes of an option are ever held (longer data of a known or unknown option is
counted and dropped), and little more than `_MAX_OUTPUT` bytes of replies; an option never leaves half a reply; the state
that options set (reply mode, contexts) is only handed on with `Chosen`.

Source: proto.md, "Fixed newstyle negotiation", "Option types", "Option reply types". Texts, and answers where the
specification leaves a choice, are those of QEMU 10.0.2. Deliberate difference: surplus data behind a well-formed
NBD_OPT_*_META_CONTEXT is ERR_INVALID here, where QEMU loses its place in the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from .constants import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    INIT_MAGIC,
    MAX_PAYLOAD,
    MAX_STRING,
    OPTION_MAGIC,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    ReplyMode,
    TransmissionFlag,
    spoken,
)
from .export import Export
from .messages import (
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION,
    U16,
    U32,
    counted,
    option_reply,
)

MAX_OPTION_DATA: Final = 256 << 10
"""Bytes of one option's data that are kept: room for thousands of meta context queries."""

_MAX_OUTPUT: Final = 256 << 10
"""Bytes of output at which no further option is answered before these were taken."""

_WILDCARDS: Final = ("base:", "qemu:", "qemu:dirty-bitmap:")
_FIXED_IDS: Final = {BASE_ALLOCATION: 0, ALLOCATION_DEPTH: 1}


class Exports(Protocol):
    """What the handshake asks of the server around it."""

    @property
    def stopping(self) -> bool:
        """Whether the server is shutting down (every option but ABORT is then refused)."""

    def find(self, name: str) -> Export | None:
        """The export of that name (undecodable bytes come as surrogate escapes)."""

    def listing(self) -> Iterable[Export]:
        """All exports, in the order in which LIST tells them."""

    def admit(self, export: Export) -> None:
        """Attach the client to ``export``. Raises OSError to refuse it."""


class Context(NamedTuple):
    """One negotiated meta context: the id that goes over the wire, and the name the export knows it by."""

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Session:
    """What a finished handshake settled: the export, the form of replies, the contexts that BLOCK_STATUS reports."""

    export: Export
    mode: ReplyMode
    contexts: tuple[Context, ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The client is attached to an export; the transmission phase begins with the next byte."""

    session: Session


@dataclass(frozen=True, slots=True)
class Aborted:
    """The client said NBD_OPT_ABORT; close once the output is sent."""


@dataclass(frozen=True, slots=True)
class Violation:
    """The client broke a rule that has no error reply; close. ``reason`` is for the log."""

    reason: str


@dataclass(frozen=True, slots=True)
class StartTls:
    """The client may start TLS: send the output, hand ``leftover`` to TLS, then call `ServerHandshake.secured`."""


Event = Chosen | Aborted | Violation | StartTls


class _OptionError(Exception):
    """An option is answered with an error; negotiation goes on."""

    def __init__(self, kind: OptionReply, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class _Fatal(Exception):
    """The client has to go."""


def transmission_flags(export: Export, mode: ReplyMode) -> TransmissionFlag:
    """The flags QEMU sends for an export of these abilities (proto.md, "Transmission flags")."""
    flag = TransmissionFlag
    flags = flag.HAS_FLAGS | flag.SEND_FLUSH | flag.SEND_FUA | flag.SEND_CACHE
    if export.read_only:
        flags |= flag.READ_ONLY
    else:
        flags |= flag.SEND_TRIM | flag.SEND_WRITE_ZEROES
        if export.can_fast_zero:
            flags |= flag.SEND_FAST_ZERO
    if export.can_multi_conn:
        flags |= flag.CAN_MULTI_CONN
    if mode >= ReplyMode.STRUCTURED:
        flags |= flag.SEND_DF
    if mode == ReplyMode.EXTENDED:
        flags |= flag.BLOCK_STATUS_PAYLOAD
    return flags


def context_ids(export: Export) -> list[Context]:
    """Every context of ``export`` with its id: 0 and 1 are QEMU's fixed ones, the rest count from 2."""
    contexts = []
    next_id = len(_FIXED_IDS)
    for name in export.contexts:
        fixed = _FIXED_IDS.get(name)
        if fixed is None:
            fixed, next_id = next_id, next_id + 1
        contexts.append(Context(fixed, name))
    return contexts


class _Reader:
    """Takes an option's data apart; every shortfall is QEMU's "Inconsistent lengths"."""

    def __init__(self, option: int, data: bytes) -> None:
        self._option = option
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise _OptionError(
                OptionReply.ERR_INVALID, f"Inconsistent lengths in option {spoken(Option, self._option)}"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def u16(self) -> int:
        return int(U16.unpack(self.take(2))[0])

    def u32(self) -> int:
        return int(U32.unpack(self.take(4))[0])

    def string(self, length: int) -> str:
        raw = self.take(length)
        if b"\0" in raw:
            raise _OptionError(
                OptionReply.ERR_INVALID, f"Unexpected embedded NUL in option {spoken(Option, self._option)}"
            )
        return raw.decode(errors="surrogateescape")

    def name(self) -> str:
        length = self.u32()
        if length > MAX_STRING:
            raise _OptionError(OptionReply.ERR_INVALID, f"Invalid name length: {length}")
        return self.string(length)

    def finish(self) -> None:
        if self._at != len(self._data):
            raise _unexpected_length(self._option)


def _unexpected_length(option: int) -> _OptionError:
    return _OptionError(OptionReply.ERR_INVALID, f"option '{spoken(Option, option)}' has unexpected length")


def _encode(name: str) -> bytes:
    return name.encode(errors="surrogateescape")


class ServerHandshake:
    """One client's negotiation, from the greeting to the choice of an export.

    ``leftover`` holds what arrived behind the end of the handshake. ``tls``: TLS is required.
    """

    def __init__(self, exports: Exports, *, tls: bool = False) -> None:
        self._exports = exports
        self._tls = tls
        self._secure = False
        self._output = bytearray(
            GREETING.pack(INIT_MAGIC, OPTION_MAGIC, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
        )
        self._pending = bytearray()
        self._step: Callable[[], bool] = self._read_flags
        self._events: list[Event] = []
        self._fixed = False
        self._no_zeroes = False
        self._option = 0
        self._length = 0
        self._skip_reply: _OptionError | None = None
        self._mode = ReplyMode.SIMPLE
        self._contexts: tuple[Context, ...] = ()
        self._contexts_of: Export | None = None
        self.leftover = b""

    def take_output(self) -> bytes:
        """Bytes to send, in order; empties the store."""
        output = bytes(self._output)
        self._output.clear()
        return output

    @property
    def held_up(self) -> bool:
        """Whether so much output waits that options already received are not looked at: take it, then ``receive(b"")``."""
        return len(self._output) >= _MAX_OUTPUT

    def receive(self, data: bytes | memoryview) -> list[Event]:
        """Go as far as ``data`` allows. Must not be called again after an event, unless `secured` said so."""
        self._pending += data
        while not self.held_up and self._step():
            pass
        events, self._events = self._events, []
        return events

    def secured(self) -> None:
        """TLS is up: go on with what comes through it."""
        self._secure = True
        self.leftover = b""
        self._step = self._read_option

    # The steps: each consumes from the front of `_pending` and says whether it got anywhere.

    def _done(self) -> bool:
        return False

    def _finish(self, event: Event) -> bool:
        self._events.append(event)
        self.leftover = bytes(self._pending)
        self._pending.clear()
        self._step = self._done
        return False

    def _consume(self, count: int) -> bytes:
        taken = bytes(self._pending[:count])
        del self._pending[:count]
        return taken

    def _read_flags(self) -> bool:
        if len(self._pending) < CLIENT_FLAGS.size:
            return False
        flags = CLIENT_FLAGS.unpack(self._consume(CLIENT_FLAGS.size))[0]
        unknown = flags & ~int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
        if unknown:
            return self._finish(Violation(f"Unknown client flags 0x{unknown:x} received"))
        self._fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        self._step = self._read_option
        return True

    def _read_option(self) -> bool:
        if len(self._pending) < OPTION.size:
            return False
        magic, self._option, self._length = OPTION.unpack(self._consume(OPTION.size))
        if magic != OPTION_MAGIC:
            return self._finish(Violation("Bad magic received"))
        if self._length > MAX_PAYLOAD:
            return self._finish(Violation(f"len ({self._length}) is larger than max len ({MAX_PAYLOAD}) of an option"))
        if not self._fixed and self._option != Option.EXPORT_NAME:
            return self._finish(Violation(f"Unsupported option {self._option} before fixed newstyle"))
        if self._tls and not self._secure and self._option == Option.EXPORT_NAME:
            return self._finish(Violation(f"Option 0x{self._option:x} not permitted before TLS"))
        if self._tls and not self._secure and self._option == Option.STARTTLS and self._length:
            self._reply_error(_unexpected_length(self._option))
            return self._finish(Violation("STARTTLS with data"))
        if self._option == Option.EXPORT_NAME and self._length > MAX_STRING:
            return self._finish(Violation("Bad length received"))
        self._skip_reply = self._refusal()
        self._step = self._read_data if self._skip_reply is None else self._skip_data
        return True

    def _refusal(self) -> _OptionError | None:
        """Why this option is refused whatever its data says, or None."""
        if self._option == Option.ABORT:
            return None
        if self._tls and not self._secure and self._option != Option.STARTTLS:
            return _OptionError(OptionReply.ERR_TLS_REQD, f"Option 0x{self._option:x} not permitted before TLS")
        if self._exports.stopping and self._option != Option.EXPORT_NAME:
            return _OptionError(OptionReply.ERR_SHUTDOWN, "server is shutting down")
        row = OPTIONS.get(self._option)
        if row is None:
            known = spoken(Option, self._option)
            return _OptionError(OptionReply.ERR_UNSUP, f"Unsupported option {self._option} ({known})")
        if self._length > row.max_data:
            if row.max_data == 0:
                return _unexpected_length(self._option)
            return _OptionError(
                OptionReply.ERR_TOO_BIG,
                f"option '{spoken(Option, self._option)}' has {self._length} bytes, more than {row.max_data}",
            )
        return None

    def _skip_data(self) -> bool:
        """Drop what has arrived of a refused option's data; answer when all of it has."""
        dropped = min(len(self._pending), self._length)
        del self._pending[:dropped]
        self._length -= dropped
        if self._length:
            return False
        assert self._skip_reply is not None
        self._reply_error(self._skip_reply)
        self._step = self._read_option
        return True

    def _read_data(self) -> bool:
        row = OPTIONS[self._option]
        wanted = min(self._length, row.max_data)  # less than sent only for ABORT, whose data nobody reads
        if len(self._pending) < wanted:
            return False
        data = self._consume(wanted)
        try:
            event = row.handler(self, _Reader(self._option, data), data)
        except _OptionError as refused:
            self._reply_error(refused)
            event = None
        except _Fatal as fatal:
            event = Violation(str(fatal))
        if event is not None:
            return self._finish(event)
        self._step = self._read_option
        return True

    # What the handlers use.

    def reply(self, kind: OptionReply, data: bytes = b"") -> None:
        """Send one reply to the option at hand."""
        self._output += option_reply(self._option, kind, data)

    def _reply_error(self, error: _OptionError) -> None:
        self.reply(error.kind, _encode(str(error))[:MAX_STRING])

    def _find(self, name: str) -> Export:
        export = self._exports.find(name)
        if export is None:
            shown = name if len(name) < 80 else name[:80] + "..."
            raise _OptionError(OptionReply.ERR_UNKNOWN, f"export '{shown}' not present")
        return export

    def _session(self, export: Export) -> Session:
        """Contexts only count for the export that they were negotiated for."""
        contexts = self._contexts if self._contexts_of is export else ()
        return Session(export, self._mode, contexts)

    # The handlers.

    def on_export_name(self, _reader: _Reader, data: bytes) -> Event | None:
        export = self._exports.find(data.decode(errors="surrogateescape"))
        if export is None or self._exports.stopping:
            raise _Fatal("export not found")
        try:
            self._exports.admit(export)
        except OSError as refused:
            raise _Fatal(f"export '{export.name}' refused the client: {refused}") from refused
        self._output += EXPORT_NAME_REPLY.pack(export.size, transmission_flags(export, self._mode))
        if not self._no_zeroes:
            self._output += EXPORT_NAME_PADDING
        return Chosen(self._session(export))

    def on_abort(self, _reader: _Reader, _data: bytes) -> Event | None:
        self.reply(OptionReply.ACK)
        return Aborted()

    def on_list(self, _reader: _Reader, _data: bytes) -> Event | None:
        for export in self._exports.listing():
            self.reply(OptionReply.SERVER, counted(_encode(export.name)) + _encode(export.description))
        self.reply(OptionReply.ACK)
        return None

    def on_starttls(self, _reader: _Reader, _data: bytes) -> Event | None:
        if not self._tls:
            raise _OptionError(OptionReply.ERR_POLICY, "TLS not configured")
        if self._secure:
            raise _OptionError(OptionReply.ERR_INVALID, "TLS already enabled")
        self.reply(OptionReply.ACK)
        return StartTls()

    def on_info(self, reader: _Reader, _data: bytes) -> Event | None:
        export, wanted = self._read_info_request(reader)
        self._send_info(export, wanted, min_block=export.min_block)
        if export.min_block > 1 and Info.BLOCK_SIZE not in wanted:
            raise _OptionError(OptionReply.ERR_BLOCK_SIZE_REQD, "request NBD_INFO_BLOCK_SIZE to use this export")
        self.reply(OptionReply.ACK)
        return None

    def on_go(self, reader: _Reader, _data: bytes) -> Event | None:
        export, wanted = self._read_info_request(reader)
        try:
            self._exports.admit(export)
        except OSError as refused:
            raise _OptionError(OptionReply.ERR_POLICY, refused.strerror or str(refused)) from refused
        # A client that did not ask about block sizes may not know them: it is promised that any will do.
        self._send_info(export, wanted, min_block=export.min_block if Info.BLOCK_SIZE in wanted else 1)
        self.reply(OptionReply.ACK)
        return Chosen(self._session(export))

    def _read_info_request(self, reader: _Reader) -> tuple[Export, set[int]]:
        name = reader.name()
        wanted = {reader.u16() for _ in range(reader.u16())}
        reader.finish()
        return self._find(name), wanted

    def _send_info(self, export: Export, wanted: set[int], *, min_block: int) -> None:
        if Info.NAME in wanted:
            self.reply(OptionReply.INFO, U16.pack(Info.NAME) + _encode(export.name))
        if export.description:
            self.reply(OptionReply.INFO, U16.pack(Info.DESCRIPTION) + _encode(export.description))
        preferred = max(export.preferred_block, min_block)
        maximum = min(export.max_payload, MAX_PAYLOAD)
        self.reply(OptionReply.INFO, INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, min_block, preferred, maximum))
        flags = transmission_flags(export, self._mode)
        self.reply(OptionReply.INFO, INFO_EXPORT.pack(Info.EXPORT, export.size, flags))

    def on_structured_reply(self, _reader: _Reader, _data: bytes) -> Event | None:
        if self._mode == ReplyMode.EXTENDED:
            raise _OptionError(OptionReply.ERR_EXT_HEADER_REQD, "extended headers already negotiated")
        if self._mode == ReplyMode.STRUCTURED:
            raise _OptionError(OptionReply.ERR_INVALID, "structured reply already negotiated")
        self._mode = ReplyMode.STRUCTURED
        self.reply(OptionReply.ACK)
        return None

    def on_extended_headers(self, _reader: _Reader, _data: bytes) -> Event | None:
        if self._mode == ReplyMode.EXTENDED:
            raise _OptionError(OptionReply.ERR_INVALID, "extended headers already negotiated")
        self._mode = ReplyMode.EXTENDED
        self.reply(OptionReply.ACK)
        return None

    def on_list_meta_context(self, reader: _Reader, _data: bytes) -> Event | None:
        export, queries = self._read_queries(reader)
        for context in context_ids(export):
            if not queries or any(_lists(query, context.name) for query in queries):
                # proto.md: the id is reserved here and should be zero.
                self.reply(OptionReply.META_CONTEXT, U32.pack(0) + _encode(context.name))
        self.reply(OptionReply.ACK)
        return None

    def on_set_meta_context(self, reader: _Reader, _data: bytes) -> Event | None:
        self._contexts, self._contexts_of = (), None  # replaced even by a request that fails
        if self._mode == ReplyMode.SIMPLE:
            name = spoken(Option, self._option)
            raise _OptionError(
                OptionReply.ERR_INVALID,
                f"request option '{name}' when structured reply is not negotiated",
            )
        export, queries = self._read_queries(reader)
        self._contexts = tuple(context for context in context_ids(export) if context.name in queries)
        self._contexts_of = export
        for context in self._contexts:
            self.reply(OptionReply.META_CONTEXT, U32.pack(context.id) + _encode(context.name))
        self.reply(OptionReply.ACK)
        return None

    def _read_queries(self, reader: _Reader) -> tuple[Export, set[str]]:
        export = self._find(reader.name())
        queries = {reader.string(reader.u32()) for _ in range(reader.u32())}
        reader.finish()
        return export, queries


def _lists(query: str, name: str) -> bool:
    """Whether NBD_OPT_LIST_META_CONTEXT's ``query`` names context ``name`` or its whole namespace."""
    return query == name or (query in _WILDCARDS and name.startswith(query))


class _Row(NamedTuple):
    handler: Callable[[ServerHandshake, _Reader, bytes], Event | None]
    max_data: int


OPTIONS: Final[dict[int, _Row]] = {
    Option.EXPORT_NAME: _Row(ServerHandshake.on_export_name, MAX_STRING),
    Option.ABORT: _Row(ServerHandshake.on_abort, 0),
    Option.LIST: _Row(ServerHandshake.on_list, 0),
    Option.STARTTLS: _Row(ServerHandshake.on_starttls, 0),
    Option.INFO: _Row(ServerHandshake.on_info, MAX_OPTION_DATA),
    Option.GO: _Row(ServerHandshake.on_go, MAX_OPTION_DATA),
    Option.STRUCTURED_REPLY: _Row(ServerHandshake.on_structured_reply, 0),
    Option.LIST_META_CONTEXT: _Row(ServerHandshake.on_list_meta_context, MAX_OPTION_DATA),
    Option.SET_META_CONTEXT: _Row(ServerHandshake.on_set_meta_context, MAX_OPTION_DATA),
    Option.EXTENDED_HEADERS: _Row(ServerHandshake.on_extended_headers, 0),
}
