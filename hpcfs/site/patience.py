"""How long a namespace may be without an answer before its calls fail: pure, no I/O, no awaits.

    ANSWERING ──a call fails for want of a connection──> FAILING ──`seconds` without──> AWAY
        ^  └──a call waits, `seconds` without an answer────────────────────────────────> |
        └───────────────────────────any answer <─────────────┴───────────────────────────┘

An outage shorter than the patience is a pause: calls wait, and go on. A longer one is an error at
once, to those who wait and to all who ask from then on, until the namespace answers again. Silence
counts from the last answer while somebody waits for one; while nobody does, none is missed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from enum import Enum, auto

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 1.0
"""Seconds between looks for the namespace, at most, while somebody waits for it. The site has
pauses of its own between logins, which are longer (model/backoff.py)."""
LONGEST_AWAY_PAUSE = 5.0
"""The same while it is away."""
LOOKING_SECONDS = 3600.0
"""A namespace that nobody asked for so long is not looked for any more: the next call waits."""


class Reachability(Enum):
    """Whether a namespace answers."""

    ANSWERING = auto()
    FAILING = auto()
    AWAY = auto()


class Patience:
    """The patience with one namespace. `now` is a clock in seconds, `draw` a number in [0, 1)."""

    def __init__(
        self,
        seconds: float,
        now: Callable[[], float],
        draw: Callable[[], float] = random.random,  # no secret
    ) -> None:
        self.seconds = seconds
        self.state = Reachability.ANSWERING
        self.reason = ""
        """Why it does not answer, as far as is known."""
        self._now = now
        self._draw = draw
        self._waiting = 0
        self._silent_since = math.inf
        self._looks = 0
        self._heard_at = -math.inf
        self._wanted_at = -math.inf

    # --- what happens -----------------------------------------------------------------------------

    def asked(self) -> float:
        """A call waits for an answer from now on; `left` follows. Returns the time."""
        self._wanted_at = self._now()
        if not self._waiting and self.state is Reachability.ANSWERING:
            self._silent_since = self._wanted_at
        self._waiting += 1
        return self._wanted_at

    def left(self) -> None:
        """A call does not wait any more, whatever became of it."""
        self._waiting -= 1

    def heard(self) -> None:
        """The namespace answered something, or a user is being asked for it."""
        self._silent_since = self._heard_at = self._now()
        if self.state is not Reachability.ANSWERING:
            self.state = Reachability.ANSWERING
            self.reason = ""
            self._looks = 0

    def failed(self, reason: str) -> None:
        """A call failed for want of a connection. A namespace that never answered is away: there
        was nothing that could go on."""
        self.reason = reason
        if self.state is not Reachability.ANSWERING:
            return
        self.state = Reachability.FAILING
        self._silent_since = min(self._silent_since, self._now())
        if self._heard_at == -math.inf:
            self.state = Reachability.AWAY

    def give_up(self, reason: str) -> None:
        """The namespace is known to be away, for no one knows how long."""
        self.reason = reason
        self.state = Reachability.AWAY
        self._silent_since = min(self._silent_since, self._now())

    # --- what follows -----------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        """When the patience ends if nothing is heard until then."""
        return self._silent_since + self.seconds

    def is_silent_since(self, began: float) -> bool:
        """Whether nothing was heard since then."""
        return self._silent_since <= began

    def was_heard_since(self, began: float) -> bool:
        """Whether the namespace answered anything since then."""
        return self._heard_at > began

    def has_ended(self) -> bool:
        """Whether the patience ended: it is away from now on. For who waits, or looks for it."""
        is_missed = self._waiting > 0 or self.state is Reachability.FAILING
        if self.state is not Reachability.AWAY and is_missed and self._now() >= self.deadline:
            self.reason = self.reason or f"no answer within {self.seconds:g} s"
            self.state = Reachability.AWAY
        return self.state is Reachability.AWAY

    def wanted(self) -> None:
        """Somebody asked for the namespace, whatever they are told."""
        self._wanted_at = self._now()

    def next_look(self) -> float | None:
        """Return how many seconds to pause before the next look for it; None if there is to be no
        more, as nobody asks for it. Each pause is twice as long as the one before, and a part of
        it is drawn, so that not all mounts of a building ask in the same moment."""
        now = self._now()
        if self.state is Reachability.AWAY and now - self._wanted_at > LOOKING_SECONDS:
            self.state = Reachability.ANSWERING  # as far as anybody knows
            self._silent_since = now
            self._looks = 0
            return None
        longest = LONGEST_AWAY_PAUSE if self.state is Reachability.AWAY else LONGEST_PAUSE
        pause = min(FIRST_PAUSE * 2.0 ** min(self._looks, 10), longest)
        self._looks += 1
        return pause * (1 + self._draw()) / 2
