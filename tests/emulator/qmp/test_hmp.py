"""The human monitor: what QEMU's prints, echoes and refuses."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.peers import peer, run
from kit.places import short_folder
from kit.process import Process
from kit.qmp import Qmp
from livedisk.emulator.qmp.hmp import complete
from livedisk.emulator.qmp.hmp_block import human_size, print_block_info
from livedisk.emulator.qmp.readline import LineEditor

TESTS = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TESTS)}
MACHINE = ["-machine", "none", "-display", "none", "-nodefaults"]

TYPED = [
    b"info blck",
    b"foo",
    b"help quit",
    b"? quit",
    b"help info block",
    b"help foo bar",
    b"help info foo",
    b"info version x",
    b"info block -q",
    b"info block a b",
    b"info block-jobs",
    b"quit 3",
    b"# x",
    b"",
    b"   ",
    b"  info   name  ",
    b"\x01a\x05b\x7f\x1b[D\x1b[Dx\x1b[C",
    b"abc def\x17x\x15y\x01\x04",
    b"one  two  \x17\x17",
    b"\x1b[A\x1b[A\x1b[B",
    b"abc\x1b[D\x1b[D\x04\x1b[Cz",
    b"x\x1b[1~q\x1b[4~w\x1b[3~\x1bOH\x1b[3~\x1bOFe",
    b"help qui\t",
]


def test_a_session_is_echoed_byte_for_byte() -> None:
    script = b"".join(line + b"\n" for line in TYPED) + b"quit\n"
    theirs = subprocess.run(
        [peer("qemu-system-x86_64"), *MACHINE, "-monitor", "stdio"],
        input=script,
        capture_output=True,
        timeout=60,
        check=True,
    ).stdout
    ours = subprocess.run(
        [sys.executable, "-m", "kit.qmp_host", "hmp stdio"],
        input=script,
        capture_output=True,
        timeout=60,
        check=True,
        env=ENVIRONMENT,
    ).stdout
    assert ours.split(b"\r\n") == theirs.split(b"\r\n")


def test_a_terminal_is_put_back() -> None:
    leader, follower = pty.openpty()
    before = subprocess.run(["stty", "-a"], stdin=follower, capture_output=True, check=True).stdout
    child = subprocess.Popen(
        [sys.executable, "-m", "kit.qmp_host", "hmp stdio"], stdin=follower, stdout=follower, env=ENVIRONMENT
    )
    try:
        seen = b""
        while b"(qemu) " not in seen:
            seen += os.read(leader, 4096)
        during = subprocess.run(["stty", "-a"], stdin=follower, capture_output=True, check=True).stdout
        assert b"-icanon" in during
        assert b"-echo " in during
        os.write(leader, b"info nam\t\rquit\r")
        assert child.wait(20) == 0
        seen += os.read(leader, 4096)
        assert b"info name " in seen
    finally:
        child.kill()
        child.wait()
    assert subprocess.run(["stty", "-a"], stdin=follower, capture_output=True, check=True).stdout == before
    os.close(leader)
    os.close(follower)


# -- info block ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine() -> Any:
    """A QEMU with all that ``info block`` has a word for, stopped."""
    with short_folder() as folder:
        base, top, cow = folder / "base.qcow2", folder / "top.qcow2", folder / "old.qcow2"
        run(["qemu-img", "create", "-q", "-f", "qcow2", base, "64M"])
        run(["qemu-img", "snapshot", "-c", "first", base])
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", base, "-F", "qcow2", top])
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", cow, "1000M"])
        run(["qemu-img", "bitmap", "--add", top, "bitmap0"])
        options = [
            *["-M", "q35", "-nodefaults", "-display", "none", "-S", "-m", "64"],
            *["-blockdev", f"qcow2,node-name=node-A,file.driver=file,file.node-name=file,file.filename={top}"],
            *["-device", "virtio-blk,drive=node-A,id=virtio0"],
            *["-drive", f"if=none,id=dr0,file={cow},format=qcow2,read-only=on", "-device", "virtio-blk,drive=dr0"],
            *["-drive", f"if=none,id=dr1,file={folder}/raw,format=raw,cache=unsafe,detect-zeroes=unmap,discard=unmap"],
            *[
                "-device",
                "virtio-blk,drive=dr1,id=slow",
                "-drive",
                "if=none,id=empty",
                "-device",
                "ide-cd,drive=empty,id=cd",
            ],
            *["-drive", "if=none,id=thr,file.driver=null-co,throttling.bps-total=1000,throttling.iops-read=5"],
            *["-blockdev", "null-co,node-name=nul,detect-zeroes=on,read-zeroes=on"],
        ]
        (folder / "raw").write_bytes(bytes(1 << 20))
        words = [peer("qemu-system-x86_64"), *options, "-qmp", f"unix:{folder}/q,server=on,wait=off"]
        with Process(words, log=folder / "log") as process:
            process.wait_for_socket(folder / "q")
            with Qmp(folder / "q") as qmp:
                yield qmp


def as_qemu_says(qmp: Qmp, line: str) -> str:
    return qmp.human(line).replace("\r\n", "\n")


@pytest.mark.parametrize("verbose", [False, True])
def test_devices_read_as_qemu_prints_them(machine: Qmp, verbose: bool) -> None:
    devices = machine.execute("query-block")
    assert len(devices) == 5
    printed = "\n".join(print_block_info(device, device.get("inserted"), verbose=verbose) for device in devices)
    assert printed == as_qemu_says(machine, "info block -v" if verbose else "info block")


@pytest.mark.parametrize("verbose", [False, True])
def test_nodes_read_as_qemu_prints_them(machine: Qmp, verbose: bool) -> None:
    nodes = machine.execute("query-named-block-nodes")
    printed = "\n".join(print_block_info(None, node, verbose=verbose) for node in nodes)
    assert printed == as_qemu_says(machine, "info block -n -v" if verbose else "info block -n")


@pytest.mark.parametrize("text", ["0", "1", "999", "1000", "1023", "1M", "1000K", "5.5G", "10T", "1023.6M"])
def test_sizes_read_as_qemu_img_prints_them(text: str, tmp_path: Path) -> None:
    run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "i", text])
    info = json.loads(run(["qemu-img", "info", "--output=json", tmp_path / "i"]).stdout)
    assert f"virtual size: {human_size(info['virtual-size'])} (" in run(["qemu-img", "info", tmp_path / "i"]).stdout


# -- the editor ---------------------------------------------------------------------------------------------------------


def shown(echoed: str) -> str:
    """What a terminal shows in its last line."""
    line, cursor = "", 0
    text = echoed.replace("\r\n", "\n")
    index = 0
    while index < len(text):
        if text.startswith("\x1b[D", index):
            cursor, index = max(0, cursor - 1), index + 3
        elif text.startswith("\x1b[C", index):
            cursor, index = cursor + 1, index + 3
        elif text.startswith("\x1b[K", index):
            line, index = line[:cursor], index + 3
        elif text[index] == "\n":
            line, cursor, index = "", 0, index + 1
        else:
            line = line[:cursor] + text[index] + line[cursor + 1 :]
            cursor, index = cursor + 1, index + 1
    return line


CONTROLS = "\x01\x02\x04\x05\x06\x0b\x0e\x10\x15\x17\x1f\x7f\t\r"
SEQUENCES = ["\x1b[A", "\x1b[B", "\x1b[C", "\x1b[D", "\x1b[3~", "\x1b[H", "\x1bx", "\x1b[9Z"]
KEYS = st.sampled_from([*"ab x", *CONTROLS, *SEQUENCES])


@given(st.lists(KEYS, max_size=60))
def test_the_screen_shows_the_line_and_enter_gives_it(keys: list[str]) -> None:
    echoed: list[str] = []
    editor = LineEditor("> ", echoed.append, lambda before: [])
    editor.show_prompt()
    for key in keys:
        on_screen = shown("".join(echoed))
        lines = list(editor.feed(key.encode()))
        if key == "\r":
            assert on_screen == f"> {lines[0]}"
            editor.show_prompt()
        else:
            assert lines == []


@given(st.binary(max_size=60))
def test_any_bytes_are_taken(data: bytes) -> None:
    editor = LineEditor("> ", lambda text: None, lambda before: ["one", "other"])
    editor.show_prompt()
    for _ in editor.feed(data):
        editor.show_prompt()


def test_completion() -> None:
    assert complete("inf") == ["info"]
    assert complete("info bl") == ["block", "block-jobs", "blockstats"]
    assert complete("help qu") == ["quit"]
    assert complete("info block ") == []
    echoed: list[str] = []
    editor = LineEditor("> ", echoed.append, complete)
    editor.show_prompt()
    assert list(editor.feed(b"inf\tbl\t\t\r")) == ["info block"]
    assert "\nblock       block-jobs  blockstats  \n" in "".join(echoed)
