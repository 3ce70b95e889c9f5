"""What every kind of remote must do, as far as the kinds agree: the tools of test_contract.py.

A `Subject` is one kind of remote on a real server. `@contract` turns `async def test(remote,
subject)` into a test that runs once per kind, each on an event loop and a connection of its own.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hpcfs.model.entries import NO_HANDLE, Attributes, Entry
from hpcfs.model.uploads import PIECE_BYTES, UploadPieceRequest, UploadRequest
from hpcfs.remotes.base import Remote, Site

T = TypeVar("T")
FILE_MODE = 0o644
READER = 77


@dataclass
class MemorySource:
    """An upload's local bytes."""

    content: bytes

    def __post_init__(self) -> None:
        self.size = len(self.content)
        self.name = ""

    def read(self, offset: int, length: int) -> bytes:
        piece = self.content[offset : offset + length]
        assert len(piece) == length, "a remote read outside the ranges it was given"
        return piece


@dataclass(frozen=True)
class Subject:
    kind: str
    make_site: Callable[[], Site]
    folder: Path | None = None
    """Where the namespace's files are on this machine, where the test may put some there."""

    @property
    def is_sftp(self) -> bool:
        return not self.kind.startswith("s3")

    def run(self, story: Callable[[Remote], Awaitable[T]]) -> T:
        async def main() -> T:
            site = self.make_site()
            try:
                remote = site.remote("ns")
                await remote.connect()
                return await story(remote)
            finally:
                await site.close()

        return asyncio.run(main())


def contract(
    test: Callable[[Remote, Subject], Awaitable[None]],
) -> Callable[[Subject], None]:
    def run(subject: Subject) -> None:
        subject.run(lambda remote: test(remote, subject))

    run.__name__ = test.__name__
    run.__doc__ = inspect.getdoc(test)
    run.__module__ = test.__module__
    return run


async def put(
    remote: Remote,
    path: bytes,
    content: bytes,
    *,
    ranges: Sequence[tuple[int, int]] | None = None,
    base_size: int = 0,
    attributes: Attributes | None = None,
    mode: int = FILE_MODE,
    sync: bool = False,
    progress: list[int] | None = None,
    base_version: bytes | None = None,
    replace: bool = False,
    handle: int = NO_HANDLE,
) -> Entry:
    """Bring `content` to the remote; by default all of it is dirty."""
    dirty = [(0, len(content))] if ranges is None and content else list(ranges or [])
    request = UploadRequest(
        path=path,
        size=len(content),
        base_size=base_size,
        ranges=dirty,
        attributes=attributes or Attributes(),
        mode=mode,
        sync=sync,
        base_version=base_version,
        replace=replace,
        handle=handle,
    )
    seen = [] if progress is None else progress
    return await remote.upload(request, MemorySource(content), seen.append)


async def put_ahead(
    remote: Remote,
    path: bytes,
    content: bytes,
    number: int,
    handle: int,
    *,
    base_version: bytes | None = None,
    mode: int = FILE_MODE,
) -> None:
    """Send the piece `number` of PIECE_BYTES of a file whose content so far is `content`."""
    offset = number * PIECE_BYTES
    request = UploadPieceRequest(path, offset, PIECE_BYTES, mode, handle, base_version)
    await remote.upload_piece(request, MemorySource(content[: offset + PIECE_BYTES]))


async def get(remote: Remote, path: bytes, handle: int = READER) -> bytes:
    """All of the file as it is now."""
    entry = await remote.stat(path)
    try:
        return b"".join(await remote.fetch(path, entry.version, 0, entry.size, handle))
    finally:
        await remote.release(handle)


async def listed(remote: Remote, path: bytes) -> dict[bytes, Entry]:
    entries = [entry async for page in remote.list(path) for entry in page]
    assert len({entry.name for entry in entries}) == len(entries)
    return {entry.name: entry for entry in entries}
