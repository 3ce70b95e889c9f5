"""Checks a mount point before a mount, and unmounts it.

It never looks into a mount from this process, since a hung daemon would hang us too. The kernel's
mount table answers most questions; a child process that can be abandoned answers the others.
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import stat
import subprocess
from pathlib import Path

from hpcfs.control import control
from hpcfs.model.errors import SetupError
from hpcfs.system import mountinfo, paths, user_namespace
from hpcfs.system.mountinfo import MountEntry

PROBE_SECONDS = 2.0
UNMOUNT_SECONDS = 20.0


class NotMounted(SetupError):
    """No hpcfs filesystem is mounted there."""


class Busy(SetupError):
    """Programs still use the mount."""


def mounts() -> list[MountEntry]:
    """Return all hpcfs mounts of this machine that we can see, those of other users too."""
    return [found for found in mountinfo.read() if found.kind == mountinfo.HPCFS_TYPE]


def check(mountpoint: Path) -> str | None:
    """Unmount what a dead daemon left behind; return a note that says so, or None.

    Raises SetupError where hpcfs can't be mounted there.
    """
    check_device()
    check_helper()
    note = _clear_old_mount(mountpoint)
    _check_no_daemon(mountpoint)
    check_directory(mountpoint)
    return note


def check_device(device: Path = Path("/dev/fuse")) -> None:
    """Raise SetupError where the kernel's FUSE device can't be opened."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if _in_container():
            advice = (
                "start the container with --device /dev/fuse --cap-add SYS_ADMIN "
                "(or bind /dev/fuse into it)"
            )
        elif error.errno in (errno.EACCES, errno.EPERM):
            advice = "ask the administrator to let users read and write it (mode 0666)"
        else:
            advice = "load the kernel's module with: sudo modprobe fuse"
        raise SetupError(f"{device} can't be opened ({error.strerror}): {advice}") from error


def check_helper() -> None:
    """Raise SetupError where a user who may not mount has no fusermount3."""
    if not user_namespace.may_mount() and not shutil.which("fusermount3"):
        raise SetupError(
            "fusermount3 is missing: install it with 'sudo apt install fuse3' "
            "or 'sudo dnf install fuse3'"
        )


def is_dead(mountpoint: Path) -> bool:
    """Return whether the mount's daemon is gone: the kernel then answers ENOTCONN. A hung daemon is
    not dead."""
    return probe(mountpoint) in (errno.ENOTCONN, errno.ECONNABORTED)


def probe(path: Path, seconds: float = PROBE_SECONDS) -> int | None:
    """Return the result of statfs(2) there: 0, an errno, or None where it did not answer in time.

    It is not stat(2), which the kernel answers from its cache for a daemon that is gone.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, bytes([_statfs_errno(path)]))
        os._exit(0)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], seconds)
        answer = os.read(reader, 1) if ready else b""
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        if ready:
            os.waitpid(child, 0)  # a child that hangs can't be waited for; init will
    return answer[0] if answer else None


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount. Raises Busy, NotMounted, or SetupError with fusermount3's message."""
    result = _run_unmount(mountpoint, lazy=lazy)
    if result.returncode == 0:
        return
    said = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.returncode}"]
    if "busy" in said[0].lower():
        raise Busy(f"{mountpoint} is in use")
    if mountinfo.at(mountpoint, mountinfo.read()) is None:
        raise NotMounted(f"nothing is mounted at {mountpoint}")
    raise SetupError(f"{mountpoint} can't be unmounted: {said[0]}")


def _run_unmount(mountpoint: Path, *, lazy: bool) -> subprocess.CompletedProcess[str]:
    if helper := shutil.which("fusermount3"):
        command = [helper, "-u", *(["-z"] if lazy else [])]
    elif os.getuid() == 0:
        command = ["umount", *(["-l"] if lazy else [])]
    else:
        raise SetupError("fusermount3 is missing: install the package fuse3 to unmount")
    try:
        return subprocess.run(
            [*command, "--", str(mountpoint)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=UNMOUNT_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SetupError(
            f"unmounting {mountpoint} takes longer than {UNMOUNT_SECONDS:.0f} s; "
            f"to detach it now: fusermount3 -u -z {mountpoint}"
        ) from None


def _clear_old_mount(mountpoint: Path) -> str | None:
    found = mountinfo.at(mountpoint, mountinfo.read())
    if found is None:
        return None
    if not found.kind.startswith("fuse"):
        raise SetupError(f"{mountpoint} already has a filesystem ({found.kind}): choose another")
    if is_dead(mountpoint):
        unmount(mountpoint, lazy=True)
        return f"unmounted {mountpoint}, which a {found.kind} daemon that is gone had left behind"
    if found.kind != mountinfo.HPCFS_TYPE:
        raise SetupError(
            f"{mountpoint} is already mounted ({found.kind}): "
            f"unmount it with 'fusermount3 -u {mountpoint}' or choose another"
        )
    raise SetupError(
        f"{mountpoint} is already mounted by {_holder(mountpoint)}: "
        f"unmount it first with 'hpcfs umount {mountpoint}'"
    )


def _check_no_daemon(mountpoint: Path) -> None:
    """Raise SetupError where an earlier daemon is still there. After a lazy unmount it continues
    until its files are closed and its uploads done, and a second one must not use the same cache
    meanwhile."""
    try:
        control.open_wait(paths.find_socket(mountpoint)).close()
    except control.DaemonNotRunning:
        return
    except control.DaemonNotAnswering as error:
        raise SetupError(
            f"an earlier daemon of {mountpoint} is still there, but does not answer ({error}): "
            "end it"
        ) from error
    raise SetupError(
        f"{_holder(mountpoint)} of an earlier mount at {mountpoint} still finishes its uploads: "
        "try again when it has ended"
    )


def _holder(mountpoint: Path) -> str:
    try:
        return f"hpcfs (pid {control.query_status(paths.find_socket(mountpoint)).pid})"
    except SetupError:
        return "an hpcfs daemon that does not answer"


def check_directory(mountpoint: Path) -> None:
    """Raise SetupError unless it is an empty directory of ours."""
    try:
        found = mountpoint.lstat()
    except FileNotFoundError:
        raise SetupError(
            f"{mountpoint} does not exist: make it with 'mkdir -p {mountpoint}'"
        ) from None
    except OSError as error:
        raise SetupError(f"{mountpoint} can't be looked at: {error.strerror}") from error
    if stat.S_ISLNK(found.st_mode):
        raise SetupError(
            f"{mountpoint} is a symbolic link: mount on the directory that it leads to "
            f"({os.path.realpath(mountpoint)}), if that is yours"
        )
    if not stat.S_ISDIR(found.st_mode):
        raise SetupError(f"{mountpoint} is not a directory: choose an empty directory")
    if found.st_uid != os.getuid() or not os.access(mountpoint, os.W_OK):
        raise SetupError(
            f"{mountpoint} is not yours (owner {found.st_uid}, mode "
            f"{stat.S_IMODE(found.st_mode):04o}): mount on a directory that you own"
        )
    try:
        with os.scandir(mountpoint) as entries:
            first = next(entries, None)
    except OSError as error:
        raise SetupError(f"{mountpoint} can't be listed: {error.strerror}") from error
    if first is not None:
        raise SetupError(
            f"{mountpoint} is not empty (it holds {first.name!r}): choose an empty directory, "
            "since a mount hides what is below it"
        )


def _statfs_errno(path: Path) -> int:
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _in_container() -> bool:
    return any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv"))
