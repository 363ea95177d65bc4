"""blkdebug: the same rules to QEMU and to us, the same requests fail; every event of qcow2 happens; breakpoints and limits."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from contract.disks import new_graph, opened, parse

from kit.libnbd import script
from kit.livedisk import Daemon
from kit.qcow2_disk import Disk
from kit.qcow2_disk import opened as opened_qcow2
from kit.qemu import StorageDaemon, check, create, qemu_img, qemu_io
from kit.qmp import Qmp, QmpError
from livedisk.emulator.block.debug import Event, breakpoints
from livedisk.emulator.block.status import block_status
from livedisk.emulator.block.types import ZeroFlags
from livedisk.emulator.drivers.blkdebug import Blkdebug
from livedisk.emulator.errors import BlockError

MIB = 1 << 20


def both(folder: Path) -> list[StorageDaemon]:
    return [StorageDaemon(folder, name="q"), Daemon(folder, name="l")]


# -- options -----------------------------------------------------------------------------------------------------------
CONFIGS = {
    "good": '# a comment\n\n[inject-error]\nevent = "none"\nerrno = "28"\nonce = "on"\n',
    "unknown": '[inject-error]\nevent = "read_aio"\nfoo = "1"\n',
    "nameless": '[inject-error]\nstate = "1"\n',
    "event": '[inject-error]\nevent = "bad"\n',
    "group": '[nosuch]\na = "1"\n',
    "none": "foo\n",
    "number": '[inject-error]\nevent = "none"\nerrno = "x"\n',
    "spaces": '[inject-error]\nevent="none"\n',
    "boolean": '[inject-error]\nevent = "none"\nonce = "maybe"\n',
    "kind": '[inject-error]\nevent = "none"\niotype = "bad"\n',
    "state": '[set-state]\nevent = "none"\nnew_state = "z"\n',
}
OPTIONS: list[dict[str, Any]] = [
    *({"config": name} for name in (*CONFIGS, "missing")),
    {"align": 3}, {"align": 4096}, {"align": 0}, {"align": 1 << 31}, {"align": 1024, "max-transfer": 1500}, {"align": -1},
    {"max-transfer": -1},
    {"align": 512, "opt-write-zero": 700}, {"align": 512, "max-write-zero": 700}, {"align": 512, "opt-discard": 700},
    {"opt-discard": 4096, "max-discard": 5000}, {"opt-write-zero": 4096, "max-write-zero": 5000}, {"max-transfer": 1 << 31},
    {"inject-error": [{"event": "foo"}]}, {"inject-error": [{"state": 1}]}, {"inject-error": {}},
    {"inject-error": [{"event": "none", "iotype": "x"}]}, {"inject-error": [{"event": "none", "errno": "x"}]},
    {"inject-error": [{"event": "none", "extra": 1}]}, {"set-state": [{"event": "none"}]},
    {"take-child-perms": ["writex"]}, {"take-child-perms": ["write"], "unshare-child-perms": ["write"]},
    {"take-child-perms": ["consistent-read", "write", "write-unchanged", "resize"]},
]  # fmt: skip


def test_options_are_taken_and_refused_as_qemu_does(short_path: Path) -> None:
    for name, text in CONFIGS.items():
        (short_path / name).write_text(text)
    (short_path / "disk.raw").write_bytes(bytes(MIB))
    answers: list[list[Any]] = []
    for daemon in both(short_path):
        answers.append([])
        with daemon, daemon.qmp() as qmp:
            for given in OPTIONS:
                changed = {key: str(short_path / value) if key == "config" else value for key, value in given.items()}
                # Not locked: QEMU's daemon has the file too.
                image = {"driver": "file", "filename": str(short_path / "disk.raw"), "locking": "off"}
                try:
                    qmp.call("blockdev-add", {"driver": "blkdebug", "node-name": "b", "image": image, **changed})
                    qmp.execute("blockdev-del", node_name="b")
                    answers[-1].append("taken")
                except QmpError as error:
                    answers[-1].append((error.kind, error.desc))
    for given, theirs, ours in zip(OPTIONS, *answers, strict=True):
        assert ours == theirs, given


def test_permissions_of_the_child_conflict_as_they_do_in_qemu(short_path: Path) -> None:
    (short_path / "disk.raw").write_bytes(bytes(MIB))
    answers: list[list[Any]] = []
    for daemon in both(short_path):
        answers.append([])
        with daemon, daemon.qmp() as qmp:
            file = {"driver": "file", "filename": str(short_path / "disk.raw"), "locking": "off", "node-name": "file"}
            qmp.call("blockdev-add", file)
            for name, more in (
                ("one", {"take-child-perms": ["write"]}),
                ("two", {"unshare-child-perms": ["write"]}),
                ("three", {"take-child-perms": ["write"]}),
            ):
                try:
                    qmp.call("blockdev-add", {"driver": "blkdebug", "node-name": name, "image": "file", **more})
                    answers[-1].append("taken")
                except QmpError as error:
                    answers[-1].append((error.kind, error.desc))
            graph = qmp.execute("x-debug-query-block-graph")["edges"]
            answers[-1].append(sorted((edge["name"], edge["perm"], edge["shared-perm"]) for edge in graph))
    assert answers[1] == answers[0]


def test_a_file_name_means_this_driver_and_is_said_of_it(short_path: Path) -> None:
    (short_path / "rules").write_text('[inject-error]\nevent = "read_aio"\nsector = "3"\n')
    create(short_path / "base.raw", MIB, format="raw")
    names = [f"blkdebug:{short_path}/rules:{short_path}/base.raw", f"blkdebug::{short_path}/base.raw"]
    for number, name in enumerate(names):
        qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", short_path / f"{number}.qcow2", "1M")
    answers: list[list[Any]] = []
    for daemon in both(short_path):
        answers.append([])
        with daemon, daemon.qmp() as qmp:
            for number in range(2):
                file = {"driver": "file", "filename": str(short_path / f"{number}.qcow2"), "locking": "off"}
                qmp.call(
                    "blockdev-add", {"driver": "qcow2", "node-name": f"n{number}", "read-only": True, "file": file}
                )
                qmp.execute("block-export-add", type="nbd", id=f"e{number}", node_name=f"n{number}")
                answers[-1].append(_try_all(daemon.uri(f"n{number}"), [("pread", 512, 0), ("pread", 512, 1536)]))
            nodes = qmp.execute("query-named-block-nodes")
            answers[-1].append(sorted(node["file"] for node in nodes))
    assert answers[1] == answers[0]
    assert answers[1][0] == [0, "EIO"]


# -- what fails --------------------------------------------------------------------------------------------------------
Request = tuple[Any, ...]


def _try_all(uri: str, requests: list[Request]) -> Any:
    """Send the requests one after another; for each 0 or its error's name."""
    return script(
        uri,
        """
        result = []
        for name, *arguments in requests:
            if name == "pwrite":
                arguments[0] = bytes([arguments[0][0]]) * arguments[0][1]
            try:
                getattr(h, name)(*arguments)
                result.append(0)
            except nbd.Error as error:
                result.append(error.errno)
        """,
        # With structured replies QEMU hangs up when a read fails.
        before="h.set_strict_mode(0); h.set_request_structured_replies(False)",
        requests=requests,
    )


SOME: list[Request] = [
    ("pread", 4096, 0), ("pwrite", (1, 4096), 0), ("pread", 4096, 0), ("flush",), ("pwrite", (2, 4096), 65536),
    ("zero", 65536, 131072), ("pread", 512, 131072), ("trim", 65536, 0), ("pwrite", (3, 512), 4096), ("flush",),
    ("pread", 512, 4096), ("pread", 4096, 65536), ("zero", 512, 66048), ("flush",), ("pread", 512, 66048),
]  # fmt: skip
RULES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "all": {"inject-error": [{"event": "none"}]},
    "all, once": {"inject-error": [{"event": "none", "once": True, "errno": 28}]},
    "reads": {"inject-error": [{"event": "none", "iotype": "read", "immediately": True}]},
    "writes": {"inject-error": [{"event": "none", "iotype": "write", "errno": 28}]},
    "zeroes": {"inject-error": [{"event": "none", "iotype": "write-zeroes"}]},
    "discards": {"inject-error": [{"event": "none", "iotype": "discard"}]},
    "flushes": {"inject-error": [{"event": "none", "iotype": "flush", "errno": 28}]},
    "one sector": {"inject-error": [{"event": "none", "sector": 8}]},
    "no error hides one": {"inject-error": [{"event": "none", "sector": 8, "errno": 0}, {"event": "none"}]},
    "an event": {"inject-error": [{"event": "write_aio", "errno": 28, "once": True}]},
    "another event": {"inject-error": [{"event": "read_aio", "iotype": "read"}]},
    "pwritev": {
        "inject-error": [{"event": "pwritev", "once": True}, {"event": "pwritev_done", "errno": 28, "once": True}]
    },
    "zero event": {"inject-error": [{"event": "pwritev_zero", "errno": 12}]},
    "flush_to_disk": {"inject-error": [{"event": "flush_to_disk", "iotype": "flush", "once": True}]},
    "flush_to_os": {"inject-error": [{"event": "flush_to_os", "once": True, "errno": 27}]},
    "states": {
        "set-state": [
            {"event": "write_aio", "state": 1, "new_state": 2},
            {"event": "write_aio", "state": 2, "new_state": 3},
        ],
        "inject-error": [
            {"event": "read_aio", "state": 2},
            {"event": "pwritev", "state": 3, "once": True, "errno": 28},
        ],
    },
    "two states at once": {
        "set-state": [{"event": "write_aio", "new_state": 5}, {"event": "write_aio", "new_state": 6}],
        "inject-error": [{"event": "read_aio", "state": 5}, {"event": "read_aio", "state": 6, "errno": 28}],
    },
    # QEMU passes over a failed read of what stands around a write (and loses it); so each of these fails the write, too.
    "padded": {"align": 4096, "inject-error": [{"event": "pwritev_rmw_tail"}]},
    "padded head": {"align": 4096, "inject-error": [{"event": "pwritev_rmw_after_head", "errno": 28, "once": True}]},
    "small zeroes": {"opt-write-zero": 65536, "inject-error": [{"event": "none", "iotype": "write"}]},
    "small discards": {"opt-discard": 131072, "inject-error": [{"event": "none", "iotype": "discard"}]},
    "cut": {"max-transfer": 1024, "align": 512, "inject-error": [{"event": "none", "sector": 129, "errno": 28}]},
}


@pytest.mark.parametrize("name", RULES)
def test_the_same_requests_fail_as_in_qemu(name: str, short_path: Path) -> None:
    answers = []
    for daemon in both(short_path):
        disk = create(short_path / "disk.raw", MIB, format="raw")
        with daemon, daemon.qmp() as qmp:
            file = {"driver": "file", "filename": str(disk)}
            debug = {"driver": "blkdebug", "discard": "unmap", "image": file, **RULES[name]}
            qmp.call("blockdev-add", {"driver": "raw", "node-name": "n", "discard": "unmap", "file": debug})
            qmp.execute("block-export-add", type="nbd", id="e", node_name="n", writable=True)
            answers.append(_try_all(daemon.uri("n"), SOME))
        answers.append(disk.read_bytes())  # type: ignore[arg-type]
    assert answers[2] == answers[0]
    assert answers[3] == answers[1]


# -- events of qcow2 -----------------------------------------------------------------------------------------------------
async def _grow_and_shrink(disk: Disk) -> None:
    await disk.backend.truncate(1 << 41)
    await disk.backend.truncate(8 * MIB)


async def _overwrite_snapshot(disk: Disk) -> None:
    await disk.write(0, b"s" * 65536)
    await disk.backend.flush()


async def _many(disk: Disk) -> None:
    for offset in range(0, disk.node.size, 65536):
        await disk.write(offset, b"m" * min(65536, disk.node.size - offset))
    await disk.backend.flush()


async def _zero_again(disk: Disk) -> None:
    await disk.write(0, b"z" * 131072)
    await disk.backend.flush()
    await disk.backend.discard(0, 131072)
    await disk.backend.flush()
    await disk.backend.flush()


async def _part(disk: Disk) -> None:
    await disk.write(100 * 512, b"p" * 512)
    await disk.backend.flush()


async def _merged(disk: Disk) -> None:
    await disk.write(MIB // 2 + 512, b"c" * 512)
    await disk.backend.flush()


async def _packed(disk: Disk) -> None:
    await disk.write(0, b"p" * 512)
    await disk.node.write_compressed(MIB, memoryview(b"q" * 65536))


async def _read(disk: Disk) -> None:
    await disk.read(0, 512)
    await disk.read(MIB // 2, 512)


WORK: dict[Event, tuple[str, Callable[[Disk], Awaitable[None]]]] = {
    Event.L1_UPDATE: ("tiny", _many),
    Event.L1_GROW_ALLOC_TABLE: ("overlay", _grow_and_shrink),
    Event.L1_GROW_WRITE_TABLE: ("overlay", _grow_and_shrink),
    Event.L1_GROW_ACTIVATE_TABLE: ("overlay", _grow_and_shrink),
    Event.L1_SHRINK_WRITE_TABLE: ("overlay", _grow_and_shrink),
    Event.L1_SHRINK_FREE_L2_CLUSTERS: ("overlay", _grow_and_shrink),
    Event.L2_LOAD: ("overlay", _read),
    Event.L2_UPDATE: ("overlay", _many),
    Event.L2_ALLOC_COW_READ: ("snapshot", _overwrite_snapshot),
    Event.L2_ALLOC_WRITE: ("snapshot", _overwrite_snapshot),
    Event.READ_AIO: ("overlay", _read),
    Event.READ_BACKING_AIO: ("overlay", _read),
    Event.READ_COMPRESSED: ("packed", _read),
    Event.WRITE_AIO: ("overlay", _part),
    Event.WRITE_COMPRESSED: ("overlay", _packed),
    Event.L2_UPDATE_COMPRESSED: ("overlay", _packed),
    Event.COW_READ: ("overlay", _merged),
    Event.COW_WRITE: ("overlay", _merged),
    Event.REFTABLE_GROW: ("tiny", _many),
    Event.REFBLOCK_LOAD: ("overlay", _merged),
    Event.REFBLOCK_UPDATE_PART: ("overlay", _merged),
    Event.REFBLOCK_ALLOC: ("tiny", _many),
    Event.REFBLOCK_ALLOC_HOOKUP: ("tiny", _many),
    Event.REFBLOCK_ALLOC_WRITE: ("tiny", _many),
    Event.REFBLOCK_ALLOC_WRITE_BLOCKS: ("tiny", _many),
    Event.REFBLOCK_ALLOC_WRITE_TABLE: ("tiny", _many),
    Event.REFBLOCK_ALLOC_SWITCH_TABLE: ("tiny", _many),
    Event.CLUSTER_ALLOC: ("overlay", _merged),
    Event.CLUSTER_ALLOC_BYTES: ("overlay", _packed),
    Event.CLUSTER_FREE: ("overlay", _zero_again),
    Event.FLUSH_TO_OS: ("overlay", _part),
    Event.FLUSH_TO_DISK: ("overlay", _part),
    Event.PWRITEV: ("overlay", _part),
    Event.PWRITEV_DONE: ("overlay", _part),
}


def _image(kind: str, folder: Path) -> Path:
    base = create(folder / "base.qcow2", 4 * MIB)
    path = folder / "image.qcow2"
    if kind == "tiny":
        return create(path, 9 * MIB, options="cluster_size=512")
    (folder / "fill.raw").write_bytes(b"f" * MIB)
    qemu_img("convert", "-n", "-f", "raw", "-O", "qcow2", "--target-is-zero", folder / "fill.raw", _sized(folder, base))
    if kind == "packed":
        create(path, 4 * MIB)
        qemu_img("convert", "-n", "-c", "-f", "raw", "-O", "qcow2", folder / "fill.raw", path)
        return path
    create(path, 4 * MIB, backing=base)
    qemu_io(path, "write -P 7 0 256k")
    if kind == "snapshot":
        qemu_img("snapshot", "-c", "s", path)
    return path


def _sized(folder: Path, base: Path) -> Path:
    qemu_img("resize", "-q", "--shrink", "-f", "qcow2", base, "1M")
    return base


@pytest.mark.parametrize("event", WORK)
def test_an_error_at_each_event_of_qcow2_fails_a_request_and_nothing_else(event: Event, tmp_path: Path) -> None:
    """The whole work fails once, goes on without error the second time, and leaves an image that is whole."""
    kind, work = WORK[event]
    path = _image(kind, tmp_path)
    rule = {"event": event.value, "errno": errno.ENOMEM, "once": True}
    file = parse({"driver": "blkdebug", "image": {"driver": "file", "filename": str(path)}, "inject-error": [rule]})

    async def act() -> None:
        async with opened_qcow2(file) as disk:
            failed = 0
            for _ in range(4):
                try:
                    await work(disk)
                except OSError as error:
                    if error.errno != errno.ENOMEM:
                        raise
                    failed += 1
            assert failed <= 1
            driver = disk.node.file.node.driver
            assert isinstance(driver, Blkdebug)
            rules = driver.breakpoints()
            assert rules is not None
            assert not rules._errors[event], "it never happened"

    asyncio.run(act())
    check(path, leaks=True)


CHANGES: list[Request] = [
    ("pread", 4096, 0), ("pwrite", (1, 4096), 0), ("pwrite", (2, 4096), 3 * 65536), ("flush",), ("pwrite", (3, 65536), 131072),
    ("flush",), ("pread", 512, MIB), ("pwrite", (4, 512), MIB + 512), ("pread", 512, MIB), ("flush",), ("trim", 65536, 0),
    ("flush",), ("zero", 65536, 131072), ("zero", 512, 3 * 65536), ("flush",), ("pwrite", (5, MIB), 2 * MIB), ("flush",),
    ("pwrite", (6, 65536), 0), ("flush",), ("pread", 4096, 0),
]  # fmt: skip
FILL: list[Request] = [
    *(("pwrite", (number % 250 + 1, 65536), number * 65536) for number in range(40)), ("flush",),
    *(("pwrite", (9, 65536), number * 65536) for number in range(40, 144)), ("flush",),
]  # fmt: skip
ELSEWHERE = {Event.CLUSTER_FREE, Event.NONE}
"""Clusters become free at the flush that makes it safe; in QEMU at once."""


def _watched(kind: str, folder: Path) -> Path:
    """An image anew; its backing file holds data everywhere: QEMU zeroes and reads what we know to be zeroes."""
    for made in folder.glob("*.qcow2"):
        made.unlink()
    if kind == "tiny":
        return _image(kind, folder)
    qemu_io(create(folder / "base.qcow2", 4 * MIB), "write -q -P 9 0 4M")
    path = create(folder / "image.qcow2", 4 * MIB, backing=folder / "base.qcow2")
    qemu_io(path, "write -q -P 7 1M 64k")
    if kind == "snapshot":
        qemu_img("snapshot", "-c", "s", path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["overlay", "snapshot", "tiny"])
def test_events_of_qcow2_come_where_they_come_in_qemu(kind: str, short_path: Path) -> None:
    """An error injected at each event, one after the other, is the same request's."""
    answers: list[dict[str, Any]] = []
    for daemon in both(short_path):
        answers.append({})
        with daemon, daemon.qmp() as qmp:
            for event in sorted({*Event} - ELSEWHERE):
                file = {"driver": "file", "filename": str(_watched(kind, short_path)), "discard": "unmap"}
                rule = {"event": event.value, "errno": 28, "once": True}
                debug = {"driver": "blkdebug", "discard": "unmap", "image": file, "inject-error": [rule]}
                backing = {"driver": "file", "filename": str(short_path / "base.qcow2"), "read-only": True}
                given: dict[str, Any] = {"driver": "qcow2", "node-name": "n", "discard": "unmap", "file": debug}
                if kind != "tiny":
                    given["backing"] = {"driver": "qcow2", "file": backing, "read-only": True}
                answers[-1][event.value] = _told(qmp, daemon.uri("n"), given, FILL if kind == "tiny" else CHANGES)
    assert answers[1] == answers[0]


def _told(qmp: Qmp, uri: str, node: dict[str, Any], requests: list[Request]) -> Any:
    """The numbers of the requests that fail, or why the node cannot be opened."""
    try:
        qmp.call("blockdev-add", node)
    except QmpError as error:
        return error.desc
    qmp.execute("block-export-add", type="nbd", id="e", node_name="n", writable=True)
    failed = [number for number, error in enumerate(_try_all(uri, requests)) if error]
    qmp.execute("block-export-del", id="e", mode="hard")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("blockdev-del", node_name="n")
    return failed


# -- breakpoints, limits, and what QEMU does not do -----------------------------------------------------------------------
Work = Callable[[Any, Blkdebug], Awaitable[None]]


def with_node(folder: Path, work: Work, **options: Any) -> None:
    """Run ``work(backend, driver)`` on a blkdebug node over a file of 1 MiB."""
    path = folder / "disk.raw"
    path.write_bytes(b"d" * MIB)
    image = {"driver": "file", "filename": str(path), "discard": "unmap"}

    async def act() -> None:
        async with opened({"driver": "blkdebug", "discard": "unmap", "image": image, **options}) as backend:
            driver = backend.node.driver
            assert isinstance(driver, Blkdebug)
            await work(backend, driver)

    asyncio.run(act())


def test_a_breakpoint_holds_one_request_until_it_is_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def work(backend: Any, driver: Blkdebug) -> None:
        found = breakpoints(backend.node)
        assert found is not None
        found.set_breakpoint("pwritev", "A")
        held = asyncio.create_task(backend.write(0, memoryview(b"x" * 512)))
        while not found.is_suspended("A"):
            await asyncio.sleep(0)
        await backend.write(4096, memoryview(b"y" * 512))  # a breakpoint is hit once
        assert not held.done()
        found.resume("A")
        await held
        found.set_breakpoint("pwritev_done", "B")
        held = asyncio.create_task(backend.write(0, memoryview(b"z" * 512)))
        while not found.is_suspended("B"):
            await asyncio.sleep(0)
        found.remove_breakpoint("B")
        await held
        found.set_breakpoint("pwritev", "C")
        found.remove_breakpoint("C")
        await backend.write(0, memoryview(b"z" * 512))
        calls: list[tuple[Callable[..., None], tuple[str, ...]]] = [
            (found.resume, ("A",)), (found.remove_breakpoint, ("A",)), (found.set_breakpoint, ("nonsense", "A"))
        ]  # fmt: skip
        for call, arguments in calls:
            with pytest.raises(OSError) as caught:
                call(*arguments)
            assert caught.value.errno == errno.ENOENT

    with_node(tmp_path, work)
    told = [f"blkdebug: {what} request '{tag}'" for tag in "AB" for what in ("Suspended", "Resuming")]
    assert capfd.readouterr().out.splitlines() == told


def test_breakpoints_of_a_format_are_those_of_what_it_stands_on(tmp_path: Path) -> None:
    async def act() -> None:
        graph = new_graph()
        raw = await graph.open(parse({"driver": "raw", "file": {"driver": "raw", "file": {"driver": "null-co"}}}))
        assert breakpoints(raw) is None
        debug = await graph.open(
            parse({"driver": "raw", "file": {"driver": "blkdebug", "image": {"driver": "null-co", "node-name": "n"}}})
        )
        assert breakpoints(debug) is debug.file.node.driver.breakpoints()
        await graph.close()

    asyncio.run(act())


def test_a_failed_read_of_what_stands_around_a_write_fails_it(tmp_path: Path) -> None:
    """QEMU writes zeroes there."""

    async def work(backend: Any, driver: Blkdebug) -> None:
        with pytest.raises(OSError) as caught:
            await backend.write(512, memoryview(b"x" * 512))
        assert caught.value.errno == errno.EIO

    rule = {"event": "pwritev_rmw_head", "iotype": "read"}
    with_node(tmp_path, work, align=4096, **{"inject-error": [rule]})
    assert (tmp_path / "disk.raw").read_bytes() == b"d" * MIB


def test_zeroes_below_the_optimum_are_written_out(tmp_path: Path) -> None:
    async def work(backend: Any, driver: Blkdebug) -> None:
        with pytest.raises(OSError) as caught:
            await backend.write_zeroes(0, 65536, ZeroFlags.NO_FALLBACK)
        assert caught.value.errno == errno.ENOTSUP
        await backend.write_zeroes(512, 300_032)
        await backend.discard(600_064, 131_072)

    with_node(tmp_path, work, **{"opt-write-zero": 131072, "max-write-zero": 131072, "max-discard": 65536})
    expected = bytearray(b"d" * MIB)
    expected[512 : 512 + 300_032] = bytes(300_032)
    expected[600_064 : 600_064 + 131_072] = bytes(131_072)
    assert (tmp_path / "disk.raw").read_bytes() == expected


def test_reading_block_status_fails_only_if_asked_for(tmp_path: Path) -> None:
    async def work(backend: Any, driver: Blkdebug) -> None:
        with pytest.raises(OSError):
            await block_status(backend.node, 0, 4096)
        assert (await block_status(backend.node, 0, MIB)).length == MIB

    with_node(tmp_path, work, **{"inject-error": [{"event": "none", "iotype": "block-status", "once": True}]})


def test_options_cannot_be_changed_by_a_reopen(tmp_path: Path) -> None:
    async def work(backend: Any, driver: Blkdebug) -> None:
        changed = parse({"driver": "blkdebug", "image": "n", "align": 4096})
        with pytest.raises(BlockError, match="Cannot change the option 'align'"):
            await driver.reopen_prepare(changed, read_only=False)

    with_node(tmp_path, work)
