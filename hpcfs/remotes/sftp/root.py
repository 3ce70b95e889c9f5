"""Finds a namespace's folder on the server."""

from __future__ import annotations

import logging
import stat
from dataclasses import dataclass

from hpcfs.model.errors import NotFound, PermissionDenied, RemoteError, WrongSettings
from hpcfs.remotes.sftp.attrs import full_mode
from hpcfs.remotes.sftp.path import SftpPath, below
from hpcfs.remotes.sftp.session import SftpSession, find_home, together

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundRoot:
    """`full` is the folder's absolute path as it was named; `paths` are those by which links on the
    server may call it: this one, and the one without links."""

    full: bytes
    paths: tuple[bytes, ...]


async def find_root(session: SftpSession, path: str) -> FoundRoot:
    """Look at the folder that the configuration names. Raises WrongSettings where there is none.

    The home directory may have been told wrong, or this: what only a person can mend is not said
    after one look.
    """
    try:
        return await _look_at_root(session, path)
    except WrongSettings:
        with SftpPath(session, b"", b"~").asking():
            session.home = await find_home(session.meta, session.shown)
        return await _look_at_root(session, path)


async def _look_at_root(session: SftpSession, path: str) -> FoundRoot:
    full = full_path(path, session.home)
    place = SftpPath(session, b"", full)
    try:
        attrs, real = await together(place.attrs(), _real_path(place))
        kind = stat.S_IFMT(full_mode(attrs, stat.S_IFDIR))
    except NotFound:
        raise WrongSettings(f"the folder {place} does not exist") from None
    except PermissionDenied:
        raise WrongSettings(f"the folder {place} may not be entered by that user") from None
    if kind != stat.S_IFDIR:
        raise WrongSettings(f"{place} is not a folder")
    return FoundRoot(full, (full, real) if real and real != full else (full,))


async def _real_path(place: SftpPath) -> bytes | None:
    """Return the path without links; None where the server does not tell."""
    try:
        with place.asking():
            names, _ = await place.session.meta.realpath(place.full)
    except RemoteError as error:
        log.debug("%s: %s", place, error.message)
        return None
    real = names[0].filename if names else None
    return real if isinstance(real, bytes) and real.startswith(b"/") else None


def full_path(path: str, home: bytes) -> bytes:
    """Return the absolute path: "~", "~/x" and relative paths start at the remote home."""
    given = path.encode(errors="surrogateescape")
    if given == b"~" or given.startswith(b"~/"):
        given = given[2:]
    if given.startswith(b"/"):
        return given
    return below(home, given.rstrip(b"/")) if given else home
