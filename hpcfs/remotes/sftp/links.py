"""Making symbolic links: in which order a server reads the two paths of SSH_FXP_SYMLINK.

The draft (draft-ietf-secsh-filexfer-02, section 6.10) has the link first and its target second.
OpenSSH reads them the other way round (its PROTOCOL, section 4.1), and so do Dropbear, which runs
OpenSSH's sftp-server, ProFTPD, libssh and Go's pkg/sftp; asyncssh's server keeps to the draft. A
banner does not tell, and a link made in the wrong order is one elsewhere on the server. So the
server is asked before the first link of a connection, with a request that it must refuse whichever
way it reads it: of its paths one is there already, and the other in a directory that is missing.
That this is missing is said only where the link was to be made in it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import asyncssh
from asyncssh.constants import FX_NO_SUCH_FILE, FX_NO_SUCH_PATH

from hpcfs.model.errors import RemoteFailure
from hpcfs.remotes.sftp.path import SftpPath
from hpcfs.remotes.sftp.rename import name_beside
from hpcfs.remotes.sftp.requests import Requests

log = logging.getLogger(__name__)

_MISSING = (FX_NO_SUCH_FILE, FX_NO_SUCH_PATH)


async def reads_target_first(place: SftpPath) -> bool:
    """Whether the server reads the target before the link, as OpenSSH does; `place` is where a link
    is wanted. Raises RemoteError where no link can be made there."""
    session = place.session
    if session.reads_target_first is None:
        session.reads_target_first = await _refused_order(place)
    if session.reads_target_first is None:
        session.reads_target_first = await _tried_order(place)
    return session.reads_target_first


async def make(place: SftpPath, target: bytes, *, target_first: bool) -> None:
    """Make a symbolic link. Raises asyncssh's errors."""
    paths = (target, place.full) if target_first else (place.full, target)
    await place.session.meta.symlink_paths(*paths)


async def _refused_order(place: SftpPath) -> bool | None:
    """Nothing is made. None where the server gives both refusals the same reason."""
    meta = place.session.meta
    there = place.parent().full or b"/"
    missing = place.beside(name_beside(b"missing")).full + b"/link"
    with place.asking():
        answers = await asyncio.gather(
            meta.symlink_paths(there, missing),
            meta.symlink_paths(missing, there),
            return_exceptions=True,
        )
        if all(isinstance(answer, asyncssh.SFTPOpUnsupported) for answer in answers):
            raise answers[0]  # type: ignore[misc]
        target_first, link_first = (_is_missing(answer) for answer in answers)
    return target_first if target_first != link_first else None


def _is_missing(answer: object) -> bool:
    """Whether the directory that is not there was missed. Raises what is no refusal."""
    if isinstance(answer, BaseException) and not isinstance(answer, asyncssh.SFTPError):
        raise answer
    return isinstance(answer, asyncssh.SFTPError) and answer.code in _MISSING


async def _tried_order(place: SftpPath) -> bool:
    """Find out the order on servers that give no reasons: of two new names beside the link, one
    becomes a link to the other, and is removed in the same flight."""
    meta = place.session.meta
    one, other = (place.beside(name_beside(b"link")) for _ in range(2))
    with place.asking():
        answers: Any = await asyncio.gather(
            meta.symlink_paths(one.full, other.full),
            meta.lstat(one.full, 0),
            meta.lstat(other.full, 0),
            _removed(meta, one),
            _removed(meta, other),
            return_exceptions=True,
        )
        made, *looks, one_left, other_left = answers
        if isinstance(made, BaseException):
            raise made
    first, second = (isinstance(look, asyncssh.SFTPAttrs) for look in looks)
    if first == second:
        raise RemoteFailure(f"{place.session.shown} makes no symbolic links, and does not say why")
    left = one_left if first else other_left
    if isinstance(left, BaseException):
        log.warning("%s could not be removed again: %s", one if first else other, left)
    return second


async def _removed(meta: Requests, place: SftpPath) -> Any:
    with place.asking():
        await meta.remove(place.full)
