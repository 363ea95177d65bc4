"""Makes a certificate authority and certificates for one server and its clients.

RSA, because QEMU's sanity check wants certificates that may encipher keys, which those of elliptic curves must not. Everything is
made in memory first; files are made anew or not at all, private keys readable by their owner alone.

The names are those that QEMU, libnbd and nbdkit look for: ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem,
client-key.pem. ca-key.pem signs more certificates later; neither server nor client needs it.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from livedisk.emulator.errors import LiveDiskError

KEY_BITS: Final = 3072
_PRIVATE, _PUBLIC = 0o600, 0o644


def make(hosts: Sequence[str], days: int, client: str) -> Mapping[str, bytes]:
    """File names and contents in PEM. ``hosts``: names and IP addresses of the server; ``client``: the client's common name.

    Raises LiveDiskError for a name that no certificate can hold.
    """
    authority = _Authority(days)
    alternatives = [_alternative(host) for host in dict.fromkeys(hosts)]
    server_key, server = authority.issue(hosts[0], ExtendedKeyUsageOID.SERVER_AUTH, alternatives)
    client_key, client_certificate = authority.issue(client, ExtendedKeyUsageOID.CLIENT_AUTH, [])
    return {
        "ca-key.pem": authority.key,
        "ca-cert.pem": authority.certificate,
        "server-key.pem": server_key,
        "server-cert.pem": server,
        "client-key.pem": client_key,
        "client-cert.pem": client_certificate,
    }


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all of ``files`` into ``folder``, which is made if need be. Raises LiveDiskError; then none of them is there."""
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            if os.path.lexists(folder / name):
                raise LiveDiskError(
                    f"{folder / name} exists; nothing was written",
                    hint="choose another folder, or move the old certificates away",
                )
        for name, content in files.items():
            path = folder / name
            mode = _PRIVATE if name.endswith("-key.pem") else _PUBLIC
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            written.append(path)
            with open(descriptor, "wb") as file:
                file.write(content)
    except OSError as error:
        for path in written:
            with suppress(OSError):
                path.unlink()
        raise LiveDiskError(f"{error.filename or folder}: {error.strerror}") from None


class _Authority:
    """Signs certificates that are good for ``days`` from now."""

    def __init__(self, days: int) -> None:
        self._key = generate_private_key(public_exponent=65537, key_size=KEY_BITS)
        # A little in the past: the other end's clock may be behind.
        self._start = datetime.now(UTC) - timedelta(hours=1)
        self._end = datetime.now(UTC) + timedelta(days=days)
        # Told apart by a number: two authorities of the same name in one list would be taken for each other.
        number = x509.random_serial_number()
        self._name = _name(f"livedisk CA {number:x}"[:28])
        self.key = _key_pem(self._key)
        builder = self._builder(self._name, self._key, number)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.certificate = self._signed(builder.add_extension(_usage(ca=True), critical=True))

    def issue(
        self, name: str, purpose: x509.ObjectIdentifier, alternatives: Sequence[x509.GeneralName]
    ) -> tuple[bytes, bytes]:
        """A key and its certificate."""
        key = generate_private_key(public_exponent=65537, key_size=KEY_BITS)
        builder = self._builder(_name(name), key, x509.random_serial_number())
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(ca=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return _key_pem(key), self._signed(builder)

    def _builder(self, name: x509.Name, key: RSAPrivateKey, number: int) -> x509.CertificateBuilder:
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(number)
            .not_valid_before(self._start)
            .not_valid_after(self._end)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(issuer, critical=False)
        )

    def _signed(self, builder: x509.CertificateBuilder) -> bytes:
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_encipherment=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: RSAPrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def _name(common_name: str) -> x509.Name:
    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    except ValueError as error:
        raise LiveDiskError(f"'{common_name}' cannot be the name in a certificate: {error}") from None


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode())
    except (ValueError, UnicodeError) as error:
        raise LiveDiskError(f"'{host}' is neither a host name nor an address: {error}") from None
