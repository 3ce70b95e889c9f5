"""One S3 login with all that its remotes share: connections, limits and the memory of failures."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from hpcfs.model.errors import WrongSettings
from hpcfs.model.sites import S3Root, S3Site, SiteSpec
from hpcfs.model.usage import Traffic
from hpcfs.remotes.rate import RateLimit
from hpcfs.remotes.s3.access import Access
from hpcfs.remotes.s3.bucket import Bucket
from hpcfs.remotes.s3.direct import Direct
from hpcfs.remotes.s3.health import Health
from hpcfs.remotes.s3.login import S3Login
from hpcfs.remotes.s3.pacing import Pacing
from hpcfs.remotes.s3.parts import MIB, Limits
from hpcfs.remotes.s3.pool import PoolLimits
from hpcfs.remotes.s3.remote import S3Remote
from hpcfs.remotes.s3.request_gate import Bounds, RequestGate

SENT_BYTES = 64 * MIB
"""Bodies that are in memory at once: four parts, more than any link needs under way."""

FAREWELL_SECONDS = 5.0
"""For what is given up at the end."""


def bounds_of(site: S3Site) -> Bounds:
    """Return the bounds of the requests that move bytes, within the user's."""
    fewest = min(Bounds.fewest_slots, site.connections)
    return Bounds(fewest_slots=fewest, slots=site.connections, per_second=site.requests)


class S3SiteConnection:
    """A `base.Site`. `limits` and `bounds` are for tests."""

    def __init__(
        self, spec: SiteSpec, limits: Limits | None = None, bounds: Bounds | None = None
    ) -> None:
        assert isinstance(spec.site, S3Site)
        site = spec.site
        bounds = bounds or bounds_of(site)
        self._login = S3Login(site)
        gate = RequestGate(bounds, RateLimit(spec.download_limit))
        sending = RequestGate(replace(bounds, bulk_bytes=SENT_BYTES))

        def answered_in(seconds: float) -> None:
            gate.answered_in(seconds)
            sending.answered_in(seconds)

        pooled = PoolLimits(site.connect_timeout, site.connections)
        self._direct = Direct(self._login, answered_in, pooled, RateLimit(spec.upload_limit))
        self._login.send_by(self._direct.send)
        self._login.when_renewed(self._direct.forget_routes)
        self.health = Health()
        pacing = Pacing(per_second=site.requests)
        access = Access(self._login, self._direct, gate, sending, self.health, pacing)
        self._remotes = {
            namespace: S3Remote(Bucket(root.bucket, access), root, spec, limits or Limits())
            for namespace, root in spec.roots.items()
            if isinstance(root, S3Root)
        }

    def remote(self, namespace: str) -> S3Remote:
        """Return the remote of a namespace (see `Site.remote`)."""
        try:
            return self._remotes[namespace]
        except KeyError:
            raise WrongSettings(f"no namespace {namespace!r} lives on this site") from None

    def traffic(self) -> Traffic:
        """Return what is open now (see `Site.traffic`)."""
        return Traffic(connections=self._direct.connections, requests=self.health.under_way)

    def try_now(self) -> None:
        """End the pause after a failure (see `Site.try_now`)."""
        self.health.try_now()

    def network_changed(self) -> None:
        """Use no connection again that may be dead (see `Site.network_changed`)."""
        self.health.try_now()
        self._direct.drop_idle()

    async def renew(self) -> None:
        """Forget refused credentials and read them anew (see `Site.renew`)."""
        await self._login.renew()
        self.health.forget()
        for remote in self._remotes.values():
            remote.forget_failures()

    async def close(self) -> None:
        """Give up what is under way and close all connections."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await asyncio.gather(*(remote.close() for remote in self._remotes.values()))
        self._direct.close()
        await self._login.close()
