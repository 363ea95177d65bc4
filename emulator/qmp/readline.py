"""A line editor for the human monitor: keys in, lines and echo out, byte for byte as QEMU echoes. No I/O.

QEMU redraws the whole line at each change, also when nobody sees it (a pipe); scripts that drive a monitor filter
exactly those sequences, so they are kept: back to the start of what was drawn (``ESC [ D`` each), the line, erase the
rest (``ESC [ K``).

Keys: printable; left, right, home, end, Ctrl-A/E; backspace, delete, Ctrl-D, Ctrl-U, Ctrl-W; up and down through the
history; tab completes. Beyond QEMU's: Ctrl-B/F/K/N/P, and Home and End as xterm sends them.
Source: QEMU ``util/readline.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

MAX_LINE: Final = 4095
"""Bytes in a line; what goes beyond is not taken."""
MAX_HISTORY: Final = 64

Completer = Callable[[str], Sequence[str]]
"""From the text before the cursor to whole replacements for its last word."""

_ESCAPES: Final = {"A": "up", "B": "down", "C": "right", "D": "left", "H": "home", "F": "end"}
_TILDES: Final = {"1": "home", "3": "delete", "4": "end", "7": "home", "8": "end"}
_CONTROLS: Final = {
    "\x01": "home",
    "\x02": "left",
    "\x04": "delete",
    "\x05": "end",
    "\x06": "right",
    "\x08": "backspace",
    "\x09": "complete",
    "\x0a": "enter",
    "\x0b": "kill",
    "\x0d": "enter",
    "\x0e": "down",
    "\x10": "up",
    "\x15": "kill-back",
    "\x17": "word-back",
    "\x7f": "backspace",
}


class LineEditor:
    """Feed it bytes; it yields finished lines. ``echo`` is called with what the user is to see."""

    def __init__(self, prompt: str, echo: Callable[[str], None], complete: Completer) -> None:
        self._prompt = prompt
        self._echo = echo
        self._complete = complete
        self._line = ""
        self._cursor = 0
        self._drawn = ""
        self._drawn_cursor = 0
        self._history: list[str] = []
        self._at = 0
        self._escape = ""

    def show_prompt(self) -> None:
        """Start a line."""
        self._line = self._drawn = ""
        self._cursor = self._drawn_cursor = 0
        self._at = len(self._history)
        self._echo(self._prompt)

    def feed(self, data: bytes) -> Iterator[str]:
        """Take keys in. After each line that is yielded the caller shows the next prompt."""
        for character in data.decode("latin-1"):
            key = self._key(character)
            if key == "enter":
                line = self._line
                self._remember(line)
                self._echo("\n")
                yield line
            elif key:
                self._press(key, character)
                self._redraw()

    # -- keys
    # ---------------------------------------------------------------------------------------------------------

    def _key(self, character: str) -> str:
        """The key that ends with this character; "" inside an escape sequence, or for what has no meaning."""
        if self._escape:
            return self._escaped(character)
        if character == "\x1b":
            self._escape = character
            return ""
        if character in _CONTROLS:
            return _CONTROLS[character]
        return "insert" if character >= " " else ""

    def _escaped(self, character: str) -> str:
        self._escape += character
        if len(self._escape) == 2:
            if character not in "[O":
                self._escape = ""
            return ""
        if character.isdigit() and len(self._escape) < 8:
            return ""
        sequence, self._escape = self._escape, ""
        if character == "~":
            return _TILDES.get(sequence[2:-1], "")
        return _ESCAPES.get(character, "")

    def _press(self, key: str, character: str) -> None:
        line, cursor = self._line, self._cursor
        match key:
            case "insert" if len(line) < MAX_LINE:
                self._set(line[:cursor] + character + line[cursor:], cursor + 1)
            case "left":
                self._cursor = max(0, cursor - 1)
            case "right":
                self._cursor = min(len(line), cursor + 1)
            case "home":
                self._cursor = 0
            case "end":
                self._cursor = len(line)
            case "backspace" if cursor:
                self._set(line[: cursor - 1] + line[cursor:], cursor - 1)
            case "delete":
                self._set(line[:cursor] + line[cursor + 1 :], cursor)
            case "kill":
                self._set(line[:cursor], cursor)
            case "kill-back":
                self._set(line[cursor:], 0)
            case "word-back":
                start = line[:cursor].rstrip(" ").rfind(" ") + 1
                self._set(line[:start] + line[cursor:], start)
            case "up" if self._at > 0:
                self._recall(self._at - 1)
            case "down" if self._at < len(self._history):
                self._recall(self._at + 1)
            case "complete":
                self._expand()

    def _set(self, line: str, cursor: int) -> None:
        self._line, self._cursor = line, cursor

    # -- history and completion
    # ---------------------------------------------------------------------------------------

    def _remember(self, line: str) -> None:
        if not line:
            return
        if line in self._history:
            self._history.remove(line)
        self._history.append(line)
        del self._history[:-MAX_HISTORY]

    @property
    def history(self) -> Sequence[str]:
        """Lines entered so far, the oldest first, each once."""
        return self._history

    def _recall(self, position: int) -> None:
        self._at = position
        line = self._history[position] if position < len(self._history) else ""
        self._set(line, len(line))

    def _expand(self) -> None:
        """Complete the word before the cursor as far as all candidates agree; if there are several, show them."""
        before, after = self._line[: self._cursor], self._line[self._cursor :]
        candidates = sorted(self._complete(before))
        if not candidates:
            return
        stem = before[before.rfind(" ") + 1 :]
        agreed = _common(candidates) + (" " if len(candidates) == 1 else "")
        line, cursor = before[: len(before) - len(stem)] + agreed + after, len(before) - len(stem) + len(agreed)
        if len(candidates) > 1:
            self._echo("\n" + _columns(candidates))
            self.show_prompt()
        self._set(line, cursor)

    # -- drawing
    # ------------------------------------------------------------------------------------------------------

    def _redraw(self) -> None:
        parts: list[str] = []
        if self._line != self._drawn:
            parts.append("\x1b[D" * self._drawn_cursor + self._line + "\x1b[K")
            self._drawn, self._drawn_cursor = self._line, len(self._line)
        moved = self._cursor - self._drawn_cursor
        parts.append("\x1b[C" * moved if moved > 0 else "\x1b[D" * -moved)
        self._drawn_cursor = self._cursor
        if any(parts):
            self._echo("".join(parts))


def _common(words: Sequence[str]) -> str:
    """The characters that all words start with."""
    first, last = min(words), max(words)
    length = next(
        (index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first)
    )
    return first[:length]


def _columns(words: Sequence[str]) -> str:
    """Words in columns, 80 characters wide."""
    width = min(max(len(word) for word in words) + 2, 80)
    width = max(width, 10)
    count = 80 // width
    rows = [words[start : start + count] for start in range(0, len(words), count)]
    return "".join("".join(word.ljust(width) for word in row) + "\n" for row in rows)
