"""Mounts without a setuid helper, in a user and mount namespace of this process's own.

Where the kernel lets ordinary users make user namespaces (apptainer needs the same), a process may
mount FUSE in one by itself. Only this process and those that it starts see the mount, and it is
gone with the last of them. See user_namespaces(7).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from hpcfs.model.errors import SetupError

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
"""From linux/sched.h; Python has os.unshare from 3.12 on."""
CAP_SYS_ADMIN = 21
"""From linux/capability.h."""


def may_mount() -> bool:
    """Return whether this process may call mount(2) itself: as root, or in its own user
    namespace."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) & 1 << CAP_SYS_ADMIN)
    return False


def enter() -> None:
    """Move this process into a namespace in which it may mount.

    Users and groups keep their numbers; files of other users are shown as user 65534's. Call it
    before any thread is started. Raises SetupError where the kernel refuses.
    """
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise SetupError(
            f"fusermount3 is missing, and user namespaces can't be made here ({reason}): "
            "ask the administrator to install the package fuse3"
        )
    try:
        Path("/proc/self/setgroups").write_text(
            "deny"
        )  # otherwise only the administrator may write gid_map
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    except OSError as error:
        raise SetupError(
            f"fusermount3 is missing, and a user namespace can't be set up ({error.strerror}): "
            "ask the administrator to install the package fuse3"
        ) from error
