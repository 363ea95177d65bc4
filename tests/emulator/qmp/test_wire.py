"""QMP's input: QEMU's values and QEMU's complaints, whatever way the bytes are cut."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livedisk.emulator.qmp import wire
from livedisk.emulator.qmp.wire import MAX_NESTING, MAX_TOKEN_SIZE, NOTHING, JsonError, Parser, parse_one


def drain(parser: Parser) -> list[Any]:
    """All that is ready: values, and the texts of errors as ``JsonError`` strings in a tuple."""
    found: list[Any] = []
    while True:
        try:
            value = parser.next()
        except JsonError as error:
            found.append(("error", str(error)))
            continue
        if value is NOTHING:
            return found
        found.append(value)


def read(*pieces: bytes) -> list[Any]:
    parser = Parser()
    found: list[Any] = []
    for piece in pieces:
        parser.feed(piece)
        found += drain(parser)
    return found


def bad(*texts: str) -> list[Any]:
    return [("error", text if text.startswith("JSON ") else f"JSON parse error, {text}") for text in texts]


# Every answer was given by qemu-storage-daemon 10.0.2; test_peers.py asks it again.
CASES: dict[bytes, list[Any]] = {
    b'{"execute":"x"}': [{"execute": "x"}],
    b"{'execute':'it\\'s \"x\"'}": [{"execute": 'it\'s "x"'}],
    b'{"a":1}{"b":[2,\t3]} true': [{"a": 1}, {"b": [2, 3]}, True],
    b'{"a":\n\n1}': [{"a": 1}],
    b'{"a" 1}': bad("missing : in object pair"),
    b"{1:2}": bad("key is not a string in object"),
    b'{"a":}': bad("expecting value"),
    b'{"a":1 "b":2}': bad("expected separator in dict"),
    b"[1 2]": bad("expected separator in list"),
    b"[,]": bad("expecting value"),
    b'["a",]': bad("expecting value"),
    b'{"a":1,}': bad("expecting value"),
    b"{foo}": bad("invalid keyword 'foo'"),
    b"foo": bad("invalid keyword 'foo'"),
    b"%s": bad("stray '%'"),
    b"[%d]": bad("stray '%'", "expecting value"),
    b"]": bad("expecting value"),
    b"[}": bad("expecting value"),
    b"{]": bad("expecting value"),
    b"[1}]": bad("expected separator in list", "expecting value"),
    b'{"execute":"x"}}': [{"execute": "x"}, *bad("expecting value")],
    b'{"a":1,"a":2}': bad("duplicate key"),
    b'{"a":{"b":1,"b":2}}': bad("duplicate key"),
    b'"\\u00"': bad('\\u00" is not a valid Unicode character'),
    b'"\\q"': bad("invalid escape sequence in string"),
    b'"\\u0000"': ["\0"],
    b'"\xc0\x80"': ["\0"],
    b'"\\ud83d\\ude00"': ["\U0001f600"],
    b'"\\ud800"': bad("\\ud800 is not a valid Unicode character"),
    b'"\\udc00\\ud800"': bad("\\udc00 is not a valid Unicode character"),
    b'"\\ud800\\u0041"': bad("\\ud800 is not a valid Unicode character"),
    b'"\\ufffe"': bad("\\ufffe is not a valid Unicode character"),
    b'"\x80"': bad("invalid UTF-8 sequence in string"),
    b'"\xc1\x80"': bad("invalid UTF-8 sequence in string"),
    b'"\xed\xa0\x80"': bad("invalid UTF-8 sequence in string"),
    b'"\xef\xbf\xbf"': bad("invalid UTF-8 sequence in string"),
    b'"\xf4\x90\x80\x80"': bad("invalid UTF-8 sequence in string"),
    b'"\xff"': bad("stray '\"\ufffd'"),
    b"\xff\xff": bad("stray '\ufffd'", "stray '\ufffd'"),
    b'"\x01"': bad("stray '\"\x01'"),
    b"\x00": bad("stray ''"),
    b"01": bad("stray '01'"),
    b"-": bad("stray '-\n'"),
    b"1.": bad("stray '1.\n'"),
    b"1e+": bad("stray '1e+\n'"),
    b'"abc': bad("stray '\"abc\n'"),
    b"A 1 [2]": [*bad("stray 'A'"), [2]],
    b"1e5 -0 0.5 -1.5E-2": [1e5, 0, 0.5, -0.015],
    b"9223372036854775807 18446744073709551615": [2**63 - 1, 2**64 - 1],
    b"18446744073709551616 -9223372036854775809": [float(2**64), -float(2**63)],
}


@pytest.mark.parametrize("data", CASES, ids=repr)
class TestCases:
    def test_whole(self, data: bytes) -> None:
        assert read(data + b"\n") == CASES[data]

    def test_byte_by_byte(self, data: bytes) -> None:
        assert read(*(bytes([byte]) for byte in data + b"\n")) == CASES[data]

    def test_cut_in_two_anywhere(self, data: bytes) -> None:
        for cut in range(len(data) + 1):
            assert read(data[:cut], data[cut:] + b"\n") == CASES[data]

    def test_next_value_is_read_after_it(self, data: bytes) -> None:
        # A control character, or the structural one, ends whatever an error left behind.
        assert read(data + b"\n\n", b'{"id":7}\n')[-1] == {"id": 7}


def test_types_are_as_written() -> None:
    values = read(b"1 1.0 1e2 true null 18446744073709551616 ")
    assert [type(value) for value in values] == [int, float, float, bool, type(None), float]


def test_a_value_needs_no_line_end() -> None:
    assert read(b'{"a":1}') == [{"a": 1}]


def test_nesting_up_to_the_limit() -> None:
    deep = b"[" * MAX_NESTING + b"]" * MAX_NESTING
    value = read(deep)[0]
    for _ in range(MAX_NESTING - 1):
        (value,) = value
    assert value == []


def test_nesting_beyond_the_limit_is_answered_once() -> None:
    assert read(b"[" * (MAX_NESTING + 1) + b'\n{"a":1}\n') == [*bad("JSON nesting depth limit exceeded"), {"a": 1}]


def test_token_count_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_TOKEN_COUNT", 100)
    # The comma after the 50th number is one too many; what follows starts afresh.
    assert read(b"[" + b"0," * 51 + b"\n") == [*bad("JSON token count limit exceeded"), 0, *bad("expecting value")]


def test_size_limit_over_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_TOKEN_SIZE", 1000)
    assert read(b'["' + b'x","' * 400)[0] == bad("JSON token size limit exceeded")[0]


def test_huge_string_costs_bounded_memory() -> None:
    parser = Parser()
    chunk = b"x" * (64 << 10)
    tracemalloc.start()
    found: list[Any] = []
    parser.feed(b'{"execute": "')
    for _ in range(3 * MAX_TOKEN_SIZE // len(chunk)):
        parser.feed(chunk)
        found += drain(parser)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[0] == bad("JSON token size limit exceeded")[0]
    # The token, its copy while it is handed on, and the growth of a bytearray.
    assert peak < 3 * MAX_TOKEN_SIZE
    parser.feed(b'"\n')
    drain(parser)
    parser.feed(b'\n{"alive": true}\n')
    assert drain(parser)[-1] == {"alive": True}


def test_a_long_keyword_is_cut_in_the_message() -> None:
    ((_, text),) = read(b"a" * 5000 + b"\n")
    assert text == ("JSON parse error, invalid keyword '" + "a" * 5000)[: len("JSON parse error, ") + 1023]


# -- properties --------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cn")))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)
DOCUMENT = st.dictionaries(TEXT, JSON, max_size=4)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    positions = [0, *sorted(position % (len(data) + 1) for position in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(positions)]


@given(
    st.lists(DOCUMENT, max_size=4),
    st.booleans(),
    st.sampled_from(["", " ", "\n", "\r\n"]),
    st.lists(st.integers(0, 10**4)),
)
def test_whatever_json_writes_is_read_back(values: list[Any], ascii_only: bool, between: str, cuts: list[int]) -> None:
    data = between.join(json.dumps(value, ensure_ascii=ascii_only) for value in values).encode() + b"\n"
    assert read(*cut(data, cuts)) == values


@given(
    st.lists(
        st.sampled_from(['{"a":1}', '{"a":"b:c"}', '{"a":1,"a":2}', "[1]", "{'a':1}", "{", "}", '"', "\\", "1e5", "x"])
    )
)
def test_the_fast_way_and_the_precise_way_agree(pieces: list[str]) -> None:
    data = "\n".join(pieces).encode() + b"\n"
    assert read(data) == read(*(bytes([byte]) for byte in data))


@given(st.binary(), st.lists(st.integers(0, 1000)))
def test_garbage_is_answered_and_survived(garbage: bytes, cuts: list[int]) -> None:
    pieces = cut(garbage, cuts)
    assert read(*pieces) == read(garbage)
    # The documented way back to a known state: 0xFF, which is an error, then a new line.
    assert read(garbage, b"\xff\n", b'{"alive":true}\n')[-1] == {"alive": True}


# -- a single value ----------------------------------------------------------------------------------------------------


def test_parse_one() -> None:
    assert parse_one(b' {"driver":"null-co"} ') == {"driver": "null-co"}
    assert parse_one(b"17") == 17


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"driver":"null-co"', "JSON parse error, premature EOI"),
        (b'{"driver":"null-co"} x', "Expecting at most one JSON value"),
        (b'x {"driver":"null-co"}', "JSON parse error, invalid keyword 'x'"),
        (b"{} {}", "Expecting at most one JSON value"),
        (b"", "Expecting a JSON value"),
        (b'{"driver":%d}', "JSON parse error, stray '%'"),
    ],
)
def test_parse_one_refuses(data: bytes, text: str) -> None:
    with pytest.raises(JsonError) as caught:
        parse_one(data)
    assert str(caught.value) == text
