"""RevokedHostKeys: a list of public keys, or a key revocation list that ssh-keygen reads for us."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import asyncssh

_KRL = b"SSHKRL\n\0"
SECONDS = 5.0


def is_list_of_keys(path: Path) -> bool:
    """Return whether the file is a list of public keys, and no revocation list. Raises OSError."""
    return not path.read_bytes().startswith(_KRL)


def keys(path: Path) -> Iterator[asyncssh.SSHKey]:
    """Return the keys of a list of public keys. Raises OSError."""
    for line in path.read_text(errors="replace").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                yield asyncssh.import_public_key(line.strip())
            except (asyncssh.KeyImportError, ValueError):
                continue  # as ssh does


def is_revoked(path: Path, key: asyncssh.SSHKey) -> bool:
    """Return whether the key is revoked. Raises OSError when that can't be told: then no key may be
    believed."""
    if is_list_of_keys(path):
        return any(one == key for one in keys(path))
    try:
        done = subprocess.run(
            ["ssh-keygen", "-Q", "-f", str(path), "/dev/stdin"],
            input=key.export_public_key(),
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"ssh-keygen did not answer within {SECONDS:g} s") from error
    return done.returncode != 0
