"""Whether certificates are any good, said when they are loaded and not when the first client fails.

QEMU's ``sanity-check``: dates, basic constraints, key usage, purpose, and whether the authority signed. The messages are QEMU's
(``crypto/tlscredsx509.c``), asked from 10.0.2.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from livedisk.emulator.errors import LiveDiskError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

log = logging.getLogger(__name__)


def check(authority: str, own: str | None, *, server: bool) -> None:
    """Check the authorities in the file ``authority`` and the chain in the file ``own``. Raises LiveDiskError."""
    authorities = _load(authority, "CA certificate")
    for certificate in authorities:
        _check_one(certificate, authority, "CA")
    if own is None:
        return
    chain = _load(own, "certificate")
    _check_one(chain[0], own, "server" if server else "client")
    reason = _distrust(chain, authorities)
    if reason:
        raise LiveDiskError(f"Our own certificate {own} failed validation against {authority}: {reason}")


def _load(path: str, what: str) -> list[Certificate]:
    from cryptography.x509 import load_pem_x509_certificates

    try:
        with open(path, "rb") as file:
            return load_pem_x509_certificates(file.read())
    except OSError as error:
        raise LiveDiskError(f"Cannot load {what} list {path}: {error.strerror}") from None
    except ValueError:
        raise LiveDiskError(f"Unable to import certificate {path}: it holds no certificate in PEM") from None


def _check_one(certificate: Certificate, path: str, role: str) -> None:
    """``role``: CA, server or client."""
    now = datetime.now(UTC)
    if certificate.not_valid_after_utc < now:
        raise LiveDiskError(f"The {role} certificate {path} has expired")
    if certificate.not_valid_before_utc > now:
        raise LiveDiskError(f"The {role} certificate {path} is not yet active")
    _check_constraints(certificate, path, role)
    _check_usage(certificate, path, role)
    if role != "CA":
        _check_purpose(certificate, path, role)


def _check_constraints(certificate: Certificate, path: str, role: str) -> None:
    from cryptography.x509 import BasicConstraints, ExtensionNotFound

    try:
        is_ca = certificate.extensions.get_extension_for_class(BasicConstraints).value.ca
    except ExtensionNotFound:
        if role == "CA":
            raise LiveDiskError(f"The certificate {path} is missing basic constraints for a CA") from None
        return
    if is_ca and role != "CA":
        raise LiveDiskError(f"The certificate {path} basic constraints show a CA, but we need one for a {role}")
    if not is_ca and role == "CA":
        raise LiveDiskError(f"The certificate {path} basic constraints do not show a CA")


def _check_usage(certificate: Certificate, path: str, role: str) -> None:
    from cryptography.x509 import ExtensionNotFound, KeyUsage

    try:
        found = certificate.extensions.get_extension_for_class(KeyUsage)
    except ExtensionNotFound:
        return
    usage = found.value
    lacking = []
    if role == "CA":
        lacking += [] if usage.key_cert_sign else ["certificate signing"]
    else:
        lacking += [] if usage.digital_signature else ["digital signature"]
        lacking += [] if usage.key_encipherment else ["key encipherment"]
    for purpose in lacking:
        text = f"Certificate {path} usage does not permit {purpose}"
        if found.critical:
            raise LiveDiskError(text)
        log.warning("%s", text)


def _check_purpose(certificate: Certificate, path: str, role: str) -> None:
    from cryptography.x509 import ExtendedKeyUsage, ExtensionNotFound
    from cryptography.x509.oid import ExtendedKeyUsageOID as Purpose

    try:
        found = certificate.extensions.get_extension_for_class(ExtendedKeyUsage)
    except ExtensionNotFound:
        return
    wanted = Purpose.SERVER_AUTH if role == "server" else Purpose.CLIENT_AUTH
    if wanted in found.value or Purpose.ANY_EXTENDED_KEY_USAGE in found.value:
        return
    text = f"Certificate {path} purpose does not allow use with a TLS {role}"
    if found.critical:
        raise LiveDiskError(text)
    log.warning("%s", text)


def _distrust(chain: list[Certificate], authorities: list[Certificate]) -> str:
    """Why nobody who trusts ``authorities`` trusts the first of ``chain``; "" where they do."""
    own, *between = chain
    for _ in range(len(between) + 1):
        if any(own == one or _signed(own, one) for one in authorities):
            return ""
        issuer = next((one for one in between if one != own and _signed(own, one)), None)
        if issuer is None:
            break
        own = issuer
    return "The certificate hasn't got a known issuer"


def _signed(certificate: Certificate, issuer: Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
