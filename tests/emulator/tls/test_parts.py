"""Names, rules, priorities and the sanity check, each on its own and against what QEMU says of the same."""

from __future__ import annotations

import gc
import json
import os
import shutil
import ssl
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kit import certificates
from kit.peers import run
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.object_commands import Objects, SecretOptions
from livedisk.emulator.tls.authz import (
    AuthzListFile,
    AuthzListFileOptions,
    AuthzListOptions,
    MatchFormat,
    Policy,
    Rule,
    make_list,
    make_list_file,
)
from livedisk.emulator.tls.credentials import Endpoint, TlsCredsX509Options, client_tls, server_tls
from livedisk.emulator.tls.names import distinguished_name
from livedisk.emulator.tls.priority import versions

TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


def der(pem: bytes) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode())


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_are_written_as_gnutls_writes_them() -> None:
    """What QEMU 10.0.2 printed for this very name when it denied it."""
    parts = [
        (NameOID.COUNTRY_NAME, "GB"),
        (NameOID.STATE_OR_PROVINCE_NAME, "Lon"),
        (NameOID.LOCALITY_NAME, 'London, SE+"x"<y>;z\\w'),
        (NameOID.ORGANIZATION_NAME, " Ex Ørg "),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, "#unit"),
        (NameOID.EMAIL_ADDRESS, "a@b"),
        (NameOID.DOMAIN_COMPONENT, "dc"),
        (NameOID.USER_ID, "uid"),
        (NameOID.SERIAL_NUMBER, "123"),
        (NameOID.GIVEN_NAME, "Giv"),
        (NameOID.SURNAME, "Sur"),
        (NameOID.TITLE, "Tit"),
        (NameOID.STREET_ADDRESS, "Str"),
        (NameOID.POSTAL_CODE, "PC"),
        (NameOID.PSEUDONYM, "Pseu"),
        (NameOID.DN_QUALIFIER, "dnq"),
        (NameOID.INITIALS, "ini"),
        (NameOID.GENERATION_QUALIFIER, "Jr"),
        (x509.ObjectIdentifier("1.2.3.4.5"), "odd"),
        (NameOID.COMMON_NAME, "lap"),
    ]
    written = distinguished_name(der(certificates.certificate("client", certificates.subject(*parts))))
    assert written == (
        r"C=GB,ST=Lon,L=London\, SE\+\"x\"\<y\>\;z\\w,O=\ Ex Ørg\ ,OU=\#unit,EMAIL=a@b,DC=dc,UID=uid,serialNumber=123,"
        r"givenName=Giv,surName=Sur,title=Tit,street=Str,postalCode=PC,pseudonym=Pseu,dnQualifier=dnq,initials=ini,"
        r"generationQualifier=Jr,1.2.3.4.5=#0c036f6464,CN=lap"
    )


# -- rules -------------------------------------------------------------------------------------------------------------


def rules(*given: tuple[str, Policy, MatchFormat], policy: Policy = Policy.DENY) -> AuthzListOptions:
    listed = [Rule(match=match, policy=how, format=form) for match, how, form in given]
    return AuthzListOptions(qom_type="authz-list", id="a", policy=policy, rules=listed)


EXACT, GLOB = MatchFormat.EXACT, MatchFormat.GLOB


def test_the_first_rule_that_matches_decides() -> None:
    listed = make_list(
        rules(("CN=bad*", Policy.DENY, GLOB), ("CN=bad one", Policy.ALLOW, EXACT), ("CN=?", Policy.ALLOW, GLOB))
    )
    assert not listed.allows("CN=bad one")
    assert listed.allows("CN=x")
    assert not listed.allows("CN=xy")
    assert make_list(rules(policy=Policy.ALLOW)).allows("anybody")
    assert not make_list(rules()).allows("anybody")


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        ("a[bc]", "a[bc]", True),
        ("a[bc]", "ab", False),
        ("*.example", "a.example", True),
        ("*.example", "axexample", False),
        ("*", "line\nline", True),
        ("a", "ab", False),
        ("***x", "abcx", True),
    ],
)
def test_globs_know_stars_and_question_marks_only(pattern: str, text: str, matches: bool) -> None:
    assert make_list(rules((pattern, Policy.ALLOW, GLOB))).allows(text) is matches


def listed_in(path: Path, *, refresh: bool = True) -> AuthzListFile:
    options = AuthzListFileOptions(qom_type="authz-list-file", id="a", filename=str(path), refresh=refresh)
    return make_list_file(options)


def put(path: Path, text: str) -> None:
    """Replace the file as editors do, so that it is another one even within a tick of the clock."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def test_a_file_of_rules_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    put(path, json.dumps({"rules": [{"match": "CN=x", "policy": "allow"}]}))
    fresh, fixed = listed_in(path), listed_in(path, refresh=False)
    assert fresh.allows("CN=x")
    assert not fresh.allows("CN=y")
    put(path, json.dumps({"policy": "allow", "rules": [{"match": "CN=x", "policy": "deny"}]}))
    assert (fresh.allows("CN=x"), fresh.allows("CN=y")) == (False, True)
    assert (fixed.allows("CN=x"), fixed.allows("CN=y")) == (True, False)


@pytest.mark.parametrize("content", ["{", "[]", '{"rules": 3}', '{"rules": [{"match": "x"}]}', '{"x": 1}', None])
def test_a_file_of_rules_that_became_unreadable_lets_nobody_in(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "rules.json"
    put(path, '{"policy": "allow"}')
    listed = listed_in(path)
    assert listed.allows("x")
    if content is None:
        path.unlink()
    else:
        put(path, content)
    assert not listed.allows("x")
    assert not listed.allows("x")
    with pytest.raises(LiveDiskError, match=r"rules\.json"):
        listed_in(path)
    put(path, '{"policy": "allow"}')
    assert listed.allows("x")


# -- priorities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        ("NORMAL", (TLS12, TLS13)),
        ("NORMAL:-VERS-TLS1.3", (TLS12, TLS12)),
        ("NORMAL:!VERS-TLS1.2", (TLS13, TLS13)),
        ("NORMAL:-VERS-ALL:+VERS-TLS1.2", (TLS12, TLS12)),
        ("SECURE128:-VERS-TLS1.0:-VERS-TLS1.1", (TLS12, TLS13)),
    ],
)
def test_priorities_choose_versions(priority: str, expected: tuple[ssl.TLSVersion, ssl.TLSVersion]) -> None:
    assert versions(priority) == expected


@pytest.mark.parametrize(
    ("priority", "named"),
    [
        ("NONSENSE", "'NONSENSE'"),
        ("@QEMU,SYSTEM", "'@QEMU,SYSTEM'"),
        ("NORMAL:-AES-128-GCM", "'-AES-128-GCM'"),
        ("NORMAL:%COMPAT", "'%COMPAT'"),
        ("NORMAL:+VERS-TLS1.1", "too old"),
        ("NORMAL:-VERS-ALL", "no version"),
        ("", "''"),
        ("NORMAL:", "''"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(priority: str, named: str) -> None:
    with pytest.raises(LiveDiskError, match=named):
        versions(priority)


# -- credentials: the same answers as QEMU's -----------------------------------------------------------------------------


def ours(folder: Path, endpoint: str, **options: str) -> str:
    """What making the credentials says; "" if they are good."""
    objects = Objects()
    objects.add(SecretOptions(qom_type="secret", id="pw", data="sesame"))
    given = {name.replace("-", "_"): value for name, value in options.items()}
    values = TlsCredsX509Options(
        qom_type="tls-creds-x509", id="t", dir=str(folder), endpoint=Endpoint(endpoint), **given
    )  # type: ignore[arg-type]
    try:
        objects.add(values)
    except LiveDiskError as error:
        return str(error)
    return ""


def qemus(folder: Path, endpoint: str) -> str:
    """What qemu-img says of the same credentials."""
    creds = f"tls-creds-x509,id=t,dir={folder},endpoint={endpoint}"
    done = run(["qemu-img", "info", "--object", creds, "--image-opts", "driver=null-co,size=512"], expect=None)
    return done.stderr.strip().removeprefix("qemu-img: ") if done.returncode else ""


EXPIRED = {"starts": timedelta(days=-3), "ends": timedelta(days=-1)}
EARLY = {"starts": timedelta(days=1), "ends": timedelta(days=3)}
SERVER = certificates.subject((NameOID.COMMON_NAME, "server"))
FAULTS = {
    "good": ("server", {}),
    "good client": ("client", {}),
    "no authority": ("server", {"ca_cert": None}),
    "no certificate": ("server", {"server_cert": None}),
    "no key": ("server", {"server_key": None}),
    "client without certificate": ("client", {"client_cert": None, "client_key": None}),
    "expired server": ("server", {"server_cert": lambda: certificates.server_certificate(**EXPIRED)}),
    "early server": ("server", {"server_cert": lambda: certificates.server_certificate(**EARLY)}),
    "expired client": ("client", {"client_cert": lambda: certificates.client_certificate(**EXPIRED)}),
    "stranger": ("server", {"server_cert": lambda: certificates.server_certificate(issuer="other")}),
    "authority for a server": (
        "server",
        {"server_cert": lambda: certificates.certificate("server", SERVER, is_ca=True)},
    ),
    "server for an authority": ("server", {"ca_cert": certificates.server_certificate}),
    "expired authority": (
        "server",
        {
            "ca_cert": lambda: certificates.certificate(
                "ca", certificates.CA_NAME, is_ca=True, starts=timedelta(days=-3), ends=timedelta(days=-1)
            )
        },
    ),
    "client's purpose": (
        "server",
        {"server_cert": lambda: certificates.certificate("server", SERVER, purpose=ExtendedKeyUsageOID.CLIENT_AUTH)},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_credentials_are_judged_as_qemu_judges_them(tmp_path: Path, fault: str) -> None:
    endpoint, changes = FAULTS[fault]
    made = {name: change() if callable(change) else change for name, change in changes.items()}  # type: ignore[attr-defined]
    folder = certificates.folder(tmp_path / "tls", **made)
    assert ours(folder, endpoint) == qemus(folder, endpoint)


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    """QEMU goes on without the certificate, and every server then says that there is none."""
    folder = certificates.folder(tmp_path / "tls", client_key=None)
    assert ours(folder, "client") == f"Unable to access credentials {folder}/client-key.pem: No such file or directory"


def test_without_the_sanity_check_an_expired_certificate_loads(tmp_path: Path) -> None:
    folder = certificates.folder(tmp_path / "tls", server_cert=certificates.server_certificate(**EXPIRED))
    assert ours(folder, "server", sanity_check=False) == ""  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ca_cert", "server_cert", "server_key"])
def test_files_of_rubbish_are_named(tmp_path: Path, name: str) -> None:
    folder = certificates.folder(tmp_path / "tls", **{name: b"rubbish\n"})
    assert name.replace("_", "-") in ours(folder, "server")
    assert name.replace("_", "-") in ours(folder, "server", sanity_check=False)  # type: ignore[arg-type]


def test_a_key_that_is_another_certificates_is_refused(tmp_path: Path) -> None:
    folder = certificates.folder(tmp_path / "tls", server_key=certificates.private_pem("client"))
    assert "key values mismatch" in ours(folder, "server")


def test_an_encrypted_key_needs_its_password(tmp_path: Path) -> None:
    folder = certificates.folder(tmp_path / "tls", server_key=certificates.private_pem("server", password=b"sesame"))
    assert "Cannot load certificate" in ours(folder, "server")
    assert ours(folder, "server", passwordid="pw") == ""
    assert ours(folder, "server", passwordid="nobody") == "No secret with id 'nobody'"


def test_psk_needs_a_newer_python_or_its_keys(tmp_path: Path) -> None:
    from livedisk.emulator.tls.credentials import TlsCredsPskOptions

    (tmp_path / "keys.psk").write_text("qemu:0123456789abcdef\n")
    options = TlsCredsPskOptions(qom_type="tls-creds-psk", id="p", dir=str(tmp_path))
    if hasattr(ssl.SSLContext, "set_psk_client_callback"):
        Objects().add(options)
        with pytest.raises(LiveDiskError, match="Username eve not found"):
            Objects().add(TlsCredsPskOptions(qom_type="tls-creds-psk", id="p", dir=str(tmp_path), username="eve"))
    else:
        with pytest.raises(LiveDiskError, match=r"needs Python 3\.13"):
            Objects().add(options)


def test_files_are_read_when_the_object_is_made_and_keys_forgotten_when_it_goes(tmp_path: Path) -> None:
    folder = certificates.folder(tmp_path / "tls")
    objects = Objects()
    objects.add(TlsCredsX509Options(qom_type="tls-creds-x509", id="t", dir=str(folder), endpoint=Endpoint.CLIENT))
    shutil.rmtree(folder)
    one, other = client_tls(objects, "t", "one"), client_tls(objects, "t", "other")
    assert (one.hostname, other.hostname) == ("one", "other")
    assert one.context.check_hostname
    kept = weakref.ref(one.context)
    objects.delete("t")
    del one, other
    gc.collect()
    assert kept() is None


def test_ends_are_not_mixed_up(certs: Path) -> None:
    objects = Objects()
    objects.add(TlsCredsX509Options(qom_type="tls-creds-x509", id="c", dir=str(certs)))
    with pytest.raises(LiveDiskError, match="Expected TLS credentials for a server endpoint"):
        server_tls(objects, "c", None)
    with pytest.raises(LiveDiskError, match="No TLS credentials with id 'x'"):
        client_tls(objects, "x", "localhost")
    with pytest.raises(LiveDiskError, match="No hostname for certificate validation"):
        client_tls(objects, "c", None)
    assert client_tls(objects, "c", "localhost").context.check_hostname
