"""Makes the contents of one mount, which share a cache, a nursery, a clock and a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from hpcfs.cache.file import CacheFile
from hpcfs.cache.store import Store
from hpcfs.content.content import Content
from hpcfs.content.fetcher import Budget
from hpcfs.content.reader import Place
from hpcfs.model.capabilities import Capabilities
from hpcfs.site.namespace import Namespace


@dataclass(frozen=True)
class ContentFactory:
    """Makes contents; `now` is the inode tree's clock, in seconds."""

    store: Store
    nursery: trio.Nursery
    now: Callable[[], float]
    budget: Budget = field(default_factory=Budget)

    def make(
        self, place: Place, namespace: Namespace, capabilities: Capabilities, file: CacheFile
    ) -> Content:
        """Return a new content on this cache file, which must be in use by the caller."""
        return Content(
            place,
            namespace,
            capabilities,
            self.store,
            file,
            self.nursery,
            self.budget,
            self.now,
        )
