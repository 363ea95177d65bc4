"""NBD over TLS between livedisk and the real peers, and the monitor's socket over TLS."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kit import certificates
from kit.libnbd import nbdcopy, nbdinfo
from kit.livedisk import Daemon, Serve, executable, livedisk
from kit.nbdkit import Nbdkit
from kit.peers import PeerFailed, run
from kit.places import pattern, write_file
from kit.process import Process
from kit.qemu import QemuNbd, StorageDaemon, qemu_img
from kit.qmp import QmpError
from livedisk.emulator.qmp.object_commands import Objects
from livedisk.emulator.tls.credentials import TlsCredsPskOptions, client_tls
from livedisk.nbd.client import NbdClient
from livedisk.nbd.tls import ClientTls

DATA = pattern(2 << 20)


def creds(folder: Path, endpoint: str, *more: str, id: str = "tls0") -> str:
    return ",".join([f"tls-creds-x509,id={id},dir={folder},endpoint={endpoint}", *more])


def client_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "ca-cert.pem")
    context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return context


def daemon(folder: Path, certs: Path, *options: str, server: str = "", creds_options: str = "verify-peer=on") -> Daemon:
    """livedisk with a disk of 2 MiB behind an NBD server that requires TLS."""
    image = write_file(folder / "disk.raw", DATA)
    nbd = f"addr.type=unix,addr.path={folder}/tls.nbd,tls-creds=tls0{server}"
    started = Daemon(
        folder,
        *("--object", creds(certs, "server", creds_options), *options),
        *("--blockdev", f"driver=file,node-name=f,filename={image}", "--blockdev", "driver=raw,node-name=d,file=f"),
        *("--nbd-server", nbd, "--export", "nbd,id=e,node-name=d,name=,writable=on"),
        nbd=False,
    )
    started.wait_for_socket(folder / "tls.nbd")
    return started


def uri(folder: Path, certs: Path) -> str:
    return f"nbds+unix:///?socket={folder}/tls.nbd&tls-certificates={certs}"


@pytest.fixture
def served(short_path: Path, certs: Path) -> Iterator[Path]:
    """The folder of a livedisk daemon that requires TLS."""
    with daemon(short_path, certs):
        yield short_path


def test_libnbd_copies_both_ways(served: Path, certs: Path, tmp_path: Path) -> None:
    nbdcopy(uri(served, certs), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == DATA
    other = write_file(tmp_path / "other", DATA[::-1])
    nbdcopy(str(other), uri(served, certs))
    assert (served / "disk.raw").read_bytes() == DATA[::-1]


def test_qemu_reads_and_writes(served: Path, certs: Path, tmp_path: Path) -> None:
    node = f"driver=nbd,server.type=unix,server.path={served}/tls.nbd,tls-creds=tls0,tls-hostname=localhost"
    given = ("--object", creds(certs, "client"), "--image-opts", node)
    run(["qemu-io", *given, "-c", "write -P 5 4k 1M", "-c", "read -P 5 4k 1M", "-c", "write -z 0 4k", "-c", "flush"])
    qemu_img("convert", *given, "-O", "raw", str(tmp_path / "copy"))
    expected = bytes(4096) + b"\5" * (1 << 20) + DATA[(1 << 20) + 4096 :]
    assert (tmp_path / "copy").read_bytes() == (served / "disk.raw").read_bytes() == expected
    wrong = node.replace("localhost", "elsewhere.example")
    refused = run(["qemu-img", "info", *given[:3], wrong], expect=1)
    assert "does not match" in refused.stderr


def test_a_client_without_tls_is_told_so(served: Path) -> None:
    refused = run(["qemu-img", "info", f"nbd+unix:///?socket={served}/tls.nbd"], expect=1)
    assert "TLS" in refused.stderr


def test_one_version_only(short_path: Path, certs: Path) -> None:
    with daemon(short_path, certs, creds_options="priority=NORMAL:-VERS-TLS1.3") as server:
        assert nbdinfo(uri(short_path, certs))["export-size"] == len(DATA)
        context = client_context(certs)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        with pytest.raises(Exception, match="TLS handshake failed"):
            asyncio.run(NbdClient.connect_unix(f"{short_path}/tls.nbd", tls=ClientTls(context, "localhost")))
        server.wait_for_output("TLS handshake failed: unsupported protocol")


def test_without_verify_peer_anybody_comes_in(short_path: Path, certs: Path, tmp_path: Path) -> None:
    nobody = certificates.folder(tmp_path / "nobody", client_cert=None, client_key=None)
    with daemon(short_path, certs), pytest.raises(PeerFailed):
        nbdinfo(uri(short_path, nobody))
    with daemon(short_path, certs, creds_options="verify-peer=off"):
        assert nbdinfo(uri(short_path, nobody))["export-size"] == len(DATA)


# -- authorization -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Daemon, StorageDaemon])
def test_authorization_as_qemus(short_path: Path, certs: Path, kind: type[StorageDaemon]) -> None:
    """By the exact name, by a glob, by a file; denied until the rules are there."""
    address = {"type": "unix", "data": {"path": f"{short_path}/tls.nbd"}}
    with kind(short_path, "--object", creds(certs, "server"), nbd=False) as server, server.qmp() as qmp:
        qmp.call("blockdev-add", {"driver": "null-co", "node-name": "d", "size": 4096, "read-zeroes": True})
        qmp.call("nbd-server-start", {"addr": address, "tls-creds": "tls0", "tls-authz": "rules"})
        qmp.call("block-export-add", {"type": "nbd", "id": "e", "node-name": "d", "name": ""})
        outcomes = {}
        for name, rules in {
            "none": None,
            "me": {"qom-type": "authz-simple", "identity": certificates.CLIENT_NAME},
            "another": {"qom-type": "authz-simple", "identity": "CN=laptop.example"},
            "glob": {
                "qom-type": "authz-list",
                "rules": [
                    {"match": "*,CN=desk*", "policy": "deny", "format": "glob"},
                    {"match": "C=??,*,CN=laptop.example", "policy": "allow", "format": "glob"},
                ],
            },
            "denied": {
                "qom-type": "authz-list",
                "policy": "allow",
                "rules": [{"match": certificates.CLIENT_NAME, "policy": "deny"}],
            },
        }.items():
            if rules is not None:
                qmp.call("object-add", {"id": "rules", **rules})
            done = run(["nbdinfo", "--size", uri(short_path, certs)], expect=None)
            outcomes[name] = done.returncode == 0
            if rules is not None:
                qmp.call("object-del", {"id": "rules"})
        assert outcomes == {"none": False, "me": True, "another": False, "glob": True, "denied": False}
        assert f"TLS x509 authz check for {certificates.CLIENT_NAME} is denied" in server.output()


def test_a_file_of_rules(short_path: Path, certs: Path) -> None:
    rules = short_path / "rules.json"
    rules.write_text("{}")
    given = ("--object", f"authz-list-file,id=rules,filename={rules}")
    with daemon(short_path, certs, *given, server=",tls-authz=rules"):
        with pytest.raises(PeerFailed):
            nbdinfo(uri(short_path, certs))
        (short_path / "new").write_text(json.dumps({"rules": [{"match": certificates.CLIENT_NAME, "policy": "allow"}]}))
        (short_path / "new").replace(rules)
        assert nbdinfo(uri(short_path, certs))["export-size"] == len(DATA)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"tls-creds": "nobody"}, "No TLS credentials with id 'nobody'"),
        ({"tls-creds": "io"}, "Object with id 'io' is not TLS credentials"),
        ({"tls-creds": "client"}, "Expected TLS credentials for a server endpoint"),
        ({"tls-authz": "rules"}, "Parameter 'tls-authz' needs 'tls-creds'"),
    ],
)
def test_servers_that_cannot_be_started(short_path: Path, certs: Path, arguments: dict[str, Any], text: str) -> None:
    options = ("--object", creds(certs, "client", id="client"), "--object", "iothread,id=io")
    address = {"type": "unix", "data": {"path": f"{short_path}/tls.nbd"}}
    with Daemon(short_path, *options, nbd=False) as server, server.qmp() as qmp:
        with pytest.raises(QmpError) as refused:
            qmp.call("nbd-server-start", {"addr": address, **arguments})
        assert refused.value.desc == text
        qmp.call("nbd-server-start", {"addr": address})


# -- our client on other people's servers --------------------------------------------------------------------------------


def exercise(path: Path, certs: Path) -> None:
    """Write and read through our client."""

    async def main() -> None:
        client = await NbdClient.connect_unix(str(path), tls=ClientTls(client_context(certs), "localhost"))
        await client.write(512, DATA[: 1 << 20])
        await asyncio.gather(*(client.write(at, DATA[:512]) for at in range(1 << 20, 2 << 20, 4096)))
        assert await client.read(512, (1 << 20) - 512) == DATA[: (1 << 20) - 512]
        assert await client.read((1 << 20) + 4096, 512) == DATA[:512]
        await client.disconnect()

    asyncio.run(main())


def test_our_client_with_qemu_nbd(short_path: Path, certs: Path) -> None:
    image = write_file(short_path / "disk.raw", bytes(2 << 20))
    with QemuNbd(short_path, image, "--object", creds(certs, "server"), "--tls-creds", "tls0") as server:
        exercise(server.socket, certs)


def test_our_client_with_nbdkit(short_path: Path, certs: Path) -> None:
    options = ("--tls=require", f"--tls-certificates={certs}", "--tls-verify-peer")
    with Nbdkit(short_path, *options, "memory", "2M") as server:
        exercise(server.socket, certs)


# -- the monitor ---------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def greeting(port: int, context: ssl.SSLContext | None) -> bytes:
    with closing(socket.create_connection(("127.0.0.1", port), timeout=10)) as plain:
        try:
            if context is None:
                plain.sendall(b'{"execute": "qmp_capabilities"}\n')
                return plain.recv(1000)
            with context.wrap_socket(plain, server_hostname="localhost") as secure:
                return secure.recv(1000)
        except OSError:
            return b""


def test_qmp_over_tls(short_path: Path, certs: Path, tmp_path: Path) -> None:
    port = free_port()
    chardev = f"socket,id=c,host=127.0.0.1,port={port},server=on,wait=off,tls-creds=tls0,tls-authz=rules"
    given = ("--object", creds(certs, "server"), "--object", "authz-list,id=rules,policy=deny", "--chardev", chardev)
    with Daemon(short_path, *given, "--monitor", "chardev=c", nbd=False) as server, server.qmp() as qmp:
        context = client_context(certs)
        assert greeting(port, context) == b""
        server.wait_for_output("turned away: TLS x509 authz check")
        qmp.call("object-del", {"id": "rules"})
        qmp.call("object-add", {"qom-type": "authz-simple", "id": "rules", "identity": certificates.CLIENT_NAME})
        assert greeting(port, context).startswith(b'{"QMP"')
        assert b"QMP" not in greeting(port, None)
        stranger = certificates.folder(
            tmp_path / "stranger", client_cert=certificates.client_certificate(issuer="other")
        )
        assert greeting(port, client_context(stranger)) == b""
        assert greeting(port, context).startswith(b'{"QMP"')


@pytest.mark.parametrize(
    ("chardev", "text"),
    [
        ("path=/tmp/x,tls-creds=server", "'tls_creds' option is incompatible with 'unix' address type"),
        ("host=localhost,port=0,tls-creds=nobody", "No TLS credentials with id 'nobody'"),
        ("host=localhost,port=0,tls-authz=a", "'tls_authz' option requires 'tls_creds' option"),
        ("host=localhost,port=0,tls-creds=client", "Expected TLS credentials for a server endpoint"),
    ],
)
def test_monitors_that_cannot_be_started(certs: Path, chardev: str, text: str) -> None:
    made = ("--object", creds(certs, "client", id="client"), "--object", creds(certs, "server", id="server"))
    options = (*made, "--chardev", f"socket,id=c,server=on,wait=off,{chardev}")
    assert text in livedisk("daemon", *options, expect=1).stderr
    assert text in run(["qemu-storage-daemon", *options], expect=1).stderr


# -- one command each ----------------------------------------------------------------------------------------------------


def test_init_makes_what_serve_and_the_peers_need(short_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    said = livedisk("tls", "init", folder, "--hostname", "disk.example", "--ip", "192.0.2.7", "--days", "3").stdout
    assert "disk.example" in said
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes.pop("ca-key.pem") == modes.pop("server-key.pem") == modes.pop("client-key.pem") == 0o600
    assert modes == {"ca-cert.pem": 0o644, "server-cert.pem": 0o644, "client-cert.pem": 0o644}
    image = write_file(tmp_path / "disk.raw", DATA)
    with Serve(short_path, image, "--tls", str(folder), format="raw") as server:
        server.wait_for_output("Ctrl-C")
        assert f"nbds+unix:///?socket={server.nbd_socket}&tls-certificates={folder}" in server.output()
        exercise(server.nbd_socket, folder)
        for host in ("disk.example", "192.0.2.7", "127.0.0.1"):
            tls = ClientTls(client_context(folder), host)
            asyncio.run(_greet(server.nbd_socket, tls))
        node = f"driver=nbd,server.type=unix,server.path={server.nbd_socket},tls-creds=tls0,tls-hostname=disk.example"
        qemu_img("info", "--object", creds(folder, "client"), "--image-opts", node)
    with QemuNbd(short_path, image, "--object", creds(folder, "server"), "--tls-creds", "tls0") as other:
        exercise(other.socket, folder)


async def _greet(path: Path, tls: ClientTls) -> None:
    client = await NbdClient.connect_unix(str(path), tls=tls)
    await client.disconnect()


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "server-key.pem").write_text("precious")
    refused = livedisk("tls", "init", tmp_path, expect=1)
    assert "server-key.pem exists; nothing was written" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["server-key.pem"]
    assert (tmp_path / "server-key.pem").read_text() == "precious"


@pytest.mark.parametrize("option", [("--ip", "disk.example"), ("--days", "0"), ("--days", "x")])
def test_init_checks_its_options(tmp_path: Path, option: tuple[str, str]) -> None:
    livedisk("tls", "init", tmp_path / "x", *option, expect=2)
    assert not (tmp_path / "x").exists()


def test_serve_names_the_file_that_is_missing(tmp_path: Path) -> None:
    image = write_file(tmp_path / "disk.raw", DATA)
    refused = livedisk("serve", image, "-f", "raw", "--tls", tmp_path, expect=1)
    assert f"Unable to access credentials {tmp_path}/ca-cert.pem" in refused.stderr


@pytest.mark.skipif(not hasattr(ssl.SSLContext, "set_psk_server_callback"), reason="pre-shared keys need Python 3.13")
def test_pre_shared_keys(short_path: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("qemu:0123456789abcdef0123456789abcdef\nother:00ff\n")
    objects = ("--object", f"tls-creds-psk,id=tls0,dir={tmp_path},endpoint=server")
    with Process(
        [
            *(executable(), "daemon", *objects, "--blockdev", "driver=null-co,node-name=d,size=4096,read-zeroes=on"),
            *("--nbd-server", f"addr.type=unix,addr.path={short_path}/tls.nbd,tls-creds=tls0"),
            *("--export", "nbd,id=e,node-name=d,name="),
        ],
        log=short_path / "log",
    ) as server:
        server.wait_for_socket(short_path / "tls.nbd")
        node = f"driver=nbd,server.type=unix,server.path={short_path}/tls.nbd,tls-creds=tls0"
        client = f"tls-creds-psk,id=tls0,dir={tmp_path},endpoint=client"
        qemu_img("info", "--object", client, "--image-opts", node)
        run(["nbdinfo", f"nbds+unix://qemu@/?socket={short_path}/tls.nbd&tls-psk-file={tmp_path}/keys.psk"])
        objects_here = Objects()
        objects_here.add(TlsCredsPskOptions(qom_type="tls-creds-psk", id="c", dir=str(tmp_path)))
        asyncio.run(_greet(short_path / "tls.nbd", client_tls(objects_here, "c", None)))
        image = write_file(tmp_path / "disk.raw", DATA)
        with QemuNbd(short_path, image, *objects, "--tls-creds", "tls0") as other:
            asyncio.run(_greet(other.socket, client_tls(objects_here, "c", None)))
        (tmp_path / "keys.psk").write_text("qemu:ffffffffffffffffffffffffffffffff\n")
        run(["qemu-img", "info", "--object", client, "--image-opts", node], expect=1)


# -- the driver ----------------------------------------------------------------------------------------------------------


def node(path: Path, certs: Path, **more: str) -> dict[str, Any]:
    server = {"type": "unix", "path": str(path)}
    return {"driver": "nbd", "node-name": "r", "server": server, "tls-creds": "tls0", **more}


@pytest.mark.parametrize("kind", [Daemon, StorageDaemon])
def test_driver_nbd_as_qemus(short_path: Path, certs: Path, kind: type[StorageDaemon]) -> None:
    """A node over TLS, on QEMU's server, read and written through an export of its own."""
    image = write_file(short_path / "disk.raw", DATA)
    with (
        QemuNbd(short_path, image, "--object", creds(certs, "server"), "--tls-creds", "tls0") as server,
        kind(short_path, "--object", creds(certs, "client"), "--object", creds(certs, "server", id="s")) as client,
        client.qmp() as qmp,
    ):
        refused = {}
        for name, given in {
            "no name": {},
            "wrong name": {"tls-hostname": "elsewhere.example"},
            "no creds": {"tls-creds": "nobody", "tls-hostname": "localhost"},
            "server's": {"tls-creds": "s", "tls-hostname": "localhost"},
        }.items():
            with pytest.raises(QmpError) as error:
                qmp.call("blockdev-add", node(server.socket, certs, **given))
            refused[name] = error.value.desc
        assert refused["no name"] == "No hostname for certificate validation"
        assert refused["no creds"] == "No TLS credentials with id 'nobody'"
        assert refused["server's"] == "Expected TLS credentials for a client endpoint"
        assert "elsewhere.example" in refused["wrong name"] or "hostname" in refused["wrong name"]
        qmp.call("blockdev-add", node(server.socket, certs, **{"tls-hostname": "localhost"}))
        qmp.call("block-export-add", {"type": "nbd", "id": "e", "node-name": "r", "name": "", "writable": True})
        run(["qemu-io", "-f", "raw", client.uri(), "-c", "write -P 9 4k 1M", "-c", "read -P 9 4k 1M", "-c", "flush"])
        nbdcopy(client.uri(), str(short_path / "copy"))
    expected = DATA[:4096] + b"\x09" * (1 << 20) + DATA[(1 << 20) + 4096 :]
    assert (short_path / "copy").read_bytes() == image.read_bytes() == expected


def test_driver_nbd_reconnects_over_tls(short_path: Path, certs: Path) -> None:
    image = write_file(short_path / "disk.raw", DATA)
    arguments = ("--object", creds(certs, "server"), "--tls-creds", "tls0")
    first = QemuNbd(short_path, image, *arguments)
    try:
        with Daemon(short_path, "--object", creds(certs, "client")) as client, client.qmp() as qmp:
            given = {**node(first.socket, certs, **{"tls-hostname": "localhost"}), "reconnect-delay": 30}
            qmp.call("blockdev-add", given)
            qmp.call("block-export-add", {"type": "nbd", "id": "e", "node-name": "r", "name": ""})
            nbdcopy(client.uri(), str(short_path / "one"))
            first.kill()
            with QemuNbd(short_path, image, *arguments):
                nbdcopy(client.uri(), str(short_path / "two"))
        assert (short_path / "one").read_bytes() == (short_path / "two").read_bytes() == DATA
    finally:
        first.kill()
