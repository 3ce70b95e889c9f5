"""Access to a site: what the buckets behind one login share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from hpcfs.remotes.s3.direct import Direct
from hpcfs.remotes.s3.health import Health
from hpcfs.remotes.s3.login import S3Login
from hpcfs.remotes.s3.pacing import Pacing
from hpcfs.remotes.s3.request_gate import RequestGate
from hpcfs.remotes.s3.server_capabilities import ServerCapabilities

T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """The objects that all buckets of a site share."""

    login: S3Login
    direct: Direct
    gate: RequestGate
    sending: RequestGate
    """For bodies that are sent: `gate` is for what is asked and received."""
    health: Health
    pacing: Pacing
    server: ServerCapabilities = field(default_factory=ServerCapabilities)

    async def ask(self, request: Callable[[], Awaitable[T]]) -> T:
        """Make a request, again where S3 wants it later or the credentials had expired. Raises what
        it raises, and AccessRefused while it makes no sense to ask."""
        async with self.health.refusal.outlived(self.login.renew):
            return await self.pacing.asked(partial(self.login.outliving, request))
