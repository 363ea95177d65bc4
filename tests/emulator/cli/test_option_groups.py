"""-set, -readconfig, -qtest and query-command-line-options: what machinery around QEMU expects of a command line."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon, executable
from kit.peers import peer, run
from kit.process import Process
from kit.qemu import create
from kit.qmp import Qmp
from kit.side_by_side import MACHINE, NO_MACHINE, compare, session, step

DRIVE = ("-drive", "driver=null-co,size=1M,id=x,if=none")
REFUSED: list[tuple[str, ...]] = [
    ("-set", "zz"),
    ("-set", "drive.x.werror"),
    ("-set", "drive.x.werror=stop"),
    ("-set", "zz.x.a=b"),
    ("-set", "blockdev.x.a=b"),
    ("-set", "drive.x.werror=stop", *DRIVE),
    (*DRIVE, "-set", "drive.y.werror=stop"),
    ("-readconfig", "none"),
    ("-readconfig", "group"),
    ("-readconfig", "bare"),
]


@pytest.mark.parametrize("options", REFUSED)
def test_refused_as_qemu_refuses(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "group").write_text('[zz "y"]\n a = "b"\n')
    (tmp_path / "bare").write_text('file = "x"\n')
    theirs = run([peer("qemu-system-x86_64"), *NO_MACHINE, *options], expect=1, cwd=tmp_path).stderr
    ours = run([executable(), "daemon", *NO_MACHINE, *options], expect=1, cwd=tmp_path).stderr
    assert ours.splitlines()[-1].partition(": ")[2] == theirs.splitlines()[-1].partition(": ")[2]


CONFIG = """
# a disk
[drive "d"]
  file = "a,b.qcow2"
  format = "qcow2"
  if = "none"

[device "v"]
  driver = "virtio-blk-pci"
  drive = "d"
"""


def test_a_file_of_options_and_changes_to_it(short_path: Path) -> None:
    def prepare(folder: Path) -> None:
        create(folder / "a,b.qcow2", "1M")
        (folder / "config").write_text(CONFIG)

    options = [*MACHINE, "-readconfig", "config", "-set", "device.v.serial=se,rial", "-set", "drive.d.werror=stop"]
    compare(
        short_path,
        [step("query-block"), step("qom-get", path="v", property="serial")],
        prepare=prepare,
        options=options,
    )


def test_a_config_line_that_is_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "config").write_text('[drive "d"]\n file null\n')
    done = run([executable(), "daemon", "-readconfig", "config"], expect=1, cwd=tmp_path)
    assert done.stderr == "livedisk daemon: -readconfig config: config:2: parse error\n"


def test_parameters_of_options_are_qemus(short_path: Path) -> None:
    found = []
    for command in ([peer("qemu-system-x86_64")], [executable(), "daemon"]):
        place = short_path / Path(command[0]).name
        place.mkdir()
        with session(command, place, NO_MACHINE) as qmp:
            found.append({one["option"]: one["parameters"] for one in qmp.execute("query-command-line-options")})
    theirs, ours = (
        {name: {(one["name"], one["type"]) for one in parameters} for name, parameters in each.items()}
        for each in found
    )
    for name in ("add-fd", "mon", "name", "drive"):
        assert ours[name] == theirs[name], name
    assert {"backend", "path", "logfile", "fd", "reconnect-ms"} <= {name for name, _ in ours["chardev"]}
    assert ours["chardev"] <= theirs["chardev"]
    assert ours["device"] == ours["object"] == set()


@pytest.mark.parametrize("parameter", ["cache.direct=on", "copy-on-read=on", "stats-account-failed=off", "media=disk"])
def test_parameters_that_are_told_are_taken(parameter: str, short_path: Path) -> None:
    with Daemon(short_path, "-drive", f"{DRIVE[1]},{parameter}", nbd=False) as daemon:
        assert daemon.running


# -- qtest -------------------------------------------------------------------------------------------------------------
def ask(client: socket.socket, *lines: str) -> list[str]:
    client.sendall("".join(f"{line}\n" for line in lines).encode())
    with client.makefile("rb") as answers:
        return [answers.readline().decode().rstrip("\n") for _ in lines]


def test_a_machine_started_as_qemus_python_package_starts_it(short_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as listener, ours:
        listener.bind(str(short_path / "qtest.sock"))
        listener.listen(1)
        listener.settimeout(30)
        options = ["-display", "none", "-vga", "none", "-chardev", f"socket,id=mon,fd={theirs.fileno()}"]
        options += ["-mon", "chardev=mon,mode=control", "-qtest", f"unix:path={short_path / 'qtest.sock'}"]
        options += ["-accel", "qtest", "-nodefaults", "-machine", "none", "-qtest-log", str(short_path / "said")]
        with Process([executable(), "daemon", *options], log=short_path / "log", inherit=[theirs.fileno()]) as process:
            theirs.close()
            client, _ = listener.accept()
            with client, ours.makefile("rb") as lines:
                client.settimeout(30)
                assert ask(client, "clock_step 100", "foo", "") == [
                    "FAIL Unknown command 'clock_step'",
                    "FAIL Unknown command 'foo'",
                    "FAIL Unknown command ''",
                ]
                assert "QMP" in json.loads(lines.readline())
                ours.sendall(b'{"execute": "qmp_capabilities"}{"execute": "query-status"}')
                lines.readline()
                assert json.loads(lines.readline())["return"]["running"] is True
                ours.sendall(b'{"execute": "quit"}')
                assert b"return" in lines.read()
            assert process.wait() == 0
    said = [line.partition("] ")[2] for line in (short_path / "said").read_text().splitlines()]
    assert said[:3] == ["OPENED", "clock_step 100", "FAIL Unknown command 'clock_step'"]


@pytest.mark.parametrize("own", [True, False])
def test_what_qemu_without_qtest_does_not_know_either(own: bool, short_path: Path) -> None:
    command = [executable(), "daemon"] if own else [peer("qemu-system-x86_64")]
    address = ["-chardev", "socket,id=q,path=q,server=on,wait=off", "-qtest", "chardev:q", "-qtest-log", "none"]
    with session(command, short_path, [*NO_MACHINE, *address]) as qmp, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(short_path / "q"))
        assert ask(client, "clock_step", "foo bar") == [
            "FAIL Unknown command 'clock_step'",
            "FAIL Unknown command 'foo'",
        ]
        assert _chardevs(qmp)["q"] is True


def _chardevs(qmp: Qmp) -> dict[str, Any]:
    return {one["label"]: one["frontend-open"] for one in qmp.execute("query-chardev")}
