"""The measure of the house: one name per thing, few parameters, small protocols, packages that say
what they own."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcfs

ROOT = Path(hpcfs.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MOST_PARAMETERS = 6
MOST_MEMBERS = 7
WIDE = {"Remote"}
"""What every kind of remote can be asked is one protocol, with a member for each question."""
LEAST_WORDS = 20


def _relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def _classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if isinstance(node, ast.ClassDef):
                yield _relative(file), node


def _is_protocol(node: ast.ClassDef) -> bool:
    """A structural type of ours; asyncio's Protocol is a base class with methods to override."""
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def _parameters(function: ast.FunctionDef) -> int:
    """All but self."""
    arguments = function.args
    return len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs) - 1


def test_no_class_name_means_two_things() -> None:
    counts = Counter(node.name for _, node in _classes())
    twice = {name for name, count in counts.items() if count > 1}
    assert not {f"{file}: {node.name}" for file, node in _classes() if node.name in twice}


def test_no_module_name_means_two_things_in_one_package() -> None:
    """`errors` is model/errors.py and nothing else."""
    assert [_relative(file) for file in FILES if file.name == "errors.py"] == ["model/errors.py"]


def test_constructors_take_few_parameters() -> None:
    assert not {
        f"{file}: {node.name} takes {_parameters(member)}"
        for file, node in _classes()
        for member in node.body
        if isinstance(member, ast.FunctionDef)
        and member.name == "__init__"
        and _parameters(member) > MOST_PARAMETERS
    }


def test_protocols_have_few_members() -> None:
    members = (ast.FunctionDef, ast.AsyncFunctionDef, ast.AnnAssign)
    assert not {
        f"{file}: {node.name}"
        for file, node in _classes()
        if _is_protocol(node)
        and node.name not in WIDE
        and sum(isinstance(member, members) for member in node.body) > MOST_MEMBERS
    }


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.name == "__init__.py"], ids=_relative
)
def test_every_package_says_what_it_owns(file: Path) -> None:
    told = ast.get_docstring(ast.parse(file.read_text(), str(file)))
    assert told is not None
    assert len(told.split()) >= LEAST_WORDS
