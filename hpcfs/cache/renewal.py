"""Makes the cache directory anew if it was removed while a mount uses it.

The daemon has the cache files open, so nothing is lost: dirty bytes are written under their old
names again, what is clean is fetched again. Until the directory can be made, what is read goes
through memory.

A file whose name is in doubt (`CacheFile.name_in_doubt`) is looked at in every round, until its
name leads to it. A copy gets the name once it is whole, on the disk, and as the file is: an upload
that is tried meanwhile finds no file, and is tried again.
"""

from __future__ import annotations

import logging
import os
import secrets

import trio

from hpcfs.cache.directory import CacheUnusable, copied, leads_to
from hpcfs.cache.file import CacheFile
from hpcfs.cache.store import Store
from hpcfs.model.errors import SetupError

log = logging.getLogger(__name__)


async def renew_if_removed(store: Store) -> None:
    """Make the cache directory anew if it was removed and that is possible, and give the open files
    names that are missing. What fails is told, and tried again by the next call.

    Raises OSError where the disk can't be looked at.
    """
    if not await store.in_thread(store.place.is_there) and not await _take_again(store):
        return
    for file in list(store.registry.files.values()):
        if not file.name_in_doubt or file.fd < 0 or file.in_memory:
            continue
        try:
            await _give_name(store, file)
        except OSError as error:
            store.troubles.tell(
                "what was written can't be put into the cache directory"
                f" {store.directory} again: {error.strerror}"
            )


async def _take_again(store: Store) -> bool:
    """Make the directory; return whether that was possible."""
    try:
        await store.in_thread(store.place.take_again)
    except (CacheUnusable, SetupError) as error:
        store.troubles.tell(f"the cache directory was removed: {error}")
        return False
    for file in store.registry.files.values():  # no await before: the directory is there now
        file.doubt_name()
    store.troubles.tell(f"the cache directory {store.directory} was removed, and is made anew")
    await store.in_thread(store.registry.index.begin_anew, "its directory was removed")
    return True


async def _give_name(store: Store, file: CacheFile) -> None:
    """Make the file's path lead to it. Raises OSError."""
    fd = os.dup(file.fd)  # the file may be closed meanwhile, and its number be another's
    try:
        path = file.path
        is_named = await trio.to_thread.run_sync(leads_to, path, fd)
        if file.fd < 0 or file.path != path:
            return
        if is_named:
            file.name_in_doubt = False
        elif file.dirty or file.pins or not file.indexed:
            await _write_again(store, file, fd)
        else:
            store.memory.to_disk(file)
    finally:
        os.close(fd)


async def _write_again(store: Store, file: CacheFile, fd: int) -> None:
    """Give a file under its old name the bytes that `fd`, its descriptor, has; leave it to the next
    call if it is written to meanwhile. Raises OSError."""
    path, changes = file.path, file.changes
    name = secrets.token_hex(12)
    temporary = store.registry.path(name)
    async with store.registry.reserving(name):
        copy = await trio.to_thread.run_sync(_copied, fd, temporary, path)
        # No await from here on: nothing may be written to the old file any more.
        if file.fd >= 0 and file.path == path and file.changes == changes:
            try:
                os.rename(temporary, path)
            except OSError:
                _drop(copy, temporary)
                raise
            file.replace(copy)
        else:
            log.info("%s changed while it was written again", path)
            _drop(copy, temporary)


def _copied(fd: int, temporary: str, path: str) -> int:
    """Copy the file, and see to it that the copy can be renamed to `path`. Runs in a thread."""
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    return copied(fd, temporary)


def _drop(copy: int, temporary: str) -> None:
    os.close(copy)
    os.unlink(temporary)
