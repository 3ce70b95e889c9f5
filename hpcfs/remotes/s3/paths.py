"""Resolves a path to its key, and finds what is there: every operation goes this way.

Plain names cost no request. A shown name that stands for a component by its hash is looked up in
the listing of its directory, and remembered.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from hpcfs.model import paths
from hpcfs.model.errors import (
    AlreadyExists,
    DirectoryNotEmpty,
    InvalidName,
    IsADirectory,
    NotADirectory,
    NotFound,
)
from hpcfs.remotes.s3.bucket import Bucket
from hpcfs.remotes.s3.caches import ExpiringCache
from hpcfs.remotes.s3.listing import is_marker
from hpcfs.remotes.s3.names import checked_key, decoded, is_plain, parse, search_prefix, stands_for
from hpcfs.remotes.s3.objects import Info, Page

LOOKED_AT = 3
"""Both kinds of marker and one thing more tell whether a directory is there and empty."""
SEEN_SECONDS = 1.0
"""As long as the mount believes attributes without asking."""
ESCAPES_SECONDS = 3600.0
ESCAPES = 10_000


@dataclass(frozen=True)
class S3Path:
    """A path with its place in the bucket.

    `parent` and `directory` are prefixes that end in "/"; `key` is the object's, "" where there
    can't be one (the root). `beside` places are objects only, even if there is a directory.
    """

    path: bytes
    parent: str
    key: str
    directory: str
    beside: bool = False
    escaped: bool = False

    @property
    def is_root(self) -> bool:
        """Whether it is the namespace's root."""
        return not self.path


@dataclass(frozen=True)
class S3Lookup:
    """The outcome of a look at a place. `markers` is complete only where there are no `children`;
    an old one, without a slash, comes last."""

    place: S3Path
    object: Info | None
    children: bool
    markers: list[str]

    @property
    def old_marker(self) -> str | None:
        """The marker as s3fs wrote it once (see objects.Info.is_directory)."""
        return self.place.key if self.place.key and self.place.key in self.markers else None

    @property
    def is_directory(self) -> bool:
        """Whether a directory is there."""
        if self.place.beside:
            return False
        return self.place.is_root or self.children or bool(self.markers)

    @property
    def file(self) -> Info | None:
        """The object that this path shows."""
        if self.place.beside:
            return self.object if self.children or self.markers else None
        return None if self.is_directory else self.object

    @property
    def exists(self) -> bool:
        """Whether anything is there."""
        return self.is_directory or self.file is not None


class PathResolver:
    """`base` is the root's prefix with its "/", or ""."""

    def __init__(self, bucket: Bucket, base: str, *, read_only: bool) -> None:
        self._bucket = bucket
        self._base = base
        self._read_only = read_only
        self._escapes: ExpiringCache[str] = ExpiringCache(ESCAPES_SECONDS, ESCAPES)
        self._seen: ExpiringCache[S3Lookup] = ExpiringCache(SEEN_SECONDS, ESCAPES)
        self._changes = 0

    async def place(self, path: bytes) -> S3Path:
        """Return the place of a path. Raises NotFound where a shown name stands for nothing."""
        parent, key, beside, escaped = self._base, "", False, False
        directory = self._base
        for name in paths.names(path):
            if beside:
                raise NotFound(f"{text(path)}: there is no such directory")
            parent = directory
            component, beside = await self._component(parent, name)
            escaped = not is_plain(name)
            key = parent + component
            directory = key + "/"
        return S3Path(path, parent, checked_key(key), directory, beside, escaped)

    async def new_place(self, path: bytes) -> S3Path:
        """Return the place of a path that may not be there yet: reserved names are refused with the
        reason.

        Raises InvalidName.
        """
        name = paths.name(path)
        decoded(name)
        try:
            place = await self.place(path)
        except NotFound:
            if is_plain(name):
                raise
            parse(name)
            raise InvalidName(f"{text(name)!r} is reserved: choose another name") from None
        if place.escaped and not (await self.look(place)).exists:
            raise InvalidName(f"{text(name)!r} is reserved: choose another name")
        return place

    async def _component(self, parent: str, name: bytes) -> tuple[str, bool]:
        decoded(name)
        try:
            found = parse(name)
        except InvalidName:
            raise NotFound(f"{text(name)}: there is no such name") from None
        component = found.component
        if component is None:
            component = await self._search(parent, name)
        return component, found.beside

    async def _search(self, parent: str, name: bytes) -> str:
        known = self._escapes.get(parent + name.decode())
        if known is not None:
            return known
        prefix = parent + search_prefix(name)
        async for page in self._bucket.pages(prefix, delimiter="/"):
            for key in (*(found.key for found in page.objects), *page.prefixes):
                component = key[len(parent) :].removesuffix("/")
                if stands_for(name, component):
                    self._escapes.put(parent + name.decode(), component)
                    return component
        raise NotFound(f"{text(name)}: there is no such name")

    async def recall(self, place: S3Path, seconds: float = SEEN_SECONDS) -> S3Lookup:
        """Return what a look found at most `seconds` ago, or look again: a program that writes a
        file makes several requests in a row, and each would ask the same."""
        return self._seen.get(text(place.path), seconds) or await self.look(place)

    def saw_file(self, place: S3Path, info: Info) -> None:
        """The object was written here."""
        self.changed(place)
        if not place.beside and info.etag:
            self._seen.put(text(place.path), S3Lookup(place, info, False, []))

    def changed(self, place: S3Path) -> None:
        """Note that this path was changed here: looks under way don't count."""
        self._changes += 1
        self._seen.drop(text(place.path))

    def forget(self) -> None:
        """Forget what was seen: others may have changed anything."""
        self._changes += 1
        self._seen.clear()

    async def look(self, place: S3Path) -> S3Lookup:
        """Ask the server what is there. Raises RemoteError."""
        changes = self._changes
        look = await self._look(place)
        if changes == self._changes:
            self._seen.put(text(place.path), look)
        return look

    async def _look(self, place: S3Path) -> S3Lookup:
        """Both requests at once: a round trip costs more than a request."""
        found, page = await asyncio.gather(
            self._object(place),
            self._bucket.first(place.directory, LOOKED_AT),
            return_exceptions=True,
        )
        for failure in (page, found):  # a listing's failure says more: answers to HEAD have no body
            if isinstance(failure, BaseException):
                raise failure
        assert isinstance(page, Page)
        assert found is None or isinstance(found, Info)
        markers = [
            item.key
            for item in page.objects
            if is_marker(item.key[len(place.directory) :], item.size)
        ]
        if found is not None and found.size == 0 and found.key == place.parent:
            found = None  # the parent's marker: its name in there would be empty
        children = len(markers) < len(page.objects) + len(page.prefixes)
        if found is not None and found.is_directory:
            markers.append(found.key)
            found = None
        return S3Lookup(place, found, children, markers)

    async def _object(self, place: S3Path) -> Info | None:
        """Return the object at a place: by a listing where that is all that may be known, or where
        the key is an odd one. Some servers answer HEAD of ".." with an error, but none lists what
        it can't hold."""
        if not place.key:
            return None
        if self._read_only or place.escaped:
            page = await self._bucket.first(place.key, 1)
            found = page.objects[0] if page.objects else None
            if found is None or found.key != place.key:
                return None
            if self._read_only:
                return Info(found.key, found.size, found.etag, found.modified_ns)
        return await self._bucket.head(place.key)


def text(path: bytes) -> str:
    """Return a path as text for a message."""
    return path.decode(errors="backslashreplace")


def file_of(look: S3Lookup) -> Info:
    """Return the file that a look found. Raises NotFound."""
    if look.file is None:
        raise NotFound(f"{text(look.place.path)}: there is no such file or directory")
    return look.file


def refuse_existing(look: S3Lookup) -> None:
    """Raise AlreadyExists where something is there."""
    if look.exists:
        raise AlreadyExists(f"{text(look.place.path)} is there already")


def check_replaceable(source: S3Lookup, goal: S3Lookup) -> None:
    """Raise NotADirectory, IsADirectory or DirectoryNotEmpty where rename(2) would refuse."""
    target = text(goal.place.path)
    if source.is_directory and goal.file is not None:
        raise NotADirectory(f"{target} is a file, and a directory can't replace it")
    if source.is_directory and goal.children:
        raise DirectoryNotEmpty(f"{target} is not empty")
    if not source.is_directory and goal.is_directory:
        raise IsADirectory(f"{target} is a directory, and a file can't replace it")
