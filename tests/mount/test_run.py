"""`hpcfs run`: a mount for one command, as jobs of a batch system use it."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from hpcfs.system import mountinfo
from tests.mount.conftest import Servers
from tests.support.command import Terminal
from tests.support.mounts import KINDS, Mount, RealHome, Served, until

SAVES = """
trap 'echo saved > "$HPCFS_MOUNT/data/checkpoint"; exit 9' TERM
echo "$HPCFS_MOUNT" > begun.new; mv begun.new begun
while true; do sleep 0.05; done
"""
"""A job that saves its state when it is told to end, as Slurm tells it at the limit."""


class Job:
    """Runs commands over one remote, named data."""

    def __init__(self, home: RealHome, served: Served) -> None:
        self.home = home
        self.inside = served.inside
        self._configure = Mount(home, {"data": served})
        self._configure.write_config()

    def run(self, script: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self.home.run("run", *options, "--", "sh", "-c", script)

    def start(self, script: str, *options: str) -> subprocess.Popen[str]:
        """Returns once the script has made the file `begun` in the home, with the mount's path."""
        job = self.home.start("run", *options, "--", "sh", "-c", script)
        until((self.home.path / "begun").exists, what="the command has begun")
        return job

    @property
    def mounted_at(self) -> Path:
        return Path((self.home.path / "begun").read_text().strip())

    def left_behind(self) -> list[str]:
        """Caches and mounts of jobs; logs are no loss."""
        caches = self.home.path / ".cache" / "hpcfs"
        found = [str(path) for path in caches.glob("*")] if caches.exists() else []
        temporary = Path(self.home.environment().get("TMPDIR", "/tmp"))
        return found + [str(path) for path in temporary.glob("hpcfs-run-*")]


@pytest.fixture
def job(request: pytest.FixtureRequest, real_home: RealHome, servers: Servers) -> Job:
    (real_home.path / "tmp").mkdir()
    real_home.environ["TMPDIR"] = str(real_home.path / "tmp")
    return Job(real_home, servers.serve(getattr(request, "param", "sftp")))


@pytest.mark.parametrize("write", ["through", "back"])
@pytest.mark.parametrize("job", KINDS, indirect=True)
def test_what_the_command_wrote_is_there_and_its_exit_code_is_ours(job: Job, write: str) -> None:
    done = job.run('echo "$1" > "$HPCFS_MOUNT/data/result"; exit 7', "--write", write)
    assert (done.returncode, done.stderr) == (7, "")
    assert job.inside.read("result") == b"\n"
    assert job.left_behind() == []


def test_the_mount_is_the_users_alone_and_new_each_time(job: Job) -> None:
    script = 'stat -c "%a %u" "$(dirname "$HPCFS_MOUNT")" "$HPCFS_MOUNT"; echo "$HPCFS_MOUNT"'
    first, second = job.run(script), job.run(script)
    assert first.returncode == second.returncode == 0
    assert first.stdout.splitlines()[1].split()[1] == str(os.getuid())
    assert first.stdout.splitlines()[2] != second.stdout.splitlines()[2]


def test_stdin_arguments_and_the_working_directory_are_the_commands(job: Job) -> None:
    done = subprocess.run(
        job.home.command("run", "--", "sh", "-c", 'pwd; cat; echo "$1"', "sh", "--read-only"),
        env=job.home.environment(),
        cwd=job.home.path,
        input="typed\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"{job.home.path}\ntyped\n--read-only\n"


def test_a_signal_that_ends_the_command_is_its_exit_code(job: Job) -> None:
    assert job.run("kill -9 $$").returncode == 128 + signal.SIGKILL


def test_what_cannot_be_run_is_told_as_a_shell_does(job: Job) -> None:
    missing = job.home.run("run", "--", "no-such-command")
    assert (missing.returncode, missing.stderr) == (
        127,
        "hpcfs: no-such-command: no such command\n",
    )
    assert job.home.run("run", "--", "/etc/passwd").returncode == 126
    assert job.home.run("run", "data").returncode == 2
    assert job.left_behind() == []


def test_without_its_remotes_the_command_is_not_run(job: Job) -> None:
    served = job._configure.namespaces["data"]
    job._configure.namespaces["other"] = served.but(path=f"{served.keys['path']}/missing")
    job._configure.write_config()
    done = job.run("touch ran")
    assert done.returncode == 125
    assert "other: the folder" in done.stderr
    assert "does not exist" in done.stderr
    assert not (job.home.path / "ran").exists()
    assert job.left_behind() == []


def test_what_could_not_be_uploaded_is_an_error_and_kept(job: Job) -> None:
    """A file that turned into a directory on the server meanwhile."""
    folder = job._configure.namespaces["data"].keys["path"]
    script = f'echo 1 > "$HPCFS_MOUNT/data/out"; rm -rf "{folder}"; touch "{folder}"; true'
    done = job.run(script, "--write", "back")
    assert done.returncode == 1
    assert "data/out is not uploaded" in done.stderr
    assert "hpcfs recover" in done.stderr
    place = done.stderr.split("hpcfs recover ")[-1].split(" --to")[0].strip("'")
    copies = job.home.path / "copies"
    copies.mkdir()
    assert job.home.run("recover", place, "--to", copies).returncode == 0
    assert (copies / "data" / "out").read_text() == "1\n"


# --- signals ----------------------------------------------------------------------------------


def _processes_of(job: subprocess.Popen[str]) -> list[int]:
    """All descendants: what Slurm finds in the cgroup of a step."""
    found, waiting = [], [job.pid]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            waiting += map(int, file.read_text().split())
    return found


@pytest.mark.parametrize("write", ["through", "back"])
def test_a_batch_system_that_signals_every_process_lets_the_command_save(
    job: Job, write: str
) -> None:
    running = job.start(SAVES, "--write", write)
    everybody = _processes_of(running)
    assert len(everybody) >= 4  # run, command, daemon and transfer process
    for pid in everybody:
        os.kill(pid, signal.SIGTERM)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 9, told
    assert "hpcfs" not in told
    assert job.inside.read("checkpoint") == b"saved\n"
    assert job.left_behind() == []


def test_a_signal_to_us_alone_reaches_the_command(job: Job) -> None:
    running = job.start(SAVES)
    running.terminate()
    _, told = running.communicate(timeout=60)
    assert running.returncode == 9, told
    assert job.inside.read("checkpoint") == b"saved\n"


def test_ctrl_c_is_the_commands_to_handle(job: Job) -> None:
    """As on a terminal without us: it comes once, and what is written after it is uploaded."""
    script = """
    trap 'echo interrupted >> "$HPCFS_MOUNT/data/result"' INT
    touch begun; while [ ! -e finish ]; do sleep 0.05; done; exit 5
    """
    terminal = Terminal(job.home, "run", "--", "sh", "-c", script)
    until((job.home.path / "begun").exists, what="the command has begun")
    terminal.write("\x03")
    until(lambda: job.inside.exists("result"), what="the command was interrupted")
    (job.home.path / "finish").touch()
    assert terminal.exit_code() == 5, terminal.shown
    assert job.inside.read("result") == b"interrupted\n"


def _sleeper_of(running: subprocess.Popen[str]) -> int | None:
    for pid in _processes_of(running):
        with suppress(FileNotFoundError):  # the shell's mv(1) has ended
            if Path(f"/proc/{pid}/comm").read_text() == "sleep\n":
                return pid
    return None


def test_when_we_are_killed_the_daemon_uploads_and_unmounts(job: Job) -> None:
    running = job.start(
        'echo kept > "$HPCFS_MOUNT/data/result"\n'
        'echo "$HPCFS_MOUNT" > begun.new; mv begun.new begun; exec sleep 300',
        "--write",
        "back",
    )
    place = job.mounted_at
    command = until(lambda: _sleeper_of(running), what="the shell has become sleep(1)")
    running.kill()
    running.wait()
    until(lambda: mountinfo.at(place, mountinfo.read()) is None, what="unmounted")
    until(lambda: job.inside.exists("result"), what="uploaded")
    os.kill(command, signal.SIGKILL)
    running.communicate()


# --- without a setuid helper ----------------------------------------------------------------------


def test_without_fusermount3_it_mounts_in_a_user_namespace(job: Job) -> None:
    """As user 1000, who is nobody outside: root's capabilities are gone with the first exec."""
    programs = job.home.path / "bin"
    programs.mkdir()
    for name in ("sh", "id", "cat", "ssh"):
        found = next(p for p in (Path("/usr/bin") / name, Path("/bin") / name) if p.exists())
        (programs / name).symlink_to(found)
    job.home.environ["PATH"] = str(programs)
    job.home.enter = ("/usr/bin/unshare", "--user", "--map-user=1000", "--map-group=1000", "--")
    done = job.run('id -u; echo made > "$HPCFS_MOUNT/data/result"; cat /proc/mounts; exit 3')
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("1000\n")
    assert "fuse.hpcfs" in done.stdout
    assert not [found for found in mountinfo.read() if "hpcfs-run" in str(found.mountpoint)]
    assert job.inside.read("result") == b"made\n"
    assert job.left_behind() == []
