"""The number of descriptors that a process may have open (RLIMIT_NOFILE, getrlimit(2)).

The soft limit is 1024 on most systems, so that programs that use select(2) fail early; the hard
one, up to which a process may raise it by itself, is larger. The daemon and its worker processes
raise theirs. Programs that they start for the user get the old one back.
"""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

MOST_FILES = 65536
"""More is not asked for: some programs close all descriptors up to the limit, one by one."""
_given: int | None = None
"""The soft limit before it was raised."""


def raise_open_files() -> int:
    """Raise the soft limit to the hard one, MOST_FILES at most; return the limit now."""
    global _given
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    _given = soft
    return wanted


def open_files() -> int:
    """Return the soft limit now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft


def give_back(pid: int) -> None:
    """Give a process that was started just now the soft limit that this one was given."""
    if _given is None:
        return
    try:
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(_given, hard), hard))
    except (OSError, ValueError) as error:  # it has ended, or has another user's rights
        log.debug("process %d keeps its limit of open files: %s", pid, error)
