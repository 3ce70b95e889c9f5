"""Decides when what waits in the journal is uploaded. Pure: no I/O, no clock, no awaits.

A file that changed rests first: programs write, set modes and times, and rename within moments,
and one upload should bring all of it. Then many go at once, those that wait longest first. What
failed for want of a connection is tried again, less and less often; what the remote refused waits
for the user (`hpcfs retry`), or for the next change of that file.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from hpcfs.model.backoff import pause_after

QUIET_SECONDS = 0.25
"""rsync, tar, git and editors are through with a file within some milliseconds."""
MOST_AT_ONCE = 48
"""Small files take two round trips each: at 20 ms and more the link is idle with fewer, and the
transfer process bounds the bytes under way."""

ItemState = Literal["waiting", "uploading", "failed"]
K = TypeVar("K", bound=Hashable)


@dataclass(eq=False, slots=True)
class Item:
    """A file that waits for its upload, is being uploaded, or was refused.

    `due` is when its upload may begin, in the caller's seconds; `attempts` counts those that
    failed since it was changed; `reason` is the last one's.
    """

    due: float
    state: ItemState = "waiting"
    attempts: int = 0
    reason: str = ""
    changed: bool = False
    """Since its upload began."""


class Schedule(Generic[K]):
    """Decides which files are uploaded when.

    Keys stand for files; times are any clock's seconds.
    """

    def __init__(self, most_at_once: int = MOST_AT_ONCE) -> None:
        self._most = most_at_once
        self._items: dict[K, Item] = {}
        """In the order in which they came."""
        self._uploading = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[K]:
        return iter(list(self._items))

    def __contains__(self, key: K) -> bool:
        return key in self._items

    def item(self, key: K) -> Item | None:
        """Return what is known of a file, None if it need not be uploaded."""
        return self._items.get(key)

    # --- what happens to files ------------------------------------------------------------------

    def changed(self, key: K, now: float) -> None:
        """Schedule a file that was closed, renamed, or given other attributes."""
        item = self._items.get(key)
        if item is None:
            self._items[key] = Item(now + QUIET_SECONDS)
        elif item.state == "uploading":
            item.changed = True
        else:
            item.state, item.attempts, item.reason = "waiting", 0, ""
            item.due = now + QUIET_SECONDS

    def refused(self, key: K, reason: str) -> None:
        """Take up a file that the remote refused in an earlier mount: it waits for the user."""
        self._items[key] = Item(math.inf, "failed", reason=reason)

    def hurry(self, key: K, now: float) -> None:
        """Make a file due now: somebody waits for it, or asks for another attempt."""
        item = self._items.get(key)
        if item is not None and item.state != "uploading":
            item.state, item.due = "waiting", min(item.due, now)

    def gone(self, key: K) -> None:
        """Drop a file. An upload under way ends by itself."""
        item = self._items.pop(key, None)
        if item is not None and item.state == "uploading":
            self._uploading -= 1

    # --- uploads --------------------------------------------------------------------------------

    def take(self, now: float) -> list[K]:
        """Return the files whose upload begins now; `ended` or `failed` follows for each."""
        room = self._most - self._uploading
        if room <= 0:
            return []
        ready = [
            (item.due, key)
            for key, item in self._items.items()
            if item.state == "waiting" and item.due <= now
        ]
        ready.sort(key=lambda pair: pair[0])
        taken = [key for _, key in ready[:room]]
        for key in taken:
            item = self._items[key]
            item.state, item.changed = "uploading", False
        self._uploading += len(taken)
        return taken

    def next_due(self) -> float:
        """Return when `take` may have something again if nothing happens; infinity for never."""
        if self._uploading >= self._most:
            return math.inf
        return min((i.due for i in self._items.values() if i.state == "waiting"), default=math.inf)

    def ended(self, key: K, now: float) -> None:
        """Note that the remote has what was there when the upload began."""
        item = self._items.get(key)
        if item is None or item.state != "uploading":
            return
        self._uploading -= 1
        if item.changed:
            item.state, item.attempts, item.due = "waiting", 0, now + QUIET_SECONDS
        else:
            del self._items[key]

    def failed(self, key: K, now: float, reason: str, *, again: bool) -> None:
        """Note a failed upload.

        `again`: there was no connection, so another attempt follows by itself.
        """
        item = self._items.get(key)
        if item is None or item.state != "uploading":
            return
        self._uploading -= 1
        item.attempts += 1
        item.reason = reason
        if again or item.changed:
            item.state, item.due = "waiting", now + pause_after(item.attempts)
        else:
            item.state, item.due = "failed", math.inf
