"""What a site has left, and what is open to it: figures for statvfs(3) and the status."""

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
    """What is open to a site now: `connections` (jump hosts' too; of S3 those that were not left to
    botocore), SFTP `channels` on them, and `requests` under way. Where a connection is kept up
    whether anybody asks for something or not (tunnels), `away` says why there is none."""

    connections: int = 0
    channels: int = 0
    requests: int = 0
    away: str = ""
