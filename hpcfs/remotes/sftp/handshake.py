"""The first messages on an SFTP channel, whatever carries it: versions, extensions and limits."""

from __future__ import annotations

import logging

import asyncssh
from asyncssh.sftp import SFTPLimits

from hpcfs.model.errors import NoService
from hpcfs.remotes.sftp.requests import Requests
from hpcfs.remotes.ssh.translate import quoted

log = logging.getLogger(__name__)

MAX_PIECE_BYTES = 261_120
"""What OpenSSH takes in one read or write; more per request gains nothing measurable."""
SAFE_PIECE_BYTES = 32 * 1024
"""The limit that the protocol promises, for servers that tell none."""


async def shake_hands(requests: Requests, shown: str) -> None:
    """Begin SFTP on a channel. Raises NoService for what is no SFTP, and asyncssh's errors."""
    try:
        await requests.start()
    except asyncssh.SFTPBadMessage as error:
        said, _, _ = requests.beginning.partition(b"\0")  # what is after it is no text
        raise NoService(
            f"{shown} sends something else before SFTP's first message "
            f"({quoted(said) or error.reason}): look for commands in ~/.bashrc "
            "there that print text, or ask the site whether this account may use SFTP"
        ) from error
    requests.limits = SFTPLimits(0, SAFE_PIECE_BYTES, SAFE_PIECE_BYTES, 0)
    try:
        await requests.request_limits()
    except asyncssh.SFTPOpUnsupported:
        log.debug("%s announces limits and does not tell them", shown)
    limits = requests.limits
    limits.max_read_len = _piece(limits.max_read_len)
    limits.max_write_len = _piece(limits.max_write_len)


def _piece(told: int) -> int:
    """Return a usable limit: a server that tells of less than the protocol promises would have a
    megabyte asked for in a million requests."""
    return max(SAFE_PIECE_BYTES, min(told, MAX_PIECE_BYTES))
