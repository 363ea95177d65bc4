"""TLS of the server and the client on their own: what the specification demands, bad peers, and libnbd."""

from __future__ import annotations

import asyncio
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from kit import certificates, raw_nbd
from kit.libnbd import nbdcopy, nbdinfo, script
from kit.places import pattern
from kit.raw_nbd import ACK, RawClient, go, opt
from livedisk.nbd.client import NbdClient
from livedisk.nbd.client_handshake import ClientHandshake, NegotiationFailed
from livedisk.nbd.tls import ClientTls, ServerTls

from .conftest import Served

TLS_REQUIRED, INVALID, POLICY = (1 << 31 | number for number in (5, 3, 2))


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good certificates."""
    return certificates.folder(tmp_path_factory.mktemp("tls") / "good")


def server_tls(certs: Path, *, admit: Callable[[bytes | None], None] | None = None) -> ServerTls:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs / "server-cert.pem", certs / "server-key.pem")
    context.load_verify_locations(certs / "ca-cert.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return ServerTls(context, admit)


def client_tls(certs: Path, hostname: str | None = "localhost", *, identify: bool = True) -> ClientTls:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = hostname is not None
    context.load_verify_locations(certs / "ca-cert.pem")
    if identify:
        context.load_cert_chain(certs / "client-cert.pem", certs / "client-key.pem")
    return ClientTls(context, hostname)


@pytest.fixture
def secure(serve: Callable[..., Served], certs: Path) -> Served:
    """A server that requires TLS, with an export of 8 MiB."""
    served = serve(tls=server_tls(certs))
    served.export(8 << 20).fill(1 << 20, pattern(3 << 20))
    return served


def uri(served: Served, certs: Path, export: str = "") -> str:
    return f"nbds+unix:///{export}?socket={served.path}&tls-certificates={certs}&tls-hostname=localhost"


def run(coroutine: Callable[[], object]) -> None:
    asyncio.run(coroutine())  # type: ignore[arg-type]


# -- what the specification demands before STARTTLS ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [raw_nbd.LIST, raw_nbd.INFO, raw_nbd.GO, raw_nbd.STRUCTURED, raw_nbd.SET_META, 77])
def test_every_option_before_tls_is_refused(secure: Served, number: int) -> None:
    with RawClient(secure.path) as client:
        client.hello()
        for _ in range(2):
            replies = client.option(opt(number, b"some data"))
            assert replies == [(number, TLS_REQUIRED, f"Option 0x{number:x} not permitted before TLS".encode())]


def test_export_name_before_tls_closes(secure: Served) -> None:
    with RawClient(secure.path) as client:
        client.hello()
        client.send(opt(raw_nbd.EXPORT_NAME))
        assert client.gone()


def test_abort_before_tls_is_answered(secure: Served) -> None:
    with RawClient(secure.path) as client:
        assert client.hello().option(opt(raw_nbd.ABORT)) == [(raw_nbd.ABORT, ACK, b"")]
        assert client.gone()


def test_starttls_with_data_is_refused_and_closes(secure: Served) -> None:
    with RawClient(secure.path) as client:
        replies = client.hello().option(opt(raw_nbd.STARTTLS, b"x"))
        assert replies == [(raw_nbd.STARTTLS, INVALID, b"option 'starttls' has unexpected length")]
        assert client.gone()


def test_starttls_without_tls_is_refused(served: Served) -> None:
    served.export(4096)
    with RawClient(served.path) as client:
        replies = client.hello().option(opt(raw_nbd.STARTTLS))
        assert replies == [(raw_nbd.STARTTLS, POLICY, b"TLS not configured")]
        assert client.option(go())[-1][1] == ACK


def test_options_smuggled_in_behind_starttls_are_not_obeyed(secure: Served) -> None:
    with RawClient(secure.path) as client:
        client.hello()
        client.send(opt(raw_nbd.STARTTLS) + opt(raw_nbd.LIST) + go())
        assert struct.unpack(">QIII", client.take(20))[1:3] == (raw_nbd.STARTTLS, ACK)
        with suppress(raw_nbd.Gone):
            rest = client.take(4096)
            assert b"\x00\x03\xe8\x89\x04\x55\x65\xa9" not in rest, "an option was answered in plain text"
    assert secure.call(secure.server.clients) == 0 or secure.run(_all_gone(secure))


async def _all_gone(served: Served) -> bool:
    while served.server.clients():
        await asyncio.sleep(0.01)
    return True


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.0\r\n\r\n", bytes(1000), b"\x16\x03\x01\x40\x00" + bytes(50)])
def test_garbage_instead_of_a_tls_handshake_closes(secure: Served, garbage: bytes) -> None:
    with RawClient(secure.path) as client:
        assert client.hello().option(opt(raw_nbd.STARTTLS))[-1][1] == ACK
        client.send(garbage)
        client.sock.shutdown(1)
        while data := client.sock.recv(1000):
            assert data[0] == 21, "anything but a TLS alert"
    secure.run(_all_gone(secure))


def test_a_client_that_stalls_in_the_tls_handshake_is_dropped(serve: Callable[..., Served], certs: Path) -> None:
    served = serve(tls=server_tls(certs), handshake_seconds=0.2)
    with RawClient(served.path) as client:
        assert client.hello().option(opt(raw_nbd.STARTTLS))[-1][1] == ACK
        assert client.gone()


# -- inside TLS --------------------------------------------------------------------------------------------------------


class TlsRawClient(RawClient):
    """A raw client that has gone through STARTTLS by Python's own blocking sockets."""

    def __init__(self, path: str, certs: Path) -> None:
        super().__init__(path)
        assert self.hello().option(opt(raw_nbd.STARTTLS))[-1][1] == ACK
        tls = client_tls(certs)
        self.sock = tls.context.wrap_socket(self.sock, server_hostname=tls.hostname)


def test_starttls_twice_is_refused(secure: Served, certs: Path) -> None:
    with TlsRawClient(secure.path, certs) as client:
        assert client.option(opt(raw_nbd.STARTTLS)) == [(raw_nbd.STARTTLS, INVALID, b"TLS already enabled")]
        assert client.option(go())[-1][1] == ACK


def test_options_and_requests_pipelined_in_one_record(secure: Served, certs: Path) -> None:
    with TlsRawClient(secure.path, certs) as client:
        reads = [raw_nbd.request(raw_nbd.READ, (1 << 20) + i * 512, 512, cookie=i) for i in range(50)]
        client.send(opt(raw_nbd.LIST) * 20 + go() + b"".join(reads))
        for _ in range(40):
            client.take(struct.unpack(">QIII", client.take(20))[3])
        kind = 0
        while kind != ACK:
            _, _, kind, length = struct.unpack(">QIII", client.take(20))
            client.take(length)
        for i in range(50):
            assert client.reply(512) == [("simple", 0, i, pattern(3 << 20)[i * 512 : (i + 1) * 512])]


def test_a_client_that_says_goodbye_and_waits_is_let_go(secure: Served, certs: Path) -> None:
    """TLS's half-close: the socket stays open, and nothing makes it readable any more."""
    with TlsRawClient(secure.path, certs) as client:
        assert client.option(go())[-1][1] == ACK
        client.send(raw_nbd.request(raw_nbd.READ, 0, 512))
        assert client.reply(512)[0][1] == 0
        assert isinstance(client.sock, ssl.SSLSocket)
        client.sock.unwrap()
        secure.run(_all_gone(secure))


def test_a_client_that_does_not_read_is_not_read_from(secure: Served, certs: Path) -> None:
    """Replies pile up to the socket's size, no further; then all of them are right."""
    count, size = 64, 256 << 10
    with TlsRawClient(secure.path, certs) as client:
        assert client.option(go())[-1][1] == ACK
        reads = b"".join(raw_nbd.request(raw_nbd.READ, i * 512, size, cookie=i) for i in range(count))
        sender = threading.Thread(target=client.send, args=(reads,))
        sender.start()
        sender.join()
        content = bytes(secure.server.exports[""].data)  # type: ignore[attr-defined]
        seen = set()
        for _ in range(count):
            ((_, failed, cookie, data),) = client.reply(size)
            assert failed == 0
            assert data == content[cookie * 512 : cookie * 512 + size]
            seen.add(cookie)
        assert len(seen) == count


def test_our_client_moves_data_of_all_sizes(secure: Served, certs: Path) -> None:
    async def main() -> None:
        client = await NbdClient.connect_unix(secure.path, tls=client_tls(certs))
        data = pattern(5 << 20)
        await asyncio.gather(*(client.write(at, data[at : at + 70_001]) for at in range(0, len(data), 70_001)))
        await client.write(6 << 20, data[: 2 << 20], fua=True)
        assert await client.read(0, len(data)) == data
        parts = await asyncio.gather(*(client.read(at, 777) for at in range(0, 777 * 200, 777)))
        assert b"".join(parts) == data[: 777 * 200]
        await client.disconnect()

    run(main)
    secure.run(_all_gone(secure))


def test_libnbd(secure: Served, certs: Path) -> None:
    info = nbdinfo(uri(secure, certs))
    assert info["export-size"] == 8 << 20
    with pytest.raises(AssertionError, match="TLS"):
        nbdinfo(secure.uri())
    code = "result = [h.get_tls_negotiated(), h.pread(4, 1 << 20).hex()]"
    before = f"h.set_tls(nbd.TLS_REQUIRE); h.set_tls_certificates({str(certs)!r}); h.set_tls_verify_peer(False)"
    found = script(f"nbd+unix:///?socket={secure.path}", code, before=before)
    assert found == [True, pattern(4).hex()]


def test_nbdcopy_both_ways(secure: Served, certs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    nbdcopy(uri(secure, certs), str(copy))
    expected = bytes(1 << 20) + pattern(3 << 20) + bytes(4 << 20)
    assert copy.read_bytes() == expected
    target = secure.export(8 << 20, "target")
    target.fill(0, b"old" * 1000)
    nbdcopy(str(copy), uri(secure, certs, "target"), "--connections=4", "--requests=64")
    assert target.data == expected


# -- certificates ------------------------------------------------------------------------------------------------------


def refused(served: Served, tls: ClientTls) -> str:
    """Why a client of ours could not read a byte."""

    async def main() -> str:
        try:
            client = await NbdClient.connect_unix(served.path, tls=tls)
        except (NegotiationFailed, OSError) as error:
            return str(error)
        await client.disconnect()
        raise AssertionError("the client was let in")

    return asyncio.run(main())


def test_the_client_checks_the_servers_name(secure: Served, certs: Path) -> None:
    assert "not valid for 'elsewhere.example'" in refused(secure, client_tls(certs, "elsewhere.example"))


def test_the_client_checks_who_signed(secure: Served, tmp_path: Path) -> None:
    other = certificates.folder(tmp_path / "other", ca_cert=certificates.authority("other"))
    assert "certificate verification failed" in refused(secure, client_tls(other))


def test_the_client_refuses_an_expired_server(serve: Callable[..., Served], certs: Path, tmp_path: Path) -> None:
    expired = certificates.server_certificate(starts=timedelta(days=-2), ends=timedelta(days=-1))
    served = serve(tls=server_tls(certificates.folder(tmp_path / "old", server_cert=expired)))
    served.export(4096)
    assert "certificate has expired" in refused(served, client_tls(certs))


@pytest.mark.parametrize("fault", ["none", "expired", "stranger"])
def test_the_server_refuses_bad_clients(secure: Served, certs: Path, tmp_path: Path, fault: str) -> None:
    bad = {
        "none": {},
        "expired": {"client_cert": certificates.client_certificate(starts=timedelta(-2), ends=timedelta(-1))},
        "stranger": {"client_cert": certificates.client_certificate(issuer="other")},
    }[fault]
    folder = certificates.folder(tmp_path / "bad", **bad)
    assert refused(secure, client_tls(folder, identify=fault != "none"))
    secure.run(_all_gone(secure))


def test_admit_turns_away(serve: Callable[..., Served], certs: Path) -> None:
    seen: list[bytes | None] = []

    def admit(certificate: bytes | None) -> None:
        seen.append(certificate)
        raise PermissionError("not you")

    served = serve(tls=server_tls(certs, admit=admit))
    served.export(4096)
    assert refused(served, client_tls(certs))
    served.run(_all_gone(served))
    assert seen == [ssl.PEM_cert_to_DER_cert((certs / "client-cert.pem").read_text())]


# -- the client's side of the negotiation ------------------------------------------------------------------------------


def client_core(*answers: bytes) -> ClientHandshake:
    core = ClientHandshake("x", tls=True)
    core.receive(raw_nbd.GREETING)
    assert core.take_output() == struct.pack(">I", 3) + opt(raw_nbd.STARTTLS)
    for answer in answers:
        core.receive(answer)
    return core


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, number, kind, len(data)) + data


def test_the_client_starts_with_tls_and_then_negotiates_afresh() -> None:
    core = client_core(reply(raw_nbd.STARTTLS, ACK))
    assert core.starting_tls
    assert core.take_output() == b""
    core.secured()
    assert core.take_output() == opt(raw_nbd.EXTENDED)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (reply(raw_nbd.STARTTLS, POLICY, b"no way"), r"Denied by server for option 5 \(starttls\)"),
        (reply(raw_nbd.STARTTLS, ACK) + reply(raw_nbd.EXTENDED, ACK), "plain text"),
        (reply(raw_nbd.GO, ACK), "Unexpected reply"),
    ],
)
def test_the_client_does_without_no_tls(answer: bytes, text: str) -> None:
    with pytest.raises(NegotiationFailed, match=text):
        client_core(answer)


def test_the_client_takes_no_oldstyle_server_for_tls() -> None:
    with pytest.raises(NegotiationFailed, match="does not support STARTTLS"):
        ClientHandshake("x", tls=True).receive(b"NBDMAGICIHAVEOPT\x00\x00")


def test_the_client_says_that_tls_is_required(secure: Served) -> None:
    with pytest.raises(NegotiationFailed, match="Server requires TLS"):
        asyncio.run(NbdClient.connect_unix(secure.path))
