"""Makes the cache directory anew if it was removed while a mount uses it.

The daemon has the cache files open, so nothing is lost: dirty bytes are written under their old
names again, what is clean is fetched again. Until the directory can be made, what is read goes
through memory.
"""

from __future__ import annotations

import os

from hpcfs.cache.directory import CacheUnusable, copied
from hpcfs.cache.file import CacheFile
from hpcfs.cache.store import Store
from hpcfs.model.errors import SetupError


async def renew_if_removed(store: Store) -> None:
    """Look at the cache directory, and make it anew if it was removed and that is possible.

    Raises OSError.
    """
    if await store.in_thread(store.place.is_there):
        return
    try:
        await store.in_thread(store.place.take_again)
    except (CacheUnusable, SetupError) as error:
        store.troubles.tell(f"the cache directory was removed: {error}")
        return
    store.troubles.tell(f"the cache directory {store.directory} was removed, and is made anew")
    await store.in_thread(store.registry.index.begin_anew, "its directory was removed")
    for file in list(store.registry.files.values()):
        if file.fd < 0 or file.in_memory:
            continue
        if file.dirty or file.pins or not file.indexed:
            await _write_again(store, file)
        else:
            store.memory.to_disk(file)


async def _write_again(store: Store, file: CacheFile) -> None:
    """Give a file under its old name the bytes that its descriptor has."""
    changes = fd = -1
    while file.changes != changes and file.fd >= 0:  # written to meanwhile
        if fd >= 0:
            os.close(fd)
        changes = file.changes
        fd = await store.in_thread(copied, file.fd, file.path)
    if file.fd < 0:
        os.close(fd)
    else:
        file.replace(fd)
