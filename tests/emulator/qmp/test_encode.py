"""JSON as QEMU prints it."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from livedisk.emulator.qmp.encode import encode, encode_pretty, ordered
from livedisk.emulator.qmp.wire import parse_one

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=6),
    max_leaves=20,
)


def clean(value: Any) -> Any:
    """What can be read back: lone surrogates do not leave the process."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return value


@given(JSON)
def test_it_is_ascii_and_reads_back(value: Any) -> None:
    value = clean(value)
    for data in (encode(value), encode_pretty(value)):
        assert data.isascii()
        assert data.endswith(b"\r\n")
        assert json.loads(data) == value
    assert encode(value).count(b"\n") == 1


@given(st.dictionaries(st.text("abcdefghij-_", min_size=1), st.integers()))
def test_order_is_a_permutation_that_does_not_depend_on_values(value: dict[str, int]) -> None:
    keys = tuple(value)
    assert sorted(ordered(keys)) == sorted(keys)
    assert tuple(parse_one(encode(value))) == ordered(keys)


def test_members_stand_where_qemu_puts_them() -> None:
    # As the greeting and replies of QEMU 10.0.2 read; "micro" and "minor" share a bucket, the later comes first.
    assert ordered(("major", "minor", "micro")) == ("micro", "minor", "major")
    assert ordered(("package", "qemu")) == ("qemu", "package")
    assert ordered(("id", "return")) == ("return", "id")
    assert ordered(("error", "id")) == ("id", "error")
    assert ordered(("data", "event", "timestamp")) == ("timestamp", "event", "data")


def test_escapes_and_numbers() -> None:
    assert encode({"id": '\x7f\u00e9\U0001f600/<>"\\\n\x01'}) == (
        b'{"id": "\\u007F\\u00E9\\uD83D\\uDE00/<>\\"\\\\\\n\\u0001"}\r\n'
    )
    assert encode([0.1, 1.0, 1e22, -0.5]) == b"[0.10000000000000001, 1, 1e+22, -0.5]\r\n"
    assert json.loads(encode(float("inf"))) == float("inf")


def test_pretty() -> None:
    assert encode_pretty({"return": {}, "id": [1, []]}).decode() == "\r\n".join(
        ["{", '    "return": {', "    },", '    "id": [', "        1,", "        [", "        ]", "    ]", "}", ""]
    )
