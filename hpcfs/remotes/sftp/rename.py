"""Renaming over SFTP, where every server means something else by it.

With posix-rename@openssh.com a rename replaces its target in one step. Version 3's own rename is
said to fail when the target exists, and on OpenSSH follows links while it looks. Without the
extension a target is moved aside first and comes back if the rename then fails: for that moment
nothing has the target's name, but at no moment are its bytes gone.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import stat

from hpcfs.model import paths
from hpcfs.model.errors import (
    AlreadyExists,
    DirectoryNotEmpty,
    InvalidRequest,
    IsADirectory,
    NotADirectory,
    NotFound,
    NotSupported,
    RemoteError,
)
from hpcfs.remotes.base import MAX_NAME_BYTES
from hpcfs.remotes.sftp.explain import explain_device, explain_sticky
from hpcfs.remotes.sftp.path import SftpPath

log = logging.getLogger(__name__)


async def rename(source: SftpPath, target: SftpPath, *, replace: bool) -> None:
    """Rename `source` to `target`, which must be free unless `replace`. Raises RemoteError as
    rename(2) would refuse."""
    if not source.path or target.full.startswith(source.full + b"/"):
        raise InvalidRequest(f"{source} can't be moved into itself")
    if not replace:
        await _rename_to_new(source, target)
        return
    try:
        with source.asking():
            await source.session.meta.posix_rename(source.full, target.full)
    except NotSupported:
        await _rename_without_extension(source, target)
    except RemoteError as error:
        await _check(source, target)
        error = await explain_device(source, target, error)
        error = await explain_sticky(source, error)
        raise await explain_sticky(target, error) from None


async def _rename_to_new(source: SftpPath, target: SftpPath) -> None:
    if await target.kind() is not None:
        raise AlreadyExists(f"{target} exists already")
    await rename_regular_to_new(source, target)


async def rename_regular_to_new(source: SftpPath, target: SftpPath) -> None:
    """Rename a regular file to a name that must be free. Raises AlreadyExists. For links and
    directories OpenSSH looks where the target leads."""
    try:
        await _plain_rename(source, target)
    except RemoteError:
        if await source.kind() is not None and await target.kind() is not None:
            raise AlreadyExists(f"{target} exists already") from None
        raise


async def _plain_rename(source: SftpPath, target: SftpPath) -> None:
    try:
        with source.asking():
            await source.session.meta.rename(source.full, target.full, 0)
    except RemoteError as error:
        raise await explain_device(source, target, error) from None


async def _check(source: SftpPath, target: SftpPath) -> int | None:
    """Raise what makes this rename impossible; return the target's type, None if it is new."""
    source_kind = await source.kind()
    if source_kind is None:
        raise NotFound(f"{source} does not exist")
    target_kind = await target.kind()
    if target_kind is None:
        return None
    if stat.S_ISDIR(target_kind) and not stat.S_ISDIR(source_kind):
        raise IsADirectory(f"{target} is a directory")
    if stat.S_ISDIR(source_kind) and not stat.S_ISDIR(target_kind):
        raise NotADirectory(f"{target} is not a directory")
    if stat.S_ISDIR(target_kind) and not await target.is_empty_directory():
        raise DirectoryNotEmpty(f"{target} is not empty")
    return target_kind


async def _rename_without_extension(source: SftpPath, target: SftpPath) -> None:
    target_kind = await _check(source, target)
    if source.full == target.full:
        return
    if target_kind is None:
        await _plain_rename(source, target)
        return
    aside = target.beside(name_beside(paths.name(target.full)))
    await _plain_rename(target, aside)
    try:
        await _plain_rename(source, target)
    except BaseException:
        await _plain_rename(aside, target)
        raise
    await _remove_aside(aside, target_kind)


def name_beside(name: bytes, origin: str | None = None) -> bytes:
    """Return a name for a file that is only there for a moment. From the same `origin` it is the
    same name, so that a later process finds what a killed one left."""
    token = secrets.token_bytes(6)
    if origin is not None:
        token = hashlib.blake2b(origin.encode(), digest_size=6).digest()
    suffix = b".hpcfs-" + token.hex().encode()
    return b"." + name[: MAX_NAME_BYTES - 1 - len(suffix)] + suffix


async def _remove_aside(aside: SftpPath, kind: int) -> None:
    """The rename is done; a leftover is worth a warning, not a failure."""
    try:
        with aside.asking():
            if stat.S_ISDIR(kind):
                await aside.session.meta.rmdir(aside.full)
            else:
                await aside.session.meta.remove(aside.full)
    except RemoteError as error:
        log.warning("what was renamed over is still there as %s: %s", aside, error.message)
