"""The parser behind ``livedisk daemon``: order, dashes, arguments, and the manual page made from the same table."""

from __future__ import annotations

import re

import pytest

from livedisk.emulator.cli.daemon_options import CLOSING, DESCRIPTION, MACHINE, STORAGE_DAEMON, TABLE, TITLE, USAGE
from livedisk.emulator.cli.options import Option, UsageError, manual, parse

SMALL = (
    Option(("blockdev",), "ARG", "g", "h", 0),
    Option(("S",), "", "g", "h"),
    Option(("version", "V"), "", "g", "h"),
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], []),
        (["-S"], [("S", "-S", "")]),
        (["--S", "-S"], [("S", "--S", ""), ("S", "-S", "")]),
        (["-blockdev", "a=b"], [("blockdev", "-blockdev a=b", "a=b")]),
        (["--blockdev", "a=b", "-S"], [("blockdev", "--blockdev a=b", "a=b"), ("S", "-S", "")]),
        (["--blockdev=a=b,c=d"], [("blockdev", "--blockdev a=b,c=d", "a=b,c=d")]),
        (["-blockdev", "-S"], [("blockdev", "-blockdev -S", "-S")]),
        (["-blockdev", ""], [("blockdev", "-blockdev ", "")]),
        (["-S", "-blockdev", "x", "-V"], [("S", "-S", ""), ("blockdev", "-blockdev x", "x"), ("version", "-V", "")]),
    ],
)
def test_options_are_read_in_order(words: list[str], expected: list[tuple[str, str, str]]) -> None:
    assert [(one.name, one.text, one.value) for one in parse(SMALL, words)] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-foo"], "-foo: invalid option"),
        (["--foo=1"], "--foo: invalid option"),
        (["---S"], "---S: invalid option"),
        (["disk.img"], "disk.img: Unexpected argument"),
        (["-S", "disk.img"], "disk.img: Unexpected argument"),
        (["-"], "-: Unexpected argument"),
        (["--"], "--: Unexpected argument"),
        (["-blockdev"], "-blockdev: requires an argument"),
        (["-S=1"], "-S: takes no argument"),
        (["-block", "x"], "-block: invalid option"),
    ],
)
def test_what_cannot_be_understood_is_named(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        parse(SMALL, words)


def test_every_option_has_one_place_in_the_manual_page() -> None:
    page = manual(TITLE, USAGE, DESCRIPTION, TABLE, CLOSING)
    for option in TABLE:
        heads = [line for line in page.splitlines() if re.match(rf"    -{re.escape(option.name)}(,|$| )", line)]
        assert len(heads) == 1, option.name
    assert [part for part in ("NAME", "SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "EXAMPLES") if part not in page] == []


def test_no_name_is_taken_twice() -> None:
    names = [name for option in TABLE for name in option.names]
    assert len(names) == len(set(names))


def test_an_option_is_ranked_if_and_only_if_it_builds_something() -> None:
    read_by_others = ("incoming", "pidfile", "trace", "qtest-log", "set", "readconfig")
    for option in TABLE:
        builds = option.group != MACHINE and option.argument and option.name not in read_by_others
        assert (option.rank is not None) == bool(builds), option.name
    assert {option.name for option in TABLE} >= STORAGE_DAEMON


def test_options_of_a_machine_that_the_documentation_promises_are_known() -> None:
    promised = (
        "display vga m machine accel cpu smp nodefaults no-user-config nographic name uuid rtc serial parallel net boot"
    )
    machine = {name for option in TABLE if option.group == MACHINE for name in option.names}
    assert machine >= set(promised.split())
