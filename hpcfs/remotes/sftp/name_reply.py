"""Parses the reply to READDIR where it is as servers usually send it: in one go, in a seventh of
the time that it takes field by field, which was a third of what a listing cost here. No I/O.

SSH_FXP_NAME of version 3 (draft-ietf-secsh-filexfer-02, section 7): a count, and for each a name, a
line for humans, and attributes (section 5), whose flags say which of them follow.
"""

from __future__ import annotations

import re
import stat
import struct

from hpcfs.remotes.sftp.attrs import AnyAttrs, ListedAttrs

_LENGTH = struct.Struct(">I")
_ATTRS = struct.Struct(">IQIIIII")
"""Flags, size, uid, gid, mode, atime, mtime."""
_USUAL = 0x1 | 0x2 | 0x4 | 0x8
"""The flags that promise these, and nothing else."""
_MODE_BITS = 0xFFFF
_TYPE_BITS = 0xF000
_LINE = re.compile(rb"([-dlbcps])[-rwxsStT]{9}")
"""The beginning of a line for humans, where it is as `ls -l` has it."""
_TYPES = {
    b"-": stat.S_IFREG,
    b"d": stat.S_IFDIR,
    b"l": stat.S_IFLNK,
    b"b": stat.S_IFBLK,
    b"c": stat.S_IFCHR,
    b"p": stat.S_IFIFO,
    b"s": stat.S_IFSOCK,
}

Listed = tuple[bytes, AnyAttrs]


def type_in_line(line: bytes) -> int:
    """Return the type bits that a line for humans tells, of a server that leaves them out of the
    mode; 0 where it tells none."""
    found = _LINE.match(line)
    return _TYPES[found[1]] if found else 0


def usual_names(payload: bytes) -> list[Listed] | None:
    """Return the names with their attributes; None where any is told in another way, or the message
    is none: then it must be read field by field."""
    found: list[Listed] = []
    try:
        (count,) = _LENGTH.unpack_from(payload)
        at = _LENGTH.size
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(payload, at)
            at += _LENGTH.size + length
            name = payload[at - length : at]
            (length,) = _LENGTH.unpack_from(payload, at)
            at += _LENGTH.size + length
            flags, size, uid, gid, mode, atime, mtime = _ATTRS.unpack_from(payload, at)
            if flags != _USUAL or not mode & _TYPE_BITS:
                return None
            at += _ATTRS.size
            found.append((name, ListedAttrs(size, uid, gid, mode & _MODE_BITS, atime, mtime)))
    except struct.error:
        return None
    return found if at == len(payload) else None
