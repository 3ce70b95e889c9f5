"""Mount points good and bad, and the command line around a daemon, over real mounts.

The daemon is the stub of tests/support: what is tested here is everything around it.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpcfs.control import control, mountpoint
from hpcfs.control.control import MountStatus
from hpcfs.model.errors import SetupError
from hpcfs.system import mountinfo, paths
from tests.support.command import Home, Terminal, end_mounts_below, make_home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    made = make_home(tmp_path.resolve())
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(made.path / "run"))
    yield made
    end_mounts_below(made.path)


def mount(home: Home, *arguments: str, **more: str) -> MountStatus:
    result = home.run("mount", *(arguments or ["login3:x"]), home.mountpoint, **more)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    return control.query_status(paths.find_socket(home.mountpoint))


def is_mounted(home: Home) -> bool:
    return mountinfo.at(home.mountpoint, mountinfo.read()) is not None


def kill(pid: int) -> None:
    """Returns once the kernel has noticed."""
    process = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([process], [], [], 10)
    os.close(process)


# --- directories --------------------------------------------------------------------------------


def test_an_empty_directory_of_ours_is_fine(home: Home) -> None:
    assert mountpoint.check(home.mountpoint) is None


def test_a_missing_directory_is_to_be_made(home: Home) -> None:
    with pytest.raises(SetupError, match=f"mkdir -p {home.path}/no"):
        mountpoint.check(home.path / "no")


def test_a_file_is_refused(home: Home) -> None:
    (home.path / "file").write_text("")
    with pytest.raises(SetupError, match="not a directory"):
        mountpoint.check(home.path / "file")


def test_a_directory_that_holds_something_is_refused(home: Home) -> None:
    (home.mountpoint / "precious").write_text("")
    with pytest.raises(SetupError, match=r"not empty.*precious"):
        mountpoint.check(home.mountpoint)


def test_a_foreign_directory_is_refused() -> None:
    def check() -> None:
        with pytest.raises(SetupError, match="not yours"):
            mountpoint.check_directory(Path("/usr"))

    assert exit_code_as_user(check) == 0


def test_another_filesystem_is_not_covered() -> None:
    with pytest.raises(SetupError, match=r"already has a filesystem \(proc\)"):
        mountpoint.check(Path("/proc"))


def exit_code_as_user(check: Callable[[], None]) -> int:
    """In a child that is no root."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            check()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("in_container", "advice"), [(True, "--device /dev/fuse"), (False, "modprobe fuse")]
)
def test_a_missing_device(
    in_container: bool, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mountpoint, "_in_container", lambda: in_container)
    with pytest.raises(SetupError, match=advice):
        mountpoint.check_device(tmp_path / "fuse")


def test_a_missing_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    def check() -> None:
        with pytest.raises(SetupError, match=r"apt install fuse3.*dnf install fuse3"):
            mountpoint.check_helper()
        with pytest.raises(SetupError, match="fusermount3 is missing"):
            mountpoint.unmount(tmp_path)

    assert exit_code_as_user(check) == 0


# --- mounts -------------------------------------------------------------------------------------


def test_a_mount_is_told_of_and_unmounted(home: Home) -> None:
    status = mount(home)
    assert status.mountpoint == str(home.mountpoint)
    assert home.mountpoint in [found.mountpoint for found in mountpoint.mounts()]
    assert os.listdir(home.mountpoint) == ["file"]
    assert os.getsid(status.pid) == status.pid, "it left the session of the terminal"
    shown = home.run("status", home.mountpoint)
    assert shown.returncode == 0
    assert "sftp://login3/~/x  connected" in shown.stdout
    everything = json.loads(home.run("status", "--json").stdout)
    assert status.pid in [found.get("pid") for found in everything], "root sees other users' too"
    done = home.run("umount", home.mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not Path(f"/proc/{status.pid}/cwd").exists()
    assert not is_mounted(home)


def test_a_relative_mount_point_and_the_alias_unmount(home: Home) -> None:
    assert home.run("mount", "login3:", "mnt").returncode == 0
    assert is_mounted(home)
    assert home.run("unmount", "mnt").returncode == 0


def test_a_second_mount_names_the_first(home: Home) -> None:
    status = mount(home)
    with pytest.raises(SetupError, match=rf"pid {status.pid}.*hpcfs umount"):
        mountpoint.check(home.mountpoint)
    result = home.run("mount", "login3:", home.mountpoint)
    assert result.returncode == 1
    assert f"pid {status.pid}" in result.stderr


def test_a_mount_inside_a_mount_is_no_error_of_the_outer(home: Home) -> None:
    mount(home)
    with pytest.raises(SetupError, match="does not exist"):
        mountpoint.check(home.mountpoint / "inner")


def test_what_a_dead_daemon_left_is_cleaned_up_and_mounted_anew(home: Home) -> None:
    status = mount(home)
    os.stat(home.mountpoint)  # the kernel caches this, and must not be believed later
    kill(status.pid)
    assert mountpoint.is_dead(home.mountpoint)
    shown = home.run("status", home.mountpoint)
    assert shown.returncode == 1
    assert "its daemon is gone" in shown.stdout
    home.config.parent.mkdir(parents=True)
    home.config.write_text(f'mountpoint = "{home.mountpoint}"\n')
    assert "left behind by a dead daemon" in home.run("check", "x=[::1]:").stdout
    result = home.run("mount", "login3:", home.mountpoint)
    assert result.returncode == 0
    assert "had left behind" in result.stderr
    assert os.listdir(home.mountpoint) == ["file"]


def test_umount_tidies_up_after_a_dead_daemon(home: Home) -> None:
    kill(mount(home).pid)
    result = home.run("umount", home.mountpoint)
    assert result.returncode == 0
    assert "was gone" in result.stderr
    assert not is_mounted(home)


def test_a_hung_daemon_hangs_nobody(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    status = mount(home)
    os.kill(status.pid, signal.SIGSTOP)
    try:
        assert mountpoint.probe(home.mountpoint, 0.2) is None
        assert not mountpoint.is_dead(home.mountpoint)
        monkeypatch.setattr(control, "ANSWER_SECONDS", 0.2)
        with pytest.raises(control.DaemonNotAnswering):
            control.query_status(paths.find_socket(home.mountpoint), 0.2)
    finally:
        os.kill(status.pid, signal.SIGCONT)
    assert mountpoint.probe(home.mountpoint, 10) in (0, errno.ENOSYS)


def test_a_busy_mount_names_who_uses_it(home: Home) -> None:
    mount(home)
    with (home.mountpoint / "file").open(), pytest.raises(mountpoint.Busy):
        mountpoint.unmount(home.mountpoint)
    program = [sys.executable, "-c", "import sys; print('in', flush=True); sys.stdin.read()"]
    with subprocess.Popen(
        program, cwd=home.mountpoint, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"in\n"
        result = home.run("umount", home.mountpoint)
        assert result.returncode == 1
        assert f"(pid {user.pid})" in result.stderr
        assert is_mounted(home)
        user.communicate()
    assert home.run("umount", home.mountpoint).returncode == 0


def test_unmounting_what_is_not_ours_is_an_error(home: Home) -> None:
    result = home.run("umount", home.mountpoint)
    assert result.returncode == 1
    assert "nothing is mounted" in result.stderr
    result = home.run("umount", "/proc")
    assert result.returncode == 1
    assert "not hpcfs's (proc)" in result.stderr
    with pytest.raises(mountpoint.NotMounted):
        mountpoint.unmount(home.mountpoint)


# --- starting -----------------------------------------------------------------------------------


def test_namespaces_that_failed_are_told_and_the_others_mounted(home: Home) -> None:
    result = home.run("mount", "a=one:", "b=two:", home.mountpoint, stub="failed")
    assert result.returncode == 0
    assert result.stdout == ""
    assert result.stderr.startswith("hpcfs: a: no route")
    assert "\x1b" not in result.stderr
    assert is_mounted(home)
    shown = home.run("status", home.mountpoint)
    assert shown.returncode == 0
    assert "a  sftp://one/~  failed: no route" in shown.stdout
    assert "\x1b" not in shown.stdout


@pytest.mark.parametrize("options", [[], ["--foreground"]])
def test_a_root_that_failed_is_not_mounted(home: Home, options: list[str]) -> None:
    result = home.run("mount", *options, "login3:", home.mountpoint, stub="failed")
    assert result.returncode == 1
    assert "login3/~: no route" in result.stderr
    assert not is_mounted(home)
    assert not list((home.path / "run" / "hpcfs").iterdir()), "the daemon has ended"


@pytest.mark.parametrize("options", [[], ["--foreground"]])
@pytest.mark.parametrize(
    ("stub", "said"),
    [("refused", "hpcfs: the kernel refused the mount"), ("bug", "ZeroDivisionError: a bug")],
)
def test_a_mount_that_fails_is_an_error(
    home: Home, stub: str, said: str, options: list[str]
) -> None:
    result = home.run("mount", *options, "login3:", home.mountpoint, stub=stub)
    assert (result.returncode, result.stdout) == (1, "")
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not is_mounted(home)


def test_a_traceback_is_shown_on_demand(home: Home) -> None:
    for arguments in (["--debug", "mount"], ["mount", "-v"]):
        result = home.run(*arguments, "login3:", home.mountpoint, stub="bug")
        assert result.returncode == 1
        assert "Traceback" in result.stderr


def test_a_daemon_that_dies_is_an_error(home: Home) -> None:
    result = home.run("mount", "login3:", home.mountpoint, stub="crash")
    assert result.returncode == 1
    assert "ended before the mount was ready" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_start_up_leaves_nothing(home: Home, number: signal.Signals) -> None:
    mark = home.path / "mark"
    os.mkfifo(mark)
    with home.start(
        "mount", "login3:", home.mountpoint, HPCFS_STUB="hang", HPCFS_STUB_MARK=str(mark)
    ) as parent:
        child = int(mark.read_text())
        os.kill(parent.pid, number)
        _, said = parent.communicate(timeout=30)
    assert parent.returncode == (130 if number == signal.SIGINT else 143)
    assert said.strip() == ""
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not is_mounted(home)


EARLY = """
import os, runpy, signal
fork = os.fork
def fork_and_be_terminated():
    child = fork()
    if child:
        os.kill(os.getpid(), signal.SIGTERM)
    return child
os.fork = fork_and_be_terminated
runpy.run_module("tests.support.stub_daemon", run_name="__main__", alter_sys=True)
"""


def test_a_signal_right_after_the_fork_leaves_nothing(home: Home) -> None:
    """The child holds stderr: what remains of it would be waited for."""
    result = subprocess.run(
        [sys.executable, "-c", EARLY, "mount", "login3:", home.mountpoint],
        env=home.environment(HPCFS_STUB="hang", HPCFS_STUB_MARK=str(home.path / "mark")),
        cwd=home.path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stderr) == (143, b"")
    assert not is_mounted(home)


def test_settings_reach_the_daemon(home: Home) -> None:
    home.config.parent.mkdir(parents=True)
    home.config.write_text(
        f'mountpoint = "{home.mountpoint}"\ncache_size = "1 GiB"\n'
        '[namespaces.home]\ntype = "sftp"\nhost = "login3"\n'
    )
    assert home.run("mount").returncode == 0
    status = control.query_status(paths.find_socket(home.mountpoint))
    assert status.cache_size == 1024**3
    assert [found.name for found in status.namespaces] == ["home"]
    assert home.run("umount", home.mountpoint).returncode == 0
    cache = home.path / "elsewhere"
    options = ["--read-only", "--cache-size", "64MiB", "--cache-dir", str(cache)]
    status = mount(home, *options, "x=s3://b/p", "y=me@h:")
    assert status.cache_size == 64 * 1024**2
    assert Path(status.cache_dir).parent == cache
    assert [found.url for found in status.namespaces] == ["s3://b/p", "sftp://me@h/~"]
    assert all(found.read_only for found in status.namespaces)


def test_the_foreground_stays_until_unmounted(home: Home) -> None:
    with home.start("mount", "-f", "login3:", home.mountpoint, HPCFS_STUB="fine") as daemon:
        end = home.path / "run" / "hpcfs"
        while not is_mounted(home) or not list(end.glob("*.sock")):
            assert daemon.poll() is None
        assert control.query_status(paths.find_socket(home.mountpoint)).pid == daemon.pid
        assert home.run("umount", home.mountpoint).returncode == 0
        assert daemon.wait(timeout=30) == 0


# --- the terminal -------------------------------------------------------------------------------


def test_a_secret_is_asked_for_without_echo(home: Home) -> None:
    terminal = Terminal(home, "mount", "login3:", home.mountpoint, HPCFS_STUB="ask")
    terminal.wait_for("Password:")
    assert not terminal.echoes()
    assert "\x1b" not in terminal.shown, "a prompt can't control the terminal"
    terminal.write("sesame\n")
    terminal.wait_for("(log: ")
    assert terminal.exit_code() == 0
    assert "mounted 1 namespace at" in terminal.shown
    assert "sesame" not in terminal.shown
    status = control.query_status(paths.find_socket(home.mountpoint))
    assert status.namespaces[0].reason == "'sesame'"


def test_nobody_is_asked_without_a_terminal(home: Home) -> None:
    status = mount(home, stub="ask")
    assert status.namespaces[0].reason == "None"


def test_ctrl_c_at_a_question_restores_the_terminal(home: Home) -> None:
    terminal = Terminal(home, "mount", "login3:", home.mountpoint, HPCFS_STUB="ask")
    terminal.wait_for("Password:")
    terminal.write("\x03")
    assert terminal.exit_code() == 130
    assert not is_mounted(home)


def test_a_mount_waits_for_the_daemon_of_the_last_one(home: Home) -> None:
    """As after `fusermount3 -uz`: the old daemon may still upload from the same cache."""
    status = mount(home)
    with control.open_wait(paths.find_socket(home.mountpoint)) as daemon:
        with (home.mountpoint / "file").open():
            mountpoint.unmount(home.mountpoint, lazy=True)
            result = home.run("mount", "login3:", home.mountpoint)
            assert result.returncode == 1
            assert f"pid {status.pid}" in result.stderr
            assert "still finishes" in result.stderr
        assert control.wait_until_gone(daemon, 30)
