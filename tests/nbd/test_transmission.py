"""Requests taken apart and judged, replies built, and the fast loop held against a bytearray -- all without sockets."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import raw_nbd as raw
from kit.memory_export import MemoryExport
from livedisk.nbd.buffers import BUFFER_SIZE
from livedisk.nbd.constants import CommandFlag, ErrorCode, ReplyMode
from livedisk.nbd.export import Extent
from livedisk.nbd.fastpath import DECLINED, FULL, MORE, SLOW, fast_loop
from livedisk.nbd.handshake import Context, Session, context_ids
from livedisk.nbd.messages import wire_error
from livedisk.nbd.slowpath import answer
from livedisk.nbd.transmission import BadFrame, Framing, Replies, Request, judge, status_filter

SIZE = 1 << 20
MODES = list(ReplyMode)


def session(mode: ReplyMode = ReplyMode.STRUCTURED, *, contexts: bool = True, **options: Any) -> Session:
    export = MemoryExport(SIZE, **options)
    return Session(export, mode, tuple(context_ids(export)) if contexts else ())


def ruling(over: Session, command: int, offset: int = 0, length: int = 512, flags: int = 0) -> tuple[int, str] | None:
    refusal = judge(over, Request(flags, command, 7, offset, length))
    return None if refusal is None else (int(refusal.error), refusal.text)


# Which flags each command takes, by mode: the whole matrix is walked.
ALLOWED = {
    raw.READ: (raw.FUA, raw.FUA | raw.DF, raw.FUA | raw.DF),
    raw.WRITE: (raw.FUA, raw.FUA, raw.FUA | raw.PAYLOAD),
    raw.FLUSH: (raw.FUA,) * 3,
    raw.TRIM: (raw.FUA,) * 3,
    raw.CACHE: (raw.FUA,) * 3,
    raw.ZEROES: (raw.FUA | raw.NO_HOLE | raw.FAST,) * 3,
    raw.STATUS: (raw.FUA | raw.REQ_ONE, raw.FUA | raw.REQ_ONE, raw.FUA | raw.REQ_ONE | raw.PAYLOAD),
}
WORDS = {1: "write", 0: "read", 3: "flush", 4: "trim", 5: "cache", 6: "write zeroes", 7: "block status"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("command", ALLOWED)
def test_each_command_takes_its_flags_and_no_other(mode: ReplyMode, command: int) -> None:
    over = session(mode)
    for bit in range(16):
        flags = 1 << bit
        if ALLOWED[command][mode] & flags:
            assert ruling(over, command, flags=flags) is None
        else:
            expected = (errno.EINVAL, f"unsupported flags for command {WORDS[command]} (got 0x{flags:x})")
            assert ruling(over, command, flags=flags) == expected


def test_fast_zero_needs_an_export_that_can() -> None:
    over = session(can_fast_zero=False)
    assert ruling(over, raw.ZEROES, flags=raw.NO_HOLE) is None
    assert ruling(over, raw.ZEROES, flags=raw.FAST) == (
        errno.EINVAL,
        "unsupported flags for command write zeroes (got 0x10)",
    )


@pytest.mark.parametrize("command", [8, 42, 0xFFFF])
def test_unknown_commands(command: int) -> None:
    assert ruling(session(), command) == (errno.EINVAL, f"invalid request type ({command}) received")
    assert ruling(session(), command, flags=raw.PAYLOAD) == (
        errno.EINVAL,
        "unsupported flags for command <unknown> (got 0x20)",
    )


@pytest.mark.parametrize("command", ALLOWED)
@pytest.mark.parametrize(("offset", "length"), [(SIZE - 512, 1024), (SIZE, 1), (SIZE + 5, 512), (2**64 - 1, 512)])
def test_beyond_the_end(command: int, offset: int, length: int) -> None:
    error = errno.ENOSPC if command in (raw.WRITE, raw.ZEROES) else errno.EINVAL
    text = f"operation past EOF; From: {offset}, Len: {length}, Size: {SIZE}"
    assert ruling(session(), command, offset, length) == (error, text)


@pytest.mark.parametrize("command", ALLOWED)
def test_up_to_the_very_end(command: int) -> None:
    assert ruling(session(), command, SIZE - 512, 512) is None


@pytest.mark.parametrize("command", ALLOWED)
def test_read_only_exports_refuse_what_writes(command: int) -> None:
    refused = command in (raw.WRITE, raw.TRIM, raw.ZEROES)
    expected = (errno.EPERM, "Export is read-only") if refused else None
    assert ruling(session(read_only=True), command) == expected


@pytest.mark.parametrize("command", ALLOWED)
def test_payload_limit(command: int) -> None:
    bounded = command in (raw.READ, raw.WRITE, raw.CACHE)
    expected = (errno.EINVAL, "len (8192) is larger than max len (4096)") if bounded else None
    assert ruling(session(max_payload=4096), command, 0, 8192) == expected


def test_block_status_needs_contexts_and_a_length() -> None:
    assert ruling(session(contexts=False), raw.STATUS) == (errno.EINVAL, "CMD_BLOCK_STATUS not negotiated")
    assert ruling(session(), raw.STATUS, length=0) == (errno.EINVAL, "need non-zero length")


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EPERM, ErrorCode.EPERM),
        (errno.EROFS, ErrorCode.EPERM),
        (errno.EIO, ErrorCode.EIO),
        (errno.EDQUOT, ErrorCode.ENOSPC),
        (errno.EFBIG, ErrorCode.ENOSPC),
        (errno.ENOTSUP, ErrorCode.ENOTSUP),
        (errno.ESHUTDOWN, ErrorCode.ESHUTDOWN),
        (errno.ENOLINK, ErrorCode.EIO),
        (None, ErrorCode.EIO),
    ],
)
def test_every_errno_has_an_error_on_the_wire(number: int | None, error: ErrorCode) -> None:
    assert wire_error(number) == error


@pytest.mark.parametrize("extended", [False, True])
def test_framing_reads_its_own_form_and_ends_on_any_other(extended: bool) -> None:
    framing = Framing(ReplyMode.EXTENDED if extended else ReplyMode.STRUCTURED)
    data = b"junk" + raw.request(raw.WRITE, 3, 5, raw.FUA, cookie=2**64 - 1, extended=extended)
    request = framing.parse(data, 4)
    assert request == (raw.FUA, raw.WRITE, 2**64 - 1, 3, 5)
    assert request.payload == 5
    with pytest.raises(BadFrame, match="invalid magic"):
        framing.parse(raw.request(raw.READ, extended=extended, magic=0x25609514), 0)
    with pytest.raises(BadFrame, match="larger than max len"):
        framing.parse(raw.request(raw.WRITE, length=(32 << 20) + 1, extended=extended), 0)


def test_payloads_outside_write_exist_only_in_extended_headers() -> None:
    header = {"flags": raw.PAYLOAD, "length": 12}
    assert Framing(ReplyMode.STRUCTURED).parse(raw.request(raw.STATUS, **header), 0).payload == 0
    assert Framing(ReplyMode.EXTENDED).parse(raw.request(raw.STATUS, **header, extended=True), 0).payload == 12


def payload(length: int, *ids: int) -> bytes:
    return length.to_bytes(8, "big") + b"".join(i.to_bytes(4, "big") for i in ids)


def test_status_filter_takes_negotiated_ids_once() -> None:
    over = Session(MemoryExport(SIZE), ReplyMode.EXTENDED, (Context(0, "base:allocation"), Context(3, "x:y")))
    assert status_filter(over, payload(5, 3)) == (5, [3])
    assert status_filter(over, payload(2**40, 3, 0)) == (2**40, [3, 0])
    for bad in (b"", b"abc", payload(5), payload(5, 1), payload(5, 0, 0), payload(5, 0, 3, 0), payload(5, 0) + b"x"):
        assert status_filter(over, bad) is None


def respond(
    over: Session, command: int, offset: int = 0, length: int = 512, flags: int = 0, data: bytes = b""
) -> bytes:
    request = Request(flags, command, 7, offset, length)
    reply = asyncio.run(answer(over, Replies(over.mode), request, memoryview(data)))
    return b"".join(reply)


def test_structured_read_splits_data_and_holes() -> None:
    over = session()
    over.export.fill(4096, b"x" * 4096)  # type: ignore[attr-defined]
    reply = respond(over, raw.READ, 0, 12288)
    kinds = []
    while reply:
        length = int.from_bytes(reply[16:20], "big")
        kinds.append((reply[5], reply[7], int.from_bytes(reply[20:28], "big"), length))
        reply = reply[20 + length :]
    assert kinds == [(0, 2, 0, 12), (0, 1, 4096, 4104), (1, 2, 8192, 12)]


def test_dont_fragment_sends_one_chunk() -> None:
    over = session()
    over.export.fill(4096, b"x" * 4096)  # type: ignore[attr-defined]
    reply = respond(over, raw.READ, 0, 12288, raw.DF)
    assert (reply[5], reply[7], len(reply)) == (1, 1, 28 + 12288)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("command", [raw.READ, raw.WRITE, raw.TRIM, raw.ZEROES, raw.CACHE])
def test_requests_of_nothing_succeed_without_asking_the_export(mode: ReplyMode, command: int) -> None:
    over = session(mode)
    assert len(respond(over, command, length=0)) == {0: 16, 1: 20 if command == raw.READ else 16, 2: 32}[mode]
    assert over.export.log == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "flags", "logged"),
    [
        (raw.WRITE, 0, "write"),
        (raw.WRITE, raw.FUA, "write fua"),
        (raw.FLUSH, 0, "flush"),
        (raw.TRIM, 0, "trim"),
        (raw.TRIM, raw.FUA, "trim fua"),
        (raw.CACHE, raw.FUA, "cache"),
        (raw.ZEROES, 0, "write_zeroes"),
        (raw.ZEROES, raw.FUA | raw.NO_HOLE, "write_zeroes fua no_hole"),
        (raw.ZEROES, raw.FAST, "write_zeroes fast"),
    ],
)
def test_flags_reach_the_export(command: int, flags: int, logged: str) -> None:
    over = session()
    respond(over, command, 4096, 4096, flags, bytes(4096))
    assert [entry[0] for entry in over.export.log] == [logged]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("raised", "error"),
    [(OSError(errno.ENOSPC, "full"), errno.ENOSPC), (OSError("odd"), errno.EIO), (ZeroDivisionError(), errno.EIO)],
)
def test_failures_of_the_export_become_error_replies(
    raised: Exception, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    over = session()

    async def fail(*_: object) -> None:
        raise raised

    over.export.hook = fail  # type: ignore[attr-defined]
    for command, text in [(raw.WRITE, b"writing to file failed"), (raw.READ, b"reading from file failed")]:
        reply = respond(over, command, data=bytes(512))
        assert int.from_bytes(reply[20:24], "big") == error
        assert text in reply
    # What is nobody's error but ours leaves its traceback in the log.
    assert ("Traceback" in caplog.text) == isinstance(raised, ZeroDivisionError)


def test_extents_are_limited_to_one_where_asked() -> None:
    over = session(ReplyMode.EXTENDED)
    over.export.fill(0, b"x" * 4096)  # type: ignore[attr-defined]
    assert len(respond(over, raw.STATUS, 0, SIZE, raw.REQ_ONE)) == 2 * (32 + 8 + 16)
    assert len(respond(over, raw.STATUS, 0, SIZE)) == 2 * (32 + 8 + 32)
    chosen = respond(over, raw.STATUS, 0, 12, raw.PAYLOAD, payload(SIZE, 1))
    assert (len(chosen), chosen[32:36]) == (32 + 8 + 32, b"\0\0\0\1")


def test_long_texts_are_cut() -> None:
    from livedisk.nbd.transmission import Refusal

    reply = Replies(ReplyMode.STRUCTURED).failure(Request(0, 0, 1, 0, 0), Refusal(ErrorCode.EIO, "x" * 5000))
    assert len(reply) == 20 + 6 + 4096


# The fast loop.


def run_fast(
    over: Session, data: bytes, *, limit: int = 1 << 16, room: int = BUFFER_SIZE, cuts: tuple[int, ...] = ()
) -> tuple[bytes, bytes, int]:
    """Feed ``data`` cut at ``cuts``; all replies, what was not consumed, and why the last call stopped."""
    loop = fast_loop(over)
    replies, sent, kept, why = memoryview(bytearray(room)), b"", b"", MORE
    for start, stop in zip((0, *cuts), (*cuts, len(data)), strict=True):
        kept += data[start:stop]
        while True:
            at, filled, why = loop(memoryview(kept), 0, len(kept), replies, 0, limit, over.export.size)
            sent += replies[:filled]
            kept = kept[at:]
            if why != FULL:
                break
    return sent, kept, why


operation = st.tuples(
    st.booleans(), st.integers(0, SIZE - 1), st.integers(1, 9000), st.integers(0, 2**64 - 1), st.integers(0, 255)
)


@given(st.sampled_from(MODES), st.lists(operation, max_size=12), st.lists(st.integers(0, 60000), max_size=5), st.data())
def test_fast_loop_against_a_bytearray(
    mode: ReplyMode, operations: list[tuple[bool, int, int, int, int]], cuts: list[int], data: st.DataObject
) -> None:
    over, extended = session(mode), mode == ReplyMode.EXTENDED
    model, stream, expected = bytearray(SIZE), b"", []
    for write, offset, wanted, cookie, byte in operations:
        length = min(wanted, SIZE - offset)
        flags = raw.PAYLOAD if write and extended else 0
        content = bytes([byte]) * length if write else b""
        stream += raw.request(int(write), offset, length, flags, cookie=cookie, payload=content, extended=extended)
        if write:
            model[offset : offset + length] = content
        expected.append((write, offset, length, cookie, bytes(model[offset : offset + length])))
    tail = data.draw(st.sampled_from([b"", b"\x25", raw.request(raw.WRITE, 0, 9, payload=b"x")]))
    places = tuple(sorted(min(cut, len(stream)) for cut in cuts))
    limit = data.draw(st.sampled_from([1, 5000, 1 << 16]))
    sent, kept, why = run_fast(over, stream + (b"" if extended else tail), limit=limit, cuts=places)
    assert (kept, why) == (b"" if extended else tail, MORE)
    for write, offset, length, cookie, content in expected:
        sent = check_reply(sent, mode, write, offset, length, cookie, content)
    assert sent == b""
    assert over.export.data == model  # type: ignore[attr-defined]


def check_reply(
    sent: bytes, mode: ReplyMode, write: bool, offset: int, length: int, cookie: int, content: bytes
) -> bytes:
    """Take one reply off ``sent`` and compare it; what follows it."""
    assert sent[8:16] == cookie.to_bytes(8, "big")
    if mode == ReplyMode.SIMPLE or (write and mode == ReplyMode.STRUCTURED):
        assert sent[:8] == b"\x67\x44\x66\x98\0\0\0\0"
        size = 0 if write else length
        assert sent[16 : 16 + size] == (b"" if write else content)
        return sent[16 + size :]
    header = 20 if mode == ReplyMode.STRUCTURED else 32
    assert sent[:4] == (b"\x66\x8e\x33\xef" if header == 20 else b"\x6e\x8a\x27\x8c")
    assert sent[4:6] == b"\0\1"
    if header == 32:
        assert sent[16:24] == offset.to_bytes(8, "big")
    size = int.from_bytes(sent[header - 4 : header], "big")
    kind, body = sent[7], sent[header : header + size]
    if write:
        assert (kind, size) == (0, 0)
    elif kind == 2:
        assert body == offset.to_bytes(8, "big") + length.to_bytes(4, "big")
        assert not any(content)
    else:
        assert (kind, body) == (1, offset.to_bytes(8, "big") + content)
    return sent[header + size :]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "header",
    [
        {"command": raw.READ, "length": 0},
        {"command": raw.READ, "offset": SIZE - 1, "length": 2},
        {"command": raw.READ, "offset": 2**64 - 1, "length": 2},
        {"command": raw.READ, "length": 512, "flags": raw.FUA},
        {"command": raw.READ, "length": 3 << 20},
        {"command": raw.WRITE, "length": 0},
        {"command": raw.WRITE, "length": 4, "payload": b"abcd", "flags": raw.FUA},
        {"command": raw.WRITE, "offset": SIZE - 1, "length": 4, "payload": b"abcd"},
        {"command": raw.FLUSH},
        {"command": raw.DISC},
        {"command": 42},
        {"command": raw.READ, "length": 512, "magic": 0x12345678},
    ],
)
def test_fast_loop_leaves_everything_else_untouched(mode: ReplyMode, header: dict[str, Any]) -> None:
    extended = mode == ReplyMode.EXTENDED
    good = raw.request(raw.READ, 0, 16, extended=extended)
    odd = raw.request(**header, extended=extended)
    over = session(mode)
    sent, kept, why = run_fast(over, good + odd + good)
    assert (kept, why) == (odd + good, SLOW)
    assert len([entry for entry in over.export.log if entry[0] == "try_read"]) == 1  # type: ignore[attr-defined]
    assert sent


def test_fast_loop_stops_at_misses_errors_read_only_and_odd_alignment() -> None:
    write = raw.request(raw.WRITE, 0, 4, payload=b"abcd")
    read = raw.request(raw.READ, 0, 512)
    for over, data, why in [
        (session(fast=False), read, DECLINED),
        (session(fast=False), write, DECLINED),
        (session(read_only=True), write, SLOW),
        (session(min_block=512), write, SLOW),
        (session(max_payload=256), read, SLOW),
        (session(fast=False, max_payload=256), read, SLOW),
        (session(fast=False, read_only=True), write, SLOW),
    ]:
        assert run_fast(over, data) == (b"", data, why)

    def fail(offset: int, view: memoryview) -> int:
        raise OSError(errno.EIO, "bad block")

    over = session()
    over.export.try_read = over.export.try_write = fail
    assert run_fast(over, read) == (b"", read, SLOW)
    assert run_fast(over, write) == (b"", write, SLOW)


def test_a_mistake_in_an_export_is_logged_and_costs_one_request(caplog: pytest.LogCaptureFixture) -> None:
    def fail(offset: int, view: memoryview) -> int:
        raise ZeroDivisionError

    over = session()
    over.export.try_read = fail
    read = raw.request(raw.READ, 0, 512)
    assert run_fast(over, read) == (b"", read, SLOW)
    assert "ZeroDivisionError" in caplog.text


def test_fast_loop_answers_long_batches_in_parts() -> None:
    over = session(ReplyMode.SIMPLE)
    loop, replies = fast_loop(over), memoryview(bytearray(BUFFER_SIZE))
    writes = raw.request(raw.WRITE, 0, 4096, payload=bytes(4096)) * 32
    at, filled, why = loop(memoryview(writes), 0, len(writes), replies, 0, 64 << 10, SIZE)
    assert (why, filled) == (FULL, 16 * 16)
    assert at == 16 * (28 + 4096)


def test_replies_report_extents_in_both_widths() -> None:
    request = Request(int(CommandFlag.REQ_ONE), raw.STATUS, 7, 4096, 8192)
    extents = [Extent(4096, 3), Extent(4096, 0)]
    narrow = Replies(ReplyMode.STRUCTURED).block_status(request, 5, extents, 1)
    assert narrow[20:] == bytes.fromhex("00000005 00001000 00000003 00001000 00000000".replace(" ", ""))
    wide = Replies(ReplyMode.EXTENDED).block_status(request, 5, [Extent(1 << 40, 3)], 0)
    assert wide[32:] == bytes.fromhex("0000000500000001" + "0000010000000000" + "0000000000000003")
    assert wide[16:24] == (4096).to_bytes(8, "big")
