"""GnuTLS priority strings, as far as OpenSSL can be told the same: which versions of TLS are spoken.

    NORMAL                               1.2 and 1.3 (also PERFORMANCE, SECURE128)
    NORMAL:-VERS-TLS1.3                  1.2 only
    NORMAL:-VERS-ALL:+VERS-TLS1.3        1.3 only

Ciphers are OpenSSL's own choice of strong ones. Whatever else a string asks for is refused by name: a restriction that is not
applied is worse than none. Source: GnuTLS manual, "Priority strings".
"""

from __future__ import annotations

import ssl
from typing import Final

from livedisk.emulator.errors import LiveDiskError

_BASES: Final = ("NORMAL", "PERFORMANCE", "SECURE128")
_VERSIONS: Final = {"VERS-TLS1.2": ssl.TLSVersion.TLSv1_2, "VERS-TLS1.3": ssl.TLSVersion.TLSv1_3}
_TOO_OLD: Final = ("VERS-SSL3.0", "VERS-TLS1.0", "VERS-TLS1.1")
_GROUPS: Final = ("VERS-ALL", "VERS-TLS-ALL")


def versions(priority: str) -> tuple[ssl.TLSVersion, ssl.TLSVersion]:
    """The oldest and the newest version that ``priority`` allows. Raises LiveDiskError naming what is not understood."""
    base, *changes = priority.split(":")
    if base not in _BASES:
        raise _refusal(priority, base)
    allowed = set(_VERSIONS.values())
    for change in changes:
        sign, token = change[:1], change[1:]
        if sign not in ("+", "-", "!") or token not in (*_VERSIONS, *_TOO_OLD, *_GROUPS):
            raise _refusal(priority, change)
        if sign == "+" and token in _TOO_OLD:
            raise LiveDiskError(
                f"Unable to set TLS session priority {priority}: {token} is too old, TLS begins with 1.2 here"
            )
        named = {_VERSIONS[token]} if token in _VERSIONS else set(_VERSIONS.values()) if token in _GROUPS else set()
        allowed = allowed | named if sign == "+" else allowed - named
    if not allowed:
        raise LiveDiskError(f"Unable to set TLS session priority {priority}: no version is left")
    return min(allowed), max(allowed)


def _refusal(priority: str, token: str) -> LiveDiskError:
    return LiveDiskError(
        f"Unable to set TLS session priority {priority}: '{token}' is not supported",
        hint=f"Known: {', '.join(_BASES)}, then :-VERS-ALL, :+VERS-TLS1.2, :-VERS-TLS1.3 and the like",
    )
