"""known_hosts files: which lines speak of a host, and how one is added (sshd(8))."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import hmac
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import asyncssh

log = logging.getLogger(__name__)

Marker = Literal["", "@cert-authority", "@revoked"]
_MARKERS: tuple[Marker, ...] = ("", "@cert-authority", "@revoked")
_SALT_BYTES = 20


@dataclass(frozen=True)
class KnownHost:
    """A key that a file has for a host. `line` counts from 1."""

    path: Path
    line: int
    marker: Marker
    key: asyncssh.SSHKey


def find(path: Path, name: str) -> list[KnownHost]:
    """The entries for `name`: a host, or "[host]:port". A line that makes no sense is passed over,
    as ssh does, not all of the file."""
    found = []
    for number, marker, hosts, text in _lines(path):
        if not _names(hosts, name.lower()):
            continue
        try:
            key = asyncssh.import_public_key(text)
        except (asyncssh.KeyImportError, ValueError) as error:
            log.warning("%s line %d is not understood: %s", path, number, error)
            continue
        found.append(KnownHost(path, number, marker, key))
    return found


def add(path: Path, name: str, key: asyncssh.SSHKey, *, hashed: bool) -> None:
    """Add a line to a file, which is made if need be. Raises OSError."""
    shown = _hashed(name.lower()) if hashed else name.lower()
    line = f"{shown} {key.export_public_key().decode().strip()}\n"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "rb+", buffering=0) as file:
        file.write(b"\n" * _is_unfinished(descriptor) + line.encode())


def _is_unfinished(descriptor: int) -> bool:
    """Return whether its last line has no end. A device has no lines."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _lines(path: Path) -> Iterator[tuple[int, Marker, str, str]]:
    try:
        text = path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        log.warning("%s could not be read: %s", path, error)
        return
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split(None, 1)
        if not words or words[0].startswith("#"):
            continue
        marker: Marker = next((one for one in _MARKERS if one == words[0]), "")
        if marker:
            words = words[1].split(None, 1) if len(words) > 1 else []
        if len(words) == 2 and not words[0].startswith("@"):
            yield number, marker, words[0], words[1]
        else:
            log.warning("%s line %d is not understood", path, number)


def _names(hosts: str, name: str) -> bool:
    if hosts.startswith("|"):
        return _is_hash_of(hosts, name)
    found = False
    for pattern in hosts.lower().split(","):
        if fnmatch.fnmatchcase(name, pattern.removeprefix("!").replace("[", "[[]")):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def _is_hash_of(hosts: str, name: str) -> bool:
    try:
        _, magic, salt, digest = hosts.split("|")
        expected = base64.b64decode(digest, validate=True)
        return magic == "1" and hmac.compare_digest(_digest(salt, name), expected)
    except ValueError:
        return False


def _hashed(name: str) -> str:
    salt = base64.b64encode(os.urandom(_SALT_BYTES)).decode()
    return f"|1|{salt}|{base64.b64encode(_digest(salt, name)).decode()}"


def _digest(salt: str, name: str) -> bytes:
    return hmac.digest(base64.b64decode(salt, validate=True), name.encode(), hashlib.sha1)
