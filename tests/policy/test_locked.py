"""scripts/locked names each dependency of pyproject.toml with a version and hashes."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.support.command import REPOSITORY

LOCKED = REPOSITORY / "scripts" / "locked"
NAME = re.compile(r"[A-Za-z0-9._-]+")


def normal(name: str) -> str:
    """PEP 503's."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required(*extras: str) -> set[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    found = [NAME.match(line) for line in lines]
    return {normal(match.group()) for match in found if match}


def locked(name: str) -> dict[str, int]:
    """Each package with the number of its hashes."""
    text = (LOCKED / f"{name}.txt").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert all(re.match(r"[a-z0-9-]+==\S+ ", line) for line in lines)
    return {line.partition("==")[0]: line.count("--hash=sha256:") for line in lines}


@pytest.mark.parametrize(("name", "extras"), [("test", ("test", "demo")), ("demo", ("demo",))])
def test_each_dependency_is_locked(name: str, extras: tuple[str, ...]) -> None:
    assert required(*extras) <= locked(name).keys()


@pytest.mark.parametrize("name", ["test", "demo", "build"])
def test_each_locked_version_has_hashes(name: str) -> None:
    assert all(locked(name).values())


def test_what_builds_is_locked() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    backends = {
        normal(match.group())
        for line in project["build-system"]["requires"]
        if (match := NAME.match(line))
    }
    assert backends | {"cython", "setuptools", "setuptools-scm"} <= locked("build").keys()


def test_the_demo_has_the_versions_of_the_tests() -> None:
    pins = [
        set(re.findall(r"^\S+==\S+", (LOCKED / f"{name}.txt").read_text(), re.MULTILINE))
        for name in ("demo", "test")
    ]
    assert pins[0] <= pins[1]


def test_scripts_install_by_hash() -> None:
    text = (REPOSITORY / "scripts" / "setup.sh").read_text()
    assert text.count("pip_install --require-hashes") == 2
    for script, name in (("test", "test"), ("bench", "test"), ("demo", "demo")):
        assert re.search(rf"install .*\b{name} ", (REPOSITORY / "scripts" / script).read_text())
