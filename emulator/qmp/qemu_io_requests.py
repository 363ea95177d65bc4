"""The commands of `qemu_io`. Each takes its options and arguments as qemu-io does, in the same order of checks."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Final

from livedisk.emulator.block.debug import Breakpoints, breakpoints
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.reopen import set_read_only
from livedisk.emulator.block.status import layer_status
from livedisk.emulator.block.types import Preallocation, ZeroFlags
from livedisk.emulator.device.accounting import Kind
from livedisk.emulator.errors import ParameterError
from livedisk.emulator.qmp.hmp_block import specific_lines
from livedisk.emulator.qmp.qemu_io import (
    COMMANDS,
    MAX_REQUEST,
    Refused,
    Target,
    Usage,
    amount,
    dump,
    io_command,
    number,
    options,
    pattern,
    report,
)
from livedisk.emulator.qmp.qemu_io_help import TEXTS

_DEFAULT_PATTERN: Final = 0xCD
_SECTOR: Final = 512
_NO_STATE: Final = "the VM state cannot be accessed: there is no machine whose state it would be"


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


# -- read and write ----------------------------------------------------------------------------------------------------
@io_command(
    "read",
    "reads a number of bytes at a specified offset",
    args="[-abCqrv] [-P pattern [-s off] [-l len]] off len",
    least=2,
    most=-1,
)
async def read(target: Target, arguments: list[str]) -> None:
    given, rest = options(arguments, "bCl:pP:qrs:v")
    length = number(given["l"]) if "l" in given else None
    wanted = pattern(given["P"]) if "P" in given else None
    skip = number(given["s"]) if "s" in given else 0
    if len(rest) != 2:
        raise Usage
    offset, count = number(rest[0]), number(rest[1])
    if count > MAX_REQUEST:
        raise Refused(f"length cannot exceed {MAX_REQUEST}, given {rest[1]}")
    if wanted is None and ("l" in given or "s" in given):
        raise Usage
    checked = count - skip if length is None else length
    if checked < 0 or checked + skip > count:
        raise Refused("pattern verification range exceeds end of read data")
    if "b" in given:
        raise Refused(f"read failed: {_NO_STATE}")
    data = bytearray(count)
    started = time.perf_counter()
    try:
        await target.backend.read(offset, memoryview(data))
    except OSError as error:
        raise Refused(f"read failed: {_reason(error)}") from error
    if wanted is not None and data[skip : skip + checked] != bytes((wanted,)) * checked:
        target.print(f"Pattern verification failed at offset {offset + skip}, {checked} bytes")
    if "q" not in given:
        if "v" in given:
            dump(target, data, offset)
        report(target, "read", started, offset, count, count, machine="C" in given)


@io_command(
    "write",
    "writes a number of bytes at a specified offset",
    args="[-bcCfnqruz] [-P pattern | -s source_file] off len",
    least=2,
    most=-1,
    needs=Perm.WRITE,
)
async def write(target: Target, arguments: list[str]) -> None:
    given, rest = options(arguments, "bcCfnpP:qrs:uz")
    fill = pattern(given["P"]) if "P" in given else _DEFAULT_PATTERN
    if len(rest) != 2:
        raise Usage
    _check_write_options(given)
    offset, count = number(rest[0]), number(rest[1])
    if count > MAX_REQUEST and "n" not in given:
        raise Refused(f"length cannot exceed {MAX_REQUEST} without -n, given {rest[1]}")
    if "b" in given or "c" in given:
        for value, what in ((offset, "offset"), (count, "count")):
            if value % _SECTOR:
                raise Refused(f"{value} is not a sector-aligned value for '{what}'")
    if "b" in given:
        raise Refused(f"write failed: {_NO_STATE}")
    data = b""
    if "z" not in given:
        data = _from_file(given["s"], count) if "s" in given else bytes((fill,)) * count
    started = time.perf_counter()
    try:
        await _put(target, given, offset, count, data)
    except OSError as error:
        raise Refused(f"write failed: {_reason(error)}") from error
    if "q" not in given:
        report(target, "wrote", started, offset, count, count, machine="C" in given)


def _check_write_options(given: dict[str, str]) -> None:
    if "b" in given and "z" in given:
        raise Refused("-b and -z cannot be specified at the same time")
    if "f" in given and ("b" in given or "c" in given):
        raise Refused("-f and -b or -c cannot be specified at the same time")
    if "n" in given and "z" not in given:
        raise Refused("-n requires -z to be specified")
    if "u" in given and "z" not in given:
        raise Refused("-u requires -z to be specified")
    if sum(name in given for name in "zPs") > 1:
        raise Refused("Only one of -z, -P, and -s can be specified at the same time")


def _from_file(path: str, count: int) -> bytes:
    """``count`` bytes of a file, again from its start where it is shorter."""
    try:
        with open(path, "rb") as file:
            content = file.read(count)
    except OSError as error:
        raise Refused(f"{path}: {_reason(error)}") from error
    if not content:
        raise Refused(f"{path}: file is empty")
    return (content * -(-count // len(content)))[:count]


def _zero_flags(given: dict[str, str]) -> ZeroFlags:
    flags = ZeroFlags.MAY_UNMAP if "u" in given else ZeroFlags.NONE
    return flags | ZeroFlags.NO_FALLBACK if "n" in given else flags


async def _put(target: Target, given: dict[str, str], offset: int, count: int, data: bytes) -> None:
    backend, fua = target.backend, "f" in given
    if "z" in given:
        await backend.write_zeroes(offset, count, _zero_flags(given), fua=fua)
    elif "c" in given:
        async with backend.request() as node:
            await node.write_compressed(offset, memoryview(data))
    else:
        await backend.write(offset, memoryview(data), fua=fua)


# -- several buffers, and asynchronous ---------------------------------------------------------------------------------
def _total(lengths: list[str]) -> int:
    """Bytes of all buffers together."""
    total = 0
    for text in lengths:
        length = number(text)
        if length > MAX_REQUEST:
            raise Refused(f"Argument '{text}' exceeds maximum size {MAX_REQUEST}")
        total += length
        if total > MAX_REQUEST:
            raise Refused(f"The total number of bytes exceed the maximum size {MAX_REQUEST}")
    return total


@io_command(
    "readv",
    "reads a number of bytes at a specified offset",
    args="[-Cqrv] [-P pattern] off len [len..]",
    least=2,
    most=-1,
)
async def readv(target: Target, arguments: list[str]) -> None:
    given, rest = options(arguments, "CP:qrv")
    wanted = pattern(given["P"]) if "P" in given else None
    if len(rest) < 2:
        raise Usage
    offset = number(rest[0])
    await _read_all(target, given, wanted, offset, _total(rest[1:]))


async def _read_all(target: Target, given: dict[str, str], wanted: int | None, offset: int, count: int) -> None:
    data = bytearray(count)
    started = time.perf_counter()
    try:
        await target.backend.read(offset, memoryview(data))
    except OSError as error:
        raise Refused(f"readv failed: {_reason(error)}") from error
    if wanted is not None and data != bytes((wanted,)) * count:
        target.print(f"Pattern verification failed at offset {offset}, {count} bytes")
    if "q" not in given:
        if "v" in given:
            dump(target, data, offset)
        report(target, "read", started, offset, count, count, machine="C" in given)


@io_command(
    "writev",
    "writes a number of bytes at a specified offset",
    args="[-Cfqr] [-P pattern] off len [len..]",
    least=2,
    most=-1,
    needs=Perm.WRITE,
)
async def writev(target: Target, arguments: list[str]) -> None:
    given, rest = options(arguments, "CfqrP:")
    fill = pattern(given["P"]) if "P" in given else _DEFAULT_PATTERN
    if len(rest) < 2:
        raise Usage
    offset = number(rest[0])
    count = _total(rest[1:])
    started = time.perf_counter()
    try:
        await target.backend.write(offset, memoryview(bytes((fill,)) * count), fua="f" in given)
    except OSError as error:
        raise Refused(f"writev failed: {_reason(error)}") from error
    if "q" not in given:
        report(target, "wrote", started, offset, count, count, machine="C" in given)


@io_command(
    "aio_read",
    "asynchronously reads a number of bytes",
    args="[-Ciqrv] [-P pattern] off len [len..]",
    least=2,
    most=-1,
)
async def aio_read(target: Target, arguments: list[str]) -> None:
    given, rest = options(arguments, "CP:iqrv")
    wanted = pattern(given["P"]) if "P" in given else None
    if "i" in given:
        _invalid(target, Kind.READ, "injecting invalid read request")
        return
    if len(rest) < 2:
        raise Usage
    offset = number(rest[0])
    count = _total(rest[1:])

    async def work() -> None:
        await _counted(target, Kind.READ, count, lambda: _read_all(target, given, wanted, offset, count))

    await target.start(work(), held=lambda: _is_held(target))


@io_command(
    "aio_write",
    "asynchronously writes a number of bytes",
    args="[-Cfiqruz] [-P pattern] off len [len..]",
    least=2,
    most=-1,
    needs=Perm.WRITE,
)
async def aio_write(target: Target, arguments: list[str]) -> None:
    given, rest = options(arguments, "CfiP:qruz")
    fill = pattern(given["P"]) if "P" in given else _DEFAULT_PATTERN
    if "i" in given:
        _invalid(target, Kind.WRITE, "injecting invalid write request")
        return
    if len(rest) < 2:
        raise Usage
    if "z" in given and len(rest) != 2:
        raise Refused("-z supports only a single length parameter")
    if "u" in given and "z" not in given:
        raise Refused("-u requires -z to be specified")
    offset = number(rest[0])
    count = _total(rest[1:])

    async def put() -> None:
        started = time.perf_counter()
        try:
            await _put(target, given, offset, count, b"" if "z" in given else bytes((fill,)) * count)
        except OSError as error:
            raise Refused(f"aio_write failed: {_reason(error)}") from error
        if "q" not in given:
            report(target, "wrote", started, offset, count, count, machine="C" in given)

    async def work() -> None:
        await _counted(target, Kind.WRITE, count, put)

    await target.start(work(), held=lambda: _is_held(target))


def _invalid(target: Target, kind: Kind, text: str) -> None:
    if target.accounting is not None:
        target.accounting.invalid(kind)
    raise Refused(text)


async def _counted(target: Target, kind: Kind, count: int, work: Callable[[], Awaitable[None]]) -> None:
    """Run a request, in the device's statistics; a failure is printed."""
    accounting = target.accounting
    started = accounting.start() if accounting is not None else 0
    try:
        await work()
    except Refused as refusal:
        target.print(str(refusal))
        if accounting is not None:
            accounting.failed(kind, started)
    else:
        if accounting is not None:
            accounting.done(kind, count, started)


@io_command("aio_flush", "completes all outstanding aio requests")
async def aio_flush(target: Target, arguments: list[str]) -> None:
    while target.pending:
        await asyncio.wait(set(target.pending))
    if target.accounting is not None:
        target.accounting.done(Kind.FLUSH, 0, target.accounting.start())


@io_command("flush", "flush all in-core file state to disk")
async def flush(target: Target, arguments: list[str]) -> None:
    try:
        await target.backend.flush()
    except OSError as error:
        raise Refused(f"flush failed: {_reason(error)}") from error


@io_command(
    "discard",
    "discards a number of bytes at a specified offset",
    args="[-Cq] off len",
    least=2,
    most=-1,
    needs=Perm.WRITE,
)
async def discard(target: Target, arguments: list[str]) -> None:
    given, rest = options(arguments, "Cq")
    if len(rest) != 2:
        raise Usage
    offset, count = number(rest[0]), number(rest[1])
    started = time.perf_counter()
    try:
        await target.backend.discard(offset, count)
    except OSError as error:
        raise Refused(f"discard failed: {_reason(error)}") from error
    if "q" not in given:
        report(target, "discard", started, offset, count, count, machine="C" in given)


# -- the image ---------------------------------------------------------------------------------------------------------
@io_command(
    "truncate",
    "truncates the current file at the given offset",
    args="[-m prealloc_mode] off",
    least=1,
    most=3,
    needs=Perm.WRITE | Perm.RESIZE,
)
async def truncate(target: Target, arguments: list[str]) -> None:
    given, rest = options(arguments, "m:")
    mode = given.get("m", Preallocation.OFF.value)
    if mode not in list(Preallocation):
        raise ParameterError(f"Invalid preallocation mode '{mode}'")
    if len(rest) != 1:
        raise Usage
    size = number(rest[0])
    async with target.node.graph.drained(target.node):
        await target.backend.truncate(size, exact=False, prealloc=Preallocation(mode))


@io_command("length", "gets the length of the current file")
async def length(target: Target, arguments: list[str]) -> None:
    target.print(amount(target.backend.size))


@io_command("info", "prints information about the current file")
async def info(target: Target, arguments: list[str]) -> None:
    node = target.node
    driver = node.driver
    target.print(f"format name: {node.options.driver}")
    if not node.children:
        target.print(f"format name: {node.options.driver}")
    target.print(f"cluster size: {amount(driver.cluster_size())}")
    target.print(f"vm state offset: {amount(driver.vm_state_offset())}")
    for line in specific_lines(driver.specific_info()):
        target.tell(line)


async def _allocated_run(target: Target, offset: int, length: int) -> tuple[bool, int]:
    """Whether the node itself has what is at ``offset``, and for how many bytes that is so."""
    status = await layer_status(target.node, offset, length)
    total, end = status.length, offset + length
    while total and offset + total < end:
        more = await layer_status(target.node, offset + total, end - offset - total)
        if more.allocated != status.allocated or not more.length:
            break
        total += more.length
    return status.allocated, total


@io_command("map", "prints the allocated areas of a file", args="")
async def map_(target: Target, arguments: list[str]) -> None:
    offset, end = 0, target.backend.size
    while offset < end:
        try:
            allocated, run = await _allocated_run(target, offset, end - offset)
        except OSError as error:
            raise Refused(f"Failed to get allocation status: {error.strerror}") from None
        if not run:
            raise Refused("Unexpected end of image")
        what = "    allocated" if allocated else "not allocated"
        target.print(f"{amount(run)} ({run:#x}) bytes {what} at offset {amount(offset)} ({offset:#x})")
        offset += run


@io_command("alloc", "checks if offset is allocated in the file", args="offset [count]", least=1, most=2)
async def alloc(target: Target, arguments: list[str]) -> None:
    start = offset = number(arguments[0])
    count = number(arguments[1]) if len(arguments) > 1 else _SECTOR
    end = min(start + count, max(target.backend.size, start))
    found = 0
    while offset < end:
        allocated, run = await _allocated_run(target, offset, end - offset)
        if not run:
            break
        found += run if allocated else 0
        offset += run
    target.print(f"{found}/{offset - start} bytes allocated at offset {amount(start)}")


@io_command(
    "reopen",
    "reopens an image with new options",
    args="[(-r|-w)] [-c cache] [-o options]",
    most=-1,
)
async def reopen(target: Target, arguments: list[str]) -> None:
    given, rest = options(arguments, "c:o:rw")
    if rest or ("r" in given and "w" in given):
        raise Usage
    if "c" in given or "o" in given:
        raise Refused("reopen: only -r and -w are supported here; use blockdev-reopen for other options")
    if given:
        await set_read_only(target.node.graph, target.node, "r" in given)


# -- breakpoints -------------------------------------------------------------------------------------------------------
def _debugger(target: Target) -> Breakpoints:
    found = breakpoints(target.node)
    if found is None:
        raise Refused("Operation not supported")
    return found


def _is_held(target: Target) -> bool:
    found = breakpoints(target.node) if target.tags else None
    return found is not None and any(found.is_suspended(tag) for tag in target.tags)


@io_command(
    "break", "sets a breakpoint on event and tags the stopped request as tag", args="event tag", least=2, most=2
)
async def break_(target: Target, arguments: list[str]) -> None:
    event, tag = arguments
    try:
        _debugger(target).set_breakpoint(event, tag)
    except (OSError, Refused) as error:
        raise Refused(f"Could not set breakpoint: {_why(error)}") from error
    target.tags.add(tag)


@io_command("remove_break", "remove a breakpoint by tag", args="tag", least=1, most=1)
async def remove_break(target: Target, arguments: list[str]) -> None:
    try:
        _debugger(target).remove_breakpoint(arguments[0])
    except (OSError, Refused) as error:
        raise Refused(f"Could not remove breakpoint {arguments[0]}: {_why(error)}") from error
    target.tags.discard(arguments[0])


@io_command("resume", "resumes the request tagged as tag", args="tag", least=1, most=1)
async def resume(target: Target, arguments: list[str]) -> None:
    before = set(target.pending)
    try:
        _debugger(target).resume(arguments[0])
    except (OSError, Refused) as error:
        raise Refused(f"Could not resume request: {_why(error)}") from error
    if before:
        # As in QEMU, what the request then prints mostly comes with this command.
        await asyncio.wait(before, timeout=1, return_when=asyncio.FIRST_COMPLETED)


@io_command("wait_break", "waits for the suspension of a request", args="tag", least=1, most=1)
async def wait_break(target: Target, arguments: list[str]) -> None:
    try:
        found = _debugger(target)
    except Refused as error:  # QEMU waits for ever
        raise Refused(f"Could not wait for a breakpoint: {error}") from error
    while not found.is_suspended(arguments[0]):
        await asyncio.sleep(0.002)


def _why(error: Exception) -> str:
    return _reason(error) if isinstance(error, OSError) else str(error)


# -- others ------------------------------------------------------------------------------------------------------------
@io_command("sleep", "waits for the given value in milliseconds", least=1, most=1)
async def sleep(target: Target, arguments: list[str]) -> None:
    try:
        milliseconds = int(arguments[0], 0)
    except ValueError:
        raise Refused(f"{arguments[0]} is not a valid number") from None
    await asyncio.sleep(max(milliseconds, 0) / 1000)


@io_command("abort", "simulate a program crash using abort(3)")
async def abort(target: Target, arguments: list[str]) -> None:
    raise Refused("abort: refused: it would take every guest down; send the daemon a signal")


@io_command("sigraise", "raises a signal", args="signal", least=1, most=1)
async def sigraise(target: Target, arguments: list[str]) -> None:
    known = {str(int(one)) for one in signal.Signals}
    if arguments[0] not in known:
        raise Refused(f"{arguments[0]} is not a valid number")
    raise Refused("sigraise: refused: it would take every guest down; send the daemon a signal")


@io_command("help", "help for one or all commands", args="[command]", most=1)
async def help_(target: Target, arguments: list[str]) -> None:
    if arguments:
        command = COMMANDS.get(arguments[0])
        if command is None:
            raise Refused(f"command {arguments[0]} not found")
        target.print(command.usage)
        text = TEXTS.get(command.name)
        if text is not None:
            target.print(text.rstrip("\n") + "\n")
        return
    for name in sorted(COMMANDS):
        target.print(COMMANDS[name].usage)
    target.print("\nUse 'help commandname' for extended help.")
