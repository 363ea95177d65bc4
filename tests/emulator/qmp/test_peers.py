"""The same bytes to qemu-storage-daemon, to qemu-system-x86_64 and to us: the same bytes come back.

What may differ is blanked: the package in the version, and timestamps.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.peers import peer
from kit.places import short_folder
from kit.process import Process

TESTS = Path(__file__).resolve().parents[2]

WIRE = [
    b"[]",
    b"17",
    b"{}",
    b'{"execute":"x"}}',
    b'{"a" 1}',
    b"{1:2}",
    b'{"a":}',
    b'{"a":1 "b":2}',
    b"[1 2]",
    b"[,]",
    b"{foo}",
    b'{"a":foo}',
    b"foo",
    b"%s",
    b"[%d]",
    b'"\\u00"',
    b'"\\u',
    b'"\\q"',
    b'"\\u0000"',
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b'"\\ud800\\u0041"',
    b'"\\ufffe"',
    b'"\\ufdd0"',
    b'"\x80"',
    b'"\xc0\x80"',
    b'"\xc1\x80"',
    b'"\xef\xbf\xbf"',
    b'"\xed\xa0\x80"',
    b'"\xf4\x90\x80\x80"',
    b'"\xf9\x90\x80\x80\x80"',
    b'"\xff"',
    b"\xff\xff",
    b"\xfe",
    b"\x00",
    b'"\x01"',
    b"01",
    b"-01",
    b"--1",
    b"+1",
    b"1a",
    b"a1",
    b"-",
    b"-a",
    b"1.",
    b"1.e",
    b"1e",
    b"1e+",
    b"1e+5",
    b"-0.0e-1",
    b'{"execute":"a","execute":"b"}',
    b'{"a":{"b":1,"b":2}}',
    b'["a",]',
    b'{"a":1,}',
    b"A",
    b"#",
    b"// x\n1",
    b"]",
    b"}",
    b"[}",
    b"{]",
    b"[1}]",
    b'{"a":[}',
    b"[" * 1025,
    b"[" * 1024 + b"]" * 1024,
    b'"abc',
    b'"\\',
    b'"\\\xff"',
    b"'a\\'b\"'",
    b'{"a":1}"b"[2]3 true',
    b'"a""b"',
    b"a" * 2000,
    b'{"":1}',
    b"\x7f",
    b'"\x7f"',
    b"\x1b[A1",
]

REQUESTS = [
    b'{"execute":1}',
    b'{"exec-oob":1}',
    b'{"id":5}',
    b'{"id":{"a":[1,2.5,null,true,"\\u20ac"],"b":-0,"c":1e22,"d":0.1,"e":1.0},"execute":"nope"}',
    b'{"id":18446744073709551616}',
    b'{"id":-9223372036854775809}',
    b'{"id":"\\u007f\xc3\xa9\xf0\x9f\x98\x80\\ud83d\\ude00/\\/<>\\n\\\\"}',
    b"{'execute':'nope','id':'a\"b'}",
    b'{"a":1,"b":2,"c":3,"id":7}',
    b'{"execute":"query-version","arguments":[],"id":7}',
    b'{"execute":"query-version","arguments":{"x":1}}',
    b'{"execute":"query-version","arguments":{},"id":[]}',
    b'{"execute":"query-version","control":{}}',
    b'{"exec-oob":"query-version","id":1}',
    b'{"exec-oob":"nope","id":1}',
    b'{"exec-oob":"nope","execute":"nope"}',
    b'{"execute":"nope"}',
    b'{"execute":"query-commands","arguments":{"a":{}}}',
    b'{"execute":"qmp_capabilities"}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":"oob"}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":[1]}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":["foo"]}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"],"x":1}}',
]

MACHINE_REQUESTS = [
    b'{"execute":"query-name"}',
    b'{"execute":"query-name","arguments":{"x":null}}',
    b'{"exec-oob":"query-yank","id":3}',
    b'{"execute":"query-yank"}',
    b'{"execute":"yank"}',
    b'{"execute":"yank","arguments":{"instances":[{}]}}',
    b'{"execute":"yank","arguments":{"instances":[{"type":"foo"}]}}',
    b'{"execute":"yank","arguments":{"instances":[{"type":"chardev"}]}}',
    b'{"execute":"yank","arguments":{"instances":[{"type":"chardev","id":"nope"}]}}',
    b'{"execute":"yank","arguments":{"instances":[{"type":"block-node","node-name":1}]}}',
    b'{"exec-oob":"yank","arguments":{"instances":[]}}',
    b'{"execute":"human-monitor-command"}',
    b'{"execute":"human-monitor-command","arguments":{"command-line":"foo"}}',
    b'{"execute":"human-monitor-command","arguments":{"command-line":"info foo"}}',
    b'{"execute":"human-monitor-command","arguments":{"command-line":"help quit"}}',
    b'{"execute":"human-monitor-command","arguments":{"command-line":"info name"}}',
    b'{"execute":"human-monitor-command","arguments":{"command-line":"info name x"}}',
    b'{"execute":"human-monitor-command","arguments":{"command-line":"info block -q"}}',
    b'{"execute":"human-monitor-command","arguments":{"command-line":"help info block"}}',
    b'{"execute":"human-monitor-command","arguments":{"command-line":"info block-jobs"}}',
    b'{"execute":"human-monitor-command","arguments":{"command-line":""}}',
]

BARRIER = b'\n\xff\n{"execute":"query-version","id":"barrier"}\n'


class Wire:
    """A connection that sends bytes as they are and gives back what came until the barrier's reply."""

    def __init__(self, path: Path) -> None:
        # No probing connection before: QEMU may give the greeting meant for that one to the next.
        deadline = time.monotonic() + 20
        while True:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.settimeout(20)
            try:
                self.socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                self.socket.close()
                assert time.monotonic() < deadline, f"nobody listens on {path}"
                time.sleep(0.01)
        self.greeting = blank(self._until(b""))

    def _until(self, mark: bytes) -> bytes:
        """All up to the end of the line that has ``mark`` in it, or until the server hangs up."""
        got = b""
        while not (got.endswith(b"\r\n") and mark in got):
            data = self.socket.recv(65536)
            if not data:
                return got + b"<closed>"
            got += data
        return got

    def ask(self, data: bytes) -> bytes:
        self.socket.sendall(data + BARRIER)
        return blank(self._until(b'"id": "barrier"'))

    def last(self, data: bytes) -> bytes:
        """What comes until the server hangs up."""
        self.socket.sendall(data)
        return blank(self._until(b"<never>"))


def blank(data: bytes) -> bytes:
    data = re.sub(rb'"package": "[^"]*"', b'"package": ""', data)
    return re.sub(rb'"(seconds|microseconds)": \d+', rb'"\1": 0', data)


@contextmanager
def monitor(*command: str) -> Iterator[Wire]:
    with short_folder() as folder:
        path = folder / "m"
        words = [word.replace("@", f"{path},server=on,wait=off") for word in command]
        environment = {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
        with Process(words, log=folder / "log", environment=environment):
            wire = Wire(path)
            try:
                yield wire
            finally:
                wire.socket.close()


STORAGE = ("qemu-storage-daemon", "--chardev", "socket,id=c,path=@", "--monitor", "c")
MACHINE = ("qemu-system-x86_64", "-machine", "none", "-display", "none", "-nodefaults", "-qmp", "unix:@")
OURS = (sys.executable, "-m", "kit.qmp_host", "qmp unix:@")


def both(theirs: tuple[str, ...], script: list[bytes]) -> list[tuple[bytes, bytes, bytes]]:
    """``(sent, what the peer answers, what we answer)``, each with a connection of its own."""
    with monitor(peer(theirs[0]), *theirs[1:]) as them, monitor(*OURS) as us:
        answers = [(b"", them.greeting, us.greeting)]
        return answers + [(data, them.ask(data), us.ask(data)) for data in script]


NEGOTIATE = b'{"execute":"qmp_capabilities"}'
WITH_OOB = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'


@pytest.mark.parametrize("theirs", [STORAGE, MACHINE], ids=["qemu-storage-daemon", "qemu-system"])
@pytest.mark.parametrize("negotiate", [None, NEGOTIATE, WITH_OOB], ids=["negotiating", "plain", "oob"])
def test_bytes(theirs: tuple[str, ...], negotiate: bytes | None) -> None:
    # While negotiating, any qmp_capabilities that succeeds would end it.
    script = (
        [negotiate, *WIRE, *REQUESTS] if negotiate else [*WIRE, *(item for item in REQUESTS if b"capab" not in item)]
    )
    for sent, expected, got in both(theirs, script):
        assert got == expected, sent


def test_commands_of_a_machine() -> None:
    for sent, expected, got in both(MACHINE, [WITH_OOB, *MACHINE_REQUESTS]):
        assert got == expected, sent


def test_quit() -> None:
    script = NEGOTIATE + b'{"execute":"quit","id":1}'
    with monitor(peer(MACHINE[0]), *MACHINE[1:]) as them, monitor(*OURS) as us:
        assert sorted(us.last(script).splitlines()) == sorted(them.last(script).splitlines())


def test_yank_cuts_the_connection() -> None:
    script = WITH_OOB + b'{"exec-oob":"yank","arguments":{"instances":[{"type":"chardev","id":"compat_monitor0"}]}}'
    with monitor(peer(MACHINE[0]), *MACHINE[1:]) as them, monitor(*OURS) as us:
        assert us.last(script).endswith(b"<closed>")
        assert them.last(script).endswith(b"<closed>")


def test_pretty() -> None:
    script = b'{"execute":"qmp_capabilities"}{"execute":"nope","id":{"a":[],"b":[1,{}]}}{"execute":"quit"}'
    pretty = (*MACHINE[:-2], "-chardev", "socket,id=c,path=@", "-mon", "c,mode=control,pretty=on")
    ours = (*OURS[:-1], "qmp-pretty unix:@")
    answers = []
    for command in ((peer(pretty[0]), *pretty[1:]), ours):
        with short_folder() as folder:
            path = folder / "m"
            words = [word.replace("@", f"{path},server=on,wait=off") for word in command]
            with Process(words, log=folder / "log", environment={"PYTHONPATH": str(TESTS)}) as process:
                process.wait_for_socket(path)
                wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                wire.settimeout(20)
                wire.connect(str(path))
                wire.sendall(script)
                got = b""
                while data := wire.recv(65536):
                    got += data
                wire.close()
                answers.append(blank(got))
    assert answers[1] == answers[0]
