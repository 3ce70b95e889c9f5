"""Objects without botocore's machinery, but as botocore would: where, and as whom.

botocore prepares one request for each bucket, which is not sent: it says which host, path, region
and kind of signature this bucket has, so nothing of AWS's rules is repeated here. Credentials come
from its chain at every request, fresh ones when they expire. Anything out of the ordinary (a proxy,
another signature, a redirect, a refusal to be retried, anything that is not understood) is left to
botocore: `answer` returns None, and the caller asks again by way of the client.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from botocore.exceptions import ClientError
from botocore.httpsession import create_urllib3_context, get_cert_path
from botocore.parsers import create_parser
from botocore.utils import get_environ_proxies

from hpcfs.remotes.s3.http import ERROR_BYTES, HttpRequest, HttpResponse, UnusualResponse
from hpcfs.remotes.s3.pool import HostAddress, NotOpened, Pool
from hpcfs.remotes.s3.responses import is_fit_to_parse, parse_copy, parse_listing, parse_object
from hpcfs.remotes.s3.sent_writes import note_sent
from hpcfs.remotes.s3.signing import ALGORITHM, EMPTY_SHA256, UNSIGNED, Keys, Signer

log = logging.getLogger(__name__)
_SCOPE = re.compile(
    re.escape(ALGORITHM) + r" Credential=[^,]+/\d{8}/([^/,]+)/([^/,]+)/aws4_request,"
)
LISTING_BYTES = 16 * 1024 * 1024
"""A page has 1000 keys of at most 1 KiB, thrice that when quoted."""
STRANGE_IN_A_ROW = 10
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
    "CopySourceIfMatch": "x-amz-copy-source-if-match",
    "MetadataDirective": "x-amz-metadata-directive",
    "StorageClass": "x-amz-storage-class",
}
_ELSEWHERE = frozenset({"Key", "Body", "Metadata", "CopySource", *_QUERY})
"""Parameters that have a place of their own in a request."""
_FINAL = frozenset({401, 403, 404, 412, 416, 429, 503})
"""Refusals that asking again at once does not change: a refused credential must not be tried twice,
and a server that is asked too much (429, 503) not sooner than pacing.py lets it."""
_FINAL_CODES = (b"<Code>BadDigest</Code>", b"<Code>InvalidDigest</Code>")
"""Among those with 400, as for botocore. rclone's server has ended the upload with this answer, and
would say of the same part that there is no such upload."""


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


class Direct:
    """Timeouts are in seconds: for a connection, and without a byte. `answered_in` hears how far
    away the server is."""

    def __init__(
        self,
        login: DirectLogin,
        answered_in: Callable[[float], None],
        connect_timeout: float,
        read_timeout: float,
    ) -> None:
        self._login, self._answered_in = login, answered_in
        self._timeouts = connect_timeout, read_timeout
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
        called as a large body is on its way. Raises ClientError for refusals, TimeoutError, and
        what finding the credentials raises.
        """
        route = await self._route(bucket)
        if route is None or not parameters.keys() <= _HEADERS.keys() | _ELSEWHERE:
            return None
        if "CopySource" in parameters and ":" in bucket:  # a tenant's, or an access point's
            return None
        if operation != "get_object":
            limit = LISTING_BYTES if operation == "list_objects_v2" else ERROR_BYTES
        body = parameters.get("Body", b"")
        payload = await _payload(body, route)
        keys = await self._login.keys()
        try:
            head = _head(route, operation, bucket, parameters, keys, payload)
            bodiless = _METHODS[operation] == "HEAD"
            found = await route.pool.ask(HttpRequest(head, bodiless, limit, body, sent))
            note_sent(operation)
            if found.status < 300:
                parsed = _parsed(operation, found)
                self._strange.pop(bucket, None)
                return parsed
        except TimeoutError:
            raise
        except (UnusualResponse, ValueError) as error:
            note_sent(operation)
            self._note_strange(bucket, error)
            return None
        except OSError as error:
            if not isinstance(error, NotOpened):
                note_sent(operation)
            log.debug("%s by way of botocore: %s", operation, error)
            return None
        if found.status in _FINAL or any(code in (found.body or b"") for code in _FINAL_CODES):
            refusal: Any = self._refusal(found)
            raise ClientError(refusal, operation)
        self._routes.pop(bucket, None)  # it may have been the wrong region's
        return None

    def _note_strange(self, bucket: str, error: Exception) -> None:
        """Count an answer that was not understood: a server that gives only such ones is not asked
        each time in vain."""
        log.debug("an answer for %s is left to botocore: %s", bucket, error)
        self._strange[bucket] = self._strange.get(bucket, 0) + 1
        if self._strange[bucket] >= STRANGE_IN_A_ROW:
            log.warning("bucket %s is read by way of botocore from now on: %s", bucket, error)
            self._routes[bucket] = None

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return sum(map(len, self._pools.values()))

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
        proxied = parts.scheme in get_environ_proxies(request.url)
        unsigned = await self._login.keys() is None and "authorization" not in headers
        if (scope is None and not unsigned) or parts.query or proxied or not parts.hostname:
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
            signer=Signer(scope[1], scope[2]) if scope is not None else None,
        )

    async def _pool(self, scheme: str, name: str, port: int) -> Pool:
        pool = self._pools.get((scheme, name, port))
        if pool is None:
            tls = None
            if scheme == "https":
                tls = await asyncio.to_thread(_tls_context, self._login.trusted())
            pool = Pool(HostAddress(name, port, tls), *self._timeouts, self._answered_in)
            self._pools[scheme, name, port] = pool
        return pool


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
