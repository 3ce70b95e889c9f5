"""Rules for all tests: none is skipped in CI, none leaves a mount, a daemon or a server behind."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.support import leftovers


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The first fixture to be set up, so the last one to be torn down."""
    leftovers.sweep()
    base = tmp_path_factory.getbasetemp()
    lock = leftovers.hold(base)
    yield
    found = leftovers.of_finished_run(base)
    leftovers.end(found)
    os.close(lock)
    assert not found, f"tests left this behind: {found}"


def _refuse_skip(report: Any) -> None:
    """In CI a test that can't run has failed. An expected failure (xfail) did run."""
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which is a failure in CI: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report
