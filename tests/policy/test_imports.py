"""The architecture as imports: parsed from the sources, so that no import can hide in a function.

Two processes share one module, transfer/messages.py; within each, imports run downward only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcfs

ROOT = Path(hpcfs.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

TRIO, ASYNCIO = {"trio"}, {"asyncio", "uvloop", "asyncssh", "aiobotocore", "botocore", "aiohttp"}
SET_UP = {"errors", "system", "control", "config"}
"""What reads the user's wishes and the machine's state, before and beside a mount."""

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "transfer.errors": set(),
    "transfer.measures": set(),
    "transfer.xattrs": set(),
    "transfer.sshwords": set(),
    "transfer.messages": {"transfer.errors", "transfer.measures", "transfer.xattrs"},
    "system": {"errors"},
    "control": {"errors", "system"},
    "config": {"errors", "system", "rendezvous", "transfer.messages", "transfer.sshwords"},
    "rendezvous": {"transfer.messages"},
    "remotes": {"errors", "system", "transfer.messages", "transfer.sshwords", "rendezvous"},
    "tunnel": SET_UP | {"rendezvous", "remotes", "transfer.messages"},
    "transfer.cachefile": {"transfer.messages"},
    "transfer.process": {"system", "remotes", "transfer.messages", "transfer.cachefile"},
    "transfer.child": {"system", "transfer.messages"},
    "transfer.client": {"transfer.messages", "transfer.child"},
    "cache": {"errors", "system", "transfer.messages"},
    "writeback": {"cache", "transfer.messages", "transfer.client"},
    "filesystem": {"cache", "writeback", "transfer.messages", "transfer.client"},
    "cacheservice": SET_UP | {"filesystem", "cache", "writeback", "transfer.messages"},
    "writeservice": SET_UP | {"cacheservice", "filesystem", "writeback", "transfer.messages"},
    "kernel": {"filesystem", "transfer.messages"},
    "daemon": SET_UP
    | {"cacheservice", "writeservice", "kernel", "filesystem", "cache", "writeback"}
    | {"transfer.client", "transfer.messages"},
    "demo": {"errors", "system", "tunnel", "remotes", "transfer.messages", "rendezvous"},
    "cli": SET_UP
    | {"daemon", "cacheservice", "writeservice", "demo", "cache", "tunnel", "transfer.messages"}
    | {"rendezvous", "remotes"},
}
MAY_USE: dict[str, set[str]] = {
    **dict.fromkeys(["cache", "writeback", "filesystem", "transfer.child"], TRIO),
    **dict.fromkeys(["transfer.client", "daemon", "cacheservice", "writeservice"], TRIO),
    **dict.fromkeys(["remotes", "rendezvous", "tunnel", "transfer.process", "demo"], ASYNCIO),
    "control": TRIO,
    "kernel": TRIO | {"pyfuse3"},
}
"""Event loops and what brings one along. The demo's servers are a process of their own."""

CLI_LIBRARIES = {
    "cli/check_machine.py": {"pyfuse3"},  # whether it can be imported at all
    "cli/check_ssh.py": {"asyncssh"},  # what it makes of ~/.ssh/config; nothing is connected
    "cli/check_s3.py": {"botocore"},  # whether there are credentials; nothing is connected
}


def _layer(module: str) -> str:
    """Of a dotted module below hpcfs: its package, or for transfer/ the module."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "transfer" and len(parts) > 1 else parts[0]


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


def _name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


CODE = [file for file in FILES if file.name != "__init__.py"]
each_file = pytest.mark.parametrize("file", CODE, ids=lambda file: str(file.relative_to(ROOT)))


@each_file
def test_imports_run_downward(file: Path) -> None:
    layer = _layer(_name(file))
    ours = {name.partition(".")[2] for name in _imported(_parse(file)) if name[:6] == "hpcfs."}
    allowed = MAY_IMPORT[layer] | {layer}
    assert {name for name in ours if _layer(name) not in allowed} == set()


@each_file
def test_each_process_has_its_own_event_loop(file: Path) -> None:
    relative = file.relative_to(ROOT).as_posix()
    used = {name.partition(".")[0] for name in _imported(_parse(file))}
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
    assert not {"rich", "click"} & {name.partition(".")[0] for name in _imported(_parse(file))}


@pytest.mark.parametrize("file", [file for file in FILES if file.name == "__init__.py"], ids=_name)
def test_packages_import_nothing_by_themselves(file: Path) -> None:
    """Else importing one module of a package would bring others, of another layer, along."""
    assert set(_imported(_parse(file))) <= {"__future__"}


def test_no_layer_is_forgotten() -> None:
    assert {_layer(_name(file)) for file in CODE} == MAY_IMPORT.keys()


def test_modules_do_not_import_each_other_in_circles() -> None:
    """Not for types either."""
    graph = {
        _name(file): {
            name.partition(".")[2] for name in _imported(_parse(file)) if name[:6] == "hpcfs."
        }
        for file in CODE
    }
    while graph:
        leaves = {name for name, below in graph.items() if not below & graph.keys()}
        assert leaves, f"these import each other: {sorted(graph)}"
        graph = {name: below for name, below in graph.items() if name not in leaves}


def test_the_checker_sees_what_it_should_refuse() -> None:
    hidden = ast.parse("def f():\n    from hpcfs.transfer import process\n    import asyncio.tasks")
    assert set(_imported(hidden)) == {"hpcfs.transfer.process", "asyncio.tasks"}
    assert _layer("transfer.process") not in MAY_IMPORT["filesystem"]
