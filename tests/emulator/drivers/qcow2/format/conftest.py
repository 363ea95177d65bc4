"""The corpus, made once for all tests of this folder, and ways to run a check on a file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.peers import run
from kit.plain_file import PlainFile
from kit.qcow2_corpus import BY_NAME, Image, make
from livedisk.emulator.drivers.qcow2.check import CheckFailed, check

Maker = Callable[[str], Image]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """A corpus image by its variant's name. Tests do not change it; they copy."""
    folder = tmp_path_factory.mktemp("corpus")
    made: dict[str, Image] = {}

    def get(name: str) -> Image:
        if name not in made:
            made[name] = make(BY_NAME[name], folder)
        return made[name]

    return get


@pytest.fixture
def ours() -> Callable[[Path], dict[str, Any]]:
    """Our check's ImageCheck, without the file's name; also of a check that could not be finished."""

    def report(path: Path) -> dict[str, Any]:
        with PlainFile(path) as file:
            try:
                found = asyncio.run(check(file)).to_json("")
            except CheckFailed as error:
                found = error.result.to_json("") | {"failed": str(error)}
        del found["filename"]
        return found

    return report


@pytest.fixture
def theirs() -> Callable[..., dict[str, Any] | None]:
    """qemu-img's ImageCheck, without the file's name; None where it does not open the image."""

    def report(path: Path, *arguments: str) -> dict[str, Any] | None:
        done = run(["qemu-img", "check", "-f", "qcow2", "--output=json", *arguments, path], expect=None, timeout=60)
        if not done.stdout.strip().startswith("{"):
            return None
        found: dict[str, Any] = json.loads(done.stdout)
        del found["filename"]
        return found

    return report
