"""Waiting as a server asks for it: a rate limit is no outage.

S3 answers 503 SlowDown, others 429, to what comes too fast; the request was not carried out, and is
made again. A request that is refused makes all others of the site wait, for twice as long each time
until somebody gets through: so what nobody limited comes a little later, and does not fail, and a
server that refuses some only is not waited for by all. Beside that a request that was refused waits
for a time of its own, which doubles, too, and of which a part is drawn at random, as Amazon's SDKs
do (aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter). What the server
failed to do (500 and the like) is asked for again, too, a few times. Connections that fail are not:
the mount knows for how long, and which requests may be made again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import TypeVar

from botocore.exceptions import ClientError

from hpcfs.remotes import life
from hpcfs.remotes.rate import RateLimit
from hpcfs.remotes.s3.translate import is_passing_fault, is_rate_limit, is_throttling

T = TypeVar("T")
SHORTEST = 0.1
LONGEST = 4.0
LONGEST_ASKED = 10.0
"""The longest pause that a server may ask for (Retry-After)."""
PATIENCE = 120.0
"""Of one request with a server that says that it is asked too often; each such answer is reported
as a sign of life."""
UNAVAILABLE_SECONDS = 20.0
"""The same, where it may as well be down. Less than what the mount waits for an answer."""
FAULTS = 2
"""Answers to one request that say that the server failed, after which it is asked again."""


class Pacing:
    """The pace of one site: at most `per_second` requests, or any number for 0. All times are in
    seconds; `clock` never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, per_second: int = 0) -> None:
        self._clock = clock
        self._meter = RateLimit(per_second, clock)
        self._pause = 0.0
        self._until = 0.0
        self._asked_until = 0.0
        self._raised = 0.0

    async def asked(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Return what `ask` returns, once the server does not want it later, nor fails in passing.
        Raises its refusal when that has gone on for too long."""
        began_asking = self._clock()
        deadline, most, faults = began_asking + UNAVAILABLE_SECONDS, 0.0, 0
        while True:
            await self._turn(deadline, random.uniform(0, most))  # noqa: S311 - no secret
            await self._meter.take(1)
            began = self._clock()
            try:
                answer = await ask()
            except ClientError as error:
                if is_throttling(error):
                    if is_rate_limit(error):
                        deadline = began_asking + PATIENCE
                        life.report()
                    self._refused(began, retry_after(error))
                    if max(self._paused_until, self._clock()) >= deadline:
                        raise
                else:
                    self._accepted()
                    faults += 1
                    if faults > FAULTS or not is_passing_fault(error):
                        raise
                most = _longer(most)
            else:
                self._accepted()
                return answer

    async def _turn(self, deadline: float, own: float) -> None:
        """Wait for the pause to end, which may be made longer meanwhile."""
        until = self._clock() + own
        while self._clock() < deadline:
            left = min(max(until, self._paused_until), deadline) - self._clock()
            if left <= 0:
                return
            await asyncio.sleep(left)

    def _refused(self, began: float, asked: float) -> None:
        """Slow down: one step for all that were under way together."""
        now = self._clock()
        if began >= self._raised:
            self._pause = _longer(self._pause)
            self._raised = now
            self._until = max(self._until, now + self._pause / 2)
        self._asked_until = max(self._asked_until, now + min(asked, LONGEST_ASKED))

    def _accepted(self) -> None:
        """Somebody got through: only those that are refused wait now, and who the server asked."""
        self._pause = self._until = 0.0

    @property
    def _paused_until(self) -> float:
        return max(self._until, self._asked_until)


def _longer(pause: float) -> float:
    return min(max(SHORTEST, pause * 2), LONGEST)


def retry_after(error: ClientError, now: Callable[[], float] = time.time) -> float:
    """Return for how many seconds the server wants nobody to ask (RFC 9110, 10.2.3); 0 where it
    does not say."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    text = str(headers.get("retry-after", "")).strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now()) if text else 0.0
    except ValueError:
        return 0.0
