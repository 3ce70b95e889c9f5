"""Objects without botocore's machinery, but as botocore would: where, and as whom.

botocore prepares one request for each bucket, which is not sent: it says which host, path, region
and kind of signature this bucket has, so nothing of AWS's rules is repeated here. Credentials come
from its chain at every request, fresh ones when they expire. Anything out of the ordinary (a proxy,
another signature, a redirect, anything that is not understood) is left to botocore: `answer`
returns None, and the caller asks again by way of the client.

botocore's own requests go over the same connections (`send`), so that one set of deadlines holds
for all. What goes through a proxy, and bodies that are streamed, take aiohttp's.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import SplitResult, quote, urlsplit

from aiobotocore.awsrequest import AioAWSResponse
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    HTTPClientError,
    ReadTimeoutError,
)
from botocore.httpsession import create_urllib3_context, get_cert_path
from botocore.parsers import create_parser
from botocore.utils import get_environ_proxies

from hpcfs.remotes.rate import UNLIMITED, RateLimit
from hpcfs.remotes.s3 import botocore_guard, deadlines
from hpcfs.remotes.s3.botocore_guard import UnfitResponse
from hpcfs.remotes.s3.http import (
    ERROR_BYTES,
    HttpRequest,
    HttpResponse,
    OversizedResponse,
    UnusualResponse,
)
from hpcfs.remotes.s3.pool import HostAddress, NotOpened, Pool, PoolLimits
from hpcfs.remotes.s3.responses import (
    is_fit_to_parse,
    is_page,
    parse_copy,
    parse_listing,
    parse_object,
)
from hpcfs.remotes.s3.sent_writes import note_sent
from hpcfs.remotes.s3.signing import ALGORITHM, EMPTY_SHA256, UNSIGNED, Keys, Signer

log = logging.getLogger(__name__)
_SCOPE = re.compile(
    re.escape(ALGORITHM) + r" Credential=[^,]+/\d{8}/([^/,]+)/([^/,]+)/aws4_request,"
)
STRANGE_IN_A_ROW = 10
STRANGE_SECONDS = 60.0
"""For how long a server that was not understood so often in a row is left to botocore."""
THREAD_BYTES = 256 * 1024
"""Hashing more than this is left to a thread."""
_METHODS = {
    "head_object": "HEAD",
    "get_object": "GET",
    "list_objects_v2": "GET",
    "put_object": "PUT",
    "upload_part": "PUT",
    "copy_object": "PUT",
}
_LOOKS = ("head_object", "list_objects_v2")
_QUERY = {
    "Prefix": "prefix",
    "Delimiter": "delimiter",
    "MaxKeys": "max-keys",
    "ContinuationToken": "continuation-token",
    "PartNumber": "partNumber",
    "UploadId": "uploadId",
}
_HEADERS = {
    "Range": "range",
    "IfMatch": "if-match",
    "IfNoneMatch": "if-none-match",
    "CacheControl": "cache-control",
    "ContentDisposition": "content-disposition",
    "ContentEncoding": "content-encoding",
    "ContentLanguage": "content-language",
    "ContentMD5": "content-md5",
    "ContentType": "content-type",
    "ChecksumCRC32": "x-amz-checksum-crc32",
    "ChecksumMode": "x-amz-checksum-mode",
    "CopySourceIfMatch": "x-amz-copy-source-if-match",
    "MetadataDirective": "x-amz-metadata-directive",
    "StorageClass": "x-amz-storage-class",
}
_ELSEWHERE = frozenset({"Key", "Body", "Metadata", "CopySource", *_QUERY})
"""Parameters that have a place of their own in a request."""
_FINAL_CODES = (b"<Code>BadDigest</Code>", b"<Code>InvalidDigest</Code>")
"""Refusals with status 400 that asking again by way of botocore does not change. rclone's server
has ended the upload with this answer, and would say of the same part that there is no such upload.
"""
_PORTS = {"http": 80, "https": 443}
_NOT_SENT_ON = frozenset({"accept-encoding", "connection", "expect", "host", "user-agent"})
"""Headers of botocore's requests that are made anew, or have no meaning here."""


class DirectLogin(Protocol):
    """The credentials and settings of a site (login.S3Login)."""

    async def prepared(self, bucket: str) -> Any:
        """Return a request to this bucket as botocore would send it."""
        ...

    async def keys(self) -> Keys | None:
        """Return the credentials to sign with now; None to ask without a signature."""
        ...

    def trusted(self) -> str | bool:
        """Return the file of certificate authorities to trust; True for the usual ones."""
        ...


@dataclass(frozen=True)
class Route:
    """The way to a bucket's objects: `path` ends in "/"."""

    pool: Pool
    host: str
    path: str
    user_agent: str
    signer: Signer | None
    """None where requests are not signed."""


class _Body:
    """A body that is there, for botocore to read."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def read(self) -> bytes:
        """Return all of it."""
        return self._body


class Direct:
    """`answered_in` hears how far away the server is; `limits` are those of the connections to each
    host, and `pace` is that of what is sent."""

    def __init__(
        self,
        login: DirectLogin,
        answered_in: Callable[[float], None],
        limits: PoolLimits,
        pace: RateLimit = UNLIMITED,
    ) -> None:
        self._pace = pace
        self._login, self._answered_in = login, answered_in
        self._limits = limits
        self._routes: dict[str, Route | None] = {}
        self._pools: dict[tuple[str, str, int], Pool] = {}
        self._strange: dict[str, int] = {}
        """Answers in a row that were not understood."""
        self._lock = asyncio.Lock()
        self._parser: Any = create_parser("rest-xml")

    async def answer(
        self,
        operation: str,
        bucket: str,
        parameters: Mapping[str, Any],
        limit: int,
        sent: Callable[[], None] | None = None,
    ) -> dict[str, Any] | None:
        """Return what the client's method of this name returns, or None where it must be asked.

        One of _METHODS: asking all of them twice does what asking once does. `limit` is how many
        bytes of an object may come; more are not read, and then there is no "Body". `sent` is
        called as a large body is on its way. Raises botocore's exceptions: ClientError for
        refusals, others for connections that fail, and what finding the credentials raises.
        """
        route = await self._route(bucket)
        if route is None or not parameters.keys() <= _HEADERS.keys() | _ELSEWHERE:
            return None
        if "CopySource" in parameters and ":" in bucket:  # a tenant's, or an access point's
            return None
        if operation != "get_object":
            limit = botocore_guard.ANSWER_BYTES if operation == "list_objects_v2" else ERROR_BYTES
        body = parameters.get("Body", b"")
        payload = await _payload(body, route)
        keys = await self._login.keys()
        try:
            head = _head(route, operation, bucket, parameters, keys, payload)
            bodiless, urgent = _METHODS[operation] == "HEAD", operation in _LOOKS
            silence = deadlines.current() + len(body) / deadlines.STORED_PER_SECOND
            request = HttpRequest(
                head, bodiless, limit, body, sent, silence, pace=self._pace, urgent=urgent
            )
            with _in_words_of_botocore(route.pool, operation):
                found = await route.pool.ask(request)
            note_sent(operation)
            if found.status < 300:
                parsed = _parsed(operation, found)
                self._strange.pop(bucket, None)
                return parsed
        except (UnusualResponse, ValueError) as error:
            note_sent(operation)
            self._note_strange(bucket, error)
            return None
        if found.status >= 401 or any(code in (found.body or b"") for code in _FINAL_CODES):
            refusal: Any = self._refusal(found)
            raise ClientError(refusal, operation)
        self._routes.pop(bucket, None)  # it may have been the wrong region's
        return None

    async def send(self, request: Any, **_: object) -> AioAWSResponse | None:
        """Answer a request of botocore's, as a handler of its event "before-send". None where it is
        to send the request itself."""
        request.context["read_timeout"] = deadlines.current()
        parts = urlsplit(request.url)
        body = request.body or b""
        streamed = request.stream_output or not isinstance(body, bytes | bytearray | str)
        if streamed or _is_proxied(request.url) or not parts.hostname:
            return None
        pool = await self._pool(parts)
        body = body.encode() if isinstance(body, str) else bytes(body)
        try:
            head, bodiless = _head_of(request, parts, body), request.method == "HEAD"
            with _in_words_of_botocore(pool):
                limit = botocore_guard.ANSWER_BYTES
                found = await pool.ask(HttpRequest(head, bodiless, limit, body))
        except OversizedResponse as error:
            raise _unfit("too long") from error
        except (UnusualResponse, ValueError) as error:
            log.debug("a request to %s is left to botocore: %s", pool.host, error)
            return None
        content = found.body
        if content is None:
            raise _unfit("too long")
        if found.status < 300 and is_page(found.headers, content):
            raise _unfit("a web page")  # of a proxy, or of a network that wants a login
        if not is_fit_to_parse(content):
            if found.status < 300:
                raise _unfit("not safe to parse")
            content = bytearray()  # the status says enough, and proxies send HTML beside it
        return AioAWSResponse(request.url, found.status, found.headers, _Body(bytes(content)))

    def _note_strange(self, bucket: str, error: Exception) -> None:
        """Count an answer that was not understood: a server that gives only such ones is not asked
        each time in vain."""
        log.debug("an answer for %s is left to botocore: %s", bucket, error)
        self._strange[bucket] = self._strange.get(bucket, 0) + 1
        if self._strange[bucket] >= STRANGE_IN_A_ROW and self._routes.get(bucket) is not None:
            log.warning("bucket %s is read by way of botocore for a while: %s", bucket, error)
            self._routes[bucket] = None
            loop = asyncio.get_running_loop()
            loop.call_later(STRANGE_SECONDS, self._routes.pop, bucket, None)

    def forget_routes(self) -> None:
        """Find the ways to the buckets anew: whether requests are signed is a part of them."""
        self._routes.clear()

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return sum(map(len, self._pools.values()))

    def drop_idle(self) -> None:
        """Close the connections that nobody uses now: the next requests take new ones."""
        for pool in self._pools.values():
            pool.drop_idle()

    def close(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            pool.close()

    def _refusal(self, answer: HttpResponse) -> dict[str, Any]:
        """Return a refusal in botocore's form, by its own parser. Answers to HEAD have no body to
        parse."""
        if not answer.body or not is_fit_to_parse(answer.body):
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
                    request = await self._login.prepared(bucket)
                    self._routes[bucket] = await self._route_of(request)
        return self._routes.get(bucket)

    async def _route_of(self, request: Any) -> Route | None:
        parts = urlsplit(request.url)
        headers = {name.lower(): _text(value) for name, value in request.headers.items()}
        scope = _SCOPE.match(headers.get("authorization", ""))
        unsigned = await self._login.keys() is None and "authorization" not in headers
        if (scope is None and not unsigned) or parts.query or not parts.hostname:
            log.info("S3 objects are read by way of botocore: another signature")
            return None
        if _is_proxied(request.url):
            log.info("S3 objects are read by way of botocore: a proxy")
            return None
        return Route(
            pool=await self._pool(parts),
            host=_host_header(parts),
            path=parts.path.rstrip("/") + "/",
            user_agent=headers.get("user-agent", "hpcfs"),
            signer=Signer(scope[1], scope[2]) if scope is not None else None,
        )

    async def _pool(self, parts: SplitResult) -> Pool:
        """Return the connections to a URL's host, which it has."""
        name, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        pool = self._pools.get((parts.scheme, name, port))
        if pool is None:
            tls = None
            if parts.scheme == "https":
                tls = await asyncio.to_thread(_tls_context, self._login.trusted())
            made = Pool(HostAddress(name, port, tls), self._limits, self._answered_in)
            pool = self._pools.setdefault((parts.scheme, name, port), made)
        return pool


def _unfit(how: str) -> HTTPClientError:
    return HTTPClientError(error=UnfitResponse(f"the answer of the S3 server is {how}"))


def _is_proxied(url: str) -> bool:
    return urlsplit(url).scheme in get_environ_proxies(url)


def _host_header(parts: SplitResult) -> str:
    name = parts.hostname or ""
    shown = f"[{name}]" if ":" in name else name
    return shown if parts.port in (None, _PORTS[parts.scheme]) else f"{shown}:{parts.port}"


@contextmanager
def _in_words_of_botocore(pool: Pool, operation: str = "") -> Iterator[None]:
    """Raise what fails on a connection as botocore does, which names the endpoint too; note that
    `operation` may have reached the server."""
    where = str(pool.host)
    try:
        yield
    except UnusualResponse:
        raise
    except NotOpened as error:
        raise EndpointConnectionError(endpoint_url=where, error=error) from error
    except OSError as error:
        note_sent(operation)
        kind = ReadTimeoutError if isinstance(error, TimeoutError) else ConnectionClosedError
        raise kind(endpoint_url=where, error=error) from error


def _head_of(request: Any, parts: SplitResult, body: bytes) -> bytes:
    """Return all of a request of botocore's but its body. Raises ValueError for what can't be
    sent."""
    headers = {name.lower(): _text(value) for name, value in request.headers.items()}
    if "transfer-encoding" in headers or int(headers.get("content-length", len(body))) != len(body):
        raise ValueError("a body of unknown length")
    lines = [
        f"{request.method} {parts.path or '/'}{'?' if parts.query else ''}{parts.query} HTTP/1.1",
        f"host: {_host_header(parts)}",
        f"user-agent: {headers.get('user-agent', 'hpcfs')}",
        "accept-encoding: identity",
    ]
    for name, value in headers.items():
        if name not in _NOT_SENT_ON and name != "content-length":
            if not _is_sendable(name) or not _is_sendable(value):
                raise ValueError("a header that can't be sent")
            lines.append(f"{name}: {value}")
    if request.method in ("PUT", "POST"):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "\r\n"]).encode()


def _tls_context(trusted: Any) -> ssl.SSLContext:
    """Return a context like botocore's, which leaves the host's name to urllib3."""
    context: ssl.SSLContext = create_urllib3_context()
    context.check_hostname = True
    context.load_verify_locations(get_cert_path(trusted))
    return context


async def _payload(body: bytes, route: Route) -> str:
    """Return what is signed of a body. As with botocore, over TLS that is nothing."""
    if not body:
        return EMPTY_SHA256
    if route.pool.secure:
        return UNSIGNED
    if len(body) <= THREAD_BYTES:
        return hashlib.sha256(body).hexdigest()
    digest = await asyncio.to_thread(hashlib.sha256, body)
    return digest.hexdigest()


def _head(
    route: Route,
    operation: str,
    bucket: str,
    parameters: Mapping[str, Any],
    keys: Keys | None,
    payload: str,
) -> bytes:
    """Return all of a request but its body. Raises ValueError for what can't be sent."""
    method = _METHODS[operation]
    path = route.path + quote(parameters["Key"], safe="/~") if "Key" in parameters else route.path
    query = _query(operation, parameters)
    headers = {"host": route.host}
    for name, value in parameters.items():
        if name in _HEADERS:
            headers[_HEADERS[name]] = value
    for name, value in parameters.get("Metadata", {}).items():
        headers[f"x-amz-meta-{name}"] = value
    if "CopySource" in parameters:
        source = quote(parameters["CopySource"]["Key"], safe="/~")
        headers["x-amz-copy-source"] = f"{bucket}/{source}"
    signed = headers
    if route.signer is not None and keys is not None:
        signed = route.signer.sign(method, path, query, headers, keys, payload=payload)
    for name, value in signed.items():  # who provides credentials may be a server, too
        if not _is_sendable(name) or not _is_sendable(value):
            raise ValueError("a header that can't be sent")
    lines = [
        f"{method} {path}{'?' if query else ''}{query} HTTP/1.1",
        *(f"{name}: {value}" for name, value in signed.items()),
        f"user-agent: {route.user_agent}",
        "accept-encoding: identity",
    ]
    if method == "PUT":
        lines.append(f"content-length: {len(parameters.get('Body', b''))}")
    return "\r\n".join([*lines, "\r\n"]).encode()


def _is_sendable(text: str) -> bool:
    return text.isascii() and text.isprintable() and text == text.strip()


def _query(operation: str, parameters: Mapping[str, Any]) -> str:
    """Return the query in the order that the signature needs."""
    given = {_QUERY[name]: str(value) for name, value in parameters.items() if name in _QUERY}
    if operation == "list_objects_v2":
        given |= {"list-type": "2", "encoding-type": "url"}
    return "&".join(f"{name}={quote(given[name], safe='-_.~')}" for name in sorted(given))


def _parsed(operation: str, answer: HttpResponse) -> dict[str, Any]:
    """Parse a response. Raises ValueError."""
    if operation == "list_objects_v2":
        if answer.body is None:
            raise ValueError("the listing is too long")
        return parse_listing(answer.body)
    if operation == "copy_object":
        return parse_copy(answer.body or b"")
    found = parse_object(answer.headers)
    if operation == "get_object" and answer.body is not None:
        found |= {"Body": answer.body, "ContentLength": len(answer.body)}
    return found


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
