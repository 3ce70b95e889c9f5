"""The rules of tests/conftest.py and tests/policy/conftest.py, tried on test runs of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import leftovers
from tests.support.command import REPOSITORY


def run_tests(directory: Path, source: str, **environ: str) -> subprocess.CompletedProcess[str]:
    (directory / "test_it.py").write_text(source)
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
            *("-p", "tests.conftest", "-p", "tests.policy.conftest"),
            *("--rootdir", str(directory), "--basetemp", str(directory / "temp"), str(directory)),
        ],
        env={**environment, "PYTHONPATH": str(REPOSITORY), **environ},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


SKIPPING = "import pytest\n@pytest.mark.skip(reason='later')\ndef test_a(): pass\n"


@pytest.mark.slow
def test_a_skipped_test_passes_on_a_desk(tmp_path: Path) -> None:
    result = run_tests(tmp_path, SKIPPING)
    assert (result.returncode, "1 skipped" in result.stdout) == (0, True), result.stdout


@pytest.mark.slow
def test_a_skipped_test_fails_in_ci(tmp_path: Path) -> None:
    result = run_tests(tmp_path, SKIPPING, CI="true")
    assert (result.returncode, "failure in CI" in result.stdout) == (1, True), result.stdout


@pytest.mark.slow
def test_a_skipped_module_fails_in_ci(tmp_path: Path) -> None:
    source = "import pytest\npytest.importorskip('no_such_module')\ndef test_a(): pass\n"
    result = run_tests(tmp_path, source, CI="true")
    assert (result.returncode, "failure in CI" in result.stdout) == (2, True), result.stdout


@pytest.mark.slow
def test_an_expected_failure_did_run(tmp_path: Path) -> None:
    source = "import pytest\n@pytest.mark.xfail\ndef test_a(): assert False\n"
    result = run_tests(tmp_path, source, CI="true")
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_a_process_left_behind_fails_the_run_and_is_ended(tmp_path: Path) -> None:
    """It says hpcfs in its arguments, as daemons do; it uses nothing of the run's files. Right
    after exec(2) /proc does not tell its arguments yet: it says when it runs."""
    source = (
        "import pytest, subprocess, sys\n"
        "@pytest.mark.slow\n"
        "def test_a():\n"
        "    wait = 'import signal; print(1, flush=True); signal.pause()'\n"
        "    left = subprocess.Popen([sys.executable, '-c', wait, 'hpcfs'], cwd='/',\n"
        "        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)\n"
        "    assert left.stdout.readline()\n"
        "    left.stdout.close()\n"
        "    left.returncode = 0\n"
    )
    result = run_tests(tmp_path, source, HPCFS_GRACE="0.1")
    assert (result.returncode, "left this behind: pid" in result.stdout) == (1, True)
    assert not leftovers.of_run(tmp_path / "temp")


def test_a_run_is_over_when_nobody_holds_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [tmp_path / name for name in ("alive", "over", "unknown")]
    for run in runs:
        run.mkdir()
    monkeypatch.setenv(leftovers.MARK, "")  # put back afterwards: hold() changes it
    lock = leftovers.hold(runs[0])
    os.close(leftovers.hold(runs[1]))
    assert [leftovers.is_over(run) for run in runs] == [False, True, False]
    os.close(lock)
    assert leftovers.is_over(runs[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mark", "body", "refused"),
    [
        (
            "",
            "subprocess.run(['true'], check=True)",
            "it starts a process: subprocess.Popen('true'",
        ),
        ("", "time.sleep(0.6)", "it takes "),
        ("", "while time.process_time() < 2: pass", "it takes "),
        ("", "time.sleep(0.01)", None),
        ("@pytest.mark.slow", "subprocess.run(['sleep', '0.6'], check=True)", None),
    ],
)
def test_a_test_without_the_mark_is_quick_and_starts_no_process(
    tmp_path: Path, mark: str, body: str, refused: str | None
) -> None:
    bound = "from tests.policy import conftest\nconftest.MOST_WORK = conftest.MOST_WAITING = 0.5\n"
    if refused is None:  # a busy machine may take longer for anything
        bound = ""
    source = f"import pytest, subprocess, time\n{bound}{mark}\ndef test_a():\n    {body}\n"
    result = run_tests(tmp_path, source)
    assert result.returncode == (1 if refused else 0), result.stdout
    assert refused is None or f"mark this test 'slow': {refused}" in result.stdout
