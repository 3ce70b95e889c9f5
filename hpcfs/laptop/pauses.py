"""How long to wait before a lost tunnel is tried again. Pure policy.

Where no connection comes about, nobody is bothered by the next attempt: soon. A login node that
answers and refuses is asked less and less often. What only the user can mend is never tried again
(`RemoteError.lasting`).
"""

from __future__ import annotations

from hpcfs.model.errors import RemoteError

SOON_SECONDS = (1.0, 1.0, 2.0)
"""The last one again and again."""
LONGEST_SECONDS = 30.0


class Pauses:
    def __init__(self) -> None:
        self._unreached = 0
        self._refused = 0

    def after(self, error: RemoteError) -> float:
        """Seconds until the next attempt."""
        if is_unreached(error):
            pause = SOON_SECONDS[min(self._unreached, len(SOON_SECONDS) - 1)]
            self._unreached += 1
            self._refused = 0
            return pause
        self._refused += 1
        return min(2.0 ** (self._refused - 1), LONGEST_SECONDS)

    def reset(self) -> None:
        """The tunnel stands, or the network has changed."""
        self._unreached = self._refused = 0


def is_unreached(error: RemoteError) -> bool:
    """Whether the host did not even answer. The login tells by what its error came from."""
    origin = error.__cause__ or error.__context__
    return isinstance(origin, OSError)
