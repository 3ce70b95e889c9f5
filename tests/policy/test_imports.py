"""The architecture as imports: parsed from the sources, so that no import can hide in a function.

Each package may import those that are named here, which were named before it: so no package can
need, over whatever way, one that needs it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import hpcfs

ROOT = Path(hpcfs.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

TRIO, ASYNCIO = {"trio"}, {"asyncio", "uvloop", "asyncssh", "aiobotocore", "botocore", "aiohttp"}

MAY_IMPORT: dict[str, set[str]] = {
    "model": set(),
    "system": {"model"},
    "tunnel": {"model"},
    "remotes": {"model", "system", "tunnel"},
    "protocol": {"model"},
    "worker": {"model", "system", "remotes", "protocol"},
    "control": {"model", "system"},
    "config": {"model", "system", "tunnel"},
    "laptop": {"model", "system", "tunnel", "remotes", "config"},
    "cache": {"model", "system"},
    "site": {"model", "system", "protocol"},
    "content": {"model", "protocol", "cache", "site"},
    "inodes": {"model", "protocol", "site", "content"},
    "prefetch": {"model", "cache", "site", "content", "inodes"},
    "directories": {"model", "site", "inodes", "prefetch"},
    "writeback": {"model", "protocol", "cache", "site", "content", "inodes"},
    "filesystem": {"model", "protocol", "cache", "site", "content", "inodes", "prefetch"}
    | {"directories", "writeback"},
    "kernel": {"model", "site", "inodes", "filesystem"},
    "daemon": {"model", "system", "protocol", "control", "config", "cache", "site", "content"}
    | {"inodes", "writeback", "filesystem", "kernel"},
    "demo": {"model", "system", "remotes", "laptop"},
    "cli": {"model", "system", "tunnel", "remotes", "control", "config", "laptop", "cache"}
    | {"daemon", "demo"},
}
"""In the order of the layers, the lowest first."""
MAY_USE: dict[str, set[str]] = {
    **dict.fromkeys(["remotes", "tunnel", "laptop", "worker", "demo"], ASYNCIO),
    **dict.fromkeys(["cache", "site", "content", "inodes", "prefetch", "directories"], TRIO),
    **dict.fromkeys(["writeback", "filesystem", "daemon", "control"], TRIO),
    "kernel": TRIO | {"pyfuse3"},
}
"""Event loops and what brings one along. The demo's servers are a process of their own."""

CLI_LIBRARIES = {
    "cli/check_machine.py": {"pyfuse3"},  # whether it can be imported at all
    "cli/check_ssh.py": {"asyncssh"},  # what it makes of ~/.ssh/config; nothing is connected
    "cli/check_s3.py": {"botocore"},  # whether there are credentials; nothing is connected
}


def _layer(module: str) -> str:
    """The package of a dotted module below hpcfs."""
    return module.partition(".")[0]


def _imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names; of `from a import b`, a.b where that is a module of ours, else a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            assert node.module
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                path = ROOT.parent.joinpath(*whole.split("."))
                is_module = path.is_dir() or path.with_suffix(".py").exists()
                yield whole if node.module.startswith("hpcfs") and is_module else node.module


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


@cache
def _imports(file: Path) -> frozenset[str]:
    return frozenset(_imported(_parse(file)))


def _name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


CODE = [file for file in FILES if file.name != "__init__.py"]
each_file = pytest.mark.parametrize("file", CODE, ids=lambda file: str(file.relative_to(ROOT)))


@each_file
def test_imports_run_downward(file: Path) -> None:
    layer = _layer(_name(file))
    ours = {name.partition(".")[2] for name in _imports(file) if name[:6] == "hpcfs."}
    allowed = MAY_IMPORT[layer] | {layer}
    assert {name for name in ours if _layer(name) not in allowed} == set()


def test_the_packages_have_an_order() -> None:
    below: set[str] = set()
    for layer, allowed in MAY_IMPORT.items():
        assert allowed <= below, f"{layer} may import what comes after it"
        below.add(layer)


@each_file
def test_each_process_has_its_own_event_loop(file: Path) -> None:
    relative = file.relative_to(ROOT).as_posix()
    used = {name.partition(".")[0] for name in _imports(file)}
    allowed = MAY_USE.get(_layer(_name(file)), set()) | CLI_LIBRARIES.get(relative, set())
    assert used & (TRIO | ASYNCIO | {"pyfuse3"}) <= allowed


@each_file
def test_only_the_command_line_prints(file: Path) -> None:
    if _layer(_name(file)) == "cli":
        return
    calls = [node for node in ast.walk(_parse(file)) if isinstance(node, ast.Call)]
    assert not [
        call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]
    assert not {"rich", "click"} & {name.partition(".")[0] for name in _imports(file)}


@pytest.mark.parametrize("file", [file for file in FILES if file.name == "__init__.py"], ids=_name)
def test_packages_import_nothing_by_themselves(file: Path) -> None:
    """Else importing one module of a package would bring others, of another layer, along."""
    assert _imports(file) <= {"__future__"}


def test_no_layer_is_forgotten() -> None:
    assert {_layer(_name(file)) for file in CODE} == MAY_IMPORT.keys()


def test_modules_do_not_import_each_other_in_circles() -> None:
    """Not for types either."""
    graph = {
        _name(file): {name.partition(".")[2] for name in _imports(file) if name[:6] == "hpcfs."}
        for file in CODE
    }
    while graph:
        leaves = {name for name, below in graph.items() if not below & graph.keys()}
        assert leaves, f"these import each other: {sorted(graph)}"
        graph = {name: below for name, below in graph.items() if name not in leaves}


def test_the_checker_sees_what_it_should_refuse() -> None:
    hidden = ast.parse("def f():\n    from hpcfs.worker import main\n    import asyncio.tasks")
    assert set(_imported(hidden)) == {"hpcfs.worker.main", "asyncio.tasks"}
    assert _layer("worker.main") not in MAY_IMPORT["filesystem"]
