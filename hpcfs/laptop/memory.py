"""What all mounts together make this process hold: requests that wait, and answers not yet taken.

One mount alone may have as much under way as a long line takes. Where all of them come to much,
each gets on with little: nobody stands still for what another one does not take.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_REQUEST_BYTES = 256 * 1024 * 1024
MOST_ANSWER_BYTES = 64 * 1024 * 1024
LITTLE_BYTES = 256 * 1024
"""Of a channel: always granted."""
MAX_CHANNEL_REQUEST_BYTES = 64 * 1024 * 1024
"""Four times what a mount has under way (sftp/session.py)."""


@dataclass
class Memory:
    """Of all channels, in bytes."""

    requests: int = 0
    answers: int = 0


class Held:
    """Of one channel, which says how many bytes it holds now and hears whether that is too much."""

    def __init__(self, memory: Memory, most_answers: int) -> None:
        self._memory = memory
        self._most_answers = most_answers
        self._requests = 0
        self._answers = 0

    def requests(self, count: int) -> bool:
        """Whether that many may wait."""
        self._memory.requests += count - self._requests
        self._requests = count
        return count <= LITTLE_BYTES or (
            count <= MAX_CHANNEL_REQUEST_BYTES and self._memory.requests <= MOST_REQUEST_BYTES
        )

    def answers(self, count: int, *, resuming: bool = False) -> bool:
        """Whether the next request may be begun with so many bytes of answers on their way. Who was
        told no waits for half."""
        self._memory.answers += count - self._answers
        self._answers = count
        most = self._most_answers // 2 if resuming else self._most_answers
        return count <= min(LITTLE_BYTES, most) or (
            count <= most and self._memory.answers <= MOST_ANSWER_BYTES
        )

    def close(self) -> None:
        self.requests(0)
        self.answers(0)
