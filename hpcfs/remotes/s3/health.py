"""Remembers the failures of a site, shared by all its remotes, so that they are not repeated.

Refused credentials are answered at once from then on, until there are others (refusal.py). While
the endpoint does not answer, requests fail at once too, for the pauses of `Backoff`, so that no
reader waits in line for a dead server.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from botocore.exceptions import ClientError

from hpcfs.model.backoff import REACHED, UNREACHED, Backoff
from hpcfs.model.errors import AccessRefused, NotConnected, RemoteError, Unreachable
from hpcfs.remotes.s3.refusal import Refusal
from hpcfs.remotes.s3.translate import CAUGHT, translate


class LastingFailure:
    """An error that only the user can mend, so that asking again is mostly in vain. Once it came
    twice in a row, since one answer may be damaged, it is the answer for the pauses of `Backoff`,
    between which one request looks whether it was mended. Times as in `Backoff`."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._backoff = Backoff(clock, draw)
        self._error: RemoteError | None = None

    def check(self) -> None:
        """Raise the error, unless it is time to look again."""
        if self._error is not None and self._backoff.is_waiting:
            raise type(self._error)(*self._error.args)

    def failed(self, error: RemoteError) -> RemoteError:
        """Remember an error. Returns it."""
        if self._error is not None and not self._backoff.is_waiting:
            self._backoff.failed(REACHED)
        self._error = error
        return error

    def succeeded(self) -> None:
        """Forget the error: the server answered as it should."""
        self._error = None
        self._backoff.succeeded()


class Health:
    """The failures of one site. `clock` is in seconds and never goes back; `draw` as in
    `Backoff`."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._backoff = Backoff(clock, draw)
        self.refusal = Refusal(clock)
        self._down: RemoteError | None = None
        self.under_way = 0
        """Requests that were sent and are not answered."""

    def check(self) -> None:
        """Raise the failure that still counts, without asking the server: as NotConnected, since
        nothing is sent."""
        if self._down is not None and self._backoff.is_waiting:
            raise NotConnected(*self._down.args)

    def try_now(self) -> None:
        """End the pause: the next request asks the server."""
        self._backoff.try_now()

    def forget(self) -> None:
        """Forget all failures: the next request asks the server."""
        self.answered()

    def failed(self, error: RemoteError, *, answered: bool) -> None:
        """Remember an error that concerns the whole site. `answered`: it is in the words of the
        server, which is there then, whatever it says."""
        if isinstance(error, AccessRefused):
            self.refusal.failed(error)
        elif isinstance(error, Unreachable) and not answered:
            if not self._backoff.is_waiting:  # requests that fail together count once
                self._backoff.failed(UNREACHED)
            self._down = error
        elif isinstance(error, Unreachable):  # it has too much to do, and looked at no key
            self._is_there()
        else:
            self.answered()

    def answered(self) -> None:
        """Note that the server answered as one that knows us: it can be reached."""
        self.refusal.forget()
        self._is_there()

    def _is_there(self) -> None:
        self._down = None
        self._backoff.succeeded()

    @contextmanager
    def watching(self, subject: str) -> Iterator[None]:
        """Wrap a request: raise what still counts, else translate and remember what it raises."""
        self.check()
        self.under_way += 1
        try:
            yield
        except CAUGHT as error:
            found = translate(error, subject)
            self.failed(found, answered=isinstance(error, ClientError))
            raise found from error
        finally:
            self.under_way -= 1
        self.answered()
