"""Access to a site: what the buckets behind one login share."""

from __future__ import annotations

from dataclasses import dataclass, field

from hpcfs.remotes.s3.direct import Direct
from hpcfs.remotes.s3.health import Health
from hpcfs.remotes.s3.login import S3Login
from hpcfs.remotes.s3.pacing import Pacing
from hpcfs.remotes.s3.request_gate import RequestGate
from hpcfs.remotes.s3.server_capabilities import ServerCapabilities


@dataclass(frozen=True)
class Access:
    """The objects that all buckets of a site share."""

    login: S3Login
    direct: Direct
    gate: RequestGate
    sending: RequestGate
    """For bodies that are sent: `gate` is for what is asked and received."""
    health: Health
    pacing: Pacing = field(default_factory=Pacing)
    server: ServerCapabilities = field(default_factory=ServerCapabilities)
