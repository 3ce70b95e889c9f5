"""How long to wait before a lost tunnel is tried again. Pure policy.

Where no connection comes about, the next attempt disturbs nobody, so it comes soon. A login node
that answers and refuses is asked less and less often. Errors that only the user can mend are never
retried (`RemoteError.lasting`).
"""

from __future__ import annotations

from hpcfs.model.backoff import ENDED, pause_after
from hpcfs.model.errors import LoginEnded, RemoteError

SOON_SECONDS = (1.0, 1.0, 2.0)
"""Seconds before the first attempts; the last one repeats."""


class Pauses:
    """Counts the failures since the last success."""

    def __init__(self) -> None:
        self._unreached = 0
        self._refused = 0

    def after(self, error: RemoteError) -> float:
        """Return the seconds until the next attempt, after this error."""
        if is_unreached(error):
            pause = SOON_SECONDS[min(self._unreached, len(SOON_SECONDS) - 1)]
            self._unreached += 1
            self._refused = 0
            return pause
        self._refused += 1
        if isinstance(error, LoginEnded) and self._refused > 1:
            return pause_after(self._refused - 1, ENDED)
        return pause_after(self._refused)

    def reset(self) -> None:
        """Start over: the tunnel is up, or the network has changed."""
        self._unreached = self._refused = 0


def is_unreached(error: RemoteError) -> bool:
    """Return whether the host did not even answer: then the error was caused by an OSError."""
    origin = error.__cause__ or error.__context__
    return isinstance(origin, OSError) and not isinstance(error, LoginEnded)
