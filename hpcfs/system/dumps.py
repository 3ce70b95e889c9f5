"""Forbids core dumps, which would write passwords and keys into files that outlive the process."""

from __future__ import annotations

import ctypes
import resource

PR_SET_DUMPABLE = 4
"""From linux/prctl.h."""


def forbid() -> None:
    """Forbid core dumps of this process and of those that it starts.

    The processes that it starts inherit the limit. It binds neither a kernel that pipes dumps to a
    program nor a debugger of the user's own; for those the process becomes not dumpable, which
    gives /proc/PID to root, except for the process itself.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
