"""``authz-simple``, ``authz-list``, ``authz-list-file``: who may come in, by the name in their certificate.

    -object authz-simple,id=a,identity=CN=laptop.example
    -object '{"qom-type": "authz-list", "id": "a",
              "rules": [{"match": "*,O=Example Org,*", "policy": "allow", "format": "glob"}]}'

The first rule that matches decides, ``policy`` decides where none does. A rule file that is ``refresh``ed is looked at again for
every client; one that cannot be read any more lets nobody in.

Source: QEMU ``qapi/authz.json``, ``authz/simple.c``, ``authz/list.c``, ``authz/listfile.c``. QEMU 10.0.2 documents
``authz-list-file`` but knows it by neither of its two names; here it works by both.
"""

from __future__ import annotations

import enum
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.object_commands import ObjectOptions, object_type
from livedisk.emulator.qmp.qapi import QapiStruct
from livedisk.emulator.qmp.visit import JSON, visit

log = logging.getLogger(__name__)


class Policy(enum.StrEnum):
    """What a rule decides (QEMU's QAuthZListPolicy)."""

    DENY = "deny"
    ALLOW = "allow"


class MatchFormat(enum.StrEnum):
    """How a rule's text is compared (QEMU's QAuthZListFormat): as it stands, or with ``*`` and ``?``."""

    EXACT = "exact"
    GLOB = "glob"


class Rule(QapiStruct):
    """One rule (QEMU's QAuthZListRule)."""

    match: str
    policy: Policy
    format: MatchFormat = MatchFormat.EXACT


class Authz(Protocol):
    """An authorization object."""

    def allows(self, identity: str) -> bool:
        """Whether ``identity`` may come in."""


class AuthzSimpleOptions(ObjectOptions):
    """``identity``: the only one that may come in."""

    identity: str


@dataclass(frozen=True, slots=True)
class AuthzSimple:
    """One name."""

    identity: str

    def allows(self, identity: str) -> bool:
        return identity == self.identity


@object_type("authz-simple", AuthzSimpleOptions)
def make_simple(options: AuthzSimpleOptions) -> AuthzSimple:
    """Nothing to check."""
    return AuthzSimple(options.identity)


class AuthzListOptions(ObjectOptions):
    """``rules`` in their order, and what holds where none matches."""

    policy: Policy = Policy.DENY
    rules: list[Rule] = []


class AuthzList:
    """Rules, compiled."""

    def __init__(self, policy: Policy, rules: list[Rule]) -> None:
        self._policy = policy
        self._rules = [(_pattern(rule), rule.policy) for rule in rules]

    def allows(self, identity: str) -> bool:
        decided = next((policy for pattern, policy in self._rules if pattern.fullmatch(identity)), self._policy)
        return decided is Policy.ALLOW


def _pattern(rule: Rule) -> re.Pattern[str]:
    """GLib's patterns: ``*`` and ``?``, nothing else is special."""
    if rule.format is MatchFormat.EXACT:
        return re.compile(re.escape(rule.match), re.DOTALL)
    words = {"*": ".*", "?": "."}
    # Neighbouring stars are one: each more of them would multiply the time that a long name takes.
    text = re.sub(r"\*+", "*", rule.match)
    return re.compile("".join(words.get(letter) or re.escape(letter) for letter in text), re.DOTALL)


@object_type("authz-list", AuthzListOptions)
def make_list(options: AuthzListOptions) -> AuthzList:
    """Nothing to check."""
    return AuthzList(options.policy, options.rules)


class AuthzListFileOptions(ObjectOptions):
    """``filename``: a JSON file with ``policy`` and ``rules``. ``refresh``: notice when it changes."""

    filename: str
    refresh: bool = True


class _Rules(QapiStruct):
    """The file's content."""

    policy: Policy = Policy.DENY
    rules: list[Rule] = []


class AuthzListFile:
    """Rules from a file, read when it is made and when it changed. Raises LiveDiskError where that cannot be done."""

    def __init__(self, filename: str, *, refresh: bool) -> None:
        self._filename = filename
        self._refresh = refresh
        self._seen = self._identity()
        self._list: AuthzList | None = self._load()

    def allows(self, identity: str) -> bool:
        if self._refresh:
            self._notice_change()
        return self._list is not None and self._list.allows(identity)

    def _notice_change(self) -> None:
        try:
            seen = self._identity()
            if seen != self._seen:
                self._seen, self._list = seen, None
                self._list = self._load()
        except LiveDiskError as error:
            if self._list is not None or self._seen:
                log.warning("%s; nobody is let in until that is mended", error)
            self._seen, self._list = (), None

    def _identity(self) -> tuple[int, ...]:
        try:
            info = os.stat(self._filename)
        except OSError as error:
            raise self._unreadable(error) from None
        return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)

    def _load(self) -> AuthzList:
        try:
            values = msgspec.json.decode(Path(self._filename).read_bytes())
        except OSError as error:
            raise self._unreadable(error) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise LiveDiskError(f"File '{self._filename}' must contain a JSON object: {error}") from None
        if not isinstance(values, dict):
            raise LiveDiskError(f"File '{self._filename}' must contain a JSON object")
        try:
            rules = visit(_Rules, values, JSON)
        except LiveDiskError as error:
            raise LiveDiskError(f"File '{self._filename}': {error}") from None
        return AuthzList(rules.policy, rules.rules)

    def _unreadable(self, error: OSError) -> LiveDiskError:
        return LiveDiskError(f"Unable to read '{self._filename}': {error.strerror}")


def make_list_file(options: AuthzListFileOptions) -> AuthzListFile:
    """Read the file. Raises LiveDiskError."""
    return AuthzListFile(options.filename, refresh=options.refresh)


object_type("authz-list-file", AuthzListFileOptions)(make_list_file)
object_type("authz-listfile", AuthzListFileOptions)(make_list_file)
