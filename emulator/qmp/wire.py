"""QMP's input: bytes in, JSON values and QEMU's parse errors out. No I/O.

A monitor's input is a stream of JSON values, not of lines: a value may span lines, a line may hold several. Two ways
lead through it, with one result:

* **fast**: between values, a whole line of plain ASCII goes to msgspec. What msgspec would take but QEMU words
  otherwise (duplicate keys, escapes, numbers at the edges, single quotes) is sent the other way;
* **precise**: QEMU's lexer as a table of states, its limits, its parser with its messages.

The lexer's states; every state loops over a run of bytes (`_RUNS`) and then looks at one more byte (`_MOVES`)::

    START --"--> STRING_DQ <--\\--> ESCAPE_DQ      '[', ']', '{', '}', ':', ',' are tokens by themselves
      |  --'--> STRING_SQ <--\\--> ESCAPE_SQ
      |  --0--> ZERO --.--> POINT --> FRACTION --e--> EXP --+--> EXP_SIGN --> EXP_DIGITS
      |  ---> SIGN --> ZERO or DIGITS --.--> POINT, --e--> EXP
      |  --a-z--> KEYWORD
      any  --a byte that fits nowhere--> error, RECOVERY --structural, control, 0xFE, 0xFF--> START

After a lexical error everything up to the next structural or control character is skipped, so that one slip is
answered once; 0xFF or a control character always brings the parser back to a known state
(``docs/interop/qmp-spec.rst``, "QGA Synchronization").

Limits, each answered by an error, the input then starting afresh: 64 MiB a token and a value's tokens together, 2 Mi
tokens, 1024 levels of nesting. Memory is bounded by them whatever a client sends. Source: QEMU
``qobject/json-lexer.c``, ``json-streamer.c``, ``json-parser.c``; messages asked from QEMU 10.0.2.

Where we differ: a stray token is cut to 1023 bytes in its message (QEMU cuts only the parser's own messages).
"""

from __future__ import annotations

import enum
import re
from collections import deque
from typing import Any, Final

import msgspec

from livedisk.emulator.errors import LiveDiskError

MAX_TOKEN_SIZE: Final = 64 << 20
"""Bytes in one token, and in all tokens of one value."""
MAX_TOKEN_COUNT: Final = 2 << 20
MAX_NESTING: Final = 1 << 10
_MAX_MESSAGE: Final = 1023


class JsonError(LiveDiskError):
    """The input is not JSON as QEMU takes it; the text is QEMU's."""


def _parse_error(text: str) -> JsonError:
    return JsonError(f"JSON parse error, {text[:_MAX_MESSAGE]}")


# -- the lexer's table
# -------------------------------------------------------------------------------------------------


class _State(enum.IntEnum):
    START = 0
    STRING_DQ = 1
    ESCAPE_DQ = 2
    STRING_SQ = 3
    ESCAPE_SQ = 4
    ZERO = 5
    SIGN = 6
    DIGITS = 7
    POINT = 8
    FRACTION = 9
    EXP = 10
    EXP_SIGN = 11
    EXP_DIGITS = 12
    KEYWORD = 13
    RECOVERY = 14


_S = _State

_RUNS: Final[dict[_State, re.Pattern[bytes]]] = {
    _S.START: re.compile(rb"[ \t\r\n]*"),
    _S.STRING_DQ: re.compile(rb'[^"\\\x00-\x1f\xfe\xff]*'),
    _S.STRING_SQ: re.compile(rb"[^'\\\x00-\x1f\xfe\xff]*"),
    _S.DIGITS: re.compile(rb"[0-9]*"),
    _S.FRACTION: re.compile(rb"[0-9]*"),
    _S.EXP_DIGITS: re.compile(rb"[0-9]*"),
    _S.KEYWORD: re.compile(rb"[a-z]*"),
    _S.RECOVERY: re.compile(rb"[^\x00-\x1f\xfe\xff\[\]{}:,]*"),
}
"""Bytes that keep a state in itself. States without an entry look at every byte."""


def _to(state: _State, characters: bytes) -> dict[int, _State]:
    return dict.fromkeys(characters, state)


_ANY: Final = bytes(range(0x20, 0xFE))
_DIGIT: Final = b"0123456789"
_LETTER: Final = b"abcdefghijklmnopqrstuvwxyz"
_STRUCTURAL: Final = b"{}[]:,"

_MOVES: Final[dict[_State, dict[int, _State]]] = {
    _S.START: (
        _to(_S.STRING_DQ, b'"')
        | _to(_S.STRING_SQ, b"'")
        | _to(_S.ZERO, b"0")
        | _to(_S.DIGITS, b"123456789")
        | _to(_S.SIGN, b"-")
        | _to(_S.KEYWORD, _LETTER)
    ),
    _S.STRING_DQ: _to(_S.ESCAPE_DQ, b"\\"),
    _S.ESCAPE_DQ: _to(_S.STRING_DQ, _ANY),
    _S.STRING_SQ: _to(_S.ESCAPE_SQ, b"\\"),
    _S.ESCAPE_SQ: _to(_S.STRING_SQ, _ANY),
    _S.ZERO: _to(_S.POINT, b".") | _to(_S.EXP, b"eE"),
    _S.SIGN: _to(_S.ZERO, b"0") | _to(_S.DIGITS, b"123456789"),
    _S.DIGITS: _to(_S.POINT, b".") | _to(_S.EXP, b"eE"),
    _S.POINT: _to(_S.FRACTION, _DIGIT),
    _S.FRACTION: _to(_S.EXP, b"eE"),
    _S.EXP: _to(_S.EXP_SIGN, b"+-") | _to(_S.EXP_DIGITS, _DIGIT),
    _S.EXP_SIGN: _to(_S.EXP_DIGITS, _DIGIT),
    _S.EXP_DIGITS: {},
    _S.KEYWORD: {},
}
"""The byte after a run that belongs to the token, and the state it leads to."""

_CLOSING: Final = {_S.STRING_DQ: ord('"'), _S.STRING_SQ: ord("'")}
"""States that a byte of the token itself ends."""
_COMPLETE: Final = frozenset({_S.ZERO, _S.DIGITS, _S.FRACTION, _S.EXP_DIGITS, _S.KEYWORD})
"""States that any byte ends which is not theirs; that byte starts the next token."""
_NOT_AFTER: Final = {_S.ZERO: frozenset(_DIGIT)}
"""Bytes that may not even end a state: 01 is no number."""


class Lexer:
    """Cuts the input into tokens, one call of `next_token` each. A token is the bytes as they came, quotes
    included."""

    def __init__(self) -> None:
        self._data = b""
        self._position = 0
        self._state = _S.START
        self._token = bytearray()

    @property
    def between_tokens(self) -> bool:
        """Nothing of a token has been seen, nor is an error being skipped."""
        return self._state is _S.START and not self._token

    def feed(self, data: bytes) -> None:
        self._data = self._data[self._position :] + data
        self._position = 0

    def take_line(self) -> bytes | None:
        """The rest of the current line without its end, taken out of the input; None if it has not ended. Only
        between tokens."""
        end = self._data.find(b"\n", self._position)
        if end < 0:
            return None
        line = self._data[self._position : end]
        self._position = end + 1
        return line

    def put_back(self, line: bytes) -> None:
        """Undo `take_line`."""
        self._position -= len(line) + 1

    def flush(self) -> None:
        """The input has ended: what is complete without a further byte becomes a token. Raises JsonError for the rest
        of one."""
        if self._state in _COMPLETE:
            self.feed(b" ")
        elif self._state not in (_S.START, _S.RECOVERY):
            raise self._stray(_S.START)

    def next_token(self) -> bytes | None:
        """The next token, or None if the input ends before it does. Raises JsonError for what starts or continues no
        token, and for a token too long."""
        data, end = self._data, len(self._data)
        while self._position < end:
            run = _RUNS.get(self._state)
            if run is not None:
                self._run(run, data, end)
                if self._position == end:
                    return None
            if self._state is _S.RECOVERY:
                self._state = _S.START
                continue
            token = self._step(data[self._position])
            if token is not None:
                return token
        return None

    def _run(self, run: re.Pattern[bytes], data: bytes, end: int) -> None:
        """Pass over a run; strings and numbers collect it, whitespace and skipped bytes go."""
        keeps = self._state not in (_S.START, _S.RECOVERY)
        if keeps:
            # One byte over the limit, as QEMU, which checks after each byte.
            end = min(end, self._position + MAX_TOKEN_SIZE + 1 - len(self._token))
        match = run.match(data, self._position, end)
        assert match is not None, "a run may be empty"
        self._position = match.end()
        if keeps:
            self._token += match.group()
            if len(self._token) > MAX_TOKEN_SIZE:
                self._restart(_S.START)
                raise JsonError("JSON token size limit exceeded")

    def _step(self, byte: int) -> bytes | None:
        """Look at one byte after a run. Returns the token that it completes."""
        state = self._state
        after = _MOVES[state].get(byte)
        if after is not None:
            self._token.append(byte)
            self._position += 1
            self._state = after
            return None
        if byte == _CLOSING.get(state) or (state is _S.START and byte in _STRUCTURAL):
            self._token.append(byte)
            self._position += 1
            return self._restart(_S.START)
        if state in _COMPLETE and byte not in _NOT_AFTER.get(state, ()):
            return self._restart(_S.START)
        self._token.append(byte)
        self._position += 1
        raise self._stray(_S.RECOVERY)

    def _stray(self, state: _State) -> JsonError:
        token = self._restart(state).partition(b"\x00")[0]
        return _parse_error(f"stray '{decode_leniently(token)}'")

    def _restart(self, state: _State) -> bytes:
        token = bytes(self._token)
        self._token.clear()
        self._state = state
        return token


# -- the parser
# --------------------------------------------------------------------------------------------------------

_NONCHARACTER: Final = re.compile(
    "[\ufdd0-\ufdef" + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF)) + "]"
)
_SIMPLE_ESCAPES: Final = {
    ord("b"): "\b",
    ord("f"): "\f",
    ord("n"): "\n",
    ord("r"): "\r",
    ord("t"): "\t",
    **{byte: chr(byte) for byte in b"\"'\\/"},
}
_KEYWORDS: Final = {b"true": True, b"false": False, b"null": None}
_HEX4: Final = re.compile(rb"\\u([0-9a-fA-F]{4})")


def decode_leniently(raw: bytes) -> str:
    """Text for a message: what is not UTF-8 becomes U+FFFD."""
    return raw.decode("utf-8", "replace")


def _decode(raw: bytes) -> str:
    """Modified UTF-8 (NUL may be written C0 80), without surrogates and noncharacters. Raises JsonError."""
    if raw.isascii():
        return raw.decode("ascii")
    try:
        text = raw.replace(b"\xc0\x80", b"\x00").decode("utf-8")
    except UnicodeDecodeError:
        raise _parse_error("invalid UTF-8 sequence in string") from None
    if _NONCHARACTER.search(text):
        raise _parse_error("invalid UTF-8 sequence in string")
    return text


def _string(token: bytes) -> str:
    """A string token's value. Raises JsonError."""
    body = token[1:-1]
    if b"\\" not in body:
        return _decode(body)
    parts: list[str] = []
    position = 0
    while (backslash := body.find(b"\\", position)) >= 0:
        parts.append(_decode(body[position:backslash]))
        escape = body[backslash + 1]
        if escape == ord("u"):
            text, position = _unicode_escape(token, backslash + 1)
            parts.append(text)
            continue
        if escape not in _SIMPLE_ESCAPES:
            raise _parse_error("invalid escape sequence in string")
        parts.append(_SIMPLE_ESCAPES[escape])
        position = backslash + 2
    parts.append(_decode(body[position:]))
    return "".join(parts)


def _unicode_escape(token: bytes, start: int) -> tuple[str, int]:
    r"""The character of ``\uXXXX`` or of a surrogate pair at ``token[start]``; and the position after it in the
    body."""
    code, end = -1, start + 6
    match = _HEX4.match(token, start)
    if match:
        code = int(match[1], 16)
        if 0xD800 <= code < 0xDC00:
            trail = _HEX4.match(token, end)
            low = int(trail[1], 16) if trail else -1
            paired = 0xDC00 <= low < 0xE000
            code = 0x10000 + ((code & 0x3FF) << 10 | low & 0x3FF) if paired else -1
            end += 6 if paired else 0
    if code < 0 or 0xDC00 <= code < 0xE000 or _NONCHARACTER.match(chr(code)):
        raise _parse_error(f"{decode_leniently(token[start:end])} is not a valid Unicode character")
    return chr(code), end - 1


def _number(token: bytes) -> int | float:
    """An integer where it has no fraction or exponent and fits 64 bits, signed or unsigned; else a float."""
    if len(token) <= 20 and not any(mark in token for mark in (b".", b"e", b"E")):
        value = int(token)
        if -(2**63) <= value < 2**64:
            return value
    return float(token)


def _scalar(token: bytes) -> Any:
    first = token[0]
    if first in b"\"'":
        return _string(token)
    if first in b"-0123456789":
        return _number(token)
    if first in _LETTER:
        if token not in _KEYWORDS:
            raise _parse_error(f"invalid keyword '{token.decode('ascii')}'")
        return _KEYWORDS[token]
    raise _parse_error("expecting value")


class _Frame:
    """A container being filled: ``key`` is that of the value being read; NO_KEY while the key itself is."""

    __slots__ = ("container", "key")

    def __init__(self, container: dict[str, Any] | list[Any]) -> None:
        self.container = container
        self.key: Any = _NO_KEY


_NO_KEY: Final = object()


def parse_tokens(tokens: deque[bytes]) -> Any:
    """The value that the tokens start with. Raises JsonError in QEMU's words. Iterative, because nesting may be 1024
    deep."""
    frames: list[_Frame] = []
    while True:
        token = _pop(tokens)
        container: dict[str, Any] | list[Any] | None = {} if token == b"{" else [] if token == b"[" else None
        if container is None:
            value = _scalar(token)
        elif tokens and tokens[0] == (b"}" if token == b"{" else b"]"):
            tokens.popleft()
            value = container
        else:
            frames.append(_Frame(container))
            continue
        while frames:
            if not _fold(frames[-1], value, tokens):
                break
            value = frames.pop().container
        else:
            return value


def _pop(tokens: deque[bytes]) -> bytes:
    if not tokens:
        raise _parse_error("premature EOI")
    return tokens.popleft()


def _fold(frame: _Frame, value: Any, tokens: deque[bytes]) -> bool:
    """Put a value into its container and take the separator after it. Returns whether that closed the container."""
    container = frame.container
    if isinstance(container, list):
        container.append(value)
        separator = _pop(tokens)
        if separator not in (b",", b"]"):
            raise _parse_error("expected separator in list")
        return separator == b"]"
    if frame.key is _NO_KEY:
        if not isinstance(value, str):
            raise _parse_error("key is not a string in object")
        if _pop(tokens) != b":":
            raise _parse_error("missing : in object pair")
        frame.key = value
        return False
    if frame.key in container:
        raise _parse_error("duplicate key")
    container[frame.key] = value
    frame.key = _NO_KEY
    separator = _pop(tokens)
    if separator not in (b",", b"}"):
        raise _parse_error("expected separator in dict")
    return separator == b"}"


# -- framing
# -----------------------------------------------------------------------------------------------------------

_DEPTHS: Final = {b"{": (1, 0), b"}": (-1, 0), b"[": (0, 1), b"]": (0, -1)}
_INT_EDGE: Final = 2**63

NOTHING: Final = object()
"""What `Parser.next` answers when the input holds no further value."""


class Parser:
    """Cuts the input into values. Feed it bytes of any cut, then ask `next` until it answers NOTHING."""

    def __init__(self) -> None:
        self._lexer = Lexer()
        self._tokens: deque[bytes] = deque()
        self._size = 0
        self._braces = 0
        self._brackets = 0

    def feed(self, data: bytes) -> None:
        self._lexer.feed(data)

    def next(self) -> Any:
        """The next value; NOTHING if there is none yet. Raises JsonError for input that is none; ask again after
        it."""
        if not self._tokens and self._lexer.between_tokens:
            value = self._fast()
            if value is not NOTHING:
                return value
        try:
            while (token := self._lexer.next_token()) is not None:
                if self._count(token):
                    return self._emit()
        except JsonError:
            self._reset()
            raise
        return NOTHING

    def finish(self) -> Any:
        """The input has ended: the last value, or NOTHING. Raises JsonError for one that is cut off."""
        try:
            self._lexer.flush()
        except JsonError:
            self._reset()
            raise
        value = self.next()
        if value is NOTHING and self._tokens:
            return self._emit()
        return value

    def _fast(self) -> Any:
        """The value of a line that needs no precision, or NOTHING."""
        line = self._lexer.take_line()
        if line is None:
            return NOTHING
        if line.isascii() and b"\\" not in line and line.count(b"{") + line.count(b"[") <= 64:
            try:
                value = msgspec.json.decode(line)
            except msgspec.DecodeError:
                pass
            else:
                if isinstance(value, dict) and line.count(b":") == _plain_pairs(value):
                    return value
        self._lexer.put_back(line)
        return NOTHING

    def _count(self, token: bytes) -> bool:
        """Take a token in. Returns whether the brackets seen so far close a value (or can no longer)."""
        braces, brackets = _DEPTHS.get(token, (0, 0))
        self._braces += braces
        self._brackets += brackets
        if self._size + len(token) + 1 > MAX_TOKEN_SIZE:
            raise JsonError("JSON token size limit exceeded")
        if len(self._tokens) + 1 > MAX_TOKEN_COUNT:
            raise JsonError("JSON token count limit exceeded")
        if self._braces + self._brackets > MAX_NESTING:
            raise JsonError("JSON nesting depth limit exceeded")
        self._size += len(token)
        self._tokens.append(token)
        if self._braces < 0 or self._brackets < 0:
            return True
        return self._braces == 0 and self._brackets == 0

    def _emit(self) -> Any:
        tokens = self._tokens
        self._reset()
        return parse_tokens(tokens)

    def _reset(self) -> None:
        self._tokens = deque()
        self._size = self._braces = self._brackets = 0


def _plain_pairs(value: Any) -> int:
    """How many members the value's objects have, or -1 if it holds a number at whose edge QEMU and msgspec may
    differ.

    Fewer members than colons in the line means a duplicate key (or a colon in a string): the precise way decides.
    """
    count, rest = 0, [value]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            count += len(item)
            rest.extend(item.values())
        elif isinstance(item, list):
            rest.extend(item)
        elif isinstance(item, float) or (type(item) is int and not -_INT_EDGE <= item < _INT_EDGE):
            return -1
    return count


def parse_one(data: bytes) -> Any:
    """The one JSON value that ``data`` is, as QEMU reads a JSON option. Raises JsonError, also for none or
    several."""
    parser = Parser()
    parser.feed(data)
    values: list[Any] = []
    for ask in (parser.next, parser.finish):
        while True:
            try:
                value = ask()
            except JsonError:
                if not values:
                    raise
                value = None
            if value is NOTHING:
                break
            values.append(value)
            if len(values) > 1:
                raise JsonError("Expecting at most one JSON value")
    if not values:
        raise JsonError("Expecting a JSON value")
    return values[0]
