"""object-add, object-del, query-iothreads, and ``-object``: named things that other options refer to.

    iothread   what ``iothread=`` of a device or an export names. All I/O of livedisk runs in one event loop, so an
               iothread is a name for that loop; its polling options are kept, and the log says that they do nothing
    secret     data that must not stand on a command line, for those who encrypt; ``file`` is read when it is made
    tls-creds-x509, tls-creds-psk, authz-simple, authz-list, authz-list-file: see ``emulator/tls``

Another part, or another package, adds types with `object_type`. Source: QEMU ``qapi/qom.json``,
``qom/object_interfaces.c``, ``crypto/secret_common.c``; messages asked from QEMU 10.0.2.
"""

from __future__ import annotations

import base64
import binascii
import enum
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import msgspec

from livedisk.emulator.errors import LiveDiskError, ParameterError
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.keyval import IDENTIFIER_HINT
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType, define_union
from livedisk.emulator.qmp.registry import command

log = logging.getLogger(__name__)

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")


class ObjectOptions(QapiStruct):
    """``qom-type`` says what is made; the variants add its properties."""

    qom_type: str
    id: str


Make = Callable[[Any], Any]
M = TypeVar("M", bound=Make)
T = TypeVar("T")
OBJECT_TYPES: dict[str, tuple[type[ObjectOptions], Make]] = {}
"""By type: its options, and what makes the object of them."""


@runtime_checkable
class Completed(Protocol):
    """An object that has more to do once it was made, and others can be found (QEMU's UserCreatable)."""

    def complete(self, objects: Objects) -> None:
        """May raise LiveDiskError to refuse; then there is no such object."""


def object_type(name: str, options: type[ObjectOptions]) -> Callable[[M], M]:
    """Decorator: register what makes objects of a type. It may raise LiveDiskError to refuse."""

    def register(make: M) -> M:
        if name in OBJECT_TYPES:
            raise ValueError(f"object type {name!r} is registered twice")
        OBJECT_TYPES[name] = (options, make)
        return make

    return register


def _variants() -> Mapping[str, type[msgspec.Struct]]:
    return {name: options for name, (options, _) in OBJECT_TYPES.items()}


define_union(ObjectOptions, "qom-type", _variants)


class Objects:
    """The objects of one daemon, by id."""

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}
        self._given: dict[str, ObjectOptions] = {}
        self.before_add: list[Callable[[Any], None]] = []
        """Called with each object before it is one; may raise LiveDiskError."""

    def __contains__(self, name: str) -> bool:
        return name in self._objects

    def __getitem__(self, name: str) -> Any:
        return self._objects[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._objects)

    def find(self, name: str, kind: type[T]) -> T | None:
        """The object of that id and class, or None."""
        found = self._objects.get(name)
        return found if isinstance(found, kind) else None

    def find_any(self, name: str) -> Any:
        """The object of that id, of whatever class, or None."""
        return self._objects.get(name)

    def all(self, kind: type[T]) -> list[T]:
        """The objects of a class, oldest first."""
        return [thing for thing in self._objects.values() if isinstance(thing, kind)]

    def add(self, options: ObjectOptions) -> None:
        """Make an object. Raises ParameterError or LiveDiskError in QEMU's words."""
        if not _IDENTIFIER.match(options.id):
            raise ParameterError("Parameter 'id' expects an identifier", hint=IDENTIFIER_HINT)
        made = OBJECT_TYPES[options.qom_type][1](options)
        for check in self.before_add:
            check(made)
        if options.id in self._objects:
            raise LiveDiskError(f"attempt to add duplicate property '{options.id}' to object (type 'container')")
        if isinstance(made, Completed):
            made.complete(self)
        self._objects[options.id], self._given[options.id] = made, options

    def given(self, name: str) -> ObjectOptions:
        """The options that the object of that id was made of."""
        return self._given[name]

    def replace(self, name: str, made: Any, options: ObjectOptions) -> None:
        """The object of that id has other properties now."""
        self._objects[name], self._given[name] = made, options

    def delete(self, name: str) -> None:
        """End an object. Raises LiveDiskError in QEMU's words."""
        if name not in self._objects:
            raise LiveDiskError(f"object '{name}' not found")
        if getattr(self._objects[name], "in_use", False):
            raise LiveDiskError(f"object '{name}' is in use, can not be deleted")
        del self._objects[name], self._given[name]


@command("object-add", allow_preconfig=True)
async def object_add(ctx: Context, args: ObjectOptions) -> None:
    """Make an object."""
    ctx.daemon.objects.add(args)


class ObjectDel(QapiStruct):
    """The object's id."""

    id: str


@command("object-del", allow_preconfig=True)
async def object_del(ctx: Context, args: ObjectDel) -> None:
    """End an object."""
    ctx.daemon.objects.delete(args.id)


# -- iothread ----------------------------------------------------------------------------------------------------------


class IothreadOptions(ObjectOptions):
    """Times in nanoseconds."""

    aio_max_batch: int = 0
    poll_max_ns: int = 32768
    poll_grow: int = 0
    poll_shrink: int = 0
    thread_pool_min: int = 0
    thread_pool_max: int = 64


@dataclass(frozen=True, slots=True)
class Iothread:
    """A name for the event loop."""

    options: IothreadOptions


@object_type("iothread", IothreadOptions)
def make_iothread(options: IothreadOptions) -> Iothread:
    """Refuse what QEMU refuses; say what has no effect here."""
    tuned = [
        name
        for name, default in zip(options.__struct_fields__, options.__struct_defaults__, strict=False)
        if name not in ("qom_type", "id") and getattr(options, name) != default
    ]
    for name in IothreadOptions.__struct_fields__:
        value = getattr(options, name)
        if isinstance(value, int) and value < 0:
            raise LiveDiskError(f"{name.replace('_', '-')} value must be in range [0, {2**63 - 1}]")
    if tuned:
        log.info("iothread '%s': all I/O runs in one event loop; its options have no effect", options.id)
    return Iothread(options)


class IOThreadInfo(QapiStruct):
    """As QEMU's; ``thread-id`` is that of the event loop's thread."""

    id: str
    thread_id: int
    poll_max_ns: int
    poll_grow: int
    poll_shrink: int
    aio_max_batch: int


@command("query-iothreads", allow_preconfig=True)
async def query_iothreads(ctx: Context) -> list[IOThreadInfo]:
    """Every iothread object."""
    return [
        IOThreadInfo(
            id=one.options.id,
            thread_id=threading.get_native_id(),
            poll_max_ns=one.options.poll_max_ns,
            poll_grow=one.options.poll_grow,
            poll_shrink=one.options.poll_shrink,
            aio_max_batch=one.options.aio_max_batch,
        )
        for one in ctx.daemon.objects.all(Iothread)
    ]


# -- secret ------------------------------------------------------------------------------------------------------------


class SecretFormat(enum.StrEnum):
    """How the data is written down."""

    RAW = "raw"
    BASE64 = "base64"


class SecretOptions(ObjectOptions):
    """The data itself, or a file that holds it. ``keyid`` and ``iv``: the data is encrypted; refused here."""

    format: SecretFormat = SecretFormat.RAW
    data: str | UnsetType = UNSET
    file: str | UnsetType = UNSET
    keyid: str | UnsetType = UNSET
    iv: str | UnsetType = UNSET


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """The decoded data. It has no repr, so that no log shows it."""

    data: bytes


@object_type("secret", SecretOptions)
def make_secret(options: SecretOptions) -> Secret:
    """Read and decode the data. Raises LiveDiskError in QEMU's words."""
    if options.keyid is not UNSET or options.iv is not UNSET:
        raise LiveDiskError("secrets that are themselves encrypted ('keyid', 'iv') are not supported")
    if isinstance(options.file, str):
        if options.data is not UNSET:
            raise LiveDiskError("'file' and 'data' are mutually exclusive")
        try:
            raw = Path(options.file).read_bytes()
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise LiveDiskError(
                f"Unable to read {options.file}: Failed to open file “{options.file}”: {reason}"
            ) from None
    elif isinstance(options.data, str):
        raw = options.data.encode()
    else:
        raise LiveDiskError("Either 'file' or 'data' must be provided")
    if options.format is SecretFormat.RAW:
        return Secret(raw)
    try:
        return Secret(base64.b64decode(raw.strip(), validate=True))
    except binascii.Error:
        raise LiveDiskError("Unable to decode base64 data") from None
