"""Reads the answer to a GET, and compares its bytes with what the server says of them.

A server says something of whole objects only: a checksum that their writer gave them (asked for by
x-amz-checksum-mode; AWS and MinIO give none with a range), or an ETag that is an MD5. So an object
that comes in one answer is compared, which small ones do; of the others TLS protects the bytes on
their way, where it is spoken. Forms:
docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import zlib
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from hpcfs.model.errors import Changed, RemoteFailure
from hpcfs.remotes.s3.checksums import is_kms
from hpcfs.remotes.s3.direct import THREAD_BYTES
from hpcfs.remotes.s3.objects import check_range, info_of, is_md5, plain_etag, read_body
from hpcfs.remotes.s3.server_capabilities import ServerCapabilities
from hpcfs.remotes.s3.translate import translating

log = logging.getLogger(__name__)
Data = bytes | bytearray
UNTOLD = 10_000
"""Objects that are remembered, at most."""


def _crc32(data: Data) -> bytes:
    return zlib.crc32(data).to_bytes(4, "big")


def _sha1(data: Data) -> bytes:
    return hashlib.sha1(data, usedforsecurity=False).digest()


def _sha256(data: Data) -> bytes:
    return hashlib.sha256(data).digest()


def _md5(data: Data) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


_SAID: dict[str, Callable[[Data], bytes]] = {
    "ChecksumCRC32": _crc32,
    "ChecksumSHA256": _sha256,
    "ChecksumSHA1": _sha1,
}
"""Checksums that can be told here, the quickest first: CRC-32C and CRC-64/NVME would need a library
of their own, and an object has an ETag, too."""


@dataclass(frozen=True)
class RangeRead:
    """The bytes of an answer, and what the server says of the whole object; `whole`: these bytes
    are all of it."""

    key: str
    data: Data
    answer: Mapping[str, Any]
    whole: bool

    @property
    def etag(self) -> str:
        """The version's ETag, without quotes."""
        return plain_etag(self.answer.get("ETag"))


async def range_of(
    answer: Mapping[str, Any], key: str, version: bytes, offset: int, length: int
) -> RangeRead:
    """Read the bytes of an answer, which is checked first. Raises Changed and ProtocolError. A body
    left unread would break the connection for whoever comes next: leaving its context closes it."""
    body = answer.get("Body")
    async with AsyncExitStack() as stack:
        if body is not None and not isinstance(body, bytearray):
            await stack.enter_async_context(body)
        described = info_of(key, answer)  # a web page is no shorter version
        total = check_range(key, answer, offset, length)
        if not replace(described, size=total).has_version(version):
            raise Changed(f"{key} has changed on the server: open it again")
        whole = offset == 0 and length == total
        if isinstance(body, bytearray):
            return RangeRead(key, body, answer, whole)
        with translating(key):
            data = await read_body(body, length) if body is not None else b""
    if len(data) != length:
        raise Changed(f"{key} ended after {len(data)} of {length} bytes: open it again")
    return RangeRead(key, data, answer, whole)


class ReadChecks:
    """The checks of one bucket, and what is known of its server."""

    def __init__(self, server: ServerCapabilities) -> None:
        self._server = server
        self._untold: dict[tuple[str, str], None] = {}
        """Keys and ETags of objects whose ETag says nothing of their bytes, the oldest first."""

    async def holds(self, found: RangeRead) -> bool:
        """Whether the bytes are those that the server says the object has, as far as it says."""
        proof = self._proof(found)
        if proof is None:
            return True
        digest, expected, by_etag = proof
        if len(found.data) <= THREAD_BYTES:
            same = digest(found.data) == expected
        else:
            same = await asyncio.to_thread(digest, found.data) == expected
        if same and by_etag:
            self._server.md5_etags = True
        return same

    async def settled(self, first: RangeRead, second: RangeRead) -> RangeRead:
        """Return what was read again, where it holds. Bytes that came twice alike were not damaged
        on their way: if only an ETag speaks against them, it is no MD5, or that of other bytes, as
        where a gateway serves a directory that programs write to.

        Raises RemoteFailure.
        """
        if await self.holds(second):
            return second
        _, _, by_etag = self._proof(second) or (None, None, False)
        if not by_etag or first.data != second.data:
            raise RemoteFailure(f"{first.key}: what arrives is not what S3 says that it holds")
        if self._server.md5_etags:
            self._note_untold(second)
        else:
            self._server.md5_etags = False
            log.info("this S3 server's ETags are no MD5s: what is read is not compared with them")
        return second

    def _note_untold(self, found: RangeRead) -> None:
        """Remember that this object's ETag is not the MD5 of its bytes. The log is told once."""
        level = logging.DEBUG if self._untold else logging.WARNING
        log.log(
            level,
            "the ETag of %s is not the MD5 of its bytes, though it looks like one: such objects "
            "are not compared with it",
            found.key,
        )
        if len(self._untold) >= UNTOLD:
            self._untold.pop(next(iter(self._untold)))
        self._untold[found.key, found.etag] = None

    def _proof(self, found: RangeRead) -> tuple[Callable[[Data], bytes], bytes, bool] | None:
        """Return how to compute a checksum, what it should be, and whether the ETag says so."""
        if not found.whole:
            return None
        answer = found.answer
        for name, digest in _SAID.items():
            said = _decoded(answer.get(name))
            if said is not None and answer.get("ChecksumType") != "COMPOSITE":
                return digest, said, False
        etag = found.etag
        if (found.key, etag) in self._untold:
            return None
        encrypted = is_kms(answer) or answer.get("SSECustomerAlgorithm")
        if not is_md5(etag) or encrypted or self._server.md5_etags is False:
            return None
        return _md5, bytes.fromhex(etag), True


def _decoded(said: object) -> bytes | None:
    """Return a checksum; None for one that is made of those of parts ("…-3"), or is none."""
    try:
        return base64.b64decode(str(said or ""), validate=True) or None
    except ValueError:
        return None
