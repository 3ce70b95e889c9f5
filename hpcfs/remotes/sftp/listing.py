"""Listing a directory page by page, trusting nothing in it.

Replies hold about a hundred names, so several requests are on their way at once, few at first: most
directories are small, and all of theirs come in one flight. At 20 ms a directory of 100,000 entries
is 1.3 s instead of 20. Names that the kernel can't show and names given
twice are dropped and counted. The names already seen are the only thing that grows with the
directory (some 100 bytes each, gone with the listing): a duplicate may come at any distance when
the directory changes meanwhile, and a lossy filter would hide files.
"""

from __future__ import annotations

import asyncio
import logging
import stat
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import asyncssh

from hpcfs.model import paths
from hpcfs.model.entries import LIST_MAX_ENTRIES, LIST_PAGE_ENTRIES, Entry
from hpcfs.model.errors import NotFound, RemoteError, TooLarge
from hpcfs.remotes.base import is_valid_name
from hpcfs.remotes.sftp.attrs import AnyAttrs, listed_entry, tells_type
from hpcfs.remotes.sftp.name_reply import Listed
from hpcfs.remotes.sftp.path import SftpPath, below
from hpcfs.remotes.sftp.session import all_of, give_up
from hpcfs.remotes.sftp.translate import translated

log = logging.getLogger(__name__)

FIRST_REQUESTS = 3
REQUESTS_AHEAD = 16
STATS_AT_ONCE = 64


async def pages(place: SftpPath, handle: bytes) -> AsyncGenerator[list[Entry], None]:
    """The entries of the open directory `handle`, which the caller closes."""
    seen: set[bytes] = set()
    page: list[Entry] = []
    dropped = impossible = 0
    async with aclosing(_replies(place, handle)) as replies:
        async for names in replies:
            usable, refused = _usable(names, seen)
            dropped += refused
            if len(seen) + dropped > LIST_MAX_ENTRIES:
                raise TooLarge(f"{place} lists more than {LIST_MAX_ENTRIES:,} names")
            for found, attrs in await _with_attributes(place, usable):
                entry, sensible = listed_entry(found, attrs, place.session.owners)
                impossible += not sensible
                page.append(entry)
                if len(page) == LIST_PAGE_ENTRIES:
                    yield page
                    page = []
    if page:
        yield page
    if dropped:
        log.warning("%s lists %d names that are repeated or can't be shown", place, dropped)
    if impossible:
        log.warning("%s lists %d files with impossible sizes, shown as 0", place, impossible)


def _usable(names: list[Listed], seen: set[bytes]) -> tuple[list[Listed], int]:
    """The names that can be shown and are new, which are noted as seen, and how many are not."""
    usable = []
    refused = 0
    for name in names:
        filename, _ = name
        if filename in (b".", b".."):
            continue
        if not is_valid_name(filename) or filename in seen:
            refused += 1
            continue
        seen.add(filename)
        usable.append(name)
    return usable, refused


async def _replies(place: SftpPath, handle: bytes) -> AsyncGenerator[list[Listed], None]:
    """Yield the replies to READDIR in order, until the end; an empty reply ends the listing too."""
    meta = place.session.meta
    ahead: deque[asyncio.Task[Any]] = deque()
    flight = 0
    try:
        while True:
            if len(ahead) <= flight // 2:
                flight = min(max(FIRST_REQUESTS, 2 * flight), REQUESTS_AHEAD)
                missing = range(flight - len(ahead))
                ahead.extend(asyncio.ensure_future(meta.names(handle)) for _ in missing)
            with translated(place.full, place.session.shown):
                try:
                    names = await ahead.popleft()
                except asyncssh.SFTPEOFError:
                    return
            if not names:
                return
            yield names
    finally:
        await give_up(ahead)


async def _with_attributes(place: SftpPath, names: list[Listed]) -> list[Listed]:
    """Names with their attributes. Entries of which the server tells too little are looked at."""
    known = list(names)
    bare = [number for number, (_, attrs) in enumerate(known) if not _is_enough(attrs)]
    for start in range(0, len(bare), STATS_AT_ONCE):
        some = bare[start : start + STATS_AT_ONCE]
        looks = [asyncio.ensure_future(_look(place, *known[number])) for number in some]
        for number, attrs in zip(some, await all_of(looks), strict=True):
            known[number] = (known[number][0], attrs)
    return known


def _is_enough(attrs: AnyAttrs) -> bool:
    is_regular = tells_type(attrs) and stat.S_ISREG(attrs.permissions or 0)
    return tells_type(attrs) and (attrs.size is not None or not is_regular)


async def _look(place: SftpPath, name: bytes, listed: AnyAttrs) -> AnyAttrs:
    full, path = below(place.full, name), paths.join(place.path, name)
    try:
        return await SftpPath(place.session, path, full).attrs()
    except NotFound:
        return listed
    except RemoteError as error:
        if place.session.lost:
            raise
        log.debug("%s", error.message)
        return listed
