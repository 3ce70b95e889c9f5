"""When to list a directory because many of its names are asked for. No I/O, no clock."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from hpcfs.directories.listing import Listing
from hpcfs.inodes.tree import ATTRIBUTE_SECONDS, Node

HALF_LIFE = 1.0
"""Seconds in which a use counts half."""
MANY_USES, FEW_USES = 3.5, 1.5
"""Four at once make it worth to list a directory; two, if it was listed a moment ago."""
RECENT_SECONDS = 10.0
ENTRIES_PER_USE = 500
"""A larger directory must be used more before it is listed in the background."""
RENEW_SECONDS = 0.5
"""A listing in use is renewed at this age, so that there is always one to answer from."""
SLOW_SECONDS = ATTRIBUTE_SECONDS
"""A listing that takes longer is too old when it comes."""
PAUSE_SECONDS = 60.0
"""For which a directory that is too large or too slow to list is left alone."""
_MAX_USED = 1000


@dataclass(eq=False, slots=True)
class _Use:
    score: float = 0.0
    last: float = -math.inf
    asked: float = -math.inf
    duration: float = 0.0
    entries: int = 0
    not_before: float = -math.inf
    under_way: bool = False

    def count(self, now: float) -> None:
        self.score = self.score * 2 ** ((self.last - now) / HALF_LIFE) + 1
        self.last = now


class LookupRate:
    """Counts the names that programs ask for in each directory and that nodes could not answer."""

    def __init__(self) -> None:
        self._uses: OrderedDict[Node, _Use] = OrderedDict()

    def note(self, node: Node, now: float) -> bool:
        """Count a name that was asked for in this directory; return whether to list it now."""
        use = self._of(node)
        use.count(now)
        age = now - use.asked
        if use.under_way or now < use.not_before or age < max(RENEW_SECONDS, 2 * use.duration):
            return False
        needed = FEW_USES if age < RECENT_SECONDS else MANY_USES
        return use.score > max(needed, use.entries / ENTRIES_PER_USE)

    def begin(self, node: Node, now: float) -> bool:
        """Note that it is being listed; return whether nobody had listed it for a while."""
        use = self._of(node)
        use.under_way = True
        return now - use.asked > RECENT_SECONDS

    def listed(self, node: Node, listing: Listing, now: float) -> None:
        """Note a listing of the directory, for a program or in the background."""
        use = self._of(node)
        use.under_way = False
        use.asked, use.duration, use.entries = listing.asked, now - listing.asked, listing.count
        if use.duration > SLOW_SECONDS or not listing.is_small:
            use.not_before = now + PAUSE_SECONDS

    def failed(self, node: Node, now: float) -> None:
        """Note that it could not be listed, or not in time."""
        use = self._of(node)
        use.under_way = False
        use.not_before = now + PAUSE_SECONDS

    def _of(self, node: Node) -> _Use:
        use = self._uses.get(node)
        if use is None:
            use = self._uses[node] = _Use()
            if len(self._uses) > _MAX_USED:
                self._uses.popitem(last=False)
        self._uses.move_to_end(node)
        return use
