"""Every QMP command by name: written once as a typed coroutine, found here by monitors, introspection and shells.

    @command("block_resize")
    async def block_resize(ctx: Context, args: BlockResize) -> None: ...

The arguments' class and the result's are read off the annotations; a command without arguments leaves ``args`` out,
one without result is annotated ``None`` and answers ``{}``. A command refuses by raising a `LiveDiskError`; its class
and text are the reply. An `OSError` is answered with its text.

Commands are registered while their modules are imported. `load_plugins` imports what other packages declare in the
entry-point group ``livedisk.plugins`` (``jobs`` of this project does so too): each entry point names a module, or a
function that is called once.
"""

from __future__ import annotations

import glob
import importlib
import inspect
import operator
import os
import sys
import typing
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, TypeVar

import msgspec

from livedisk.emulator.errors import CommandNotFound
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.model import Object, Type, describe, plain_object
from livedisk.emulator.qmp.qapi import QapiStruct
from livedisk.emulator.qmp.visit import JSON, Place, Syntax, read

PLUGIN_GROUP = "livedisk.plugins"

Handler = Callable[..., Awaitable[Any]]
H = TypeVar("H", bound=Handler)


class NoArguments(QapiStruct):
    """What a command takes that takes nothing."""


class Command(msgspec.Struct, eq=False, dict=True):
    """One command: its coroutine and what a monitor must know before calling it."""

    name: str
    handler: Handler
    allow_oob: bool = False
    """May run out of band, beside a command that is still running. It must not await anything that one could hold."""
    allow_preconfig: bool = False
    """May run before the machine is configured. livedisk has no such state; introspection clients see no
    difference."""
    success_response: bool = True
    """Whether success is answered; only commands that cannot answer any more say False."""
    features: tuple[str, ...] = ()

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return typing.get_type_hints(self.handler, include_extras=True)

    @cached_property
    def _argument(self) -> str | None:
        """Name of the parameter after the context, if there is one."""
        parameters = list(inspect.signature(self.handler).parameters)
        return parameters[1] if len(parameters) > 1 else None

    @cached_property
    def arguments(self) -> Object:
        """The type of the arguments; an empty object for none."""
        if self._argument is None:
            return plain_object(NoArguments)
        node = describe(self._hints[self._argument])
        if not isinstance(node, Object):
            raise TypeError(f"the arguments of {self.name} are not a Struct")
        return node

    @cached_property
    def returns(self) -> Type | None:
        """The type of the result; None for a command that answers ``{}``."""
        annotation = self._hints.get("return")
        return None if annotation in (None, type(None)) else describe(annotation)

    async def run(self, ctx: Context, arguments: dict[str, Any], syntax: Syntax = JSON) -> Any:
        """Check the arguments, run the command, return its typed result.

        Raises LiveDiskError, ParameterError among them, and OSError.
        """
        args = read(self.arguments, arguments, Place(), syntax)
        return await (self.handler(ctx) if self._argument is None else self.handler(ctx, args))


class Registry:
    """Commands by name. The process has one, `registry`; tests make their own."""

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}

    def __iter__(self) -> Iterator[Command]:
        return iter(self._commands.values())

    def __contains__(self, name: str) -> bool:
        return name in self._commands

    def add(self, command: Command) -> None:
        """Raises ValueError for a name that is taken."""
        if command.name in self._commands:
            raise ValueError(f"command {command.name!r} is registered twice")
        self._commands[command.name] = command

    def get(self, name: str) -> Command:
        """Raises CommandNotFound in QEMU's words."""
        try:
            return self._commands[name]
        except KeyError:
            raise CommandNotFound(f"The command {name} has not been found") from None

    def command(
        self,
        name: str,
        *,
        allow_oob: bool = False,
        allow_preconfig: bool = False,
        success_response: bool = True,
        features: tuple[str, ...] = (),
    ) -> Callable[[H], H]:
        """Decorator that registers a coroutine; see `Command` for the flags."""

        def register(handler: H) -> H:
            self.add(Command(name, handler, allow_oob, allow_preconfig, success_response, features))
            return handler

        return register

    async def execute(self, ctx: Context, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command by name with arguments as JSON has them. Returns its typed result."""
        return await self.get(name).run(ctx, arguments or {})


registry = Registry()
"""The process's commands."""

command = registry.command


def to_wire(result: Any) -> Any:
    """A command's result as JSON values: Structs become dicts, enums strings; None becomes ``{}``."""
    return {} if result is None else msgspec.to_builtins(result)


def load_plugins() -> None:
    """Import everything declared in the entry-point group ``livedisk.plugins``, in order of names. What a plugin
    raises is not caught: a broken plugin must not be passed over."""
    for _, reference in sorted(set(_declared_plugins(sys.path))):
        module_name, _, attribute = reference.partition(":")
        module = importlib.import_module(module_name)
        if attribute:
            operator.attrgetter(attribute)(module)()


def _declared_plugins(path: Iterable[str]) -> Iterator[tuple[str, str]]:
    """``(name, "module" or "module:function")`` of each entry point of the group, from installed packages' folders.

    As importlib.metadata finds them; but importing that alone takes a tenth of the time a daemon has to start.
    """
    seen: set[str] = set()
    for folder in path:
        for declaration in sorted(glob.glob("*.*-info/entry_points.txt", root_dir=folder or ".")):
            if declaration in seen:
                continue  # an earlier folder's package hides this one
            seen.add(declaration)
            in_group = False
            with open(os.path.join(folder, declaration), encoding="utf-8") as lines:
                for line in map(str.strip, lines):
                    if line.startswith("["):
                        in_group = line == f"[{PLUGIN_GROUP}]"
                    elif in_group and line and not line.startswith(("#", ";")):
                        name, _, reference = line.partition("=")
                        yield name.strip(), reference.partition("[")[0].strip()
