"""Keeps passwords and keys out of files that outlive a process: none of ours dumps its memory."""

from __future__ import annotations

import ctypes
import resource

PR_SET_DUMPABLE = 4
"""linux/prctl.h's."""


def forbid_core() -> None:
    """For this process and those that it starts, whatever kills them."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def forbid() -> None:
    """Also where the kernel pipes dumps to a program, which is not bound by limits, and from
    debuggers of the user's own: /proc/PID belongs to root then, but for the process itself.

    Not for the mount daemon, whose files in memory the transfer processes open by /proc/PID/fd.
    """
    forbid_core()
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
