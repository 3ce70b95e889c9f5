"""The first messages on an SFTP channel, whatever carries it: versions, extensions and limits."""

from __future__ import annotations

import logging

import asyncssh
from asyncssh.sftp import SFTPLimits

from hpcfs.model.errors import NoService
from hpcfs.remotes.sftp.requests import SFTP_VERSION, Requests
from hpcfs.remotes.ssh.translate import quoted

log = logging.getLogger(__name__)

MAX_PIECE_BYTES = 261_120
"""What OpenSSH takes in one read or write; more per request gains nothing measurable."""
SAFE_PIECE_BYTES = 32 * 1024
"""The limit that the protocol promises, for servers that tell none."""


async def shake_hands(requests: Requests, shown: str) -> None:
    """Begin SFTP on a channel. Raises NoService where a login script's text comes instead of SFTP,
    and asyncssh's errors."""
    try:
        await requests.start()
    except asyncssh.SFTPBadMessage as error:
        said, _, _ = requests.beginning.partition(b"\0")  # what is after it is no text
        if not _is_text(said):
            raise
        raise NoService(
            f"{shown} sends something else before SFTP's first message "
            f"({quoted(said) or error.reason}): look for commands in ~/.bashrc "
            "there that print text, or ask the site whether this account may use SFTP"
        ) from error
    if requests.version != SFTP_VERSION:  # and all that follows would be read in another way
        raise asyncssh.SFTPBadMessage(f"SFTP of version {requests.version}")
    requests.limits = SFTPLimits(0, SAFE_PIECE_BYTES, SAFE_PIECE_BYTES, 0)
    try:
        await requests.request_limits()
    except asyncssh.SFTPOpUnsupported:
        log.debug("%s announces limits and does not tell them", shown)
    limits = requests.limits
    limits.max_read_len = _piece(limits.max_read_len)
    limits.max_write_len = _piece(limits.max_write_len)


def _is_text(said: bytes) -> bool:
    """Return whether somebody may have written this: no message, which begins with a zero, and no
    noise."""
    spaces = b"\t\r\n\f\x1b"
    has_controls = any(byte < 0x20 and byte not in spaces for byte in said)
    return bool(said) and (said[0] < 0x80 or len(said) >= 4) and not has_controls


def _piece(told: int) -> int:
    """Return a usable limit: a server that tells of less than the protocol promises would have a
    megabyte asked for in a million requests."""
    return max(SAFE_PIECE_BYTES, min(told, MAX_PIECE_BYTES))
