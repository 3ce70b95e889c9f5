"""Attributes as user metadata of objects, in the form that rclone and s3fs read.

`mtime` is decimal seconds, with nine digits of fraction where there is one (s3fs takes the digits
after the point as nanoseconds); `mode` (a full st_mode), `uid` and `gid` are decimal. Reading is
liberal: octal modes as `rclone --metadata` writes them are understood, what makes no sense counts
as missing. Metadata that is not ours is kept. Extended attributes are in `xattr`, as s3fs has them
(model/xattrs.py).
"""

from __future__ import annotations

import base64
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from hpcfs.model.entries import Attributes
from hpcfs.model.errors import NoSpace
from hpcfs.model.xattrs import Xattrs, changed_xattrs, xattrs_of, xattrs_text

NANOSECONDS = 1_000_000_000
MAX_TIME_NS = 2**63 - 1
MAX_ID = 2**32 - 2
PERMISSIONS = 0o7777
FILE_MODE = stat.S_IFREG | 0o644
DIRECTORY_MODE = stat.S_IFDIR | 0o755
SYMLINK_MODE = stat.S_IFLNK | 0o777
OURS = frozenset({"mtime", "mode", "uid", "gid", "atime"})
XATTRS = "xattr"
MOST_BYTES = 2048
"""Of names and values together (docs.aws.amazon.com/AmazonS3/latest/userguide/UsingMetadata.html).
"""


@dataclass(frozen=True)
class Metadata:
    """The attributes that an object's user metadata holds; None for one that is not there or makes
    no sense."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    mtime_ns: int | None = None
    atime_ns: int | None = None
    xattrs: Xattrs = ()
    """Of every namespace that some program wrote."""
    foreign: tuple[tuple[str, str], ...] = ()

    def changed(self, attributes: Attributes, mode: int) -> Metadata:
        """Return it with these attributes; `mode` is the full st_mode to keep where they have none.

        Raises NoSpace where extended attributes make it more than an object can carry.
        """
        if attributes.mode is not None:
            mode = stat.S_IFMT(mode) | (attributes.mode & PERMISSIONS)
        changed = Metadata(
            mode=mode,
            uid=self.uid if attributes.uid is None else attributes.uid,
            gid=self.gid if attributes.gid is None else attributes.gid,
            mtime_ns=self.mtime_ns if attributes.mtime_ns is None else attributes.mtime_ns,
            atime_ns=self.atime_ns if attributes.atime_ns is None else attributes.atime_ns,
            xattrs=changed_xattrs(self.xattrs, attributes.xattrs or {}),
            foreign=self.foreign,
        )
        if attributes.xattrs and _bytes_of(changed) > MOST_BYTES:
            raise NoSpace("an object on S3 carries at most 2 KiB of attributes, as text")
        return changed


def decode(user_metadata: Mapping[str, str], *, directory: bool = False) -> Metadata:
    """Read user metadata. Some servers change the keys' case, so it does not count."""
    values = {key.lower(): value for key, value in user_metadata.items()}
    xattrs = xattrs_of(values[XATTRS]) if XATTRS in values else None
    ours = OURS if xattrs is None else OURS | {XATTRS}
    return Metadata(
        mode=_parse_mode(values.get("mode"), directory=directory),
        uid=_parse_id(values.get("uid")),
        gid=_parse_id(values.get("gid")),
        mtime_ns=parse_time(values.get("mtime")),
        atime_ns=parse_time(values.get("atime")),
        xattrs=xattrs or (),
        foreign=tuple((key, value) for key, value in values.items() if key not in ours),
    )


def encode(metadata: Metadata) -> dict[str, str]:
    """Return the user metadata (keys and ASCII values) that stands for these attributes."""
    values = {key: _header_text(value) for key, value in metadata.foreign}
    for key, number in (("mode", metadata.mode), ("uid", metadata.uid), ("gid", metadata.gid)):
        if number is not None:
            values[key] = str(number)
    for key, time_ns in (("mtime", metadata.mtime_ns), ("atime", metadata.atime_ns)):
        if time_ns is not None:
            values[key] = format_time(time_ns)
    if metadata.xattrs:
        values[XATTRS] = xattrs_text(metadata.xattrs)
    return values


def _bytes_of(metadata: Metadata) -> int:
    return sum(len(key) + len(value) for key, value in encode(metadata).items())


def format_time(time_ns: int) -> str:
    """Decimal seconds; a minus sign counts for the fraction too."""
    seconds, fraction = divmod(abs(time_ns), NANOSECONDS)
    sign = "-" if time_ns < 0 else ""
    return f"{sign}{seconds}.{fraction:09}" if fraction else f"{sign}{seconds}"


def parse_time(text: str | None) -> int | None:
    """Nanoseconds, digits beyond them cut off."""
    if text is None:
        return None
    digits = text.strip()
    sign = -1 if digits.startswith("-") else 1
    whole, _, fraction = digits.removeprefix("-").removeprefix("+").partition(".")
    if not _is_number(whole) or not (fraction == "" or _is_number(fraction[:9])):
        return None
    time_ns = int(whole) * NANOSECONDS + int(fraction[:9].ljust(9, "0"))
    return sign * time_ns if time_ns <= MAX_TIME_NS else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20


def _parse_id(text: str | None) -> int | None:
    if text is None or not _is_number(text.strip()) or int(text) > MAX_ID:
        return None
    return int(text)


def _parse_mode(text: str | None, *, directory: bool) -> int | None:
    """Return a full st_mode of the kind that the key allows, or None.

    Decimal where that gives a type that fits (s3fs, hpcfs), else octal ("100644", rclone). A value
    without a type is permissions only, octal when it begins with a zero, as in C.
    """
    digits = (text or "").strip()
    if not _is_number(digits):
        return None
    octal = int(digits, 8) if not set(digits) & {"8", "9"} else None
    starts_octal = digits.startswith("0") and octal is not None
    readings = [octal] if starts_octal else [int(digits), octal]
    kinds = (stat.S_IFDIR,) if directory else (stat.S_IFREG, stat.S_IFLNK)
    for mode in readings:
        if mode is not None and mode <= 0o177777 and stat.S_IFMT(mode) in kinds:
            return mode
    if readings[0] is not None and readings[0] <= PERMISSIONS:
        return kinds[0] | readings[0]
    return None


def _header_text(value: str) -> str:
    """Headers are ASCII; for the rest, S3 itself uses RFC 2047."""
    if value.isascii() and value.isprintable():
        return value
    return f"=?UTF-8?B?{base64.b64encode(value.encode()).decode()}?="
