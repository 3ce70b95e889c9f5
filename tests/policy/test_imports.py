"""Imports run downward only, as docs/architecture.md says: parsed from the code itself."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "hpcfs"
MODULES = sorted(ROOT.rglob("*.py"))

BASE = {"errors", "__init__"}
SEAM = {"transfer.messages"}
DAEMON_CORE = SEAM | {"cache", "writeback"}
MAY_IMPORT = {
    "transfer.messages": set(),
    "transfer.client": SEAM,
    "transfer.process": SEAM | {"remotes"},
    "remotes": SEAM | {"remotes"},
    "cache": SEAM | {"cache", "system"},
    "writeback": SEAM | {"writeback"},
    "filesystem": DAEMON_CORE | {"filesystem"},
    "kernel": SEAM | {"filesystem", "kernel"},
    "system": {"system", "control"},
    "control": {"control", "system"},
    "config": SEAM | {"config", "system"},
    "errors": set(),
    "daemon": DAEMON_CORE
    | {"kernel", "filesystem", "transfer.client", "config", "control", "system"},
    "demo": {"demo", "config", "system", "errors"},
    "cli": {"cli", "daemon", "config", "control", "system", "cache", "demo", "transfer.messages"},
}
ASYNCIO_SIDE = {"asyncio", "asyncssh", "aiobotocore", "botocore", "uvloop"}
TRIO_SIDE = {"trio", "pyfuse3"}
MAY_USE = {
    "remotes": ASYNCIO_SIDE,
    "transfer.process": ASYNCIO_SIDE,
    "demo": ASYNCIO_SIDE,
    "cli": {"botocore", "asyncssh"},  # `hpcfs check` reads credentials and configs as a mount will
    "kernel": TRIO_SIDE,
    "transfer.client": {"trio"},
    "cache": {"trio"},
    "writeback": {"trio"},
    "filesystem": {"trio"},
    "control": {"trio"},
    "daemon": {"trio"},
}


def part_of(module: str) -> str:
    """The part of the architecture that a dotted module (without "hpcfs.") belongs to."""
    first = module.split(".")[0]
    return ".".join(module.split(".")[:2]) if first == "transfer" else first


def imported(file: Path) -> Iterator[str]:
    """Dotted names, of types-only imports too: a circle of types is a circle."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module
            if (ROOT.parent / node.module.replace(".", "/")).is_dir():
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def name_of(file: Path) -> str:
    dotted = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downward(file: Path) -> None:
    part = part_of(name_of(file))
    if part == "__init__":
        return
    for name in imported(file):
        top, _, rest = name.partition(".")
        if top == "hpcfs":
            other = part_of(rest)
            allowed = MAY_IMPORT.get(part, set()) | BASE | {"__version__"}
            assert other in allowed or not rest, f"{name_of(file)} imports {name}"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_each_side_keeps_to_its_loop(file: Path) -> None:
    part = part_of(name_of(file))
    for name in imported(file):
        top = name.partition(".")[0]
        if top in ASYNCIO_SIDE | TRIO_SIDE:
            assert top in MAY_USE.get(part, set()), f"{name_of(file)} imports {top}"


def test_no_two_modules_import_each_other() -> None:
    graph = {name_of(file): {n.removeprefix("hpcfs.") for n in imported(file)} for file in MODULES}
    for one, two in itertools.combinations(graph, 2):
        assert not (one in graph[two] and two in graph[one]), f"{one} and {two}"


def test_only_the_command_line_prints() -> None:
    for file in MODULES:
        if part_of(name_of(file)) in ("cli", "demo"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            assert not (is_call and node.func.id == "print"), file  # type: ignore[attr-defined]
