"""The one error that set-up code raises for the user: the command line prints it and exits 1.

Requests to a remote fail with `RemoteError`s (transfer/messages.py) instead. Anything else that
reaches the command line is a bug and is reported as one.
"""

from __future__ import annotations


class SetupError(Exception):
    """One sentence for the user, without a trailing period, that says what to do next."""
