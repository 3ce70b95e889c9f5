"""`hpcfs demo` as users run it: servers, mount and tour are real, and all of it goes away again."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcfs.control import control
from hpcfs.system import mountinfo, paths
from tests.support import leftovers
from tests.support.command import Home, make_home
from tests.support.mounts import errno_of

HPCFS = Path(sys.executable).parent / "hpcfs"
LAST_LINE = "Ctrl-C here ends it"


class Demo:
    """Started in a home of its own, whose environment would lead elsewhere if it were obeyed."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.tree = home.path / "hpcfs-demo"
        self.temporary = home.path / "tmp"
        self._running: subprocess.Popen[str] | None = None

    def environment(self) -> dict[str, str]:
        return self.home.environment(
            TMPDIR=str(self.temporary),
            AWS_PROFILE="no-such-profile",
            AWS_ENDPOINT_URL="http://127.0.0.1:1",
            http_proxy="http://127.0.0.1:1",
            SSH_AUTH_SOCK="/nonexistent",
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [HPCFS, *arguments],
            env=self.environment(),
            cwd=self.home.path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Returns once it says that it stays."""
        self._running = subprocess.Popen(
            [HPCFS, "demo", *arguments],
            env=self.environment(),
            cwd=self.home.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._running.stdout is not None
        lines = []
        for line in self._running.stdout:
            lines.append(line)
            if line.startswith(LAST_LINE):
                return self._running
        raise AssertionError(f"the demo ended: {''.join(lines)} {self._running.communicate()[1]}")

    def assert_gone(self) -> None:
        assert not leftovers.of_finished_run(self.home.path)
        assert os.listdir(self.temporary) == []
        assert not os.path.lexists(self.tree)

    def clean_up(self) -> None:
        if self._running is not None and self._running.poll() is None:
            self._running.kill()
            self._running.communicate()
        leftovers.end(leftovers.of_run(self.home.path))


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    home = make_home(tmp_path.resolve())
    (home.path / "tmp").mkdir()
    made = Demo(home)
    yield made
    made.clean_up()


def all_below(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


def test_the_tour_shows_real_commands_and_leaves_nothing(demo: Demo) -> None:
    before = all_below(demo.home.path)
    result = demo.run("demo", "--tour")
    assert (result.returncode, result.stderr) == (0, "")
    shown = [line for line in result.stdout.splitlines() if line.startswith("$ ")]
    assert [line.split()[1] for line in shown] == [
        *("ls", "cp", "cp", "rsync", "rsync", "diff", "hpcfs")
    ]
    assert "'laptop/data/inputs/sample-1.csv' -> 'cluster/inputs/sample-1.csv'" in result.stdout
    assert "'cluster/results/model.bin' -> 'bucket/model.bin'" in result.stdout
    assert ">f+++++++++ results/run-1.csv" in result.stdout
    assert "(nothing was transferred)" in result.stdout
    assert "(no difference)" in result.stdout
    assert "sftp://demo-cluster/~  connected" in result.stdout
    assert "tunnel:laptop  connected" in result.stdout
    demo.assert_gone()
    runtime = demo.home.path / "run" / "hpcfs"
    assert all_below(demo.home.path) - before <= {runtime}


def test_a_tour_that_fails_says_so_and_leaves_nothing(demo: Demo) -> None:
    """cp is one that refuses."""
    bad = demo.home.path / "bin"
    bad.mkdir()
    (bad / "cp").write_text("#!/bin/sh\necho no >&2; exit 3\n")
    (bad / "cp").chmod(0o755)
    hpcfs = bad / "hpcfs"  # what stands beside it is found first
    for name in (hpcfs.name, "hpcfs-main"):
        (bad / name).write_text(HPCFS.with_name(name).read_text())
        (bad / name).chmod(0o755)
    result = subprocess.run(
        [hpcfs, "demo", "--tour"],
        env=demo.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    assert "failed with exit code 3" in result.stderr
    assert "$ rsync" not in result.stdout
    demo.assert_gone()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_stays_until_it_is_told_to_end(demo: Demo, number: signal.Signals) -> None:
    running = demo.start()
    (demo.tree / "cluster" / "new").write_text("hello")
    assert (demo.tree / "cluster" / "new").read_text() == "hello"
    assert "cat-001.png" in (demo.tree / "bucket/datasets/images/labels.csv").read_text()
    assert demo.run("status", str(demo.tree)).returncode == 0
    running.send_signal(number)
    _, complaints = running.communicate(timeout=60)
    assert (running.returncode, complaints) == (0, "")
    demo.assert_gone()


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_the_laptop_is_reached_through_a_reverse_tunnel(demo: Demo, way: str) -> None:
    """A login node's socket has a short path: where the temporary directory's is long, a port."""
    with tempfile.TemporaryDirectory(prefix="hpcfs-") as short:
        demo.temporary = Path(short) / ("t" if way == "unix" else "t" * 100)
        demo.temporary.mkdir()
        running = demo.start()
        (directory,) = demo.temporary.glob("hpcfs-demo-*")
        left = directory / "cluster" / ".hpcfs" / "tunnels"
        assert any(path.is_socket() for path in left.iterdir()) == (way == "unix")
        (demo.tree / "laptop" / "data" / "back.txt").write_text("from the cluster")
        assert (directory / "laptop" / "data" / "back.txt").read_text() == "from the cluster"
        read_only = demo.tree / "laptop" / "code" / "model.py"
        assert errno_of(read_only.write_text, "") == errno.EROFS
        running.send_signal(signal.SIGINT)
        assert running.communicate(timeout=60)[1] == ""
        demo.assert_gone()


def test_a_given_directory_stays(demo: Demo) -> None:
    running = demo.start("mnt")
    assert (demo.home.mountpoint / "cluster" / "README.txt").exists()
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode == 0
    assert list(demo.home.mountpoint.iterdir()) == []
    demo.assert_gone()


def test_keep_stays_after_the_tour(demo: Demo) -> None:
    running = demo.start("--tour", "--keep")
    assert (demo.tree / "bucket" / "results" / "run-1.csv").exists()
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    demo.assert_gone()


def test_unmounting_elsewhere_ends_it(demo: Demo) -> None:
    running = demo.start()
    assert demo.run("umount", str(demo.tree)).returncode == 0
    shown, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    assert "was unmounted" in shown
    demo.assert_gone()


def test_it_ends_though_a_shell_is_in_the_tree(demo: Demo) -> None:
    running = demo.start()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=demo.tree / "cluster") as user:
        running.send_signal(signal.SIGINT)
        _, complaints = running.communicate(timeout=60)
        assert running.returncode == 0
        assert f"still in use by cat (pid {user.pid})" in complaints
        user.communicate()
    demo.assert_gone()


def test_a_daemon_that_dies_is_an_error(demo: Demo) -> None:
    running = demo.start()
    socket = paths.find_socket(demo.tree, demo.environment())
    os.kill(control.query_status(socket).pid, signal.SIGKILL)
    _, complaints = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "ended unexpectedly" in complaints
    demo.assert_gone()


def test_when_the_demo_is_killed_umount_still_ends_all(demo: Demo) -> None:
    running = demo.start()
    running.kill()
    running.communicate()
    assert (demo.tree / "cluster" / "README.txt").exists()
    assert demo.run("umount", str(demo.tree)).returncode == 0
    assert not leftovers.of_finished_run(demo.home.path)


def test_a_directory_that_is_not_empty_is_refused(demo: Demo) -> None:
    demo.tree.mkdir()
    (demo.tree / "precious").write_text("")
    result = demo.run("demo", "--tour")
    assert result.returncode == 1
    assert "is not empty" in result.stderr
    assert (demo.tree / "precious").exists()
    assert mountinfo.at(demo.tree, mountinfo.read()) is None


def test_without_the_s3_server_it_says_what_to_install(demo: Demo) -> None:
    """A Python that has hpcfs, but no rclone beside it or on PATH."""
    lonely = demo.home.path / "bin"
    lonely.mkdir()
    (lonely / "python").symlink_to(Path(sys.executable).resolve())
    result = subprocess.run(
        [lonely / "python", "-c", "from hpcfs.cli.main import main; main()", "demo", "--tour"],
        env={
            **demo.environment(),
            "PATH": str(lonely),
            "PYTHONPATH": os.pathsep.join(["", *sys.path]),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == (
        "hpcfs: the demo's S3 server is not installed: pip install 'hpcfs[demo]'\n"
    )
    demo.assert_gone()
