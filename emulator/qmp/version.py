"""Which version is reported where QEMU reports its own.

Tools ask ``query-version`` (and read the greeting) to decide what they may use: libvirt, qmpbackup and virtnbdbackup
compare ``qemu.major`` and ``qemu.minor``. Every behaviour here is that of QEMU 10.0.2, so that is the version told;
``package``, which is free text in QEMU, says who answers.
"""

from __future__ import annotations

from typing import Final

from livedisk.emulator.qmp.qapi import QapiStruct

QEMU_VERSION: Final = (10, 0, 2)
LIVEDISK_VERSION: Final = "0.1.0"
"""As in ``pyproject.toml``, which a test compares; asking the installed metadata would cost a fifth of the start-up."""


class VersionTriple(QapiStruct):
    major: int
    minor: int
    micro: int


class VersionInfo(QapiStruct):
    """``package`` names livedisk and its version."""

    qemu: VersionTriple
    package: str


_info: VersionInfo | None = None


def version_info() -> VersionInfo:
    """What query-version answers and the greeting tells."""
    global _info
    if _info is None:
        major, minor, micro = QEMU_VERSION
        triple = VersionTriple(major=major, minor=minor, micro=micro)
        _info = VersionInfo(qemu=triple, package=f"livedisk {LIVEDISK_VERSION}")
    return _info
