"""No code is imported from the current directory: seen in the sources, and tried in a directory
where somebody planted modules. tests/mount/test_search_path.py tries it with mounts."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcfs.cli.main import COMMANDS
from hpcfs.system import interpreter
from tests.support.command import REPOSITORY
from tests.support.mounts import RealHome, make_real_home
from tests.support.planted import SEARCH_PATHS, Planted, plant

SOURCES = sorted(file for top in ("hpcfs", "scripts") for file in (REPOSITORY / top).rglob("*.py"))
STARTERS = [
    file
    for file in SOURCES
    if {"sys.executable", "interpreter.command"} & set(re.findall(r"\w+\.\w+", file.read_text()))
]
SCRIPTS = ("bench", "demo", "setup.sh", "test")


def _python_lines(tree: ast.AST) -> Iterator[tuple[int, object]]:
    """The line of each list or tuple that begins with sys.executable, and what follows there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple) and len(node.elts) > 1:
            first, second = node.elts[:2]
            if ast.unparse(first) == "sys.executable":
                yield node.lineno, second.value if isinstance(second, ast.Constant) else None


def _unsafe_starts(tree: ast.AST) -> list[int]:
    """Lines that start Python without -P or -I."""
    return [line for line, flag in _python_lines(tree) if flag not in ("-P", "-I", "-IS")]


@pytest.mark.parametrize("file", STARTERS, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_python_is_started_without_the_current_directory(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert _unsafe_starts(tree) == []
    named = ast.unparse(tree).count("sys.executable")
    told = len(list(_python_lines(tree)))
    beside = ast.unparse(tree).count("Path(sys.executable)")
    assert named == told + beside, "sys.executable stands first in a list, so that it is seen here"


@pytest.mark.parametrize("file", STARTERS, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_modules_of_ours_are_started_in_a_safe_directory(file: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    for call in calls:
        given = [ast.unparse(one).partition("(")[0] for one in call.args]
        if "interpreter.command" in given:
            keywords = {one.arg: ast.unparse(one.value) for one in call.keywords}
            assert keywords.get("cwd") == "interpreter.SAFE_DIRECTORY"


def test_the_search_path_is_not_changed() -> None:
    for file in SOURCES:
        assert "sys.path" not in file.read_text(), file


def test_the_checker_sees_what_it_should_refuse() -> None:
    bad = ast.parse(
        "f([sys.executable, '-m', 'a'])\ng((sys.executable, x))\nh([sys.executable, '-P'])"
    )
    assert _unsafe_starts(bad) == [1, 2]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_start_python_without_the_current_directory(name: str) -> None:
    lines = (REPOSITORY / "scripts" / name).read_text().splitlines()
    starts = [line for line in lines if 'python" -' in line or 'candidate" -' in line]
    assert [line for line in starts if '" -P ' not in line and '" -I ' not in line] == []


@pytest.mark.slow
def test_a_module_of_ours_is_found_in_the_safe_directory(planted: Planted) -> None:
    """As it is installed here: editable, in a virtual environment."""
    command = interpreter.command("hpcfs.worker.main")
    ended = subprocess.run(
        command,
        cwd=interpreter.SAFE_DIRECTORY,
        env={"PYTHONPATH": ":."},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "not enough values to unpack" in ended.stderr, "it missed its sockets, so it ran"


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return plant(tmp_path / "planted")


@pytest.fixture
def home(tmp_path: Path) -> RealHome:
    return make_real_home(tmp_path / "home")


@pytest.mark.slow
@pytest.mark.parametrize("search_path", SEARCH_PATHS)
@pytest.mark.parametrize("name", [*COMMANDS, "--version"])
def test_commands_run_nothing_of_the_current_directory(
    home: RealHome, planted: Planted, name: str, search_path: str
) -> None:
    """Their help: the imports of the command, and nothing that it starts."""
    result = _run(home, planted, search_path, name, "--help")
    assert (result.returncode, planted.executed) == (0, ""), result.stderr


@pytest.mark.slow
def test_the_planted_modules_would_run(home: RealHome, planted: Planted) -> None:
    """Without the shell that cleans PYTHONPATH: else the test above could not fail."""
    program = str(Path(sys.executable).with_name("hpcfs-main"))
    subprocess.run(
        [program, "--version"],
        cwd=planted.directory,
        env=home.environment(PYTHONPATH=":"),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert "sitecustomize.py" in planted.executed


@pytest.mark.slow
def test_what_pythonpath_names_absolutely_is_kept(home: RealHome, planted: Planted) -> None:
    """It is the user's decision: environment modules install so."""
    _run(home, planted, f":{planted.directory}:lib", "--version")
    assert "sitecustomize.py" in planted.executed


@pytest.mark.slow
@pytest.mark.parametrize("linked", [False, True], ids=["beside", "through-a-link"])
def test_the_command_is_found_however_it_is_called(
    home: RealHome, planted: Planted, linked: bool
) -> None:
    (command,) = home.command()
    if linked:
        link = home.path / "bin" / "hpcfs"
        link.parent.mkdir()
        link.symlink_to(command)
        command = str(link)
    for line in (
        [command],
        ["sh", command],
        ["env", "-C", str(Path(command).parent), "sh", "hpcfs"],
    ):
        told = subprocess.run([*line, "--version"], capture_output=True, text=True, check=True)
        assert told.stdout.startswith("hpcfs ")


def _run(
    home: RealHome, planted: Planted, search_path: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        home.command(*arguments),
        cwd=planted.directory,
        env=home.environment(PYTHONPATH=search_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_descriptor_becomes_no_other_file(home: RealHome, closed: str) -> None:
    """The cache's index would get number 2, and then what programs write on stderr."""
    line = ["sh", "-c", f'"$@" {closed}', "sh", *home.command("--version")]
    told = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("hpcfs ") == (">&-" not in closed.replace("2>&-", ""))
