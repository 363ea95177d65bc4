"""``tls-creds-x509`` and ``tls-creds-psk``: a folder of PEM files, or of keys, becomes an `ssl.SSLContext`.

    tls-creds-x509   dir holds ca-cert.pem; for a server server-cert.pem, server-key.pem and perhaps ca-crl.pem; for a client
                     perhaps client-cert.pem and client-key.pem. ``verify-peer``: the other end has to show a certificate that
                     the authority signed; off, a server asks for none and a client believes anybody.
    tls-creds-psk    dir holds keys.psk, lines of ``username:hexadecimal key``. Needs Python 3.13, whose ssl first has it.

TLS 1.2 and up, no compression, no renegotiation, no session tickets. Files are read when the object is made: certificates
that are renewed take a new object. Source: QEMU ``qapi/crypto.json``, ``crypto/tlscreds*.c``; messages asked from QEMU 10.0.2.
"""

from __future__ import annotations

import enum
import os
import ssl
from typing import Any, Final, Protocol

from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.object_commands import ObjectOptions, Objects, Secret, object_type
from livedisk.emulator.qmp.qapi import UNSET, UnsetType
from livedisk.emulator.tls.authz import Authz
from livedisk.emulator.tls.names import distinguished_name
from livedisk.emulator.tls.priority import versions
from livedisk.emulator.tls.x509 import check
from livedisk.nbd.tls import ClientTls, ServerTls


class Endpoint(enum.StrEnum):
    """Which end of a connection the credentials are for (QEMU's QCryptoTLSCredsEndpoint)."""

    CLIENT = "client"
    SERVER = "server"


class TlsCredsOptions(ObjectOptions):
    """What all credentials have (QEMU's TlsCredsProperties). ``priority``: see `priority`."""

    verify_peer: bool = True
    dir: str | UnsetType = UNSET
    endpoint: Endpoint = Endpoint.CLIENT
    priority: str | UnsetType = UNSET


class TlsCredsX509Options(TlsCredsOptions):
    """``passwordid``: a secret that the private key is encrypted with. ``sanity-check``: see `x509`."""

    sanity_check: bool = True
    passwordid: str | UnsetType = UNSET


class TlsCredsPskOptions(TlsCredsOptions):
    """``username``: whom a client says to be."""

    username: str | UnsetType = UNSET


class TlsCreds(Protocol):
    """Credentials of any kind. ``context``: what to speak TLS with, once they are complete."""

    endpoint: Endpoint
    context: ssl.SSLContext

    @property
    def needs_hostname(self) -> bool:
        """Whether a client has to say whom it expects; its context then insists that the server's certificate is for that."""


class TlsCredsX509:
    """Certificates of one end. `complete` loads them, once the objects that it refers to can be found."""

    def __init__(self, options: TlsCredsX509Options) -> None:
        self.endpoint = options.endpoint
        self.context: ssl.SSLContext
        self._options = options

    @property
    def needs_hostname(self) -> bool:
        """See `TlsCreds`."""
        return self._options.verify_peer

    def complete(self, objects: Objects) -> None:
        """Load and check everything. Raises LiveDiskError in QEMU's words."""
        passwordid = self._options.passwordid
        password = _secret(objects, passwordid) if isinstance(passwordid, str) else b""
        server = self.endpoint is Endpoint.SERVER
        authority = self._file("ca-cert.pem")
        certificate = self._file(f"{self.endpoint}-cert.pem", needed=server)
        if self._options.sanity_check:
            assert authority is not None
            check(authority, certificate, server=server)
        self.context = self._load(password)

    def _load(self, password: bytes) -> ssl.SSLContext:
        context = _fresh(self.endpoint, self._options.priority)
        server = self.endpoint is Endpoint.SERVER
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED if self._options.verify_peer else ssl.CERT_NONE
        context.check_hostname = self._options.verify_peer and not server
        self._load_authority(context)
        certificate = self._file(f"{self.endpoint}-cert.pem", needed=server)
        key = self._file(f"{self.endpoint}-key.pem", needed=server or certificate is not None)
        if certificate is not None and key is not None:
            try:
                # With an empty answer OpenSSL fails where it would ask at the terminal.
                context.load_cert_chain(certificate, key, password=password)
            except (ssl.SSLError, OSError) as error:
                raise LiveDiskError(f"Cannot load certificate '{certificate}' & key '{key}': {_words(error)}") from None
        return context

    def _load_authority(self, context: ssl.SSLContext) -> None:
        authority, revoked = self._file("ca-cert.pem"), self._file("ca-crl.pem", needed=False)
        assert authority is not None
        try:
            context.load_verify_locations(authority)
        except (ssl.SSLError, OSError) as error:
            raise LiveDiskError(f"Cannot load CA certificate '{authority}': {_words(error)}") from None
        if revoked is not None:
            try:
                context.load_verify_locations(revoked)
            except (ssl.SSLError, OSError) as error:
                raise LiveDiskError(f"Cannot load CRL '{revoked}': {_words(error)}") from None
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF

    def _file(self, name: str, *, needed: bool = True) -> str | None:
        return _credential(self._options.dir, name, needed=needed)


@object_type("tls-creds-x509", TlsCredsX509Options)
def make_x509(options: TlsCredsX509Options) -> TlsCredsX509:
    """Loaded by `TlsCredsX509.complete`."""
    return TlsCredsX509(options)


class TlsCredsPsk:
    """Keys that both ends know. `complete` loads them."""

    def __init__(self, options: TlsCredsPskOptions) -> None:
        self.endpoint = options.endpoint
        self.context: ssl.SSLContext
        self._options = options
        self._keys: dict[str, bytes] = {}

    @property
    def needs_hostname(self) -> bool:
        """Never: whoever knows the key is the server."""
        return False

    def complete(self, objects: Objects) -> None:
        """Load the keys. Raises LiveDiskError."""
        if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
            raise LiveDiskError(
                "tls-creds-psk needs Python 3.13 or later, whose ssl module first supports pre-shared keys",
                hint="use tls-creds-x509 ('livedisk tls init' makes the certificates), or a newer Python",
            )
        path = _credential(self._options.dir, "keys.psk")
        assert path is not None
        self._keys = _read_keys(path)
        if self.endpoint is Endpoint.CLIENT and self._username not in self._keys:
            raise LiveDiskError(f"Username {self._username} not found in PSK credentials {path}")
        self.context = self._make_context()

    @property
    def _username(self) -> str:
        return self._options.username if isinstance(self._options.username, str) else "qemu"

    def _make_context(self) -> ssl.SSLContext:
        """There is no name to check, the key is the proof."""
        keys, username = self._keys, self._username
        made: Any = _fresh(self.endpoint, self._options.priority)
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
        made.set_ciphers("PSK")
        if self.endpoint is Endpoint.SERVER:
            made.set_psk_server_callback(lambda identity: keys.get(identity or "", b""))
        else:
            made.set_psk_client_callback(lambda _hint: (username, keys[username]))
        context: ssl.SSLContext = made
        return context


@object_type("tls-creds-psk", TlsCredsPskOptions)
def make_psk(options: TlsCredsPskOptions) -> TlsCredsPsk:
    """Loaded by `TlsCredsPsk.complete`."""
    return TlsCredsPsk(options)


# -- what NBD asks -----------------------------------------------------------------------------------------------------


def server_tls(objects: Objects, creds: str, authz: str | None) -> ServerTls:
    """TLS of a server with the credentials and the rules of these ids. Raises LiveDiskError in QEMU's words.

    The rules are looked up for every client, so that they may be made, and changed, afterwards; without them nobody comes in.
    """
    found = _find(objects, creds, Endpoint.SERVER)
    if authz is None:
        return ServerTls(found.context)

    def admit(certificate: bytes | None) -> None:
        if certificate is None:
            raise PermissionError("TLS authz check needs a client certificate, and there is none (verify-peer=off?)")
        name = distinguished_name(certificate)
        rules = objects.find_any(authz)
        if not hasattr(rules, "allows"):
            raise PermissionError(f"Cannot find QAuthZ object ID {authz}")
        allowed: Authz = rules
        if not allowed.allows(name):
            raise PermissionError(f"TLS x509 authz check for {name} is denied")

    return ServerTls(found.context, admit)


def client_tls(objects: Objects, creds: str, hostname: str | None) -> ClientTls:
    """TLS of a client that expects the server to be ``hostname``. Raises LiveDiskError in QEMU's words."""
    found = _find(objects, creds, Endpoint.CLIENT)
    if hostname is None and found.needs_hostname:
        raise LiveDiskError(
            "No hostname for certificate validation",
            hint="A Unix socket has no name to check: give the server's as tls-hostname",
        )
    return ClientTls(found.context, hostname)


def _find(objects: Objects, name: str, endpoint: Endpoint) -> TlsCreds:
    found = objects.find_any(name)
    if found is None:
        raise LiveDiskError(f"No TLS credentials with id '{name}'")
    if not isinstance(found, TlsCredsX509 | TlsCredsPsk):
        raise LiveDiskError(f"Object with id '{name}' is not TLS credentials")
    if found.endpoint is not endpoint:
        raise LiveDiskError(f"Expected TLS credentials for a {endpoint} endpoint")
    return found


# -- files -------------------------------------------------------------------------------------------------------------

_LINE: Final = "lines of 'username:key', the key in hexadecimal"


def _credential(folder: str | UnsetType, name: str, *, needed: bool = True) -> str | None:
    """The path of a file of credentials; None where it is not there and need not be. Raises LiveDiskError."""
    if not isinstance(folder, str):
        raise LiveDiskError("Missing 'dir' property value")
    path = os.path.join(folder, name)
    try:
        os.stat(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not needed:
            return None
        raise LiveDiskError(f"Unable to access credentials {path}: {error.strerror}") from None
    return path


def _read_keys(path: str) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LiveDiskError(f"Cannot load PSK keys {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        username, colon, digits = line.rpartition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not colon or not key:
            raise LiveDiskError(f"Cannot load PSK keys {path}: line {number} is not one of {_LINE}")
        keys[username.removeprefix("#")] = key
    return keys


def _secret(objects: Objects, name: str) -> bytes:
    found = objects.find_any(name)
    if found is None:
        raise LiveDiskError(f"No secret with id '{name}'")
    if not isinstance(found, Secret):
        raise LiveDiskError(f"Object with id '{name}' is not a secret")
    return found.data


def _fresh(endpoint: Endpoint, priority: str | UnsetType) -> ssl.SSLContext:
    server = endpoint is Endpoint.SERVER
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    oldest, newest = versions(priority if isinstance(priority, str) else "NORMAL")
    context.minimum_version, context.maximum_version = oldest, newest
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    if server:
        context.num_tickets = 0
    return context


def _words(error: OSError) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else str(error.strerror or error)
