"""Reading objects without botocore's machinery, but as botocore would: where, and as whom.

botocore prepares one request for each bucket, which is not sent: it says which host, path, region
and kind of signature this bucket has, so nothing of AWS's rules is repeated here. Credentials come
from its chain at every request, fresh ones when they expire. What is out of the ordinary (a proxy,
another signature, a redirect, a refusal to be retried, anything that is not understood) is left to
botocore: `answer` returns None, and the caller asks again by way of the client.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from botocore.exceptions import ClientError
from botocore.httpsession import create_urllib3_context, get_cert_path
from botocore.parsers import create_parser
from botocore.utils import get_environ_proxies

from hpcfs.remotes.s3.answers import of_listing, of_object
from hpcfs.remotes.s3.http import Answer, Question, Unusual
from hpcfs.remotes.s3.pool import Gate, Host, Pool
from hpcfs.remotes.s3.signing import ALGORITHM, Keys, Signer

log = logging.getLogger(__name__)
PREPARED = "HeadBucket"
"""The operation that is prepared and never sent. It is used for nothing else."""
_SCOPE = re.compile(
    re.escape(ALGORITHM) + r" Credential=[^,]+/\d{8}/([^/,]+)/([^/,]+)/aws4_request,"
)
LISTING_BYTES = 16 * 1024 * 1024
"""A page has 1000 keys of at most 1 KiB, thrice that when quoted."""
STRANGE_IN_A_ROW = 10
_QUERY = {
    "Prefix": "prefix",
    "Delimiter": "delimiter",
    "MaxKeys": "max-keys",
    "ContinuationToken": "continuation-token",
}
_FINAL = frozenset({401, 403, 404, 412, 416})
"""Refusals that asking again does not change: a refused credential must not be tried twice."""


class _Prepared(Exception):
    """Carries the request out of botocore before it is sent."""

    def __init__(self, request: Any) -> None:
        super().__init__("prepared, not to be sent")
        self.request = request


class Login(Protocol):
    """What a site logs in with (login.py)."""

    async def client(self) -> Any: ...

    async def keys(self) -> Keys: ...

    def trusted(self) -> str | bool: ...


@dataclass(frozen=True)
class Route:
    """How to reach a bucket's objects: `path` ends in "/"."""

    pool: Pool
    host: str
    path: str
    user_agent: str
    signer: Signer


class Direct:
    """Timeouts are in seconds: for a connection, and without a byte. The gate hears how far away
    the server is."""

    def __init__(
        self, login: Login, gate: Gate, connect_timeout: float, read_timeout: float
    ) -> None:
        self._login, self._gate = login, gate
        self._timeouts = connect_timeout, read_timeout
        self._routes: dict[str, Route | None] = {}
        self._pools: dict[tuple[str, str, int], Pool] = {}
        self._strange: dict[str, int] = {}
        """Answers in a row that were not understood."""
        self._lock = asyncio.Lock()
        self._parser: Any = create_parser("rest-xml")

    async def answer(
        self, operation: str, bucket: str, parameters: Mapping[str, Any], limit: int
    ) -> dict[str, Any] | None:
        """What the client's method of this name answers, or None where it must be asked.

        One of head_object, get_object and list_objects_v2. `limit` is how many bytes of an object
        may come; more are not read, and then there is no "Body". Raises ClientError for refusals,
        TimeoutError, and what finding the credentials raises.
        """
        route = await self._route(bucket)
        if route is None:
            return None
        if operation == "list_objects_v2":
            limit = LISTING_BYTES
        keys = await self._login.keys()
        try:
            question = _question(route, operation, parameters, limit, keys)
            found = await route.pool.ask(question)
            if found.status < 300:
                parsed = _parsed(operation, found)
                self._strange.pop(bucket, None)
                return parsed
        except TimeoutError:
            raise
        except (Unusual, ValueError) as error:
            self._note_strange(bucket, error)
            return None
        except OSError as error:
            log.debug("%s by way of botocore: %s", operation, error)
            return None
        if found.status in _FINAL:
            refusal: Any = self._refusal(found)
            raise ClientError(refusal, operation)
        self._routes.pop(bucket, None)  # it may have been the wrong region's
        return None

    def _note_strange(self, bucket: str, error: Exception) -> None:
        """A server whose every answer is not understood is not asked each time in vain."""
        log.debug("an answer for %s is left to botocore: %s", bucket, error)
        self._strange[bucket] = self._strange.get(bucket, 0) + 1
        if self._strange[bucket] >= STRANGE_IN_A_ROW:
            log.warning("bucket %s is read by way of botocore from now on: %s", bucket, error)
            self._routes[bucket] = None

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def _refusal(self, answer: Answer) -> dict[str, Any]:
        """In botocore's form, by its own parser. Answers to HEAD have no body to parse."""
        if not answer.body:
            return {
                "Error": {"Code": str(answer.status)},
                "ResponseMetadata": {"HTTPStatusCode": answer.status},
            }
        response = {
            "status_code": answer.status,
            "headers": answer.headers,
            "body": bytes(answer.body),
        }
        parsed: dict[str, Any] = self._parser.parse(response, None)
        return parsed

    # --- where and how ----------------------------------------------------------------------------

    async def _route(self, bucket: str) -> Route | None:
        if bucket not in self._routes:
            async with self._lock:
                if bucket not in self._routes:
                    request = await self._prepared(bucket)
                    self._routes[bucket] = await self._route_of(request)
        return self._routes.get(bucket)

    async def _prepared(self, bucket: str) -> Any:
        client = await self._login.client()
        client.meta.events.register(f"before-send.s3.{PREPARED}", _stop, unique_id="hpcfs-prepared")
        try:
            await client.head_bucket(Bucket=bucket)
        except _Prepared as prepared:
            return prepared.request
        raise AssertionError("botocore sent what was only to be prepared")

    async def _route_of(self, request: Any) -> Route | None:
        parts = urlsplit(request.url)
        headers = {name.lower(): _text(value) for name, value in request.headers.items()}
        scope = _SCOPE.match(headers.get("authorization", ""))
        proxied = parts.scheme in get_environ_proxies(request.url)
        if scope is None or parts.query or proxied or not parts.hostname:
            log.info("S3 objects are read by way of botocore: a proxy, or another signature")
            return None
        default = {"http": 80, "https": 443}[parts.scheme]
        port = parts.port or default
        name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return Route(
            pool=await self._pool(parts.scheme, parts.hostname, port),
            host=name if port == default else f"{name}:{port}",
            path=parts.path.rstrip("/") + "/",
            user_agent=headers.get("user-agent", "hpcfs"),
            signer=Signer(scope[1], scope[2]),
        )

    async def _pool(self, scheme: str, name: str, port: int) -> Pool:
        pool = self._pools.get((scheme, name, port))
        if pool is None:
            tls = None
            if scheme == "https":
                tls = await asyncio.to_thread(_tls_context, self._login.trusted())
            pool = Pool(Host(name, port, tls), *self._timeouts, self._gate.answered_in)
            self._pools[scheme, name, port] = pool
        return pool


def _tls_context(trusted: Any) -> ssl.SSLContext:
    """As botocore's, which leaves the host's name to urllib3."""
    context: ssl.SSLContext = create_urllib3_context()
    context.check_hostname = True
    context.load_verify_locations(get_cert_path(trusted))
    return context


def _question(
    route: Route, operation: str, parameters: Mapping[str, Any], limit: int, keys: Keys
) -> Question:
    method = "HEAD" if operation == "head_object" else "GET"
    path = route.path + quote(parameters["Key"], safe="/~") if "Key" in parameters else route.path
    query = _query(parameters) if operation == "list_objects_v2" else ""
    headers = {"host": route.host}
    for parameter, name in (("Range", "range"), ("IfMatch", "if-match")):
        if parameter in parameters:
            headers[name] = parameters[parameter]
            if not headers[name].isprintable():
                raise ValueError("an ETag that can't be sent")
    signed = route.signer.sign(method, path, query, headers, keys)
    lines = [
        f"{method} {path}{'?' if query else ''}{query} HTTP/1.1",
        *(f"{name}: {value}" for name, value in signed.items()),
        f"user-agent: {route.user_agent}",
        "accept-encoding: identity\r\n\r\n",
    ]
    return Question("\r\n".join(lines).encode(), method == "HEAD", limit)


def _query(parameters: Mapping[str, Any]) -> str:
    """In the order that the signature needs."""
    given = {_QUERY[name]: str(value) for name, value in parameters.items()}
    given |= {"list-type": "2", "encoding-type": "url"}
    return "&".join(f"{name}={quote(given[name], safe='-_.~')}" for name in sorted(given))


def _parsed(operation: str, answer: Answer) -> dict[str, Any]:
    """Raises ValueError."""
    if operation == "list_objects_v2":
        if answer.body is None:
            raise ValueError("the listing is too long")
        return of_listing(answer.body)
    found = of_object(answer.headers)
    if operation == "get_object" and answer.body is not None:
        found |= {"Body": answer.body, "ContentLength": len(answer.body)}
    return found


def _stop(request: Any, **_: object) -> None:
    raise _Prepared(request)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
