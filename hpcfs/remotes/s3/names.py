"""Shows S3 keys as paths: a pure, reversible mapping.

A key is the root's prefix and the path. But a key may be what no path can be: "a//b", "..", a
component with a NUL or of more than 255 bytes, or an object "a" beside the keys "a/…". Nothing of
that is hidden and nothing of it may reach other data, so

- a component that is no name is shown as its printable beginning, ESCAPE and 16 hex digits of its
  hash; so is a component that itself contains ESCAPE: what is shown stays unambiguous;
- an object beside a directory of its name is shown with BESIDE appended;
- MARKER is the name of the marker object on servers that can't keep "a/" apart from "a"
  (markers.py); it is not shown.

New entries can't be given a name that contains ESCAPE. Percent-encoding was considered instead of
hashes: it can't shorten names that are too long, and it turns ordinary names ("100%41") ambiguous.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b

from hpcfs.model.errors import InvalidName, NameTooLong
from hpcfs.remotes.base import MAX_NAME_BYTES, is_valid_name

ESCAPE = b"%hpcfs-"
BESIDE = ESCAPE + b"object"
MARKER = "%hpcfs-directory"
MAX_KEY_BYTES = 1024
SHOWN_BYTES = 180
"""How much of an escaped component is shown: with hash and BESIDE it stays below 255 bytes."""
UNPRINTABLE = b"?"
OBVIOUS = ("", ".", "..")
"""Components found without listing anything."""

_HASHED = re.compile(rb"(?s)(.*)" + re.escape(ESCAPE) + rb"([0-9a-f]{16})\Z")


@dataclass(frozen=True)
class ShownName:
    """The meaning of a shown name. `component` is None where only its hash is known."""

    component: str | None
    beside: bool


def decoded(name: bytes) -> str:
    """Return a name as text. Raises InvalidName unless S3 can hold it."""
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        shown = name.decode(errors="backslashreplace")
        raise InvalidName(f"{shown!r} is not UTF-8, and S3 keys must be: rename it") from None


def checked_key(key: str) -> str:
    """Return the key. Raises NameTooLong for keys that S3 refuses."""
    if len(key.encode()) > MAX_KEY_BYTES:
        raise NameTooLong(f"the path is longer than the {MAX_KEY_BYTES} bytes of an S3 key")
    return key


def is_plain(component: bytes) -> bool:
    """Whether a component of a key is shown as it is."""
    return is_valid_name(component) and ESCAPE not in component


def shown(component: str, *, beside: bool = False) -> bytes:
    """The name under which a component of a key appears in its directory."""
    raw = component.encode()
    fits = len(raw) + len(BESIDE) <= MAX_NAME_BYTES if beside else True
    name = raw if is_plain(raw) and fits else _hashed(raw)
    return name + BESIDE if beside else name


def parse(name: bytes) -> ShownName:
    """The reverse of `shown`, as far as it goes without looking at the server.

    Raises InvalidName for names that `shown` never returns, so that no key has two names.
    """
    beside = name.endswith(BESIDE)
    rest = name.removesuffix(BESIDE)
    if is_plain(rest):
        component = decoded(rest)
        if shown(component, beside=beside) == name:
            return ShownName(component, beside)
    elif _HASHED.match(rest):
        for obvious in OBVIOUS:
            if shown(obvious) == rest:
                return ShownName(obvious, beside)
        return ShownName(None, beside)
    raise InvalidName(f"{_text(name)!r} can't be used: names with {_text(ESCAPE)!r} are reserved")


def stands_for(name: bytes, component: str) -> bool:
    """Whether `name`, for which `parse` knew no component, is this component's."""
    return shown(component, beside=name.endswith(BESIDE)) == name


def search_prefix(name: bytes) -> str:
    """Return the beginning of every component that could be shown as this hashed name."""
    found = _HASHED.match(name.removesuffix(BESIDE))
    beginning = found[1] if found else b""
    return beginning.partition(UNPRINTABLE)[0].decode("utf-8", "ignore")


def _hashed(raw: bytes) -> bytes:
    beginning = raw[:SHOWN_BYTES].decode("utf-8", "ignore")
    printable = "".join(char if char.isprintable() else "?" for char in beginning).encode()
    return printable + ESCAPE + blake2b(raw, digest_size=8).hexdigest().encode()


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")
