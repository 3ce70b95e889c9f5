"""One bucket of a site: requests in, values or `RemoteError`s out.

Nothing above this module sees a botocore response. It knows keys, not paths; what a server answers
(sizes, keys, tokens) is checked here. No response body is left unread.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from botocore.exceptions import ClientError

from hpcfs.model.errors import (
    Changed,
    Conflict,
    InvalidRequest,
    IsADirectory,
    NotFound,
    NotSupported,
    PermissionDenied,
    ProtocolError,
    RemoteError,
    RemoteFailure,
    WrongSettings,
)
from hpcfs.remotes.base import checked_size
from hpcfs.remotes.s3 import deadlines
from hpcfs.remotes.s3.access import Access
from hpcfs.remotes.s3.checksums import CRC32, PartSent, UploadChecks, proof_of
from hpcfs.remotes.s3.health import LastingFailure
from hpcfs.remotes.s3.metadata import Metadata, encode
from hpcfs.remotes.s3.names import checked_key
from hpcfs.remotes.s3.objects import (
    BELONGINGS,
    Info,
    Page,
    Summary,
    condition,
    if_match,
    info_of,
    plain_etag,
    settable,
    summary_of,
)
from hpcfs.remotes.s3.reading import RangeRead, ReadChecks, range_of
from hpcfs.remotes.s3.translate import (
    is_fault,
    is_refusal,
    is_throttling,
    is_worded,
    s3_code,
    translate,
    unparsable_refused,
)

log = logging.getLogger(__name__)
T = TypeVar("T")
DELETED_AT_ONCE = 1000
"""What S3 takes in one request."""


@dataclass(frozen=True)
class MultipartSession:
    """An upload in parts. `with_crc`: the server wants to have a CRC-32 with each of them."""

    id: str
    with_crc: bool = False


class Bucket:
    """Requests go the direct way where there is one, and those that move bytes only as many at once
    as the gates let through; the rest goes by way of botocore's client."""

    def __init__(self, name: str, access: Access) -> None:
        self.name = name
        self._access = access
        self.login, self.server = access.login, access.server
        self._checks = UploadChecks(access.server)
        self._read_checks = ReadChecks(access.server)
        self._lasting = LastingFailure()

    async def call(self, operation: str, subject: str, **parameters: Any) -> dict[str, Any]:
        """Make one request of S3's API, by botocore's name of the operation. Raises RemoteError."""

        async def ask() -> dict[str, Any]:
            return await self._by_client(operation, parameters)

        with self._watching(subject):
            return await self._access.ask(ask)

    async def _directly(
        self,
        operation: str,
        subject: str,
        parameters: dict[str, Any],
        limit: int = 0,
        sent: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Make a request for which there is a direct way."""

        async def ask() -> dict[str, Any]:
            answer = await self._access.direct.answer(operation, self.name, parameters, limit, sent)
            if answer is None:
                answer = await self._by_client(operation, parameters)
            return answer

        with self._watching(subject):
            return await self._access.ask(ask)

    async def _by_client(self, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        client = await self._access.login.client()
        body: Any = parameters.get("Body")
        if hasattr(body, "seek"):  # it may have been sent before
            body.seek(0)
        with unparsable_refused():
            made: dict[str, Any] = await getattr(client, operation)(Bucket=self.name, **parameters)
        return made

    @contextmanager
    def _watching(self, subject: str) -> Iterator[None]:
        self._lasting.check()
        try:
            with self._access.health.watching(subject):
                yield
        except WrongSettings as error:
            self._lasting.failed(error)
            raise
        except RemoteError as error:
            if is_worded(error) and not is_refusal(error) and not is_fault(error):
                self._lasting.succeeded()
            raise
        self._lasting.succeeded()

    def forget(self) -> None:
        """Forget what was remembered: the user has mended it."""
        self._lasting.succeeded()

    def remember(self, error: RemoteError) -> RemoteError:
        """Answer the next requests with this error (see LastingFailure). Returns it."""
        return self._lasting.failed(error)

    async def head(self, key: str, *, urgent: bool = True) -> Info | None:
        """Return what the object's headers say, or None where there is no such object. `urgent`
        requests overtake those that are not."""
        try:
            async with self._access.gate.turn(0, urgent=urgent):
                answer = await self._directly("head_object", key, {"Key": key})
        except NotFound:
            return None
        return info_of(key, answer)

    async def get(
        self, key: str, version: bytes, offset: int, length: int, *, urgent: bool = True
    ) -> bytes | bytearray:
        """Return `length` bytes of one version, compared with what the server says of them.

        Raises Changed when another version is there.
        """
        parameters = {
            "Key": key,
            "Range": f"bytes={offset}-{offset + length - 1}",
            "ChecksumMode": "ENABLED",
        }
        if b":" not in version:
            parameters["IfMatch"] = f'"{version.decode()}"'

        async def ask() -> RangeRead:
            async with self._access.gate.turn(length, urgent=urgent):
                answer = await self._directly("get_object", key, parameters, length)
                return await range_of(answer, key, version, offset, length)

        try:
            found = await ask()
            if not await self._read_checks.holds(found):
                log.warning("%s arrived damaged: it is read again over another connection", key)
                self._access.direct.drop_idle()
                found = await self._read_checks.settled(found, await ask())
            return found.data
        except NotFound:
            raise Changed(f"{key} was removed on the server: it can't be read on") from None

    @asynccontextmanager
    async def sending(self, size: int) -> AsyncIterator[None]:
        """Around what reads a body of `size` bytes and sends it: bounds the memory for them."""
        async with self._access.sending.turn(size, urgent=False):
            yield

    async def put(
        self,
        key: str,
        body: bytes,
        metadata: Metadata,
        headers: Mapping[str, Any],
        *,
        base: bytes | None = None,
        sent: Callable[[], None] | None = None,
    ) -> str:
        """The new object's ETag. `base` is the version that is replaced (see UploadRequest).

        Raises Conflict where the server has another one.
        """
        asked = {
            "Key": checked_key(key),
            "Body": body,
            "Metadata": encode(metadata),
            **settable(headers),
            **condition(base),
        }
        with self._conditional(key, base):
            try:
                stored = await self._put(asked, headers, sent)
            except IsADirectory:
                await self._make_room(key, base)
                asked.pop("IfMatch", None)
                stored = await self._put(asked | condition(b""), headers, sent)
        return stored.etag

    async def _put(
        self, asked: dict[str, Any], headers: Mapping[str, Any], sent: Callable[[], None] | None
    ) -> PartSent:
        with_crc = self._checks.want_crc(headers)

        async def send(asked: dict[str, Any]) -> PartSent:
            try:
                return await self._send("put_object", asked, sent, with_crc=with_crc)
            except RemoteError as error:
                if not with_crc or not self._checks.refused_crc(error):
                    raise
            return await self._send("put_object", asked, sent, with_crc=False)

        return await _with_belongings(asked, send)

    async def _make_room(self, key: str, base: bytes | None) -> None:
        """versitygw takes an object with a name of more than 237 bytes for a directory when it is
        to be replaced. Raises IsADirectory where it is one, and Conflict."""
        found = await self.head(key)
        if found is None:
            raise IsADirectory(f"{key}: the server has a directory of this name")
        if base is not None and not (base and found.has_version(base)):
            raise Conflict(f"{key} is not what it was when it was opened")
        log.info("%s can't be replaced on this server: it is removed first", key)
        await self.delete(key)

    async def _send(
        self,
        operation: str,
        asked: dict[str, Any],
        sent: Callable[[], None] | None,
        *,
        with_crc: bool,
    ) -> PartSent:
        """Send a body, with what tells that it arrived."""
        proof = await proof_of(asked["Body"], with_crc=with_crc)
        key = asked["Key"]
        answer = await self._directly(operation, key, {**asked, **proof.parameters()}, sent=sent)
        return self._checks.compare(key, answer, proof)

    async def copy(
        self,
        source: Summary,
        key: str,
        metadata: Metadata | None = None,
        headers: Mapping[str, Any] | None = None,
    ) -> str:
        """Within the bucket, on the server; returns the ETag.

        `metadata` and `headers` together replace the source's. Without `metadata` those of
        `headers` count that the server does not copy by itself.
        """
        kept = settable(headers or {})
        parameters = {name: kept[name] for name in BELONGINGS if name in kept}
        parameters["MetadataDirective"] = "COPY"
        if metadata is not None:
            parameters = {"MetadataDirective": "REPLACE", "Metadata": encode(metadata)}
            parameters |= kept
        elif storage := source.storage_class or kept.get("StorageClass"):  # COPY leaves it behind
            parameters["StorageClass"] = storage
        if "Tagging" in parameters:
            parameters["TaggingDirective"] = "REPLACE"
        asked = {
            "Key": checked_key(key),
            "CopySource": {"Bucket": self.name, "Key": source.key},
            **if_match(source),
            **parameters,
        }

        async def send(asked: dict[str, Any]) -> dict[str, Any]:
            with deadlines.silence(deadlines.for_bytes(source.size)):
                return await self._directly("copy_object", key, asked)

        try:
            answer = await _with_belongings(asked, send)
        except IsADirectory:
            if key == source.key:
                raise
            await self._make_room(key, None)
            answer = await _with_belongings(asked, send)
        return plain_etag(answer.get("CopyObjectResult", {}).get("ETag"))

    @contextmanager
    def _conditional(self, key: str, base: bytes | None) -> Iterator[None]:
        """Turn the refusals of a condition that does not hold into Conflict: 412, 409 to one of two
        that come at once, 404 where there is nothing to match."""
        try:
            yield
        except (Changed, NotFound) as error:
            if base is None or s3_code(error) in ("NoSuchUpload", "NoSuchBucket"):
                raise
            raise Conflict(
                f"{key} is not what it was when it was opened: the server has another version"
            ) from None

    async def delete(self, key: str) -> None:
        """S3 does not say whether the object was there."""
        await self.call("delete_object", key, Key=key)

    async def delete_many(self, keys: Sequence[str]) -> None:
        """Remove DELETED_AT_ONCE objects at most."""
        left = list(keys)

        async def ask() -> None:
            listed = {"Objects": [{"Key": key} for key in left], "Quiet": True}
            answer = await self._by_client("delete_objects", {"Delete": listed})
            failures = {str(found.get("Key", "")): found for found in answer.get("Errors", [])}
            left[:] = [key for key in left if key in failures]
            for key, found in failures.items():
                about = {"Code": str(found.get("Code", "")), "Message": str(found.get("Message"))}
                refusal = ClientError({"Error": about}, "DeleteObjects")
                raise refusal if is_throttling(refusal) else translate(refusal, key)

        longest = deadlines.SILENCE + deadlines.DELETION * len(keys)
        with self._watching(keys[0]), deadlines.silence(longest):
            await self._access.ask(ask)

    async def first(self, prefix: str, count: int, *, delimiter: str = "") -> Page:
        """The beginning of a listing."""
        page, _ = await self._page(prefix, delimiter, {"MaxKeys": count})
        return page

    async def pages(self, prefix: str, *, delimiter: str = "") -> AsyncIterator[Page]:
        """Yield all keys that begin with `prefix`, page by page."""
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
        asked = {"Prefix": prefix, **parameters}
        async with self._access.gate.turn(0, urgent=True):
            with deadlines.silence(deadlines.SILENCE if "MaxKeys" in asked else deadlines.LISTING):
                answer = await self._directly("list_objects_v2", subject, asked)
        objects = [summary_of(found) for found in answer.get("Contents", [])]
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

    async def create_upload(
        self, key: str, metadata: Metadata, headers: Mapping[str, Any]
    ) -> MultipartSession:
        """Begin a multipart upload of an object."""
        asked = {"Key": checked_key(key), "Metadata": encode(metadata), **settable(headers)}
        with_crc = self._checks.want_crc(headers)

        async def begin(asked: dict[str, Any]) -> MultipartSession:
            operation = "create_multipart_upload"
            if with_crc:
                try:
                    answer = await self.call(operation, key, **asked, ChecksumAlgorithm=CRC32)
                except RemoteError as error:
                    if not self._checks.refused_crc(error):
                        raise
                else:
                    return _session(key, answer, answer.get("ChecksumAlgorithm") == CRC32)
            return _session(key, await self.call(operation, key, **asked))

        return await _with_belongings(asked, begin)

    async def upload_part(
        self,
        key: str,
        upload: MultipartSession,
        number: int,
        body: bytes | BinaryIO,
        sent: Callable[[], None] | None = None,
    ) -> PartSent:
        """Send a part. A body that is no bytes is streamed, and its MD5 is not known."""
        asked = {"Key": key, "UploadId": upload.id, "PartNumber": number, "Body": body}
        if isinstance(body, bytes):
            return await self._send("upload_part", asked, sent, with_crc=upload.with_crc)
        if upload.with_crc:
            asked["ChecksumAlgorithm"] = CRC32
        answer = await self.call("upload_part", key, **asked)
        return PartSent(plain_etag(answer.get("ETag")), crc=answer.get("ChecksumCRC32"))

    async def copy_part(
        self,
        key: str,
        upload: MultipartSession,
        number: int,
        source: Summary,
        offset: int,
        length: int,
    ) -> PartSent:
        """Copy a range on the server as a part. Raises NotSupported where the server does not copy:
        some take it for an empty part."""
        with deadlines.silence(deadlines.for_bytes(length)):
            answer = await self.call(
                "upload_part_copy",
                key,
                Key=key,
                UploadId=upload.id,
                PartNumber=number,
                CopySource={"Bucket": self.name, "Key": source.key},
                CopySourceRange=f"bytes={offset}-{offset + length - 1}",
                **if_match(source),
            )
        copied = answer.get("CopyPartResult", {})
        etag = plain_etag(copied.get("ETag"))
        if not etag:
            raise NotSupported(f"{key}: this S3 server can't copy parts of an object")
        return PartSent(etag, crc=copied.get("ChecksumCRC32"))

    async def parts(self, key: str, upload: MultipartSession) -> dict[int, int]:
        """The sizes of an upload's parts as the server has them, by number."""
        found: dict[int, int] = {}
        more: dict[str, Any] = {}
        while True:
            answer = await self.call("list_parts", key, Key=key, UploadId=upload.id, **more)
            for part in answer.get("Parts", []):
                size = checked_size(part.get("Size"), key.encode())
                found[int(part.get("PartNumber") or 0)] = size
            marker = answer.get("NextPartNumberMarker")
            if (
                not answer.get("IsTruncated")
                or not marker
                or more.get("PartNumberMarker") == marker
            ):
                return found
            more = {"PartNumberMarker": marker}

    async def complete_upload(
        self,
        key: str,
        upload: MultipartSession,
        parts: Sequence[PartSent],
        base: bytes | None = None,
    ) -> str:
        """`parts` in order; returns the object's ETag. Raises Conflict as `put` does."""
        listed = [
            {"PartNumber": number, "ETag": f'"{part.etag}"'}
            | ({"ChecksumCRC32": part.crc} if upload.with_crc and part.crc else {})
            for number, part in enumerate(parts, 1)
        ]
        with self._conditional(key, base):
            answer = await self.call(
                "complete_multipart_upload",
                key,
                Key=key,
                UploadId=upload.id,
                MultipartUpload={"Parts": listed},
                **condition(base),
            )
        self._checks.compare_joined(key, answer, parts)
        return plain_etag(answer.get("ETag"))

    async def abort_upload(self, key: str, upload: MultipartSession) -> None:
        """End a multipart upload, and free its parts. Raises RemoteError."""
        await self.call("abort_multipart_upload", key, Key=key, UploadId=upload.id)


def _session(key: str, answer: Mapping[str, Any], with_crc: bool = False) -> MultipartSession:
    if not answer.get("UploadId"):
        raise ProtocolError(f"{key}: the S3 server began an upload without a name")
    return MultipartSession(str(answer["UploadId"]), with_crc)


async def _with_belongings(
    asked: dict[str, Any], send: Callable[[dict[str, Any]], Awaitable[T]]
) -> T:
    """Send with tags and access list. A server that does not take these gets the object without,
    and the log says so."""
    try:
        return await send(asked)
    except (PermissionDenied, NotSupported, InvalidRequest, RemoteFailure) as error:
        lost = [name for name in BELONGINGS if name in asked]
        if not lost or not s3_code(error):
            raise
        plain = {name: value for name, value in asked.items() if name not in lost}
        plain.pop("TaggingDirective", None)
        stored = await send(plain)
        log.warning("%s loses %s: %s", asked["Key"], ", ".join(lost), error.message)
        return stored
