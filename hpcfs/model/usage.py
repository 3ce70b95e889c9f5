"""Figures of a site for statvfs(3) and the status: its space, and what is open to it."""

from __future__ import annotations

import msgspec


class DiskUsage(msgspec.Struct, frozen=True):
    """Sizes in bytes and counts, as statvfs(3) means them: `available` is what a user may use."""

    total: int
    free: int
    available: int
    files: int
    files_free: int


class Traffic(msgspec.Struct, frozen=True):
    """Counts what is open to a site now: `connections` (jump hosts' too; of S3 those that were not
    left to botocore), SFTP `channels` on them, and `requests` under way. `received` are the bytes
    that came over these channels so far. Where a connection is kept
    up without any request (tunnels), `away` says why there is none."""

    connections: int = 0
    channels: int = 0
    requests: int = 0
    away: str = ""
    received: int = 0
