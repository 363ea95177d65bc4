"""Certificates for tests, good and bad, made with the ``cryptography`` package.

`folder` lays out what QEMU, libnbd and nbdkit look for: ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem,
client-key.pem. Keys are RSA and used again, because making one takes longer than most tests.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PAST, FUTURE = timedelta(minutes=-5), timedelta(days=2)
HOSTS = ("localhost", "127.0.0.1", "::1")
CLIENT_SUBJECT = (
    (NameOID.COUNTRY_NAME, "GB"),
    (NameOID.LOCALITY_NAME, "London, SE"),
    (NameOID.ORGANIZATION_NAME, "Example Org"),
    (NameOID.COMMON_NAME, "laptop.example"),
)
CLIENT_NAME = r"C=GB,L=London\, SE,O=Example Org,CN=laptop.example"
"""How GnuTLS, and so QEMU, writes `CLIENT_SUBJECT`."""


@functools.cache
def key(name: str) -> RSAPrivateKey:
    """The key of that name, the same in the whole test run."""
    return generate_private_key(public_exponent=65537, key_size=2048)


def private_pem(name: str, *, password: bytes | None = None) -> bytes:
    scheme: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        scheme = serialization.BestAvailableEncryption(password)
    return key(name).private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, scheme)


def subject(*parts: tuple[x509.ObjectIdentifier, str]) -> x509.Name:
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])


def certificate(
    owner: str,
    name: x509.Name,
    *,
    issuer: str = "ca",
    issuer_name: x509.Name | None = None,
    is_ca: bool = False,
    purpose: x509.ObjectIdentifier | None = None,
    hosts: Sequence[str] = (),
    starts: timedelta = PAST,
    ends: timedelta = FUTURE,
) -> bytes:
    """A certificate of ``owner``'s key, signed by ``issuer``'s, as PEM. ``starts`` and ``ends`` count from now."""
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer_name or CA_NAME)
        .public_key(key(owner).public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + starts)
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(_usage(is_ca), critical=True)
        # OpenSSL's strict checks want both, and GnuTLS finds issuers by them.
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key(owner).public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key(issuer).public_key()), critical=False)
    )
    if purpose is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), False)
    return builder.sign(key(issuer), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _usage(is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_encipherment=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


CA_NAME = subject((NameOID.COMMON_NAME, "livedisk test CA"))


def authority(name: str = "ca") -> bytes:
    """A certificate authority's own certificate, as PEM."""
    return certificate(name, CA_NAME, issuer=name, is_ca=True)


def server_certificate(
    *, hosts: Sequence[str] = HOSTS, issuer: str = "ca", starts: timedelta = PAST, ends: timedelta = FUTURE
) -> bytes:
    name = subject((NameOID.COMMON_NAME, "server.example"))
    purpose = ExtendedKeyUsageOID.SERVER_AUTH
    return certificate("server", name, purpose=purpose, hosts=hosts, issuer=issuer, starts=starts, ends=ends)


def client_certificate(*, issuer: str = "ca", starts: timedelta = PAST, ends: timedelta = FUTURE) -> bytes:
    name = subject(*CLIENT_SUBJECT)
    purpose = ExtendedKeyUsageOID.CLIENT_AUTH
    return certificate("client", name, purpose=purpose, issuer=issuer, starts=starts, ends=ends)


def folder(path: Path, **files: bytes | None) -> Path:
    """Make the folder ``path`` with everything in it. ``files`` replaces some (``server_cert=...``), None leaves one out."""
    path.mkdir()
    contents: dict[str, bytes | None] = {
        "ca_cert": authority(),
        "server_cert": server_certificate(),
        "server_key": private_pem("server"),
        "client_cert": client_certificate(),
        "client_key": private_pem("client"),
    }
    for name, content in (contents | files).items():
        if content is not None:
            (path / f"{name.replace('_', '-')}.pem").write_bytes(content)
    return path
