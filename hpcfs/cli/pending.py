"""Formats mounts and pending uploads, in the same way for all commands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from hpcfs.cli.output import ago, count, size
from hpcfs.control import control, mountpoint
from hpcfs.control.control import MountStatus, PendingFile, PendingList, PendingState
from hpcfs.model.errors import SetupError

if TYPE_CHECKING:
    from hpcfs.cli.cache_places import CacheTarget

MAX_NAMED = 20
_STATES: tuple[PendingState, ...] = ("failed", "kept", "uploading", "waiting", "writing")
REMEDIES = (
    "'hpcfs retry' tries again, 'hpcfs recover --to DIR' copies them, "
    "'hpcfs discard PATH' gives one up"
)


class UnansweredMount(msgspec.Struct, frozen=True):
    """A mount whose daemon gave no status, as --json shows it."""

    mountpoint: str
    error: str


def amount(files: int, length: int) -> str:
    """Return text such as "3 files (1.2 MiB)"."""
    return f"{count(files, 'file')} ({size(length)})"


def states(numbers: Mapping[PendingState, int]) -> str:
    """Return text such as "2 failed, 1 uploading"."""
    return ", ".join(f"{numbers[state]} {state}" for state in _STATES if numbers.get(state))


def stuck(status: MountStatus) -> int:
    """Return the number of files that failed or are kept."""
    return status.pending_states.get("failed", 0) + status.pending_states.get("kept", 0)


def path_of(status: MountStatus, file: PendingFile) -> str:
    """Return the file's path in the mount, which other commands take as PATH."""
    own = [] if file.namespace == status.root_namespace else [file.namespace]
    return os.path.join(status.mountpoint, *own, file.path)


def lines(status: MountStatus) -> list[str]:
    """Return lines for `hpcfs status`: failed files by name, all others as numbers."""
    if not status.pending_files:
        return ["  uploads: nothing is pending"]
    rate = f", {size(round(status.upload_rate))}/s" if status.upload_rate >= 1 else ""
    found = [
        f"  uploads: {amount(status.pending_files, status.pending_bytes)} pending: "
        f"{states(status.pending_states)}{rate}"
    ]
    if failed := stuck(status):
        found.append(f"  {count(failed, 'file')} could not be uploaded:")
        named = [file for file in status.pending if file.is_stuck][:MAX_NAMED]
        for file in named:
            found += stuck_lines(status, file)
        if failed > len(named):
            found.append(f"    and {failed - len(named)} more: 'hpcfs status --json' lists them")
        found.append(f"    {REMEDIES}")
    return found


def stuck_lines(status: MountStatus, file: PendingFile) -> list[str]:
    """Return lines about one file that failed or is kept."""
    about = f"({size(file.size)}, {ago(file.since)} ago): {file.reason}"
    found = [f"    {file.state} {path_of(status, file)} {about}"]
    return [*found, f"      the bytes: {file.data}"] if file.data else found


def query(place: CacheTarget, timeout: float = control.STEP_SECONDS) -> PendingList:
    """Ask the mount's daemon for its pending files. Raises SetupError."""
    assert place.socket
    assert place.mountpoint
    try:
        return control.query_pending(place.socket, place.path, timeout)
    except control.DaemonNotRunning:
        if not mountpoint.is_dead(place.mountpoint):
            raise
        raise SetupError(
            f"the daemon of {place.mountpoint} is gone: 'hpcfs umount {place.mountpoint}' tidies "
            "up, and the next mount resumes what was pending"
        ) from None
