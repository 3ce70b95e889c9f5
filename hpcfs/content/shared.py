"""What the contents of one mount share, and what each is told of its remote file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from hpcfs.cache.store import Store
from hpcfs.content.fetcher import Budget
from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import Entry
from hpcfs.site.namespace import Namespace
from hpcfs.site.tasks import Tasks


@dataclass(frozen=True)
class Shared:
    """The cache, the nursery for what runs beside programs, the inode tree's clock in seconds, and
    the bytes that may be under way ahead of readers."""

    store: Store
    nursery: Tasks
    now: Callable[[], float]
    budget: Budget = field(default_factory=Budget)


class Place(Protocol):
    """Where the file is in the tree (inodes.tree.Node): its path may change while it is open.

    `validated_at` is when the remote was last asked for the entry, by the tree's clock.
    """

    ino: int
    entry: Entry
    validated_at: float

    @property
    def path(self) -> bytes:
        """Relative to the namespace's root."""
        ...


@dataclass
class RemoteFile:
    """A file of a namespace, and what its remote can do."""

    place: Place
    namespace: Namespace
    capabilities: Capabilities
