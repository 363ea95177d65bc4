"""One table of options: the parser of the command line and ``--help`` are both made from it.

Order matters to a daemon's command line and long options stand behind one dash as well as two, which neither argparse nor click
offers; so this is the smallest parser that does it: a walk over the words, a look-up a word. What an option's argument means is
the business of whoever takes the parsed list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


class UsageError(Exception):
    """The command line cannot be understood; exit code 2. The text names the offending word."""


@dataclass(frozen=True, slots=True)
class Option:
    """One row: ``names`` (the first is the option's own), the argument as help shows it ("" for none), the help text.

    ``group`` is the heading it stands under. ``rank`` orders options where the command line's own order does not count (see
    `livedisk.emulator.cli.daemon`); None: it has no place in that order.
    """

    names: tuple[str, ...]
    argument: str
    group: str
    help: str
    rank: int | None = None

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True, slots=True)
class Given:
    """An option as it was written: ``text`` is for messages (``-blockdev driver=...``), ``value`` the argument, "" for none."""

    option: Option
    spelled: str
    value: str

    @property
    def name(self) -> str:
        return self.option.name

    @property
    def text(self) -> str:
        return f"{self.spelled} {self.value}" if self.option.argument else self.spelled


def parse(table: Iterable[Option], words: Sequence[str]) -> list[Given]:
    """The options given, in order. ``--name value``, ``--name=value`` and the same with one dash. Raises UsageError."""
    known = {name: option for option in table for name in option.names}
    return list(_walk(known, iter(words)))


def _walk(known: dict[str, Option], words: Iterator[str]) -> Iterator[Given]:
    for word in words:
        if not word.startswith("-") or word in ("-", "--"):
            raise UsageError(f"{word}: Unexpected argument")
        spelled, equals, attached = word.partition("=")
        option = known.get(spelled.removeprefix("-").removeprefix("-"))
        if option is None:
            raise UsageError(f"{spelled}: invalid option")
        if not option.argument:
            if equals:
                raise UsageError(f"{spelled}: takes no argument")
            yield Given(option, spelled, "")
            continue
        value = attached if equals else next(words, None)
        if value is None:
            raise UsageError(f"{spelled}: requires an argument")
        yield Given(option, spelled, value)


def manual(title: str, usage: str, description: str, table: Sequence[Option], closing: str) -> str:
    """The text of ``--help``, laid out as a manual page for the terminal's width."""
    # Imported here, as below: a daemon that starts has no use for it.
    import shutil

    width = min(max(shutil.get_terminal_size((80, 24)).columns, 60), 100)
    blocks = [
        f"NAME\n{_indented(title, width)}",
        f"SYNOPSIS\n{_indented(usage, width)}",
        f"DESCRIPTION\n{_indented(description, width)}",
    ]
    groups = list(dict.fromkeys(option.group for option in table))
    for group in groups:
        rows = [_row(option, width) for option in table if option.group == group]
        blocks.append(f"{group.upper()}\n" + "\n".join(rows))
    blocks.append(closing.rstrip())
    return "\n\n".join(blocks) + "\n"


def _row(option: Option, width: int) -> str:
    import textwrap

    spelled = ", ".join(f"-{name}" for name in option.names)
    head = f"    {spelled} {option.argument}".rstrip()
    return head + "\n" + textwrap.indent(textwrap.fill(option.help, width - 8), " " * 8)


def _indented(text: str, width: int) -> str:
    import textwrap

    paragraphs = [textwrap.fill(" ".join(part.split()), width - 4) for part in text.strip().split("\n\n")]
    return textwrap.indent("\n\n".join(paragraphs), "    ")
