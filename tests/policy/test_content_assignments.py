"""Only hpcfs/content/ assigns the attributes of a content: others say what happened, by a method
of the content. Its states they read, and don't change.

Parsed from the sources. As contents count expressions that end in `content`, arguments and
variables annotated as one, and names bound to either. Besides, no attribute that only classes of
hpcfs/content/ declare is assigned of anything.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcfs

ROOT = Path(hpcfs.__file__).parent
INSIDE = sorted((ROOT / "content").glob("*.py"))
OUTSIDE = sorted(file for file in ROOT.rglob("*.py") if file not in INSIDE)
CLASSES = {"Content", "State", "Reader", "BaseVersion", "FileUpload", "RemoteFile"}
ALSO_NAMED = {"doomed"}
"""Names of contents that say something else."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _declared(tree: ast.AST) -> set[str]:
    """The attributes that classes declare: in their bodies, or by `self.name = ...`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                targets = item.targets if isinstance(item, ast.Assign) else []
                if isinstance(item, ast.AnnAssign):
                    targets = [item.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if _is_self(node.value) else set()
    return found


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


OWN = set[str]().union(*(_declared(_parse(file)) for file in INSIDE)) - set[str]().union(
    *(_declared(_parse(file)) for file in OUTSIDE)
)
"""Attributes that nothing but a content and its parts has."""


def _is_content(node: ast.AST, names: set[str]) -> bool:
    """Whether it is a content or, by way of one, a part of it."""
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Attribute):
        return node.attr.lstrip("_") == "content" or _is_content(node.value, names)
    return False


def _mentions_class(annotation: ast.AST | None) -> bool:
    if annotation is None:
        return False
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    return bool(names & CLASSES)


def _names_of_contents(tree: ast.AST) -> set[str]:
    """Names bound to a content anywhere in a module: a coarse net that has caught nothing else."""
    names = {"content", *ALSO_NAMED}
    for node in ast.walk(tree):
        if isinstance(node, Function):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names |= {one.arg for one in arguments if _is_plain_content(one.annotation)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if _is_plain_content(node.annotation):
                names.add(node.target.id)
        elif isinstance(node, ast.Assign | ast.NamedExpr):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if _makes_content(node.value):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _makes_content(value: ast.AST) -> bool:
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id in CLASSES
    return isinstance(value, ast.Attribute) and value.attr == "content"


def _is_plain_content(annotation: ast.AST | None) -> bool:
    """`Content`, or `Content | None`; of a list of them the elements are met by another name."""
    return _mentions_class(annotation) and not any(
        isinstance(node, ast.Subscript) for node in ast.walk(annotation or ast.Pass())
    )


def _assigned(tree: ast.AST) -> Iterator[str]:
    """What is assigned, augmented or deleted of contents, as text."""
    names = _names_of_contents(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            is_own = node.attr in OWN and not _is_self(node.value)
            if is_own or _is_content(node.value, names):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and _is_transition(node.func, names):
            yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in ("setattr", "delattr", "__setattr__") and any(
                _is_content(argument, names) for argument in node.args
            ):
                yield f"line {node.lineno}: {ast.unparse(node)}"


def _is_transition(function: ast.AST, names: set[str]) -> bool:
    """Whether it is a method of a content's state: what may be read of that are properties."""
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Attribute):
        return False
    return function.value.attr == "state" and _is_content(function.value, names)


@pytest.mark.parametrize("file", OUTSIDE, ids=lambda file: str(file.relative_to(ROOT)))
def test_others_assign_nothing_of_a_content(file: Path) -> None:
    assert list(_assigned(_parse(file))) == []


@pytest.mark.parametrize(
    "code",
    [
        "content.new = True",
        "node.content.place = place",
        "self._content.users += 1",
        "del content.failure",
        "content.file.version = version",
        "def f(file: Content): file.size = 1",
        "def f(file: Content | None): file.a, other = 1, 2",
        "lost = node.content\nlost.anything = 1",
        "if (lost := target.content): lost.anything = 1",
        "for content.users in range(3): pass",
        "setattr(node.content, 'users', 1)",
        "node.content.state.unlink()",
        "content.reader.base.size = 0",
        "reader = Reader(remote, file, State(), shared)\nreader.base.handle = 0",
        f"whatever.{min(OWN)} = 1",
    ],
)
def test_the_checker_sees_what_it_should_refuse(code: str) -> None:
    assert list(_assigned(ast.parse(code)))


def test_the_checker_lets_through_what_is_no_content() -> None:
    code = "node.content = None\nself.closing = 1\nhold.file = content.file\nfile.users += 1"
    assert list(_assigned(ast.parse(code))) == []
    assert {"durability", "closing"} <= OWN
