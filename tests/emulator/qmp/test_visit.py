"""Input checks over typed Structs, in both syntaxes. Messages were asked from QEMU 10.0.2."""

from __future__ import annotations

import enum
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from livedisk.emulator.errors import ParameterError
from livedisk.emulator.qmp.model import describe
from livedisk.emulator.qmp.qapi import (
    UNSET,
    Meta,
    QapiStruct,
    Size,
    StrOrNull,
    UInt8,
    UInt32,
    UInt64,
    UnsetType,
    define_alternate,
    define_union,
)
from livedisk.emulator.qmp.visit import JSON, KEYVAL, Syntax, parse_integer, parse_size, visit


class Mode(enum.StrEnum):
    FAST = "fast"
    SAFE = "safe"


class Inner(QapiStruct, kw_only=True):
    flag: bool = False
    name: str


class Shape(QapiStruct):
    """Base of an open union, as BlockdevOptions is."""

    driver: str
    node_name: str | UnsetType = UNSET


ShapeRef = Annotated[Any, Meta(extra={"qapi": "ShapeRef"})]
ShapeRefOrNull = Annotated[Any, Meta(extra={"qapi": "ShapeRefOrNull"})]


class Circle(Shape, kw_only=True):
    size: int = 0
    latency: UInt64 = 0


class Stack(Shape, kw_only=True):
    file: ShapeRef
    backing: ShapeRefOrNull | UnsetType = UNSET
    cache: Inner | None = None


SHAPES: dict[str, type[msgspec.Struct]] = {"circle": Circle, "round": Circle, "stack": Stack, "bare": Shape}
define_union(Shape, "driver", lambda: SHAPES)
define_alternate("ShapeRef", str, Shape)
define_alternate("ShapeRefOrNull", str, Shape, None)


class Action(QapiStruct, tag_field="type"):
    pass


class Snapshot(Action, tag="snapshot"):
    data: Inner


class Abort(Action, tag="abort"):
    pass


class Everything(QapiStruct):
    text: str = ""
    whole: int = 0
    tiny: UInt8 = 0
    small: UInt32 = 0
    size: Size = 0
    number: float = 0.0
    flag: bool = False
    mode: Mode = Mode.SAFE
    literal: Literal["a", "b"] = "a"
    names: list[str] = []
    modes: list[Mode] = []
    actions: list[Snapshot | Abort] = []
    label: StrOrNull = UNSET
    bitmaps: list[Annotated[str | Inner, Meta(extra={"qapi": "NameOrInner"})]] = []
    free: dict[str, Any] = {}
    anything: Any = None
    inner: Inner | None = None
    old_name: int = msgspec.field(default=0, name="old_name")


def test_a_whole_value() -> None:
    value = visit(
        Everything,
        {
            "text": "x",
            "whole": -5,
            "tiny": 255,
            "size": 2**63,
            "number": 2,
            "flag": True,
            "mode": "fast",
            "literal": "b",
            "names": ["a"],
            "actions": [{"type": "abort"}, {"type": "snapshot", "data": {"name": "n"}}],
            "label": None,
            "bitmaps": ["b", {"name": "c"}],
            "free": {"k": [1]},
            "anything": [{}],
            "old_name": 3,
        },
        JSON,
    )
    assert value == Everything(
        text="x",
        whole=-5,
        tiny=255,
        size=2**63,
        number=2.0,
        flag=True,
        mode=Mode.FAST,
        literal="b",
        names=["a"],
        actions=[Abort(), Snapshot(data=Inner(name="n"))],
        label=None,
        bitmaps=["b", Inner(name="c")],
        free={"k": [1]},
        anything=[{}],
        old_name=3,
    )


def test_absent_is_not_null() -> None:
    assert visit(Everything, {}, JSON).label is UNSET
    assert visit(Everything, {"label": None}, JSON).label is None


def test_an_open_union_and_its_references() -> None:
    value = visit(
        Shape, {"driver": "stack", "node-name": "top", "file": {"driver": "round", "size": 7}, "backing": None}, JSON
    )
    assert value == Stack(driver="stack", node_name="top", file=Circle(driver="round", size=7), backing=None)
    assert visit(Shape, {"driver": "stack", "file": "below"}, JSON) == Stack(driver="stack", file="below")
    assert type(visit(Shape, {"driver": "bare"}, JSON)) is Shape


def test_a_variant_that_registers_later_is_known() -> None:
    class Late(Shape, kw_only=True):
        speed: int

    SHAPES["late"] = Late
    try:
        assert visit(Shape, {"driver": "late", "speed": 1}, JSON) == Late(driver="late", speed=1)
    finally:
        del SHAPES["late"]


def refuses(annotation: Any, value: Any, syntax: Syntax, message: str) -> ParameterError:
    with pytest.raises(ParameterError) as caught:
        visit(annotation, value, syntax)
    assert str(caught.value) == message
    return caught.value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": 1}, "Invalid parameter type for 'text', expected: string"),
        ({"text": None}, "Invalid parameter type for 'text', expected: string"),
        ({"whole": "1"}, "Invalid parameter type for 'whole', expected: integer"),
        ({"whole": 1.0}, "Invalid parameter type for 'whole', expected: integer"),
        ({"whole": True}, "Invalid parameter type for 'whole', expected: integer"),
        ({"whole": 2**63}, "Invalid parameter type for 'whole', expected: integer"),
        ({"small": "1"}, "Parameter 'small' expects uint64"),
        ({"small": 1e3}, "Parameter 'small' expects uint64"),
        ({"small": -1}, "Parameter 'small' expects uint32_t"),
        ({"small": 2**32}, "Parameter 'small' expects uint32_t"),
        ({"tiny": 256}, "Parameter 'tiny' expects uint8_t"),
        ({"size": "1k"}, "Parameter 'size' expects uint64"),
        ({"size": 2**64}, "Parameter 'size' expects uint64"),
        ({"number": "1"}, "Invalid parameter type for 'number', expected: number"),
        ({"number": True}, "Invalid parameter type for 'number', expected: number"),
        ({"flag": 1}, "Invalid parameter type for 'flag', expected: boolean"),
        ({"flag": "on"}, "Invalid parameter type for 'flag', expected: boolean"),
        ({"mode": "slow"}, "Parameter 'mode' does not accept value 'slow'"),
        ({"mode": 1}, "Invalid parameter type for 'mode', expected: string"),
        ({"modes": ["slow"]}, "Parameter 'null' does not accept value 'slow'"),
        ({"names": "a"}, "Invalid parameter type for 'names', expected: array"),
        ({"names": ["a", 2]}, "Invalid parameter type for 'names[1]', expected: string"),
        ({"actions": [1]}, "Invalid parameter type for 'actions[0]', expected: object"),
        ({"actions": [{}]}, "Parameter 'actions[0].type' is missing"),
        ({"actions": [{"type": "x"}]}, "Parameter 'type' does not accept value 'x'"),
        ({"actions": [{"type": "snapshot"}]}, "Parameter 'actions[0].data' is missing"),
        (
            {"actions": [{"type": "abort"}, {"type": "snapshot", "data": {"name": 1}}]},
            "Invalid parameter type for 'actions[1].data.name', expected: string",
        ),
        ({"actions": [{"type": "abort", "y": 1}]}, "Parameter 'actions[0].y' is unexpected"),
        ({"bitmaps": [1]}, "Invalid parameter type for 'null', expected: NameOrInner"),
        ({"bitmaps": ["a", {"name": 1}]}, "Invalid parameter type for 'bitmaps[1].name', expected: string"),
        ({"free": 1}, "Invalid parameter type for 'free', expected: object"),
        ({"inner": None}, "Invalid parameter type for 'inner', expected: object"),
        ({"inner": {}}, "Parameter 'inner.name' is missing"),
        ({"old-name": 1}, "Parameter 'old-name' is unexpected"),
        ({"x": 1, "y": 2}, "Parameter 'x' is unexpected"),
    ],
)
def test_json_messages(value: Any, message: str) -> None:
    refuses(Everything, value, JSON, message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "Parameter 'driver' is missing"),
        ({"driver": 1}, "Invalid parameter type for 'driver', expected: string"),
        ({"driver": "foo"}, "Parameter 'driver' does not accept value 'foo'"),
        ({"driver": "stack"}, "Parameter 'file' is missing"),
        ({"driver": "stack", "file": 1}, "Invalid parameter type for 'file', expected: ShapeRef"),
        ({"driver": "stack", "file": None}, "Invalid parameter type for 'file', expected: ShapeRef"),
        ({"driver": "stack", "file": "x", "backing": 3}, "Invalid parameter type for 'backing', expected: ShapeRefOrNull"),
        ({"driver": "stack", "file": {"driver": "foo"}}, "Parameter 'driver' does not accept value 'foo'"),
        ({"driver": "stack", "file": {"driver": "circle", "q": 1}}, "Parameter 'file.q' is unexpected"),
        ({"driver": "stack", "file": {"driver": "bare", "node-name": 1}}, "Invalid parameter type for 'file.node-name', expected: string"),  # noqa: E501
        # The base's members are looked at before the variant's, and leftovers last.
        ({"driver": "circle", "z": 1, "size": "", "node-name": 1}, "Invalid parameter type for 'node-name', expected: string"),
        ({"driver": "circle", "zork": 1, "size": "a"}, "Invalid parameter type for 'size', expected: integer"),
        ([], "Invalid parameter type for '<anonymous>', expected: object"),
    ],
)  # fmt: skip
def test_union_messages(value: Any, message: str) -> None:
    refuses(Shape, value, JSON, message)


def test_the_hint_lists_what_is_accepted() -> None:
    error = refuses(Shape, {"driver": "foo"}, JSON, "Parameter 'driver' does not accept value 'foo'")
    assert error.hint == "Accepted values: bare, circle, round, stack"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"flag": "maybe"}, "Parameter 'flag' expects 'on' or 'off'"),
        ({"flag": "ON"}, "Parameter 'flag' expects 'on' or 'off'"),
        ({"whole": "1k"}, "Parameter 'whole' expects integer"),
        ({"whole": ""}, "Parameter 'whole' expects integer"),
        ({"whole": "08"}, "Parameter 'whole' expects integer"),
        ({"small": "x"}, "Parameter 'small' expects integer"),
        ({"small": "4294967296"}, "Parameter 'small' expects uint32_t"),
        ({"size": "1x"}, "Parameter 'size' expects a size value"),
        ({"number": "x"}, "Invalid parameter type for 'number', expected: number"),
        ({"number": "inf"}, "Invalid parameter type for 'number', expected: number"),
        ({"text": {"x": "1"}}, "Parameters 'text.*' are unexpected"),
        ({"whole": ["1"]}, "Parameters 'whole.*' are unexpected"),
        ({"inner": "on"}, "Invalid parameter type for 'inner', expected: object"),
        ({"names": "a"}, "Invalid parameter type for 'names', expected: array"),
        ({"bitmaps": ["a", {"flag": "on"}]}, "Parameter 'bitmaps.1.name' is missing"),
        ({"label": {"x": "1"}}, "Invalid parameter type for 'label', expected: StrOrNull"),
    ],
)
def test_keyval_messages(value: Any, message: str) -> None:
    refuses(Everything, value, KEYVAL, message)


def test_keyval_values() -> None:
    value = visit(
        Everything,
        {
            "whole": "0x10",
            "small": "010",
            "size": "1.5K",
            "flag": "yes",
            "number": "1e3",
            "mode": "fast",
            "names": ["1"],
        },
        KEYVAL,
    )
    assert (value.whole, value.small, value.size, value.flag, value.number) == (16, 8, 1536, True, 1000.0)
    assert (value.mode, value.names) == (Mode.FAST, ["1"])


# Asked from qemu-system-x86_64 -object memory-backend-ram,size=...
@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("+5", 5),
        ("007", 7),
        (" 8K", 8192),
        ("1.0", 1),
        ("5.", 5),
        ("5.K", 5120),
        (".5K", 512),
        ("1.5k", 1536),
        ("1b", 1),
        ("0x10", 16),
        ("0x10B", 0x10B),
        ("1e", 2**60),
        ("7.1E", 8185742682708613530),
        ("3.3P", 3715469692580659),
        ("1.00000000000000000001k", 1024),
        ("", None),
        ("1x", None),
        ("1kb", None),
        ("1.5", None),
        ("0.1", None),
        ("8K ", None),
        ("16E", None),
        ("-1", None),
        ("1e3", None),
        ("1e1K", None),
        ("0x", None),
        ("0x10K", None),
        ("0x1p3", None),
        ("nan", None),
        ("12345678901234567890123", None),
    ],
)
def test_sizes(text: str, size: int | None) -> None:
    assert parse_size(text) == size


@given(st.integers(0, 2**44 - 1), st.sampled_from("KMGT"), st.booleans())
def test_whole_sizes_are_exact(number: int, suffix: str, lower: bool) -> None:
    shift = {"K": 10, "M": 20, "G": 30, "T": 40}[suffix]
    expected = number << shift
    assert parse_size(f"{number}{suffix.lower() if lower else suffix}") == (expected if expected < 2**64 else None)


@given(st.integers(-(2**70), 2**70))
def test_integers_in_three_bases(number: int) -> None:
    sign = "-" if number < 0 else ""
    for text in (str(number), f"{sign}0x{abs(number):x}", f"{sign}0{abs(number):o}"):
        assert parse_integer(text) == number


# -- the walk as a whole -----------------------------------------------------------------------------------------------

INNER = st.fixed_dictionaries({"name": st.text()}, optional={"flag": st.booleans()})
VALID = st.fixed_dictionaries(
    {},
    optional={
        "text": st.text(),
        "whole": st.integers(-(2**63), 2**63 - 1),
        "small": st.integers(0, 2**32 - 1),
        "size": st.integers(0, 2**64 - 1),
        "flag": st.booleans(),
        "mode": st.sampled_from(["fast", "safe"]),
        "names": st.lists(st.text(), max_size=3),
        "bitmaps": st.lists(st.text() | INNER, max_size=3),
        "inner": INNER,
        "label": st.none() | st.text(),
    },
)


@given(VALID)
def test_what_is_valid_is_taken_and_printed_back(value: dict[str, Any]) -> None:
    struct = visit(Everything, value, JSON)
    defaults = msgspec.to_builtins(Everything()) | {"label": UNSET}
    printed = msgspec.to_builtins(struct)
    for name, item in value.items():
        whole = Everything.__struct_encode_fields__
        assert name in whole
        if name in printed:
            assert visit(Everything, {name: printed[name]}, JSON) == visit(Everything, {name: item}, JSON)
        else:
            assert getattr(struct, name) == getattr(Everything(), name), defaults


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from((*Everything.__struct_encode_fields__, "type", "driver", "file")), inner, max_size=5
        )
    ),
    max_leaves=15,
)


@given(ANYTHING, st.sampled_from([Everything, Shape]), st.sampled_from([JSON, KEYVAL]))
def test_anything_is_taken_or_refused_by_name(value: Any, kind: Any, syntax: Syntax) -> None:
    try:
        result = visit(kind, value, syntax)
    except ParameterError as error:
        text = str(error)
    else:
        text = "''"
        assert isinstance(result, kind)
    assert text.count("'") >= 2


@pytest.mark.parametrize(
    "annotation", [complex, str | int, bytes, Annotated[Any, Meta(extra={"qapi": "Nowhere"})], Inner | Snapshot]
)
def test_types_that_qapi_has_no_word_for_are_refused(annotation: Any) -> None:
    with pytest.raises(TypeError):
        describe(annotation)


class Descriptor(QapiStruct):
    """As QEMU's FdSocketAddress: the member has its type's name."""

    str: str


def test_a_member_named_as_its_type() -> None:
    assert visit(Descriptor, {"str": "7"}, JSON) == Descriptor(str="7")
    refuses(Descriptor, {"str": 7}, JSON, "Invalid parameter type for 'str', expected: string")
