"""Logs a site in: botocore's session and client, made at their first use.

Credentials come from the AWS chain (environment, ~/.aws, SSO, instance) unless the site names a key
of its own. Nothing is made before the first request, so that a wrong profile is an error of that
request and not of the process.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from contextvars import ContextVar
from enum import Enum, auto
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore import UNSIGNED
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
)
from botocore.handlers import validate_bucket_name

from hpcfs.model.errors import Unreachable, WrongSettings
from hpcfs.model.sites import S3Site
from hpcfs.remotes.s3 import deadlines, refusal
from hpcfs.remotes.s3.botocore_guard import guard
from hpcfs.remotes.s3.pool import new_unwatched_socket
from hpcfs.remotes.s3.sent_writes import note_client_attempt
from hpcfs.remotes.s3.signing import Keys
from hpcfs.remotes.s3.translate import is_expiry, may_be_expiry

T = TypeVar("T")
log = logging.getLogger(__name__)
CONNECTIONS = 96
"""Of botocore's, at most: for the rarer requests, and for all where there is no direct way."""
DEFAULT_REGION = "us-east-1"
"""What S3-compatible servers expect where nothing is configured."""
PREPARED = "HeadBucket"
"""The operation that is prepared and never sent: not by botocore either, which would, to ask for a
region that a redirect does not name, and again when the answer is the same redirect, without end.
"""
_preparing: ContextVar[bool] = ContextVar("_preparing", default=False)


class _Prepared(Exception):
    """Carries the request out of botocore before it is sent."""

    def __init__(self, request: Any) -> None:
        super().__init__("prepared, not to be sent")
        self.request = request


def check_secrecy(endpoint_url: str, keys: Keys | None) -> str:
    """Return a remark about the endpoint for the status. Raises WrongSettings where a session token
    would be sent without encryption: it is a secret, other than a signature."""
    parts = urlsplit(endpoint_url)
    if parts.scheme != "http" or _is_loopback(parts.hostname or ""):
        return ""
    where = f"{parts.scheme}://{parts.netloc}"
    if keys is not None and keys.token is not None:
        raise WrongSettings(
            f"{where} is not encrypted, and these S3 credentials have a session token, which "
            "everybody on the way could use: set `endpoint_url` to an https:// URL"
        )
    log.warning("%s is not encrypted: everybody on the way can read and change the files", where)
    return "not encrypted"


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def _stop(request: Any, **_: object) -> None:
    if _preparing.get():
        raise _Prepared(request)
    raise ClientError({"Error": {}, "ResponseMetadata": {"HTTPHeaders": {}}}, PREPARED)


@contextmanager
def _unusable_refused() -> Iterator[None]:
    """Raise CredentialRetrievalError for whatever a provider of credentials makes fail: it may be a
    server that is wrong, or wicked, and botocore checks nothing of what it says."""
    try:
        yield
    except (BotoCoreError, ClientError, aiohttp.ClientError, OSError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise CredentialRetrievalError(provider="their provider", error_msg=said) from error


def _checked(keys: Keys) -> Keys:
    """Return the keys. Raises ValueError for what can't go into a header."""
    for text in (keys.access_key, keys.secret_key, keys.token or ""):
        if not isinstance(text, str) or not text.isascii() or not text.isprintable():
            raise ValueError("what it gave are no credentials")
    return keys


class _Nothing(Enum):
    """What is offered before the providers gave anything; None means that there are none."""

    NOTHING = auto()


NOTHING = _Nothing.NOTHING


class S3Login:
    """The credentials and the botocore client of one site."""

    def __init__(self, site: S3Site) -> None:
        guard()
        self._site = site
        self._stack = AsyncExitStack()
        self._lock = asyncio.Lock()
        self._retired = AsyncExitStack()
        """Of the client before, which may still be answering."""
        self._session: AioSession | None = None
        self._offered: Keys | _Nothing | None = NOTHING
        self._generation = 0
        """How often the credentials were replaced by others."""
        self._look_at = 0.0
        """When the providers may be asked again for no good reason."""
        self._made: Any = None
        self._closed = False
        self._on_renewed: Callable[[], None] = lambda: None
        self._send: Callable[..., Awaitable[Any]] | None = None
        self.anonymous = site.anonymous
        """Known once there is a client; so is `remark`, for the status."""
        self.remark = ""

    def when_renewed(self, call: Callable[[], None]) -> None:
        """Have `call` called when other credentials have come."""
        self._on_renewed = call

    def send_by(self, send: Callable[..., Awaitable[Any]]) -> None:
        """Give the client's requests to `send`, a handler of botocore's event "before-send"."""
        self._send = send

    async def close(self) -> None:
        """Close the client and its connections."""
        self._closed = True
        async with self._lock:
            self._made = None
            await self._retired.aclose()
            await self._stack.aclose()

    async def client(self) -> Any:
        """Return the client, which the first call makes. Raises Unreachable once it is closed."""
        if self._made is None:
            async with self._lock:
                if self._closed:
                    raise Unreachable("the connection to S3 was closed")
                if self._made is None:
                    self._made = await self._make()
        return self._made

    async def _make(self) -> Any:
        keys = self._offered = await self._find_keys(self._the_session())
        self.anonymous = keys is None
        try:
            client = await self._stack.enter_async_context(self._creation())
        except ValueError as error:  # an endpoint that is no URL
            raise WrongSettings(f"the S3 settings can't be used: {error}") from error
        said = ["without credentials, as anybody may"] if self.anonymous else []
        said.append(check_secrecy(client.meta.endpoint_url, keys))
        self.remark = ", ".join(filter(None, said))
        events = client.meta.events
        events.register_first(f"before-send.s3.{PREPARED}", _stop)
        if self._send is not None:
            events.register("before-send.s3", self._send)
        events.register("needs-retry.s3", note_client_attempt)
        events.unregister("before-parameter-build.s3", validate_bucket_name)  # servers know better
        return client

    async def prepared(self, bucket: str) -> Any:
        """Return a request to this bucket as botocore would send it."""
        client = await self.client()
        token = _preparing.set(True)
        try:
            await client.head_bucket(Bucket=bucket)
        except _Prepared as prepared:
            return prepared.request
        finally:
            _preparing.reset(token)
        raise AssertionError("botocore sent what was only to be prepared")

    async def keys(self) -> Keys | None:
        """Return the credentials to sign with now, None to ask without: those that expire are
        renewed by their provider."""
        await self.client()
        if self.anonymous:
            return None
        self._offered = await self._find_keys(self._the_session())
        return self._offered

    async def renew(self, generation: int | None = None, *, sparingly: bool = False) -> bool:
        """Ask the providers of credentials anew: files are read, programs run. Return whether there
        are others now than those that were used last, or at that generation. None in the place of
        some are no others: the file is being written, and a site does not become anonymous.
        `sparingly`: no provider is asked where one was in vain LOOK_SECONDS ago."""
        async with self._lock:
            if generation is not None and generation != self._generation:
                return True
            if self._closed or (sparingly and time.monotonic() < self._look_at):
                return False
            session = AioSession(profile=self._site.profile)
            found = await self._others(session)
            if isinstance(found, _Nothing):
                self._look_at = time.monotonic() + refusal.LOOK_SECONDS
                return False
            log.info("there are other S3 credentials: they are used from now on")
            await self._retired.aclose()
            self._retired, self._stack = self._stack, AsyncExitStack()
            self._session, self._made = session, None
            self._generation += 1
            self._on_renewed()
            return True

    async def _others(self, session: AioSession) -> Keys | _Nothing | None:
        """Return other credentials than those that were offered; NOTHING where there are none."""
        try:
            found = await self._find_keys(session)
        except (BotoCoreError, ClientError, aiohttp.ClientError, OSError) as error:
            log.debug("no other S3 credentials: %s", error)
            return NOTHING
        if found is None and isinstance(self._offered, Keys):
            log.debug("no other S3 credentials: there are none now")
            return NOTHING
        return NOTHING if found == self._offered or self._closed else found

    async def outliving(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Return what `ask` returns. Where the credentials have expired and there are others, it is
        asked again at once."""
        generation = self._generation
        try:
            return await ask()
        except ClientError as error:
            if not may_be_expiry(error):
                raise
            if not await self.renew(generation, sparingly=not is_expiry(error)):
                raise
        return await ask()

    async def _find_keys(self, session: AioSession) -> Keys | None:
        """Return the credentials, or None where there are none: public buckets want none."""
        site = self._site
        if site.anonymous:
            return None
        if site.access_key is not None and site.secret_key is not None:
            return Keys(site.access_key.value, site.secret_key.value, None)
        with _unusable_refused():
            found: Any = await session.get_credentials()
            if found is not None:
                return _checked(Keys(*(await found.get_frozen_credentials())[:3]))
        if site.profile is not None:
            raise NoCredentialsError
        return None

    def trusted(self) -> str | bool:
        """The file of the authorities that servers' certificates may come from; True: the usual
        ones. As botocore chooses it."""
        bundle = self._the_session().get_config_variable("ca_bundle")
        return str(bundle or os.environ.get("REQUESTS_CA_BUNDLE") or "") or True

    def _the_session(self) -> AioSession:
        if self._session is None:
            self._session = AioSession(profile=self._site.profile)
        return self._session

    def _creation(self) -> Any:
        site, session = self._site, self._the_session()
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
            config=self._config(),
            **keys,
        )

    def _config(self) -> AioConfig:
        """Other servers than AWS's know neither buckets as host names nor the newer checksums."""
        compatible: dict[str, Any] = {}
        if self.anonymous:
            compatible["signature_version"] = UNSIGNED
        if self._site.endpoint_url:
            compatible |= {
                "s3": {"addressing_style": "path"},
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            }
        return AioConfig(
            connect_timeout=self._site.connect_timeout,
            read_timeout=deadlines.SILENCE,
            max_pool_connections=CONNECTIONS,
            connector_args={"socket_factory": new_unwatched_socket},
            retries={"mode": "standard", "total_max_attempts": 1},  # pacing.py asks again
            **compatible,
        )
