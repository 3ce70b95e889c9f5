"""What one S3 login reaches: one client, its connections and its memory of failures.

Credentials come from the AWS chain (environment, ~/.aws, SSO, instance) unless the site names a key
of its own. The client is made at the first request, so that a wrong profile is an error of that
request and not of the process.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession

from hpcfs.remotes.s3.bucket import Bucket
from hpcfs.remotes.s3.directory import HEADS_IN_FLIGHT
from hpcfs.remotes.s3.errors import Health
from hpcfs.remotes.s3.remote import S3Remote
from hpcfs.remotes.s3.transfer import Limits
from hpcfs.transfer.messages import S3Root, S3Site, Start, Unreachable

CONNECTIONS = 32
READ_TIMEOUT = 60.0
"""Without a byte. Completing a large object takes longer, but S3 sends blanks meanwhile."""
ATTEMPTS = 3
DEFAULT_REGION = "us-east-1"
"""What S3-compatible servers expect where nothing is configured."""


class S3SiteConnection:
    """A `base.Site`. `limits` is for tests."""

    def __init__(self, start: Start, limits: Limits | None = None) -> None:
        assert isinstance(start.site, S3Site)
        self._site = start.site
        self._stack = AsyncExitStack()
        self._lock = asyncio.Lock()
        self._made: Any = None
        self._closed = False
        self.health = Health()
        heads = asyncio.Semaphore(HEADS_IN_FLIGHT)
        self._remotes = {
            namespace: S3Remote(
                Bucket(root.bucket, self._client, self.health),
                root,
                start,
                limits or Limits(),
                heads,
            )
            for namespace, root in start.roots.items()
            if isinstance(root, S3Root)
        }

    def remote(self, namespace: str) -> S3Remote:
        return self._remotes[namespace]

    async def close(self) -> None:
        self._closed = True
        async with self._lock:
            self._made = None
            await self._stack.aclose()

    async def _client(self) -> Any:
        if self._made is None:
            async with self._lock:
                if self._closed:
                    raise Unreachable("the connection to S3 was closed")
                if self._made is None:
                    self._made = await self._stack.enter_async_context(self._creation())
        return self._made

    def _creation(self) -> Any:
        site = self._site
        session = AioSession(profile=site.profile)
        region = site.region or session.get_config_variable("region")
        if region is None and site.endpoint_url:
            region = DEFAULT_REGION
        keys: dict[str, Any] = {}
        if site.access_key is not None and site.secret_key is not None:
            keys = {
                "aws_access_key_id": site.access_key.value,
                "aws_secret_access_key": site.secret_key.value,
            }
        return session.create_client(
            "s3",
            region_name=region,
            endpoint_url=site.endpoint_url,
            config=_config(site),
            **keys,
        )


def _config(site: S3Site) -> AioConfig:
    """Other servers than AWS's know neither buckets as host names nor the newer checksums."""
    compatible: dict[str, Any] = {}
    if site.endpoint_url:
        compatible = {
            "s3": {"addressing_style": "path"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    return AioConfig(
        connect_timeout=site.connect_timeout,
        read_timeout=READ_TIMEOUT,
        max_pool_connections=CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        **compatible,
    )
