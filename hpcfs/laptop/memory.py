"""Limits the memory that all mounts together occupy: waiting requests, and untaken answers.

One mount alone may have as much in flight as a long line carries. Where all together hold much,
each gets a small share: no mount is blocked by answers that another one does not take.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_REQUEST_BYTES = 256 * 1024 * 1024
MOST_ANSWER_BYTES = 64 * 1024 * 1024
LITTLE_BYTES = 256 * 1024
"""Bytes of a channel that are always granted."""
MAX_CHANNEL_REQUEST_BYTES = 64 * 1024 * 1024
"""Four times what a mount has in flight (sftp/session.py)."""


@dataclass
class ServerMemory:
    """Bytes that all channels hold."""

    requests: int = 0
    answers: int = 0


class ChannelMemory:
    """Bytes that one channel holds. The channel reports them, and learns whether they are too
    many."""

    def __init__(self, memory: ServerMemory, most_answers: int) -> None:
        self._memory = memory
        self._most_answers = most_answers
        self._requests = 0
        self._answers = 0

    def requests(self, count: int) -> bool:
        """Report `count` bytes of waiting requests; return whether that many are allowed."""
        self._memory.requests += count - self._requests
        self._requests = count
        return count <= LITTLE_BYTES or (
            count <= MAX_CHANNEL_REQUEST_BYTES and self._memory.requests <= MOST_REQUEST_BYTES
        )

    def answers(self, count: int, *, resuming: bool = False) -> bool:
        """Report `count` bytes of untaken answers; return whether the next request may start. A
        channel that was told no asks with `resuming`: then the limit is half."""
        self._memory.answers += count - self._answers
        self._answers = count
        most = self._most_answers // 2 if resuming else self._most_answers
        return count <= min(LITTLE_BYTES, most) or (
            count <= most and self._memory.answers <= MOST_ANSWER_BYTES
        )

    def close(self) -> None:
        """Report that the channel holds nothing any more."""
        self.requests(0)
        self.answers(0)
