"""The same exports opened by QEMU and by livedisk: the same replies, the same names in queries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kit.peers import run
from kit.places import free_port, short_folder
from kit.process import Process
from kit.qemu import QemuNbd, create, qemu_img
from kit.side_by_side import NO_MACHINE, Step, compare, step

SIZE = 1 << 20
LONG = "x" * 4097


class Servers:
    """Real servers: ``path/rw`` and ``path/ro`` (exports of those names), ``path/image`` (a qcow2 image with a relative backing
    file name, export ""), and a TCP ``port`` (export "a b/c")."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.port = str(free_port())

    def at(self, name: str, **options: Any) -> dict[str, Any]:
        server = {"type": "unix", "path": f"{self.path}/{name}.nbd"}
        return {"driver": "nbd", "node-name": "n", "server": server, **options}

    def tcp(self, host: str = "127.0.0.1", port: str | None = None, **options: Any) -> dict[str, Any]:
        server = {"type": "inet", "host": host, "port": port or self.port}
        return {"driver": "nbd", "node-name": "n", "server": server, **options}


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with short_folder() as path, ExitStack() as stack:
        servers = Servers(path)
        disk = path / "disk"
        disk.write_bytes(bytes(SIZE))
        image = create(path / "image", SIZE)
        qemu_img("rebase", "-u", "-F", "raw", "-b", "base.raw", image)
        for name, file, options in (
            ("rw", disk, ("-x", "rw")),
            ("ro", disk, ("-x", "ro", "-r")),
            ("image", image, ()),
        ):
            stack.enter_context(QemuNbd(path, file, *options, name=name))
        tcp = stack.enter_context(
            Process(
                ["qemu-nbd", "-t", "-e", "8", "-f", "raw", "-b", "127.0.0.1", "-p", servers.port, "-x", "a b/c", disk],
                log=path / "tcp.log",
            )
        )
        tcp.wait_for_port(int(servers.port))
        yield servers


QUERY = step("query-named-block-nodes", flat=True)
DELETE = step("blockdev-del", node_name="n")


def add(options: dict[str, Any]) -> Step:
    return "blockdev-add", options


def reopen(options: dict[str, Any]) -> Step:
    return "blockdev-reopen", {"options": [options]}


def test_servers_that_are_not_there_or_refuse(servers: Servers, tmp_path: Path) -> None:
    compare(
        tmp_path,
        [
            add(servers.at("none")),
            add(servers.tcp(port="1")),
            add(servers.tcp("host.invalid", "1")),
            add(servers.tcp(port="no-service")),
            add(servers.at("rw", export="nope")),
            add(servers.at("rw")),
            add(servers.at("rw", export=LONG)),
            add(servers.at("rw", export="rw", **{"x-dirty-bitmap": LONG})),
            add(servers.at("rw", export="rw", **{"tls-creds": "nobody"})),
            add(servers.at("rw", export="rw", **{"reconnect-delay": -1})),
            add(servers.at("rw", export="rw", **{"open-timeout": 1 << 32})),
            add({"driver": "nbd", "node-name": "n"}),
            add({"driver": "nbd", "node-name": "n", "filename": "nbd://x"}),
            add({**servers.at("rw"), "server": {"type": "unix"}}),
            QUERY,
        ],
        options=NO_MACHINE,
    )


def test_a_node_and_its_names(servers: Servers, tmp_path: Path) -> None:
    above = [
        add({"driver": "copy-on-read", "node-name": "c", "file": "n"}),
        add({"driver": "raw", "node-name": "r", "offset": 512, "file": "n"}),
        add({"driver": "raw", "node-name": "plain", "file": "n"}),
    ]
    for number, options in enumerate(
        (
            servers.at("rw", export="rw", **{"open-timeout": 1, "reconnect-delay": 3}),
            servers.at("image"),
            servers.tcp(export="a b/c"),
            servers.at("rw", export="rw", **{"tls-hostname": "host", "x-dirty-bitmap": "base:allocation"}),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        compare(folder, [add(options), QUERY, *above, QUERY], options=NO_MACHINE)


def test_size_and_options_that_do_not_change(servers: Servers, tmp_path: Path) -> None:
    options = servers.at("rw", export="rw", **{"open-timeout": 1, "reconnect-delay": 3})
    compare(
        tmp_path,
        [
            add(options),
            step("block_resize", node_name="n", size=SIZE // 2),
            step("block_resize", node_name="n", size=SIZE),
            step("block_resize", node_name="n", size=2 * SIZE),
            reopen(options),
            reopen({**options, "open-timeout": 2}),
            reopen({**options, "export": "image"}),
            reopen(servers.at("rw", export="rw", **{"open-timeout": 1})),
            step("query-yank"),
            DELETE,
            step("query-yank"),
        ],
        options=NO_MACHINE,
    )


def test_read_only_exports(servers: Servers, tmp_path: Path) -> None:
    auto = servers.at("ro", export="ro", **{"auto-read-only": True})
    compare(
        tmp_path,
        [
            add(auto),
            QUERY,
            reopen(servers.at("ro", export="ro")),
            reopen(auto),
            DELETE,
            add(servers.at("ro", export="ro", **{"read-only": True})),
            reopen(servers.at("ro", export="ro", **{"read-only": False})),
        ],
        options=NO_MACHINE,
    )


@pytest.mark.parametrize(
    "name",
    [
        "nbd+unix:///rw?socket={path}/rw.nbd",
        "nbd:unix:{path}/rw.nbd:exportname=rw",
        "nbd:unix:{path}/none.nbd",
        "nbd+unix:///?socket={path}/image.nbd",
        "nbd+unix://?socket={path}/image.nbd",
        "nbd:unix:{path}/image.nbd",
        "nbd:127.0.0.1:{port}:exportname=a b/c",
        "nbd://127.0.0.1:{port}/a%20b/c",
        "nbd+tcp://127.0.0.1:{port}/a b/c",
        "nbd://localhost:{port}/a%20b/c",
        "nbd://127.0.0.1:{port}//a%20b/c",
        "nbd://[::1]:1/x",
        "nbd:[::1]:1:exportname=x",
        "nbd://127.0.0.1:{port}/x?y=z",
        "nbd+unix:///rw?socket={path}/rw.nbd&x=y",
        "nbd+unix:///rw",
        "nbd+unix://host/rw?socket={path}/rw.nbd",
        "nbd+unix://:80/rw?socket={path}/rw.nbd",
        "nbd:",
        "nbd:foo",
        "nbd://",
        "nbd:///x",
        "nbd+unix:/rw?socket={path}/rw.nbd",
        "nbd:127.0.0.1:{port}:exportname=",
        "nbd:127.0.0.1:{port}:foo=bar",
        "nbd://127.0.0.1:99999/x",
        'json:{{"driver":"raw","file":{{"driver":"nbd","server":{{"type":"unix","path":"{path}/rw.nbd"}},"export":"rw"}}}}',
    ],
)
def test_names_in_an_images_header(name: str, servers: Servers, tmp_path: Path) -> None:
    name = name.format(path=servers.path, port=servers.port)

    def prepare(folder: Path) -> None:
        run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", name, folder / "overlay", str(SIZE)])

    file = {"driver": "file", "filename": "overlay"}
    compare(
        tmp_path,
        [add({"driver": "qcow2", "node-name": "n", "file": file}), QUERY],
        prepare=prepare,
        options=NO_MACHINE,
    )


def test_relative_names_in_an_image_on_an_export(servers: Servers, tmp_path: Path) -> None:
    image = {"driver": "qcow2", "node-name": "n", "file": {**servers.at("image"), "node-name": "f"}}
    compare(tmp_path, [add(image), add({**image, "backing": None}), QUERY], options=NO_MACHINE)
