"""`hpcfs umount`: waits for pending uploads, unmounts, and returns once the daemon has ended.

Files that can't be uploaded do not keep it mounted: they stay in the journal, on this machine. A
remote that does not answer is tried for the time of --timeout, or for four seconds; then programs
that wait for it are let go, so that none keeps the mount busy by a close(2). Exit code 1:
unmounted, but something written through this mount is not on its remote; or not unmounted. 3:
unmounted, but --timeout passed before all was uploaded.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import msgspec

from hpcfs.cli import pending, waiting
from hpcfs.cli.output import complain, count
from hpcfs.cli.progress import ProgressBar
from hpcfs.cli.waiting import timeout_option
from hpcfs.control import control, mountpoint
from hpcfs.control.control import ControlRequest, MountStatus, WorkProgress
from hpcfs.model.errors import SetupError
from hpcfs.system import mountinfo, paths
from hpcfs.system.text import printable

PATIENCE_SECONDS = 2.0
"""Seconds after which the user is told what is waited for. A daemon without uploads ends within
them."""
LEAVE_SECONDS = 2.0
"""That programs get to end after their calls were failed."""
GOES_ON = "; the daemon goes on, and what it does not finish, the next mount resumes"
MAX_USERS_NAMED = 5
MAX_FILES_NAMED = 5


@click.command(short_help="Unmount, after pending uploads.")
@click.argument("place", metavar="MOUNTPOINT")
@timeout_option
def umount(place: str, timeout: float | None) -> int:
    """Wait until all is uploaded, unmount, and wait until the daemon has ended."""
    end = waiting.ends_at(timeout)
    target = paths.absolute_mountpoint(place)
    _check_mounted(target)
    at = paths.find_socket(target)
    try:
        daemon: socket.socket | None = control.open_wait(at)
    except SetupError:  # gone, hung, or its socket was removed: unmounting helps in each case
        daemon = None
    if daemon is None and mountpoint.is_dead(target):
        mountpoint.unmount(target, lazy=True)
        complain(f"the daemon of {target} was gone; what it left behind is unmounted")
        return 0
    code, rest, were_stuck = 0, "", 0
    if daemon is not None:
        if end is None:
            were_stuck = _let_go(at)
        code = _upload(at, target, end)
        if code == waiting.OUT_OF_TIME:
            were_stuck = _let_go(at)
            code, rest = _left_behind(at)
    _unmount(target, LEAVE_SECONDS if were_stuck else 0.0)
    if daemon is not None:
        with daemon:
            outcome = _wait(daemon, at, target, end)
            if not outcome and rest:
                complain(f"{target} is unmounted, but there was no time to wait{rest}")
            return max(code, outcome)
    return code


def _check_mounted(target: Path) -> None:
    found = mountinfo.at(target, mountinfo.read())
    if found is None:
        raise SetupError(f"nothing is mounted at {target}: 'hpcfs status' lists what is")
    if found.kind != mountinfo.HPCFS_TYPE:
        raise SetupError(f"what is mounted at {target} is not hpcfs's ({found.kind})")


def _unmount(target: Path, seconds: float) -> None:
    """Unmount; programs that use it may take so long to end. Raises SetupError."""
    end = time.monotonic() + seconds
    while True:
        try:
            mountpoint.unmount(target)
        except mountpoint.Busy:
            if time.monotonic() >= end:
                raise SetupError(_busy(target)) from None
            time.sleep(0.05)
        else:
            return


# --- before -------------------------------------------------------------------------------------


def _let_go(at: Path) -> int:
    """Fail the calls of programs that wait for a remote that does not answer; return how many."""
    try:
        return control.work(at, ControlRequest("let_go"), lambda step: None).files
    except SetupError:  # unmounting helps with this, too
        return 0


def _upload(at: Path, target: Path, end: float | None) -> int:
    """Wait for the uploads while it is still mounted, since a program may use the mount for as long
    as this takes. Returns the exit code: 1 if something written through this mount is not on its
    remote."""
    problem = ""
    try:
        with ProgressBar("uploading") as bar:
            control.work(at, _sync_request(end), _Watcher(bar, target).show, waiting.left(end))
    except KeyboardInterrupt:
        complain(f"{target} stays mounted{_rest(at, '; the mount goes on with that')}")
        raise
    except control.OutOfTime:
        return waiting.OUT_OF_TIME
    except SetupError as error:
        problem = str(error)
    try:
        return report_failures(control.query_status(at), problem)
    except SetupError as error:  # unmounting helps with this, too
        complain(f"whether all is uploaded is not known: {error}")
        return 1


def _left_behind(at: Path) -> tuple[int, str]:
    """Return the exit code when the time has passed, and what to say of files that wait."""
    try:
        status = control.query_status(at)
    except SetupError:
        return 0, ""
    kept = msgspec.structs.replace(
        status, pending=[one for one in status.pending if one.state == "kept"]
    )
    if code := report_failures(kept, ""):
        return code, ""
    return (waiting.OUT_OF_TIME, _rest(at, GOES_ON)) if status.pending_files else (0, "")


def _sync_request(end: float | None) -> ControlRequest:
    """With --timeout a remote out of reach is tried until then; without, it was just tried."""
    return ControlRequest("sync", patience=0.0) if end is None else waiting.sync_request(end)


class _Watcher:
    """Shows the progress, and reports once what a user who waits long should know."""

    def __init__(self, bar: ProgressBar, target: Path) -> None:
        self._bar = bar
        self._target = target
        self._report_at = time.monotonic() + PATIENCE_SECONDS
        self._reported = False
        self._outage = waiting.OutageNotice()

    def show(self, step: WorkProgress) -> None:
        """Show the progress."""
        self._bar.show(step)
        self._outage.show(step)
        if self._reported or time.monotonic() < self._report_at:
            return
        self._reported = True
        if users := _named_users(self._target):
            complain(f"{self._target} is in use by {users}: end them or leave the directory")
        if not sys.stderr.isatty():
            left = pending.amount(
                step.files_total - step.files_done, max(0, step.total - step.done)
            )
            complain(f"waiting until all is uploaded: {left} to go (Ctrl-C stops only waiting)")


def report_failures(status: MountStatus, problem: str) -> int:
    """Report failed uploads; return the exit code. Failures of an earlier mount are not reported
    again: `hpcfs status` lists them."""
    news = [one for one in status.pending if one.is_stuck and one.since >= status.started]
    for file in news[:MAX_FILES_NAMED]:
        complain(f"{pending.path_of(status, file)} is not uploaded: {file.reason}")
    if news:
        complain(
            f"{count(len(news), 'file')} could not be uploaded and stay in the journal on this "
            "machine: 'hpcfs recover --to DIR' copies them, and the next mount lists them"
        )
        return 1
    if problem and status.pending_files > pending.stuck(status):
        complain(f"not all is uploaded: {problem}")
        return 1
    return 0


# --- after --------------------------------------------------------------------------------------


def _wait(daemon: socket.socket, at: Path, target: Path, end: float | None) -> int:
    """Wait for the daemon's end as long as uploads take: Ctrl-C ends the waiting, not the
    uploads."""
    if control.wait_until_gone(daemon, PATIENCE_SECONDS):
        return 0
    if end is None:
        complain(
            f"{target} is unmounted; waiting for its daemon to finish (Ctrl-C stops only waiting)"
        )
    try:
        with ProgressBar("uploading") as bar, suppress(SetupError):
            control.work(at, waiting.sync_request(end), bar.show, waiting.left(end))
        if control.wait_until_gone(daemon, waiting.left(end)):
            return 0
    except KeyboardInterrupt:
        complain(f"{target} is unmounted{_rest(at, GOES_ON)}")
        raise
    complain(f"{target} is unmounted, but there was no time to wait{_rest(at, GOES_ON)}")
    return waiting.OUT_OF_TIME


def _rest(at: Path, outlook: str) -> str:
    """Return text that says how much is pending, and what becomes of it."""
    try:
        status = control.query_status(at)
    except SetupError:
        return outlook
    left = pending.amount(status.pending_files, status.pending_bytes)
    return f", {left} not uploaded yet{outlook}" if status.pending_files else outlook


# --- programs that use it -----------------------------------------------------------------------


def _busy(target: Path) -> str:
    users = _named_users(target)
    if not users:
        return f"{target} is in use by programs that can't be seen: close its files and try again"
    return f"{target} is in use by {users}: end them or leave the directory, then try again"


def _named_users(target: Path) -> str:
    users = list(dict.fromkeys(users_below(target)))
    named = ", ".join(users[:MAX_USERS_NAMED])
    return (
        f"{named} and {len(users) - MAX_USERS_NAMED} more"
        if len(users) > MAX_USERS_NAMED
        else named
    )


def users_below(target: Path) -> Iterator[str]:
    """Yield the processes with a working directory, root or open file there. Reads only the links
    in /proc, since the mount itself may hang."""
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and any(_is_below(link, target) for link in _links(process)):
            yield f"{_name(process)} (pid {process.name})"


def _links(process: Path) -> Iterator[str]:
    names = ["cwd", "root"]
    with suppress(OSError):  # it ended, or is another user's
        names += [f"fd/{number}" for number in os.listdir(process / "fd")]
    with suppress(OSError):
        names += [f"map_files/{area}" for area in os.listdir(process / "map_files")]
    for name in names:
        with suppress(OSError):
            yield os.readlink(process / name)


def _is_below(link: str, target: Path) -> bool:
    return link == str(target) or link.startswith(f"{target}/")


def _name(process: Path) -> str:
    try:
        return printable((process / "comm").read_text(errors="replace").strip())
    except OSError:  # it ended meanwhile
        return "a program"
