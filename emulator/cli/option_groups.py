"""Options that are lists of ``key=value`` under an id: what ``-set`` changes, ``-readconfig`` gives, and queries describe.

``-set GROUP.ID.KEY=VALUE`` adds to an option that stands before it; ``-readconfig FILE`` stands for the options that the file
has as ``[GROUP "ID"]`` with lines ``KEY = "VALUE"``. Both are worked off before anything is built. An option given as JSON is in
no group. Source: QEMU ``util/qemu-config.c`` (qemu_config_foreach, config_parse_qdict), ``system/vl.c`` (qemu_set_option).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from livedisk.emulator.cli.options import Given, Option
from livedisk.emulator.errors import ParameterError

GROUPS: Final = ("add-fd", "chardev", "device", "drive", "mon", "name", "object")
_SET: Final = re.compile(r"([^.]+)\.([^.]+)\.([^=]+)=(.*)\Z", re.DOTALL)
_SECTION: Final = re.compile(r'\[\s*([A-Za-z0-9_-]+)(?:\s+"([^"]*)")?\s*\]\Z')
_ENTRY: Final = re.compile(r'([A-Za-z0-9._-]+)\s*=\s*"([^"]*)"\Z')


def expand(given: Sequence[Given], table: Sequence[Option]) -> Iterator[tuple[Given, Exception | None]]:
    """The options without ``-set`` and ``-readconfig``; the first of these that fails comes with its error, as the last."""
    known = {option.name: option for option in table}
    found: list[Given] = []
    for one in given:
        try:
            if one.name == "set":
                _change(found, one.value)
            elif one.name == "readconfig":
                found += _read(one.value, known)
            else:
                found.append(one)
        except (ParameterError, OSError) as error:
            yield one, error
            return
    for one in found:
        yield one, None


def _change(found: list[Given], text: str) -> None:
    parts = _SET.match(text)
    if parts is None:
        raise ParameterError(f'can\'t parse: "{text}"')
    group, ident, key, value = parts.groups()
    _check(group)
    for place, one in enumerate(found):
        if one.name == group and not one.value.startswith("{") and f"id={ident}" in one.value.split(","):
            found[place] = replace(one, value=f"{one.value},{key}={_quoted(value)}")
            return
    raise ParameterError(f'there is no {group} "{ident}" defined')


def _read(path: str, known: dict[str, Option]) -> list[Given]:
    sections: list[tuple[str, list[str]]] = []
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            numbered = list(enumerate(lines, 1))
    except OSError as error:
        raise ParameterError(f"Could not open '{path}': {error.strerror}") from None
    for number, line in numbered:
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if section := _SECTION.match(text):
            _check(section[1])
            sections.append((section[1], [f"id={_quoted(section[2])}"] if section[2] else []))
        elif entry := _ENTRY.match(text):
            if not sections:
                raise ParameterError("no group defined")
            sections[-1][1].append(f"{entry[1]}={_quoted(entry[2])}")
        else:
            raise ParameterError(f"{path}:{number}: parse error")
    return [Given(known[name], f"-{name}", ",".join(fields)) for name, fields in sections]


def _check(group: str) -> None:
    if group not in GROUPS:
        raise ParameterError(f"There is no option group '{group}'")


def _quoted(value: str) -> str:
    return value.replace(",", ",,")


# -- what is in them ---------------------------------------------------------------------------------------------------
_DRIVE: Final = {
    "string": "aio detect-zeroes discard driver file format if media node-name rerror throttling.group werror",
    "boolean": "active auto-read-only cache.direct cache.no-flush cache.writeback copy-on-read force-share read-only snapshot "
    "stats-account-failed stats-account-invalid",
    "number": "bus index unit throttling.iops-size",
}
_LIMITS: Final = [
    f"throttling.{what}-{way}{more}"
    for what in ("bps", "iops")
    for way in ("total", "read", "write")
    for more in ("", "-max", "-max-length")
]


def parameters(option: str) -> list[tuple[str, str]]:
    """The keys of an option and their types (QEMU's CommandLineParameterType); none for an option that is no list, or takes
    whatever its driver or type takes."""
    # Imported here: a daemon that starts has no use for them.
    from livedisk.emulator.qmp.chardev import BACKENDS, MonitorOptions

    if option == "drive":
        found = [(name, kind) for kind, names in _DRIVE.items() for name in names.split()]
        return sorted(found + [(name, "number") for name in _LIMITS])
    if option == "chardev":
        every = {pair for cls in BACKENDS.values() for pair in _members(cls)}
        return sorted(every | {("backend", "string")})
    if option == "mon":
        return _members(MonitorOptions)
    return {
        "add-fd": [("fd", "number"), ("opaque", "string"), ("set", "number")],
        "name": [("debug-threads", "boolean"), ("guest", "string"), ("process", "string")],
    }.get(option, [])


def _members(cls: type) -> list[tuple[str, str]]:
    from livedisk.emulator.qmp.model import plain_object

    return sorted(
        (member.name, _kind(member.annotation)) for member in plain_object(cls).members if member.name != "id"
    )


def _kind(annotation: object) -> str:
    text = str(annotation)
    kinds = (("bool", "boolean"), ("'size'", "size"), ("int", "number"))
    return next((kind for part, kind in kinds if part in text), "string")
