"""Parses responses to the form that botocore gives them.

The two ways to a server (direct.py, botocore) must say the same: a test asks both. Whatever is
malformed raises ValueError, and then botocore decides what it means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any
from xml.etree import ElementTree

from botocore.compat import unquote_str

_TEXTS = {
    "cache-control": "CacheControl",
    "content-disposition": "ContentDisposition",
    "content-encoding": "ContentEncoding",
    "content-language": "ContentLanguage",
    "content-range": "ContentRange",
    "content-type": "ContentType",
    "etag": "ETag",
    "x-amz-checksum-crc32": "ChecksumCRC32",
    "x-amz-checksum-crc32c": "ChecksumCRC32C",
    "x-amz-checksum-crc64nvme": "ChecksumCRC64NVME",
    "x-amz-checksum-sha1": "ChecksumSHA1",
    "x-amz-checksum-sha256": "ChecksumSHA256",
    "x-amz-checksum-type": "ChecksumType",
    "x-amz-object-lock-legal-hold": "ObjectLockLegalHoldStatus",
    "x-amz-object-lock-mode": "ObjectLockMode",
    "x-amz-server-side-encryption": "ServerSideEncryption",
    "x-amz-server-side-encryption-customer-algorithm": "SSECustomerAlgorithm",
    "x-amz-server-side-encryption-aws-kms-key-id": "SSEKMSKeyId",
    "x-amz-storage-class": "StorageClass",
    "x-amz-website-redirect-location": "WebsiteRedirectLocation",
}
_METADATA = "x-amz-meta-"
MAX_TIME_LETTERS = 100
_MONTHS = {
    name: number
    for number, name in enumerate(
        ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"), 1
    )
}


def parse_object(headers: Mapping[str, str]) -> dict[str, Any]:
    """Parse the headers of HeadObject and GetObject, as far as this package needs them."""
    answer: dict[str, Any] = {"ResponseMetadata": {"HTTPHeaders": headers}}
    metadata: dict[str, str] = {}
    for name, value in headers.items():
        if name.startswith(_METADATA):
            metadata[name[len(_METADATA) :]] = value
        elif name in _TEXTS:
            answer[_TEXTS[name]] = value
    answer["Metadata"] = metadata
    if "content-length" in headers:
        answer["ContentLength"] = int(headers["content-length"])
    if "last-modified" in headers:
        answer["LastModified"] = http_time(headers["last-modified"])
    if "x-amz-server-side-encryption-bucket-key-enabled" in headers:
        enabled = headers["x-amz-server-side-encryption-bucket-key-enabled"]
        answer["BucketKeyEnabled"] = enabled.lower() == "true"
    if "x-amz-tagging-count" in headers:
        answer["TagCount"] = int(headers["x-amz-tagging-count"])
    if "x-amz-object-lock-retain-until-date" in headers:
        until = headers["x-amz-object-lock-retain-until-date"]
        answer["ObjectLockRetainUntilDate"] = _xml_time(until)
    if "expires" in headers:
        answer |= _expiry(headers["expires"])
    return answer


def _expiry(text: str) -> dict[str, Any]:
    """Writers may put anything there; what is no time is left out, as botocore does."""
    try:
        return {"Expires": http_time(text)}
    except ValueError:
        return {}


@lru_cache(maxsize=4096)
def http_time(text: str) -> datetime:
    """Servers send one form; for the others that HTTP knows there is the standard library."""
    # Sun, 06 Nov 1994 08:49:37 GMT
    if len(text) > MAX_TIME_LETTERS:  # it would be kept
        raise ValueError("a time that is too long")
    if len(text) == 29 and text.endswith(" GMT") and text[8:11] in _MONTHS:
        day, year = int(text[5:7]), int(text[12:16])
        clock = int(text[17:19]), int(text[20:22]), int(text[23:25])
        return datetime(year, _MONTHS[text[8:11]], day, *clock, tzinfo=UTC)
    found = parsedate_to_datetime(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


@lru_cache(maxsize=4096)
def _xml_time(text: str) -> datetime:
    if len(text) > MAX_TIME_LETTERS:
        raise ValueError("a time that is too long")
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


_XML_ROOT = re.compile(rb"\s*<\?xml[^>]*\?>\s*<(?!html\b)[a-z]", re.IGNORECASE)
"""The beginning of an XML document that is no page in XHTML."""


def is_page(headers: Mapping[str, str], body: bytes | bytearray) -> bool:
    """Whether an answer is a page for people: OpenStack Swift calls its XML one, too."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "text/html" and bool(body) and _XML_ROOT.match(body) is None


MOST_MARKS = 300_000
"""Tags, and attributes, of one answer: a page has 1000 keys, with some ten elements each. In memory
an element takes a hundred times its shortest text."""


def is_fit_to_parse(body: bytes | bytearray) -> bool:
    """Whether it is small once it is parsed, too. Entities can be defined in UTF-16 as well, where
    every letter of the keyword has a zero beside it; S3 speaks UTF-8."""
    defines = b"<!DOCTYPE" in body or b"\0" in body
    return not defines and body.count(b"<") <= MOST_MARKS and body.count(b"=") <= MOST_MARKS


def parse_copy(body: bytes | bytearray) -> dict[str, Any]:
    """Parse the body of CopyObject. A failure may come with status 200, once the copying has
    begun."""
    return {"CopyObjectResult": dict(_texts(_root(body, "CopyObjectResult")))}


def _root(body: bytes | bytearray, tag: str) -> ElementTree.Element:
    if not is_fit_to_parse(body):
        raise ValueError("an answer that defines entities, or has too many elements")
    try:
        root = ElementTree.fromstring(bytes(body))  # noqa: S314 - without entities it is safe
    except (ElementTree.ParseError, LookupError) as error:  # an encoding that nobody knows
        raise ValueError(str(error)) from None
    if _local(root.tag) != tag:
        raise ValueError(f"an answer without {tag}")
    return root


def parse_listing(body: bytes | bytearray) -> dict[str, Any]:
    """Parse the body of ListObjectsV2. Keys come quoted: XML can't hold every character."""
    root = _root(body, "ListBucketResult")
    answer: dict[str, Any] = {}
    contents: list[dict[str, Any]] = []
    prefixes: list[dict[str, Any]] = []
    for child in root:
        name = _local(child.tag)
        if name == "Contents":
            contents.append(_listed(dict(_texts(child))))
        elif name == "CommonPrefixes":
            prefixes.append(_common(dict(_texts(child))))
        elif name in ("IsTruncated", "EncodingType", "NextContinuationToken"):
            answer[name] = child.text or ""
    answer["IsTruncated"] = answer.get("IsTruncated", "").strip().lower() == "true"
    if answer.get("EncodingType") == "url":
        for found in contents:
            found["Key"] = unquote_str(found["Key"])
        for found in prefixes:
            found["Prefix"] = unquote_str(found["Prefix"])
    return {**answer, "Contents": contents, "CommonPrefixes": prefixes}


def _common(texts: dict[str, str]) -> dict[str, str]:
    if "Prefix" not in texts:
        raise ValueError("a common prefix without a name")
    return texts


def _listed(texts: dict[str, str]) -> dict[str, Any]:
    if "Key" not in texts or "Size" not in texts:
        raise ValueError("an object without key or size")
    found: dict[str, Any] = {**texts, "Size": int(texts["Size"])}
    if "LastModified" in texts:
        found["LastModified"] = _xml_time(texts["LastModified"])
    return found


def _texts(element: ElementTree.Element) -> Iterator[tuple[str, str]]:
    for child in element:
        yield _local(child.tag), child.text or ""


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]
