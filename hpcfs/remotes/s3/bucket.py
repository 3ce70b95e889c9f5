"""One bucket of a site: requests in, values or `RemoteError`s out.

Nothing above this module sees a botocore response. It knows keys, not paths; what a server answers
(sizes, keys, tokens) is checked here. No response body is left unread.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, BinaryIO

from hpcfs.remotes.base import checked_size
from hpcfs.remotes.s3.direct import Direct
from hpcfs.remotes.s3.errors import Health, translating
from hpcfs.remotes.s3.metadata import NANOSECONDS, Metadata, decode, encode
from hpcfs.remotes.s3.names import MARKER, checked_key
from hpcfs.remotes.s3.pool import Gate
from hpcfs.transfer.messages import (
    Changed,
    NotFound,
    ProtocolError,
    RemoteError,
    RemoteFailure,
    WrongSettings,
)

KEPT_HEADERS = (
    *("CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "ContentType"),
    *("Expires", "WebsiteRedirectLocation", "StorageClass", "ServerSideEncryption"),
    *("SSEKMSKeyId", "BucketKeyEnabled"),
)
"""What belongs to an object beside its metadata, by the names that requests and answers share."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/")
_MD5 = re.compile(r"[0-9a-f]{32}\Z")


@dataclass(frozen=True)
class Summary:
    """What a listing says of an object. `etag` is without quotes, "" where there is none."""

    key: str
    size: int
    etag: str
    modified_ns: int
    storage_class: str = field(default="", compare=False)

    @property
    def version(self) -> bytes:
        """The content's identity. Whole seconds: listings and headers differ in the rest."""
        if self.etag:
            return self.etag.encode()
        return f"{self.size}:{self.modified_ns // NANOSECONDS}".encode()


@dataclass(frozen=True)
class Info(Summary):
    """What an object's headers say of it."""

    metadata: Metadata = field(default_factory=Metadata)
    headers: Mapping[str, Any] = field(default_factory=dict)
    server_time_ns: int | None = None

    def has_version(self, version: bytes) -> bool:
        sized = f"{self.size}:{self.modified_ns // NANOSECONDS}".encode()
        return version in (self.version, sized)


@dataclass(frozen=True)
class Page:
    """A piece of a listing; `prefixes` end in the delimiter."""

    objects: list[Summary]
    prefixes: list[str]


@dataclass(frozen=True)
class Access:
    """What a site's buckets share. `client` gives botocore's, making it at its first use."""

    client: Callable[[], Awaitable[Any]]
    direct: Direct
    gate: Gate
    health: Health


class Bucket:
    """Reads go the direct way where there is one, and only as many at once as the gate lets
    through; the rest goes by way of botocore's client."""

    def __init__(self, name: str, access: Access) -> None:
        self.name = name
        self._access = access
        self._lasting: RemoteError | None = None

    async def call(self, operation: str, subject: str, **parameters: Any) -> dict[str, Any]:
        """One request of S3's API."""
        with self._watching(subject):
            return await self._by_client(operation, parameters)

    async def _read(
        self, operation: str, subject: str, parameters: dict[str, Any], limit: int = 0
    ) -> dict[str, Any]:
        """The same for the operations that there is a direct way for."""
        with self._watching(subject):
            answer = await self._access.direct.answer(operation, self.name, parameters, limit)
            if answer is None:
                answer = await self._by_client(operation, parameters)
            return answer

    async def _by_client(self, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        client = await self._access.client()
        answer: dict[str, Any] = await getattr(client, operation)(Bucket=self.name, **parameters)
        return answer

    @contextmanager
    def _watching(self, subject: str) -> Iterator[None]:
        self.check()
        try:
            with self._access.health.watching(subject):
                yield
        except WrongSettings as error:
            self._lasting = error
            raise

    def check(self) -> None:
        """Raises what can't be cured by asking again."""
        if self._lasting is not None:
            raise type(self._lasting)(*self._lasting.args)

    def remember(self, error: RemoteError) -> RemoteError:
        self._lasting = error
        return error

    async def head(self, key: str, *, urgent: bool = True) -> Info | None:
        """None where there is no such object. `urgent` requests overtake those that are not."""
        try:
            async with self._access.gate.turn(0, urgent=urgent):
                answer = await self._read("head_object", key, {"Key": key})
        except NotFound:
            return None
        return _info(key, answer)

    async def get(
        self, key: str, version: bytes, offset: int, length: int, *, urgent: bool = True
    ) -> bytes | bytearray:
        """A range of one version. Raises Changed when that is not what is there."""
        parameters = {"Key": key, "Range": f"bytes={offset}-{offset + length - 1}"}
        if b":" not in version:
            parameters["IfMatch"] = f'"{version.decode()}"'
        try:
            async with self._access.gate.turn(length, urgent=urgent):
                answer = await self._read("get_object", key, parameters, length)
                return await self._range_of(answer, key, version, offset, length)
        except NotFound:
            raise Changed(f"{key} was removed on the server: it can't be read on") from None

    async def _range_of(
        self, answer: dict[str, Any], key: str, version: bytes, offset: int, length: int
    ) -> bytes | bytearray:
        """The bytes of an answer, which is checked first. A body left unread would break the
        connection for whoever comes next: leaving its context closes it."""
        body = answer.get("Body")
        async with AsyncExitStack() as stack:
            if body is not None and not isinstance(body, bytearray):
                await stack.enter_async_context(body)
            total = _check_range(key, answer, offset, length)
            info = _info(key, {**answer, "ContentLength": total})
            if not info.has_version(version):
                raise Changed(f"{key} has changed on the server: open it again")
            if isinstance(body, bytearray):
                return body
            with translating(key):
                data: bytes = await body.read() if body is not None else b""
        if len(data) != length:
            raise Changed(f"{key} ended after {len(data)} of {length} bytes: open it again")
        return data

    async def put(
        self,
        key: str,
        body: bytes,
        metadata: Metadata,
        headers: Mapping[str, Any],
        md5: str | None = None,
    ) -> str:
        """The new object's ETag; `md5` is compared with it where the ETag is an MD5."""
        answer = await self.call(
            "put_object",
            key,
            Key=checked_key(key),
            Body=body,
            Metadata=encode(metadata),
            **_settable(headers),
        )
        etag = plain_etag(answer.get("ETag"))
        encrypted = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
        if md5 and _MD5.match(etag) and not encrypted and etag != md5:
            raise RemoteFailure(f"{key}: what S3 stored is not what was sent: write it again")
        return etag

    async def copy(
        self,
        source: Summary,
        key: str,
        metadata: Metadata | None = None,
        headers: Mapping[str, Any] | None = None,
    ) -> str:
        """Within the bucket, on the server; returns the ETag.

        `metadata` and `headers` together replace the source's.
        """
        parameters: dict[str, Any] = {"MetadataDirective": "COPY"}
        if metadata is not None:
            parameters = {"MetadataDirective": "REPLACE", "Metadata": encode(metadata)}
            parameters |= _settable(headers or {})
        elif source.storage_class:  # COPY does not copy this one
            parameters["StorageClass"] = source.storage_class
        answer = await self.call(
            "copy_object",
            key,
            Key=checked_key(key),
            CopySource={"Bucket": self.name, "Key": source.key},
            **if_match(source),
            **parameters,
        )
        return plain_etag(answer.get("CopyObjectResult", {}).get("ETag"))

    async def delete(self, key: str) -> None:
        """S3 does not say whether the object was there."""
        await self.call("delete_object", key, Key=key)

    async def first(self, prefix: str, count: int, *, delimiter: str = "") -> Page:
        """The beginning of a listing."""
        page, _ = await self._page(prefix, delimiter, {"MaxKeys": count})
        return page

    async def pages(self, prefix: str, *, delimiter: str = "") -> AsyncIterator[Page]:
        """All keys that begin with `prefix`, page by page."""
        token: str | None = None
        while True:
            more = {"ContinuationToken": token} if token else {}
            page, following = await self._page(prefix, delimiter, more)
            yield page
            if following is None:
                return
            if following == token:
                raise ProtocolError(f"the S3 server's listing of {prefix!r} does not end")
            token = following

    async def _page(
        self, prefix: str, delimiter: str, parameters: dict[str, Any]
    ) -> tuple[Page, str | None]:
        if delimiter:
            parameters = {**parameters, "Delimiter": delimiter}
        subject = prefix or f"bucket {self.name}"
        async with self._access.gate.turn(0, urgent=True):
            answer = await self._read("list_objects_v2", subject, {"Prefix": prefix, **parameters})
        objects = [_summary(found) for found in answer.get("Contents", [])]
        prefixes = [str(found.get("Prefix", "")) for found in answer.get("CommonPrefixes", [])]
        page = Page(
            [found for found in objects if found.key.startswith(prefix)],
            [found for found in prefixes if found.startswith(prefix) and found.endswith("/")],
        )
        if not answer.get("IsTruncated"):
            return page, None
        token = answer.get("NextContinuationToken")
        if not token:
            raise ProtocolError(f"the S3 server's listing of {prefix!r} breaks off")
        return page, str(token)

    async def create_upload(self, key: str, metadata: Metadata, headers: Mapping[str, Any]) -> str:
        answer = await self.call(
            "create_multipart_upload",
            key,
            Key=checked_key(key),
            Metadata=encode(metadata),
            **_settable(headers),
        )
        return str(answer["UploadId"])

    async def upload_part(
        self, key: str, upload: str, number: int, body: bytes | BinaryIO
    ) -> dict[str, Any]:
        answer = await self.call(
            "upload_part", key, Key=key, UploadId=upload, PartNumber=number, Body=body
        )
        return {"PartNumber": number, "ETag": answer["ETag"]}

    async def copy_part(
        self, key: str, upload: str, number: int, source: Summary, offset: int, length: int
    ) -> dict[str, Any]:
        answer = await self.call(
            "upload_part_copy",
            key,
            Key=key,
            UploadId=upload,
            PartNumber=number,
            CopySource={"Bucket": self.name, "Key": source.key},
            CopySourceRange=f"bytes={offset}-{offset + length - 1}",
            **if_match(source),
        )
        return {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}

    async def complete_upload(self, key: str, upload: str, parts: list[dict[str, Any]]) -> None:
        listed = {"Parts": parts}
        await self.call(
            "complete_multipart_upload", key, Key=key, UploadId=upload, MultipartUpload=listed
        )

    async def abort_upload(self, key: str, upload: str) -> None:
        await self.call("abort_multipart_upload", key, Key=key, UploadId=upload)


def if_match(source: Summary) -> dict[str, str]:
    return {"CopySourceIfMatch": f'"{source.etag}"'} if source.etag else {}


def plain_etag(value: object) -> str:
    """Some servers quote it in headers and not in listings."""
    return str(value or "").strip('"')


def _settable(headers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: headers[name] for name in KEPT_HEADERS if name in headers}


def _nanoseconds(moment: object) -> int:
    """To the microsecond, without a float's rounding."""
    if not isinstance(moment, datetime):
        return 0
    since = moment.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    return ((since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds) * 1000


def _storage_class(found: Mapping[str, Any]) -> str:
    """ "" for the default one, which listings name and headers don't."""
    name = str(found.get("StorageClass") or "")
    return "" if name == "STANDARD" else name


def _summary(found: Mapping[str, Any]) -> Summary:
    key = str(found.get("Key", ""))
    size = checked_size(found.get("Size"), key.encode())
    return Summary(
        key, size, plain_etag(found.get("ETag")), _nanoseconds(found.get("LastModified"))
    )


def _info(key: str, answer: Mapping[str, Any]) -> Info:
    http_headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return Info(
        key=key,
        size=checked_size(answer.get("ContentLength"), key.encode()),
        etag=plain_etag(answer.get("ETag")),
        modified_ns=_nanoseconds(answer.get("LastModified")),
        storage_class=_storage_class(answer),
        metadata=decode(answer.get("Metadata", {}), directory=key.endswith(("/", MARKER))),
        headers={name: answer[name] for name in KEPT_HEADERS if answer.get(name)},
        server_time_ns=_date(http_headers.get("date")),
    )


@lru_cache(maxsize=1024)
def _date(text: str | None) -> int | None:
    try:
        return _nanoseconds(parsedate_to_datetime(text)) if text else None
    except ValueError:
        return None


def _check_range(key: str, answer: Mapping[str, Any], offset: int, length: int) -> int:
    """The whole object's size. Raises Changed when the answer is shorter than what was asked."""
    sent = checked_size(answer.get("ContentLength"), key.encode())
    given = str(answer.get("ContentRange") or "")
    found = _CONTENT_RANGE.match(given)
    begins = int(found[1]) if found else 0
    total = given.rpartition("/")[2]
    whole = int(total) if found and total.isdigit() else begins + sent
    if begins == offset and sent < length:
        raise Changed(f"{key} has become shorter on the server: open it again")
    if begins != offset or sent != length:
        raise ProtocolError(f"{key}: the S3 server sent other bytes than the range asked for")
    return whole
