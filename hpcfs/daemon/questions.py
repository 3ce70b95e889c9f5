"""Questions to the user at the terminal: passwords, second factors, unknown host keys."""

from __future__ import annotations

import threading

from hpcfs.site.client import Ask

DECISION = "(yes/no"
"""In the questions about host keys, ours and those of `ssh`; they name host and fingerprint."""


class Questions:
    """Puts the questions of all sites, one after the other, until the terminal is gone.

    The user's decision about a host key holds for each site that shows the same key of the same
    host, such as a jump host of several.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._decided: dict[str, str] = {}
        self._has_ended = False

    def ask(self, text: str, echo: bool) -> str | None:
        """Return what the user typed, None if nobody can be asked. Called in threads."""
        with self._lock:
            if self._has_ended:
                return None
            if text in self._decided:
                return self._decided[text]
            answer = self._ask(text, echo)
            if answer and echo and _is_decision(text):  # nothing else that is typed is kept
                self._decided[text] = answer
            return answer

    def end(self) -> None:
        """Ask the user nothing from now on; a question under way is still answered."""
        self._has_ended = True


def _is_decision(text: str) -> bool:
    """Whether it is about a host key; a server's own questions begin with "(user@host)"."""
    return DECISION in text and not text.startswith("(")
