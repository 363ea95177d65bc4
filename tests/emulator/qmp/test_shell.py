"""``livedisk qmp``, its syntax, the client under it, and the public qmp-shell on our socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from kit.places import short_folder
from kit.process import Process
from kit.qemu import StorageDaemon
from livedisk.emulator.cli.qmp import qmp
from livedisk.emulator.cli.qmp_shell import completions
from livedisk.emulator.qmp.client import ConnectionLost, QmpClient, QmpError
from livedisk.emulator.qmp.introspect import Introspection
from livedisk.emulator.qmp.shell_syntax import LineReader, ShellSyntaxError, parse_arguments, split_words

TESTS = Path(__file__).resolve().parents[2]


@pytest.fixture
def ours(short_path: Path) -> Iterator[Path]:
    """A monitor of ours; several clients may come one after the other."""
    words = [sys.executable, "-m", "kit.qmp_host", f"qmp unix:{short_path}/q,server=on,wait=off"]
    with Process(words, log=short_path / "log", environment={"PYTHONPATH": str(TESTS)}) as process:
        process.wait_for_socket(short_path / "q")
        yield short_path / "q"


@pytest.fixture(scope="module")
def theirs() -> Iterator[Path]:
    with short_folder() as folder, StorageDaemon(folder, nbd=False) as daemon:
        yield daemon.qmp_socket


# -- syntax -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["a=1", "b=x", "c=true", "d=False", "e=null"], {"a": 1, "b": "x", "c": True, "d": False, "e": None}),
        (["a=-5", "b=1.5", "c=0x10", "d="], {"a": -5, "b": "1.5", "c": "0x10", "d": ""}),
        (['a="5"', "b='x y'", 'c="q\\"r"'], {"a": "5", "b": "x y", "c": 'q"r'}),
        (["a.b.c=1", "a.b.d=2"], {"a": {"b": {"c": 1, "d": 2}}}),
        (["a.0=x", "a.1.b=y"], {"a": ["x", {"b": "y"}]}),
        (["a=[1, 'x', {'k': true}]"], {"a": [1, "x", {"k": True}]}),
        (['a={"b": [null]}', "a.c=1"], {"a": {"b": [None], "c": 1}}),
        (["file=/a=b"], {"file": "/a=b"}),
    ],
)
def test_arguments(words: list[str], arguments: dict[str, Any]) -> None:
    assert parse_arguments(words) == arguments


@pytest.mark.parametrize("word", ["x", "=1", "a=[1", "a={1:}"])
def test_bad_arguments(word: str) -> None:
    with pytest.raises(ShellSyntaxError):
        parse_arguments([word])
    with pytest.raises(ShellSyntaxError):
        parse_arguments(["a=1", "a.b=2"])


def test_words() -> None:
    assert split_words("""cmd a=1  b="x y" c=[{'k': "] "}, 2] d='it is'""") == [
        "cmd",
        "a=1",
        'b="x y"',
        """c=[{'k': "] "}, 2]""",
        "d='it is'",
    ]
    with pytest.raises(ShellSyntaxError):
        split_words("cmd a=[1, 2")
    with pytest.raises(ShellSyntaxError):
        split_words('cmd a="x')


def test_transactions() -> None:
    reader = LineReader()
    assert reader.take("transaction(") is None
    assert reader.take("  blockdev-snapshot-sync node-name=a snapshot-file=b.qcow2") is None
    with pytest.raises(ShellSyntaxError):
        reader.take("transaction(")
    request = reader.take("abort )")
    assert request is not None
    assert request.message == {
        "execute": "transaction",
        "arguments": {
            "actions": [
                {"type": "blockdev-snapshot-sync", "data": {"node-name": "a", "snapshot-file": "b.qcow2"}},
                {"type": "abort", "data": {}},
            ]
        },
    }
    assert reader.actions is None


def test_json_goes_as_it_is() -> None:
    request = LineReader().take('{"execute": "x", "arguments": {"port": 1}}')
    assert request is not None
    assert request.as_written
    with pytest.raises(ShellSyntaxError):
        LineReader().take('{"arguments": {}}')
    assert LineReader().take("") is None
    assert LineReader().take("# a comment") is None


SCALAR = st.none() | st.booleans() | st.integers() | st.text()
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@given(st.dictionaries(st.from_regex(r"[a-z][a-z-]{0,8}", fullmatch=True), VALUE, max_size=4))
def test_json_values_read_back(arguments: dict[str, Any]) -> None:
    line = " ".join(["cmd", *(f"{name}={json.dumps(value)}" for name, value in arguments.items())])
    assert parse_arguments(split_words(line)[1:]) == arguments


@given(st.text("ab=.,[]{}\"' \\1", max_size=30))
def test_any_line_is_read_or_refused(line: str) -> None:
    try:
        request = LineReader().take(line)
    except ShellSyntaxError as refusal:
        text = str(refusal)
    else:
        text = json.dumps(request.message) if request is not None else "nothing to send"
    assert text


# -- schema ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema(theirs: Path) -> Introspection:
    async def ask() -> Introspection:
        async with await QmpClient.connect(str(theirs)) as client:
            return Introspection(await client.execute("query-qmp-schema"))

    return asyncio.run(ask())


def test_completion(schema: Introspection) -> None:
    assert completions(schema, "blockdev-a") == ("blockdev-a", ["blockdev-add"])
    assert "driver=" in completions(schema, "blockdev-add ")[1]
    assert completions(schema, "blockdev-add dri")[1] == ["driver="]
    assert "null-co" in completions(schema, "blockdev-add driver=null")[1]
    assert "read-zeroes=" not in completions(schema, "blockdev-add driver=raw rea")[1]
    assert "read-zeroes=" in completions(schema, "blockdev-add driver=null-co read-")[1]
    assert "file.filename=" in completions(schema, "blockdev-add driver=raw file.driver=file file.f")[1]
    assert completions(schema, "blockdev-add driver=null-co read-zeroes=")[1] == ["true", "false"]
    assert completions(schema, "nope ")[1] == []
    assert completions(schema, 'x y="') == ("", [])


def test_numbers_become_strings_where_only_strings_go(schema: Introspection) -> None:
    arguments = {"addr": {"type": "inet", "data": {"host": 1, "port": 10809}}, "max-connections": 5}
    assert schema.coerce("nbd-server-start", arguments) == {
        "addr": {"type": "inet", "data": {"host": "1", "port": "10809"}},
        "max-connections": 5,
    }
    actions = [{"type": "blockdev-snapshot-sync", "data": {"node-name": 7, "snapshot-file": True}}]
    assert schema.coerce("transaction", {"actions": actions})["actions"][0]["data"] == {
        "node-name": "7",
        "snapshot-file": "true",
    }
    assert schema.coerce("nope", {"a": 1}) == {"a": 1}


# -- the client --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer_name", ["ours", "theirs"])
def test_client(peer_name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(peer_name)

    async def script() -> None:
        async with await QmpClient.connect(f"unix:{path}", oob=True) as client:
            version, commands = await asyncio.gather(client.execute("query-version"), client.execute("query-commands"))
            assert version == client.greeting["version"]
            assert {"name": "quit"} in commands
            with pytest.raises(QmpError) as caught:
                await client.call("query-version", {"no-such": 1})
            assert (caught.value.kind, str(caught.value)) == ("GenericError", "Parameter 'no-such' is unexpected")

    asyncio.run(script())


def test_client_events_and_the_end(ours: Path) -> None:
    async def script() -> None:
        client = await QmpClient.connect(str(ours))
        with pytest.raises(ConnectionLost):
            await QmpClient.connect(str(ours), timeout=0.2)
        await client.execute("quit")
        event = await client.wait_event("SHUTDOWN", reason="host-qmp-quit")
        assert event["data"]["guest"] is False
        assert [event async for event in client.events()] == []
        with pytest.raises(ConnectionLost):
            await client.execute("query-version")
        await client.close()

    asyncio.run(script())


def test_client_refuses_what_is_no_monitor(short_path: Path) -> None:
    async def script() -> None:
        with pytest.raises(ConnectionLost, match="No such file"):
            await QmpClient.connect(str(short_path / "nope"))

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-x\r\n")
            writer.close()

        listener = await asyncio.start_unix_server(talk, str(short_path / "s"))
        with pytest.raises(ConnectionLost):
            await QmpClient.connect(str(short_path / "s"))
        listener.close()

    asyncio.run(script())


# -- the command -------------------------------------------------------------------------------------------------------


def command(*words: str, stdin: str = "") -> Result:
    return CliRunner().invoke(qmp, list(words), input=stdin)


def test_one_command(ours: Path) -> None:
    done = command(str(ours), "query-version")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["qemu"]["major"] == 10
    done = command(str(ours), "--compact", '{"execute": "query-name"}')
    assert (done.exit_code, done.stdout) == (0, "{}\n")


def test_it_works_on_qemu(theirs: Path) -> None:
    done = command(str(theirs), "blockdev-add", "driver=null-co", "node-name=n1", "size=65536", "read-zeroes=true")
    assert (done.exit_code, done.stdout) == (0, "{}\n")
    done = command(str(theirs), "blockdev-add", "driver=null-co", "node-name=n1")
    assert done.exit_code == 1
    assert done.stderr == "GenericError: Duplicate nodes with node-name='n1'\n"
    assert done.stdout == ""


def test_exit_codes(ours: Path) -> None:
    assert command(str(ours), "no-such-command").exit_code == 1
    assert command(str(ours / "nowhere"), "query-version").exit_code == 1
    assert command(str(ours), "query-version", "x").exit_code == 2
    assert command(str(ours), "--no-such-option").exit_code == 2
    assert command().exit_code == 2
    assert command("--help").exit_code == 0


def test_events_until_the_monitor_goes(ours: Path) -> None:
    done = command(str(ours), "--events", "quit")
    assert done.exit_code == 0
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()[1:]] == ["SHUTDOWN"]


def test_lines_from_a_pipe(theirs: Path) -> None:
    script = "# a script\nblockdev-add driver=null-co node-name=p1\ntransaction(\nabort\n)\nquery-version\n"
    done = command(str(theirs), "--compact", stdin=script)
    # The transaction fails, and so the rest is not run.
    assert done.exit_code == 1
    assert done.stdout == "{}\n"
    assert "Transaction aborted" in done.stderr
    assert command(str(theirs), stdin="transaction(\n").exit_code == 2
    assert command(str(theirs), stdin="blockdev-add x\n").exit_code == 2


def test_the_shell_on_a_terminal(theirs: Path, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    program = "from livedisk.emulator.cli.qmp import qmp; qmp()"
    environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(theirs)], stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    try:
        seen = until(leader, b"(QEMU)")
        assert b"QMP 10.0.2" in seen
        os.write(leader, b"query-version\r")
        assert b'"minor": 0' in until(leader, b'"major": 10')
        os.write(leader, b"nope\r")
        until(leader, b"The command nope has not been found")
        # Between two prompts the terminal is not the shell's, and what is typed there may be lost: type it again.
        deadline = time.monotonic() + 20
        while child.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # EIO: the shell has gone
                os.write(leader, b"\x04")
                if select.select([leader], [], [], 0.2)[0]:
                    os.read(leader, 4096)
            time.sleep(0.05)
        assert child.poll() == 0
    finally:
        child.kill()
        child.wait()
        os.close(leader)
    assert "query-version" in (tmp_path / "livedisk" / "qmp_history").read_text()


def until(descriptor: int, mark: bytes) -> bytes:
    """Read until ``mark`` was seen since the call, on an otherwise quiet terminal."""
    seen, deadline = b"", time.monotonic() + 20
    while mark not in seen:
        assert select.select([descriptor], [], [], max(0, deadline - time.monotonic()))[0], seen
        seen += os.read(descriptor, 4096)
    return seen


def test_the_public_qmp_shell_works(ours: Path, tmp_path: Path) -> None:
    shell = Path(sys.executable).with_name("qmp-shell")
    script = "query-version\nquery-name\nhuman-monitor-command command-line=foo\nquery-yank\nquit\n"
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        [shell, str(ours)], input=script, capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert "Connected to QEMU 10.0.2" in done.stdout
    assert '"package": "livedisk' in done.stdout
    assert "unknown command: 'foo'" in done.stdout
    assert "host-qmp-quit" in done.stdout or done.stdout.count('"return"') >= 4


def test_the_qmp_library_works(ours: Path) -> None:
    program = """
import asyncio, sys
from qemu.qmp import QMPClient
async def main():
    client = QMPClient("test")
    await client.connect(sys.argv[1])
    print((await client.execute("query-version"))["qemu"]["major"])
    await client.disconnect()
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(ours)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "10\n"
