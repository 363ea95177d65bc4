"""The server's negotiation core. Every exchange is replayed whole, byte by byte, and with bytes behind its end."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import raw_nbd as raw
from kit.memory_export import MemoryExport
from kit.raw_nbd import go, meta, opt
from livedisk.nbd.constants import OptionReply, ReplyMode
from livedisk.nbd.export import Export
from livedisk.nbd.handshake import (
    MAX_OPTION_DATA,
    OPTIONS,
    Aborted,
    Chosen,
    Event,
    ServerHandshake,
    Violation,
)

FIXED = struct.pack(">I", 3)


class Directory:
    """The exports of a server that is not there."""

    def __init__(self, *exports: MemoryExport) -> None:
        self.exports = {export.name: export for export in exports}
        self.stopping = False

    def find(self, name: str) -> Export | None:
        return self.exports.get(name)

    def listing(self) -> Iterable[Export]:
        return list(self.exports.values())

    def admit(self, export: Export) -> None:
        export.client_connected(self)


def directory() -> Directory:
    return Directory(
        MemoryExport(1 << 20, description="hello", contexts=("base:allocation",)),
        MemoryExport(4096, "ro", read_only=True),
        MemoryExport(8192, "big", min_block=512),
        MemoryExport(
            4096,
            "marked",
            contexts=("base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"),
            can_fast_zero=False,
        ),
    )


def play(data: bytes, exports: Directory | None = None) -> tuple[bytes, Event | None, bytes]:
    """Output behind the greeting, final event, leftover -- the same however ``data`` is cut."""

    def feed(pieces: list[bytes]) -> tuple[bytes, Event | None, bytes]:
        handshake = ServerHandshake(exports or directory())
        events: list[Event] = []
        output = handshake.take_output()
        for index, piece in enumerate(pieces):
            events += handshake.receive(piece)
            while handshake.held_up:
                output += handshake.take_output()
                events += handshake.receive(b"")
            output += handshake.take_output()
            if events:
                rest = b"".join(pieces[index + 1 :])
                return output, events[0], handshake.leftover + rest
        assert len(events) <= 1
        return output, events[0] if events else None, b""

    whole = feed([data])
    bytewise = feed([data[i : i + 1] for i in range(len(data))])
    trailing = feed([data + b"and more"])
    assert summary(bytewise) == summary(whole)
    if whole[1] is not None:
        assert summary(trailing)[:2] == summary(whole)[:2]
        if isinstance(whole[1], Chosen):
            assert (bytewise[2], trailing[2]) == (whole[2], whole[2] + b"and more")
    assert whole[0].startswith(raw.GREETING)
    return whole[0][18:], whole[1], whole[2]


def summary(result: tuple[bytes, Event | None, bytes]) -> tuple[bytes, object]:
    output, event, _ = result
    if isinstance(event, Chosen):
        return output, (event.session.export.name, event.session.mode, event.session.contexts)
    return output, event


def answers(*options: bytes, exports: Directory | None = None) -> list[tuple[int, int, bytes]]:
    output, _, _ = play(FIXED + b"".join(options), exports)
    return raw.option_replies(output)


def error(option: bytes, exports: Directory | None = None) -> tuple[int, str]:
    """The single error reply to one option, which must leave the negotiation usable."""
    replies = answers(option, opt(raw.LIST), exports=exports)
    assert replies[-1] in ((raw.LIST, raw.ACK, b""), (raw.LIST, OptionReply.ERR_SHUTDOWN, b"server is shutting down"))
    return replies[0][1], replies[0][2].decode(errors="surrogateescape")


@pytest.mark.parametrize("flags", [0x4, 0x7, 0x80000000, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_session(flags: int) -> None:
    output, event, _ = play(struct.pack(">I", flags) + opt(raw.LIST))
    assert output == b""
    assert isinstance(event, Violation)


@pytest.mark.parametrize(("flags", "padding"), [(3, 0), (2, 0), (1, 124), (0, 124)])
def test_export_name_with_and_without_zeroes(flags: int, padding: int) -> None:
    output, event, _ = play(struct.pack(">I", flags) + opt(raw.EXPORT_NAME, b"ro"))
    assert output == struct.pack(">QH", 4096, 0x50F) + bytes(padding)
    assert isinstance(event, Chosen)
    assert event.session.mode == ReplyMode.SIMPLE


@pytest.mark.parametrize("name", [b"nope", b"x" * 4096, b"x" * 4097, b"\xff"])
def test_export_name_without_such_export_ends_the_session(name: bytes) -> None:
    output, event, _ = play(FIXED + opt(raw.EXPORT_NAME, name))
    assert (output, type(event)) == (b"", Violation)


@pytest.mark.parametrize("flags", [0, 2])
def test_only_export_name_before_fixed_newstyle(flags: int) -> None:
    output, event, _ = play(struct.pack(">I", flags) + go())
    assert (output, type(event)) == (b"", Violation)


def test_list_names_and_descriptions_in_order() -> None:
    replies = answers(opt(raw.LIST))
    assert [data for _, kind, data in replies if kind == OptionReply.SERVER] == [
        b"\0\0\0\0hello",
        b"\0\0\0\x02ro",
        b"\0\0\0\x03big",
        b"\0\0\0\x06marked",
    ]
    assert replies[-1] == (raw.LIST, raw.ACK, b"")


@pytest.mark.parametrize(
    ("option", "name"), [(3, "list"), (5, "starttls"), (8, "structured reply"), (11, "extended headers")]
)
def test_options_that_carry_nothing_refuse_data(option: int, name: str) -> None:
    assert error(opt(option, b"data")) == (OptionReply.ERR_INVALID, f"option '{name}' has unexpected length")


def test_abort_is_acknowledged_whatever_it_carries() -> None:
    for option in (opt(raw.ABORT), opt(raw.ABORT, b"data"), opt(raw.ABORT, length=1 << 20)):
        output, event, _ = play(FIXED + option)
        assert raw.option_replies(output) == [(raw.ABORT, raw.ACK, b"")]
        assert isinstance(event, Aborted)


def test_starttls_is_refused_by_policy() -> None:
    assert error(opt(raw.STARTTLS)) == (OptionReply.ERR_POLICY, "TLS not configured")


@pytest.mark.parametrize("number", [0, 4, 12, 99, 0xFFFFFFFF])
@pytest.mark.parametrize("size", [0, 5, 70000])
def test_unknown_options_are_skipped_with_their_data(number: int, size: int) -> None:
    assert number not in OPTIONS
    assert error(opt(number, b"x" * size)) == (OptionReply.ERR_UNSUP, f"Unsupported option {number} (<unknown>)")


def test_data_of_refused_options_is_not_kept() -> None:
    handshake = ServerHandshake(directory())
    handshake.receive(FIXED + opt(77, length=32 << 20))
    for _ in range(31):
        handshake.receive(bytes(1 << 20))
        assert len(handshake._pending) == 0  # the point of the test is what is held
    assert raw.option_replies(handshake.take_output()[18:]) == []
    handshake.receive(bytes(1 << 20))
    assert raw.option_replies(handshake.take_output())[0][1] == OptionReply.ERR_UNSUP


def test_options_without_end_do_not_pile_up_replies() -> None:
    handshake = ServerHandshake(Directory(MemoryExport(512, "x" * 4000)))
    handshake.receive(FIXED + opt(raw.LIST) * 4000)
    total = 0
    while handshake.held_up:
        output = handshake.take_output()
        assert len(output) < (256 << 10) + 5000
        total += len(output)
        handshake.receive(b"")
    assert total + len(handshake.take_output()) == 18 + 4000 * (20 + 4 + 4000 + 20)


def test_known_option_with_too_much_data_is_refused_and_skipped() -> None:
    kind, text = error(opt(raw.GO, bytes(MAX_OPTION_DATA + 1)))
    assert kind == OptionReply.ERR_TOO_BIG
    assert str(MAX_OPTION_DATA) in text


@pytest.mark.parametrize("length", [(32 << 20) + 1, 0xFFFFFFFF])
def test_option_longer_than_anything_sensible_ends_the_session(length: int) -> None:
    _, event, _ = play(FIXED + opt(3, length=length))
    assert isinstance(event, Violation)


def test_bad_option_magic_ends_the_session() -> None:
    _, event, _ = play(FIXED + b"IHAVEOPX" + bytes(8))
    assert isinstance(event, Violation)


BLOCK = b"\0\3" + struct.pack(">III", 1, 4096, 32 << 20)


def test_info_says_name_only_when_asked_and_description_always() -> None:
    assert answers(go(number=raw.INFO)) == [
        (raw.INFO, 3, b"\0\2hello"),
        (raw.INFO, 3, BLOCK),
        (raw.INFO, 3, b"\0\0" + struct.pack(">QH", 1 << 20, 0xD6D)),
        (raw.INFO, 1, b""),
    ]
    assert answers(go(b"ro", 1, 2, 3, 4, 99, number=raw.INFO))[0] == (raw.INFO, 3, b"\0\1ro")


def test_info_of_export_with_large_blocks_wants_to_be_asked_for_them() -> None:
    replies = answers(go(b"big", number=raw.INFO))
    assert replies[-1] == (
        raw.INFO,
        OptionReply.ERR_BLOCK_SIZE_REQD,
        b"request NBD_INFO_BLOCK_SIZE to use this export",
    )
    assert replies[0][2] == b"\0\3" + struct.pack(">III", 512, 4096, 32 << 20)
    assert answers(go(b"big", 3, number=raw.INFO))[-1][1] == raw.ACK
    # A client that goes without asking is promised that it need not know.
    assert answers(go(b"big"))[0][2] == BLOCK


@pytest.mark.parametrize(
    ("mode", "flags"), [([], 0xD6D), ([opt(raw.STRUCTURED)], 0xDED), ([opt(raw.EXTENDED)], 0x1DED)]
)
def test_flags_follow_what_was_negotiated(mode: list[bytes], flags: int) -> None:
    assert struct.pack(">H", flags) == answers(*mode, go(number=raw.INFO))[-2][2][-2:]
    assert struct.pack(">H", flags & ~0x800) == answers(*mode, go(b"marked", number=raw.INFO))[-2][2][-2:]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "Inconsistent lengths in option go"),
        (b"\0\0", "Inconsistent lengths in option go"),
        (b"\0\0\0\5abc", "Inconsistent lengths in option go"),
        (b"\0\0\0\0", "Inconsistent lengths in option go"),
        (b"\0\0\0\0\0\1", "Inconsistent lengths in option go"),
        (b"\0\0\0\0\0\1\0\1\0", "option 'go' has unexpected length"),
        (b"\0\0\0\3a\0b\0\0", "Unexpected embedded NUL in option go"),
        (b"\0\0\x13\x88" + b"n" * 5000 + b"\0\0", "Invalid name length: 5000"),
    ],
)
def test_malformed_go(data: bytes, text: str) -> None:
    assert error(opt(raw.GO, data)) == (OptionReply.ERR_INVALID, text)


@pytest.mark.parametrize(
    ("name", "shown"), [("nope", "nope"), ("n" * 100, "n" * 80 + "..."), ("\udcff", "\udcff"), ("ä", "ä")]
)
def test_go_to_nowhere(name: str, shown: str) -> None:
    kind, text = error(go(name.encode(errors="surrogateescape")))
    assert (kind, text) == (OptionReply.ERR_UNKNOWN, f"export '{shown}' not present")


def test_export_may_refuse_a_client() -> None:
    exports = directory()
    exports.exports["ro"].refuse = OSError(errno.EBUSY, "locked by a job")
    assert error(go(b"ro"), exports) == (OptionReply.ERR_POLICY, "locked by a job")
    _, event, _ = play(FIXED + opt(raw.EXPORT_NAME, b"ro"), exports)
    assert isinstance(event, Violation)


def test_structured_replies_and_extended_headers_each_once() -> None:
    assert [r[1:] for r in answers(opt(8), opt(8))] == [
        (1, b""),
        (OptionReply.ERR_INVALID, b"structured reply already negotiated"),
    ]
    assert [r[1:] for r in answers(opt(11), opt(11), opt(8))] == [
        (1, b""),
        (OptionReply.ERR_INVALID, b"extended headers already negotiated"),
        (OptionReply.ERR_EXT_HEADER_REQD, b"extended headers already negotiated"),
    ]
    assert [r[1] for r in answers(opt(8), opt(11), opt(8))] == [1, 1, OptionReply.ERR_EXT_HEADER_REQD]


def contexts(*options: bytes) -> list[tuple[int, str]]:
    """Ids and names in the replies to the last option."""
    return [
        (struct.unpack(">I", data[:4])[0], data[4:].decode())
        for _, kind, data in answers(*options)
        if kind == OptionReply.META_CONTEXT
    ]


@pytest.mark.parametrize(
    ("queries", "listed"),
    [
        ((), ["base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"]),
        ((b"",), []),
        ((b"base:",), ["base:allocation"]),
        ((b"base:allocation",), ["base:allocation"]),
        ((b"base:alloc",), []),
        ((b"base",), []),
        ((b"qemu:",), ["qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"]),
        ((b"qemu:dirty-bitmap:",), ["qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"]),
        ((b"qemu:dirty-bitmap:b",), ["qemu:dirty-bitmap:b"]),
        ((b"qemu:", b"base:", b"base:allocation"), ["base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"]),
        ((b"x" * 5000, b"other:"), []),
    ],
)
def test_listing_contexts_knows_wildcards(queries: tuple[bytes, ...], listed: list[str]) -> None:
    # Allowed before structured replies, as QEMU 10 allows it; ids are zero.
    assert contexts(meta(raw.LIST_META, b"marked", *queries)) == [(0, name) for name in listed]


def test_setting_contexts_takes_exact_names_and_gives_stable_ids() -> None:
    structured = opt(raw.STRUCTURED)
    assert contexts(structured, meta(raw.SET_META, b"marked", b"base:", b"qemu:", b"qemu:dirty-bitmap:")) == []
    everything = (b"qemu:dirty-bitmap:b", b"base:allocation", b"base:allocation")
    assert contexts(structured, meta(raw.SET_META, b"marked", *everything)) == [
        (0, "base:allocation"),
        (3, "qemu:dirty-bitmap:b"),
    ]
    assert contexts(structured, meta(raw.SET_META, b"ro", b"qemu:allocation-depth")) == [(1, "qemu:allocation-depth")]


def test_setting_contexts_needs_structured_replies() -> None:
    assert error(meta(raw.SET_META, b"", b"base:allocation")) == (
        OptionReply.ERR_INVALID,
        "request option 'set meta context' when structured reply is not negotiated",
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "Inconsistent lengths in option list meta context"),
        (b"\0\0\0\0", "Inconsistent lengths in option list meta context"),
        (b"\0\0\0\0\0\0\0\5", "Inconsistent lengths in option list meta context"),
        (b"\0\0\0\0\0\0\0\1\0\0\0\5ab", "Inconsistent lengths in option list meta context"),
        (b"\0\0\0\0\xff\xff\xff\xff\0\0\0\0", "Inconsistent lengths in option list meta context"),
        (b"\0\0\0\0\0\0\0\0zz", "option 'list meta context' has unexpected length"),
        (b"\0\0\0\0\0\0\0\1\0\0\0\3a\0b", "Unexpected embedded NUL in option list meta context"),
        (b"\0\0\x13\x88" + b"n" * 5000, "Invalid name length: 5000"),
    ],
)
def test_malformed_context_queries(data: bytes, text: str) -> None:
    assert error(opt(raw.LIST_META, data)) == (OptionReply.ERR_INVALID, text)


def chosen(*options: bytes) -> tuple[str, ...]:
    """Names of the contexts that the session ends up with."""
    _, event, _ = play(FIXED + opt(raw.STRUCTURED) + b"".join(options))
    assert isinstance(event, Chosen)
    return tuple(context.name for context in event.session.contexts)


def test_contexts_hold_for_their_export_and_until_the_next_request() -> None:
    depth = meta(raw.SET_META, b"ro", b"qemu:allocation-depth")
    assert chosen(depth, go(b"ro")) == ("qemu:allocation-depth",)
    assert chosen(depth, opt(raw.EXPORT_NAME, b"ro")) == ("qemu:allocation-depth",)
    assert chosen(depth, go(b"", number=raw.INFO), opt(raw.EXTENDED), go(b"ro")) == ("qemu:allocation-depth",)
    assert chosen(depth, go(b"")) == ()
    assert chosen(depth, meta(raw.SET_META, b"nope", b"base:allocation"), go(b"ro")) == ()
    assert chosen(depth, opt(raw.SET_META, b"\0"), go(b"ro")) == ()


def test_server_that_stops_refuses_all_but_abort() -> None:
    exports = directory()
    exports.stopping = True
    for option in (opt(raw.LIST), go(), go(number=raw.INFO), opt(raw.STRUCTURED)):
        assert error(option, exports) == (OptionReply.ERR_SHUTDOWN, "server is shutting down")
    assert isinstance(play(FIXED + opt(raw.ABORT), exports)[1], Aborted)
    assert isinstance(play(FIXED + opt(raw.EXPORT_NAME, b"ro"), exports)[1], Violation)


fragments = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([opt(3), opt(8), opt(11), go(b"ro"), go(b"big", 3), meta(10, b"ro", b"base:allocation"), opt(2)]),
    st.builds(
        lambda number, data, lie: opt(number, data, length=max(0, len(data) + lie)),
        st.integers(0, 12),
        st.binary(max_size=30),
        st.integers(-3, 3),
    ),
)


@given(st.lists(fragments, max_size=8).map(b"".join), st.lists(st.integers(0, 200), max_size=6))
def test_any_input_is_answered_the_same_however_it_is_cut(data: bytes, cuts: list[int]) -> None:
    output, event, _ = play(FIXED + data)
    if not isinstance(event, Chosen):
        raw.option_replies(output)  # well-formed
    handshake = ServerHandshake(directory())
    stream, pieces, at = FIXED + data, [], 0
    for cut in sorted(cuts):
        pieces.append(stream[at : max(at, cut)])
        at = max(at, cut)
    pieces.append(stream[at:])
    events: list[Event] = []
    for piece in pieces:
        if not events:
            events += handshake.receive(piece)
    assert handshake.take_output()[18:] == output
    assert [type(e) for e in events] == ([type(event)] if event else [])
