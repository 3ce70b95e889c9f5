"""Reads what a server says of objects, and checks it: sizes, keys, times, ranges."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from hpcfs.model.errors import Changed, ProtocolError
from hpcfs.remotes.base import checked_size
from hpcfs.remotes.s3.metadata import MAX_TIME_NS, NANOSECONDS, Metadata, decode
from hpcfs.remotes.s3.names import MARKER
from hpcfs.remotes.s3.responses import http_time

KEPT_HEADERS = (
    *("CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "ContentType"),
    *("Expires", "WebsiteRedirectLocation", "StorageClass", "ServerSideEncryption"),
    *("SSEKMSKeyId", "BucketKeyEnabled"),
)
"""Headers of an object beside its metadata, by the names that requests and answers share."""
ACCESS = ("ACL", "GrantFullControl", "GrantRead", "GrantReadACP", "GrantWriteACP")
BELONGINGS = (
    *("Tagging", *ACCESS),
    *("ObjectLockMode", "ObjectLockRetainUntilDate", "ObjectLockLegalHoldStatus"),
)
"""The same, of what needs permissions of its own, or servers that know it (see
tags_and_acls.py)."""
_LOCK = ("ObjectLockMode", "ObjectLockRetainUntilDate")
PRIVATE = "private"
"""The access list that objects have by themselves: known, and not sent."""

DIRECTORY_TYPES = ("application/x-directory", "httpd/unix-directory")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/")
_NUMBER = re.compile(r"[0-9]{1,19}\Z")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MD5 = re.compile(r"[0-9a-f]{32}\Z")


@dataclass(frozen=True)
class Summary:
    """An object in a listing. `etag` is without quotes, "" where there is none."""

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
    """An object as its headers describe it."""

    metadata: Metadata = field(default_factory=Metadata)
    headers: Mapping[str, Any] = field(default_factory=dict)
    server_time_ns: int | None = None
    tag_count: int = 0

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory as s3fs wrote them once: "a" instead of "a/", told by the
        content type."""
        kind = str(self.headers.get("ContentType", ""))
        return self.size == 0 and kind in DIRECTORY_TYPES and not self.key.endswith(("/", MARKER))

    @property
    def is_link(self) -> bool:
        """Whether its metadata say that it is a symbolic link."""
        return self.metadata.mode is not None and stat.S_ISLNK(self.metadata.mode)

    @property
    def is_tagged(self) -> bool:
        """Whether the object has tags."""
        return bool(self.tag_count) or "Tagging" in self.headers

    def has_version(self, version: bytes) -> bool:
        """Return whether this is the version: an ETag, or a size and second where there is none."""
        sized = f"{self.size}:{self.modified_ns // NANOSECONDS}".encode()
        return version in (self.version, sized)


@dataclass(frozen=True)
class Page:
    """One page of a listing; `prefixes` end in the delimiter."""

    objects: list[Summary]
    prefixes: list[str]


def condition(base: bytes | None) -> dict[str, str]:
    """Return the parameters that ask for this version; a version that is no ETag can't be asked
    for."""
    if base is None or b":" in base:
        return {}
    return {"IfMatch": f'"{base.decode()}"'} if base else {"IfNoneMatch": "*"}


def if_match(source: Summary) -> dict[str, str]:
    """Return the condition that a copy's source is still this object."""
    return {"CopySourceIfMatch": f'"{source.etag}"'} if source.etag else {}


def plain_etag(value: object) -> str:
    """Return an ETag without quotes: some servers quote it in headers and not in listings."""
    return str(value or "").strip('"')


def is_md5(etag: str) -> bool:
    """Whether it may be the content's MD5: that of one sent in parts ends in their number."""
    return bool(_MD5.match(etag))


def access_of(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers that say who may read the object."""
    return {name: headers[name] for name in ACCESS if name in headers}


def without_access(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers without those that say who may read the object."""
    return {name: headers[name] for name in headers if name not in ACCESS}


def settable(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers that an object can be stored with."""
    names = (*KEPT_HEADERS, *BELONGINGS)
    found = {name: headers[name] for name in names if name in headers}
    if found.get("ACL") == PRIVATE:
        del found["ACL"]
    until = found.get("ObjectLockRetainUntilDate")
    if isinstance(until, datetime) and until <= datetime.now(UTC):  # which servers refuse
        found = {name: value for name, value in found.items() if name not in _LOCK}
    return found


def _nanoseconds(moment: object) -> int:
    """Convert a time, to the microsecond, without a float's rounding. A time that no file has
    counts as none."""
    if not isinstance(moment, datetime):
        return 0
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    found = ((since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds) * 1000
    return found if abs(found) <= MAX_TIME_NS else 0


def _storage_class(found: Mapping[str, Any]) -> str:
    """ "" for the default one, which listings name and headers don't."""
    name = str(found.get("StorageClass") or "")
    return "" if name == "STANDARD" else name


def summary_of(found: Mapping[str, Any]) -> Summary:
    """Return an object of a listing, checked. Raises ProtocolError."""
    key = str(found.get("Key", ""))
    size = checked_size(found.get("Size"), key.encode())
    modified_ns = _nanoseconds(found.get("LastModified"))
    return Summary(key, size, plain_etag(found.get("ETag")), modified_ns, _storage_class(found))


def info_of(key: str, answer: Mapping[str, Any]) -> Info:
    """Return what the headers of an object say, checked. Raises ProtocolError, for those of a web
    page too, which have neither an ETag nor a time."""
    http_headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if not answer.get("ETag") and not answer.get("LastModified"):
        raise ProtocolError(f"{key}: the S3 server's answer is not that of an object")
    return Info(
        key=key,
        size=checked_size(answer.get("ContentLength"), key.encode()),
        etag=plain_etag(answer.get("ETag")),
        modified_ns=_nanoseconds(answer.get("LastModified")),
        storage_class=_storage_class(answer),
        metadata=decode(
            answer.get("Metadata", {}),
            directory=key.endswith(("/", MARKER)) or answer.get("ContentType") in DIRECTORY_TYPES,
        ),
        headers={name: answer[name] for name in (*KEPT_HEADERS, *BELONGINGS) if answer.get(name)},
        server_time_ns=_date(http_headers.get("date")),
        tag_count=int(answer.get("TagCount") or 0),
    )


@lru_cache(maxsize=1024)
def _date(text: str | None) -> int | None:
    try:
        return (_nanoseconds(http_time(text)) or None) if text else None
    except ValueError:
        return None


def check_range(key: str, answer: Mapping[str, Any], offset: int, length: int) -> int:
    """The whole object's size. Raises Changed when the answer is shorter than what was asked."""
    sent = checked_size(answer.get("ContentLength"), key.encode())
    given = str(answer.get("ContentRange") or "")
    found = _CONTENT_RANGE.match(given)
    begins = int(found[1]) if found else 0
    total = _NUMBER.match(given.rpartition("/")[2])
    whole = int(total[0]) if found and total else begins + sent
    if begins == offset and sent < length:
        raise Changed(f"{key} has become shorter on the server: open it again")
    if begins != offset or sent != length:
        raise ProtocolError(f"{key}: the S3 server sent other bytes than the range asked for")
    return whole


async def read_body(body: Any, length: int) -> bytes:
    """No more than one byte more than `length`, which tells that it is too much."""
    data = bytearray()
    while len(data) <= length and (piece := await body.read(length + 1 - len(data))):
        data += piece
    return bytes(data)
