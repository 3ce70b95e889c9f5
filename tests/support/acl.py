"""Default access lists of directories, as setfacl -d sets them, without that program."""

from __future__ import annotations

import os
import struct
from pathlib import Path

_VERSION = 2
_USER_OBJ, _GROUP_OBJ, _OTHER = 0x01, 0x04, 0x20
_NOBODY = 0xFFFFFFFF


def set_default_acl(directory: Path, user: int, group: int, other: int) -> None:
    """What is made in it gets at most these permissions, of three bits each, whatever the umask
    (acl(5); the form is linux/posix_acl_xattr.h's)."""
    entries = ((_USER_OBJ, user), (_GROUP_OBJ, group), (_OTHER, other))
    content = struct.pack("<I", _VERSION) + b"".join(
        struct.pack("<HHI", tag, permissions, _NOBODY) for tag, permissions in entries
    )
    os.setxattr(directory, "system.posix_acl_default", content)
