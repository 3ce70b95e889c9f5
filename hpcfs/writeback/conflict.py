"""Others changed a file since it was opened here: neither version is lost.

The remote's file stays as others wrote it. What was written here becomes a file of its own beside
it, with a name that says so; where that can't be (parts of the old version are gone, the remote
refuses), it is kept in the cache directory.
"""

from __future__ import annotations

import stat
import time

from hpcfs.content.content import Content
from hpcfs.content.upload import UPLOAD_TIMEOUT
from hpcfs.model import paths
from hpcfs.model.entries import Attributes, Entry
from hpcfs.model.errors import CacheFileGone, FilesystemError, RemoteError, Unreachable
from hpcfs.model.uploads import UploadRequest
from hpcfs.writeback.uploader import Uploader

MAX_NAME_BYTES = 255
MARK = b".hpcfs-conflict-"


def path_beside(path: bytes, now: float) -> bytes:
    """Return PATH.hpcfs-conflict-DATE-TIME, in UTC; the name is cut to 255 bytes."""
    suffix = MARK + time.strftime("%Y%m%d-%H%M%S", time.gmtime(now)).encode()
    return paths.beside(path, paths.name(path)[: MAX_NAME_BYTES - len(suffix)] + suffix)


async def set_aside(content: Content, uploader: Uploader, reason: str) -> str:
    """Save the local version beside the remote's, or strand it; return the sentence for the user.

    Raises Unreachable where the remote can't be asked now, CacheFileGone where the cache file lost
    its name, and OSError or sqlite3.Error when the cache's disk fails; the version is then where it
    was.
    """
    path = content.place.path
    shown = path.decode(errors="replace")
    beside = path_beside(path, time.time())
    try:
        await content.upload.fetch_whole()
        await _send(content, beside)
    except (CacheFileGone, Unreachable):
        raise
    except (RemoteError, FilesystemError) as error:
        await uploader.strand(content, f"{reason}; it can't be saved beside it: {error.message}")
        return f"{shown} was changed by others: what was written here is kept, see 'hpcfs status'"
    await uploader.forget(content)
    name = paths.name(beside).decode(errors="replace")
    return f"{shown} was changed by others: what was written here is beside it as {name}"


async def _send(content: Content, path: bytes) -> Entry:
    """Upload the whole file as it is here, as a new one of this name."""
    entry = content.place.entry
    attributes = Attributes(
        mode=content.state.attributes.mode,
        atime_ns=entry.atime_ns,
        mtime_ns=entry.mtime_ns,
        xattrs=dict(entry.xattrs) or None,
    )
    request = UploadRequest(
        path,
        content.size,
        0,
        [(0, content.size)] if content.size else [],
        attributes,
        stat.S_IMODE(entry.mode),
        base_version=b"",
    )
    with content.upload.pinned():
        return await content.namespace.upload(
            request, content.file.path, UPLOAD_TIMEOUT, lambda done: None
        )
