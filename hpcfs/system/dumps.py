"""Keeps passwords and keys out of files that outlive a process: none of ours dumps its memory."""

from __future__ import annotations

import ctypes
import resource

PR_SET_DUMPABLE = 4
"""linux/prctl.h's."""


def forbid() -> None:
    """The limit holds for the processes that this one starts, too. Where the kernel pipes dumps to
    a program, which no limit binds, and for debuggers of the user's own, the process is not
    dumpable: /proc/PID belongs to root then, but for the process itself.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
