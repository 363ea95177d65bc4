"""The one direction of imports: ``jobs -> emulator -> nbd``, and inside the emulator the order of `LAYERS`.

Every import statement counts, wherever it stands: in a function, or for type checking only. What is needed upward
comes in by a `typing.Protocol` or a registry. Also here: nobody imports a bare ``nbd`` (that name belongs to
libnbd's binding), and the packaging metadata lists every package.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from kit.peers import python_scripts

ROOT: Final = Path(__file__).resolve().parent.parent

LAYERS: Final = (
    ("nbd",),
    ("emulator.errors",),
    ("emulator.block",),
    ("emulator.drivers", "emulator.device", "emulator.exports", "emulator.qmp", "emulator.tls"),
    ("emulator.daemon",),
    ("emulator.cli",),
    ("jobs",),
)
"""From the bottom up. A module imports from its own layer and from those below it."""

UNDER_SYSTEM_PYTHON: Final = frozenset({Path("tests/kit/writer_child.py")})
"""Programs that run isolated under Debian's Python, where ``nbd`` is libnbd's binding."""

PACKAGES: Final = ("nbd", "emulator", "jobs")


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    """``emulator/block/node.py`` is ``emulator.block.node``; a package's ``__init__.py`` is the package."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int | None:
    """The index in `LAYERS`; None for a package that only holds others (``emulator``) or a name that is in no
    layer."""
    for index, layer in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in layer):
            return index
    return None


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """``(line, module)`` of every import, absolute, ours without the leading ``livedisk.``.

    ``from x import y`` yields ``x.y``: whether ``y`` is a module does not matter for the layer.
    """
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.removeprefix("livedisk.")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            base = base.removeprefix("livedisk").removeprefix(".") if base.startswith("livedisk") else base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}" if base else alias.name


def violations(path: Path) -> list[str]:
    own = layer_of(module_name(path))
    assert own is not None, f"{path.relative_to(ROOT)} is in no layer: give it a place in LAYERS"
    found = []
    for line, target in imported(path):
        if target.split(".")[0] not in PACKAGES:
            continue
        layer = layer_of(target)
        if layer is not None and layer > own:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {target} from above")
    return found


def placed() -> list[Path]:
    """All sources but the ``__init__.py`` of ``emulator`` itself, which is below all of its layers and may import
    none of ours."""
    return [path for path in sources() if path != ROOT / "emulator" / "__init__.py"]


@pytest.mark.parametrize("path", placed(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_upward(path: Path) -> None:
    assert violations(path) == []


def test_package_roots_import_nothing_of_ours() -> None:
    # Importing livedisk.emulator.errors runs livedisk/emulator/__init__.py first: what that imports, everybody
    # imports.
    targets = [target for _, target in imported(ROOT / "emulator" / "__init__.py")]
    assert [target for target in targets if target.split(".")[0] in PACKAGES] == []


def test_the_check_sees_an_upward_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    offender = tmp_path / "emulator" / "block" / "node.py"
    offender.parent.mkdir(parents=True)
    offender.write_text(
        "from livedisk.emulator.errors import BlockError\n"
        "from livedisk.emulator import qmp\n"
        "def late():\n    from ..drivers.raw import Raw\n    import livedisk.jobs.job\n"
    )
    assert [message.partition(" ")[2] for message in violations(offender)] == [
        "imports emulator.qmp from above",
        "imports emulator.drivers.raw.Raw from above",
        "imports jobs.job from above",
    ]


def bare_nbd_imports(path: Path) -> list[int]:
    lines = []
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        lines += [node.lineno for name in names if name.split(".")[0] in PACKAGES]
    return lines


def test_nobody_imports_a_folder_by_its_bare_name() -> None:
    everything = [*sources(), *(ROOT / "tests").rglob("*.py"), *python_scripts()]
    found = {
        str(path.relative_to(ROOT)): lines
        for path in everything
        if path.relative_to(ROOT) not in UNDER_SYSTEM_PYTHON and (lines := bare_nbd_imports(path))
    }
    assert found == {}


def test_packaging_lists_every_package() -> None:
    # setuptools cannot find packages whose folders are named otherwise, so the list is kept by hand, and checked
    # here.
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {f"livedisk.{module_name(path)}" for path in sources() if path.name == "__init__.py"}
    with_modules = {f"livedisk.{'.'.join(path.parent.relative_to(ROOT).parts)}" for path in sources()}
    assert folders == set(listed)
    assert with_modules == folders, "a folder of modules lacks its __init__.py"
