"""Extended attributes as a text: the form in which S3 objects carry them, beside mode and times.

It is s3fs's (its metadata key `xattr`; github.com/s3fs-fuse/s3fs-fuse, src/s3fs.cpp): a JSON object
of names and base64 values, percent-encoded but for letters, digits and "-._~". What JSON escapes
in names s3fs takes as it is written: it finds plain names only. Bytes that are no UTF-8 are
surrogates, as everywhere in Python. Both sides of the socket need it: whether there is room must be
known when a file that is not uploaded yet gets one.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from urllib.parse import quote, unquote

Xattrs = tuple[tuple[bytes, bytes], ...]
"""Names, with the namespace ("user.") before them, and values."""

_OTHER_NAMESPACES = (b"security.", b"system.", b"trusted.")
"""Those that Linux gives a meaning (xattr(7)). s3fs keeps all other names, without "user." too."""

XATTRS_TEXT_BYTES = 1792
"""S3 takes 2 KiB of metadata in all: what is left is for the other attributes and for others'."""


def xattrs_text(xattrs: Xattrs) -> str:
    """ASCII."""
    names = {
        name.decode(errors="surrogateescape"): base64.b64encode(value).decode()
        for name, value in xattrs
    }
    return quote(json.dumps(names, separators=(",", ":")), safe="")


def xattrs_of(text: str) -> Xattrs | None:
    """Read the text again; None where it makes no sense."""
    try:
        found = json.loads(unquote(text, errors="strict"))
        if not isinstance(found, dict) or any("\0" in name for name in found):
            return None
        return tuple(
            (name.encode(errors="surrogateescape"), base64.b64decode(value, validate=True))
            for name, value in found.items()
        )
    except (ValueError, TypeError, RecursionError):
        return None


def is_kept_xattr(name: bytes) -> bool:
    """Tell whether an attribute of this name is a user's own, which namespaces keep and show."""
    return not name.startswith(_OTHER_NAMESPACES)


def changed_xattrs(xattrs: Xattrs, changes: Mapping[bytes, bytes | None]) -> Xattrs:
    """Return the attributes after these changes, where None removes one."""
    merged = {**dict(xattrs), **changes}
    return tuple((name, value) for name, value in merged.items() if value is not None)
