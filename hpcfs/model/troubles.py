"""What went wrong in the daemon itself, as sentences for the user: `hpcfs status` shows the last.

Such a thing has no caller to be told: a database on the local disk was damaged, a task of the
daemon failed.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict

log = logging.getLogger(__name__)

MOST_TOLD = 20
"""Sentences that are remembered."""
AGAIN_SECONDS = 600.0
"""The same sentence comes into the log again after so long only."""


class Troubles:
    """The last sentences, each once. May be called in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: OrderedDict[str, float] = OrderedDict()
        """When each was logged last, by a monotonic clock in seconds."""

    def tell(self, sentence: str) -> None:
        """Log a sentence, unless it was logged a short while ago, and remember it."""
        now = time.monotonic()
        with self._lock:
            is_new = now - self._told.get(sentence, -math.inf) >= AGAIN_SECONDS
            if is_new:
                self._told[sentence] = now
            self._told.move_to_end(sentence)
            while len(self._told) > MOST_TOLD:
                self._told.popitem(last=False)
        if is_new:
            log.error("%s", sentence)

    @property
    def sentences(self) -> list[str]:
        """All that are remembered, the oldest first."""
        with self._lock:
            return list(self._told)
