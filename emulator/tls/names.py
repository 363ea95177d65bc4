"""A certificate's distinguished name, written as GnuTLS writes it: what authorization rules compare with.

In the order of the certificate, ``C=GB,O=Example Org,CN=laptop.example``, escaped as RFC 4514 says; a type that GnuTLS has no
word for is its number with the value's DER in hexadecimal. Asked from QEMU 10.0.2 (``gnutls_x509_crt_get_dn``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from cryptography import x509

_WORDS: Final = {
    "2.5.4.3": "CN",
    "2.5.4.4": "surName",
    "2.5.4.5": "serialNumber",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.9": "street",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "2.5.4.12": "title",
    "2.5.4.17": "postalCode",
    "2.5.4.42": "givenName",
    "2.5.4.43": "initials",
    "2.5.4.44": "generationQualifier",
    "2.5.4.46": "dnQualifier",
    "2.5.4.65": "pseudonym",
    "0.9.2342.19200300.100.1.1": "UID",
    "0.9.2342.19200300.100.1.25": "DC",
    "1.2.840.113549.1.9.1": "EMAIL",
}
_SPECIAL: Final = frozenset(',+"\\<>;')


def distinguished_name(certificate: bytes) -> str:
    """The name of the subject of a certificate in DER. Raises ValueError where it is no certificate."""
    # Imported here: only who has rules to apply needs it.
    from cryptography.x509 import load_der_x509_certificate

    subject = load_der_x509_certificate(certificate).subject
    return ",".join("+".join(_attribute(attribute) for attribute in part) for part in subject.rdns)


def _attribute(attribute: x509.NameAttribute[str | bytes]) -> str:
    number = attribute.oid.dotted_string
    word = _WORDS.get(number)
    if word is None or isinstance(attribute.value, bytes):
        return f"{word or number}=#{_der(attribute).hex()}"
    return f"{word}={_escaped(attribute.value)}"


def _escaped(value: str) -> str:
    text = "".join(f"\\{letter}" if letter in _SPECIAL else letter for letter in value)
    if text[:1] in ("#", " "):
        text = f"\\{text}"
    if text.endswith(" ") and len(value) > 1:
        text = f"{text[:-1]}\\ "
    return text


def _der(attribute: x509.NameAttribute[str | bytes]) -> bytes:
    """Tag, length and content of the value."""
    value = attribute.value
    content = value if isinstance(value, bytes) else value.encode()
    size = len(content)
    if size < 128:
        length = bytes([size])
    else:
        digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
        length = bytes([0x80 | len(digits)]) + digits
    return bytes([attribute._type.value]) + length + content
