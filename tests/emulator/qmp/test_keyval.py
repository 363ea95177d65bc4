"""key=value,... as QEMU reads it. Messages were asked from qemu-storage-daemon 10.0.2."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livedisk.emulator.errors import ParameterError
from livedisk.emulator.qmp.keyval import HelpRequested, parse_keyval, parse_opts


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", {}),
        ("a=1,b=2", {"a": "1", "b": "2"}),
        ("a=1,", {"a": "1"}),
        ("a=,b=", {"a": "", "b": ""}),
        ("a=1,a=2", {"a": "2"}),
        ("a=x=y", {"a": "x=y"}),
        ("a=1,,2,,,b=3", {"a": "1,2,", "b": "3"}),
        ("a.b.c=1,a.b.d=2", {"a": {"b": {"c": "1", "d": "2"}}}),
        ("a.0=x,a.1=y", {"a": ["x", "y"]}),
        ("a.1=y,a.0=x", {"a": ["x", "y"]}),
        ("a.0.b=x,a.1.0=y", {"a": [{"b": "x"}, ["y"]]}),
        ("__org.example_x-y=1", {"__org.example_x-y": "1"}),
    ],
)
def test_values(text: str, value: dict[str, Any]) -> None:
    assert parse_keyval(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null-co", {"driver": "null-co"}),
        ("null-co,a=1", {"driver": "null-co", "a": "1"}),
        ("driver=null-co", {"driver": "null-co"}),
        ("a=1", {"a": "1"}),
    ],
)
def test_implied_key(text: str, value: dict[str, Any]) -> None:
    assert parse_keyval(text, "driver") == value


LONG = "a" * 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,read-only", "Expected '=' after parameter 'read-only'"),
        ("a..b=1", "Invalid parameter 'a..b'"),
        ("1=2", "Invalid parameter '1'"),
        (".=1", "Invalid parameter '.'"),
        ("a.=2", "Invalid parameter 'a.'"),
        ("=3", "Invalid parameter ''"),
        (",", "Invalid parameter ''"),
        ("null-co,,node-name=a", "Invalid parameter ''"),
        ("x.1=a", "Parameter 'x.0' missing"),
        ("a.0=1,a.2=3", "Parameter 'a.1' missing"),
        ("x.0=a,x.b=1", "Parameters 'x.*' used inconsistently"),
        ("cache.direct=on,cache=1", "Parameters 'cache.*' used inconsistently"),
        ("cache=1,cache.direct=on", "Parameters 'cache.*' used inconsistently"),
        ("a-b.c.d=1,a-b.c=2", "Parameters 'a-b.c.*' used inconsistently"),
        (f"{LONG}=1", f"Parameter '{LONG}' is too long"),
        (f"b.{LONG}=1", f"Parameter fragment '{LONG}' is too long"),
    ],
)
def test_messages(text: str, message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        parse_keyval(text, "driver")
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["help", "?", "null-co,help", "driver=null-co,?"])
def test_help(text: str) -> None:
    with pytest.raises(HelpRequested):
        parse_keyval(text, "driver")


def flatten(value: Any, prefix: str = "") -> list[str]:
    if isinstance(value, str):
        return [f"{prefix}={value.replace(',', ',,')}"]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for key, item in items for leaf in flatten(item, f"{prefix}.{key}" if prefix else str(key))]


NAME = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True)
TREE = st.recursive(
    st.text(),
    lambda inner: st.lists(inner, min_size=1, max_size=4) | st.dictionaries(NAME, inner, min_size=1, max_size=4),
)


@given(st.dictionaries(NAME, TREE, max_size=5), st.randoms())
def test_any_tree_of_strings_reads_back_whatever_the_order(tree: dict[str, Any], random: Any) -> None:
    leaves = flatten(tree)
    random.shuffle(leaves)
    assert parse_keyval(",".join(leaves)) == tree


@given(st.text("ab.,=01-_?h", max_size=40))
def test_any_text_is_read_or_refused_by_name(text: str) -> None:
    for parse in (parse_keyval, parse_opts):
        for implied in (None, "driver"):
            try:
                assert isinstance(parse(text, implied), dict)
            except (ParameterError, HelpRequested):
                pass


class TestOpts:
    def test_short_forms_warn(self) -> None:
        warnings: list[str] = []
        values = parse_opts("socket,id=c,path=/x,server,nowait,nodelay", "backend", warn=warnings.append)
        assert values == {
            "backend": "socket",
            "id": "c",
            "path": "/x",
            "server": "on",
            "wait": "off",
            "nodelay": "on",
        }
        assert warnings == [
            "short-form boolean option 'server' deprecated\nPlease use server=on instead",
            "short-form boolean option 'nowait' deprecated\nPlease use wait=off instead",
            "short-form boolean option 'nodelay' deprecated\nPlease use nodelay=on instead",
        ]

    def test_commas_and_dots_are_not_structure(self) -> None:
        assert parse_opts("a,,b,x.y=1,,2", "path") == {"path": "a,b", "x.y": "1,2"}

    def test_bad_id(self) -> None:
        with pytest.raises(ParameterError) as caught:
            parse_opts("socket,id=1a", "backend")
        assert str(caught.value) == "Parameter 'id' expects an identifier"
        assert "starting with a letter" in caught.value.hint

    @pytest.mark.parametrize("text", ["help", "?", "backend=help", "socket,help"])
    def test_help(self, text: str) -> None:
        with pytest.raises(HelpRequested):
            parse_opts(text, "backend")
