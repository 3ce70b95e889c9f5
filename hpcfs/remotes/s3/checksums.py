"""Checks whether the server stored what it was sent.

Every body goes with its MD5 (Content-MD5), and an ETag that is an MD5 is compared. Where ETags are
none, as the server encrypts with keys of its own (SSE-KMS) or makes them in a way of its own, a
CRC-32 goes along, too: servers that know it (AWS and others, since 2022) compare and answer with
theirs. An upload in parts must be begun for that. A server that ignores or refuses it is spared it
from then on. Form: docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcfs.model.errors import NotSupported, RemoteError, RemoteFailure
from hpcfs.remotes.s3.direct import THREAD_BYTES
from hpcfs.remotes.s3.objects import is_md5, plain_etag
from hpcfs.remotes.s3.server_capabilities import ServerCapabilities
from hpcfs.remotes.s3.translate import s3_code

CRC32 = "CRC32"
_REFUSALS = frozenset({"InvalidRequest", "InvalidArgument"})


@dataclass(frozen=True)
class Proof:
    """The checksums of a body. `crc` is in base64, as it is sent."""

    md5: bytes
    crc: str | None = None

    def parameters(self) -> dict[str, str]:
        """Return the checksums as parameters of a request in botocore's form."""
        found = {"ContentMD5": base64.b64encode(self.md5).decode()}
        return found if self.crc is None else {**found, "ChecksumCRC32": self.crc}


@dataclass(frozen=True)
class PartSent:
    """A part, or a whole object, as the server stored it."""

    etag: str
    md5: bytes | None = None
    """Of what was sent, where it is known."""
    crc: str | None = None
    """As the server computed it."""


async def proof_of(body: bytes, *, with_crc: bool = False) -> Proof:
    """Return the checksums of a body; a large one is hashed in a thread."""
    if len(body) <= THREAD_BYTES:
        return _proof_of(body, with_crc)
    return await asyncio.to_thread(_proof_of, body, with_crc)


def _proof_of(body: bytes, with_crc: bool) -> Proof:
    md5 = hashlib.md5(body, usedforsecurity=False).digest()
    return Proof(md5, crc_of(body) if with_crc else None)


def crc_of(body: bytes) -> str:
    """Return the CRC-32 of a body as S3 writes it: big-endian, in base64."""
    return base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()


def joined_crc(parts: Sequence[PartSent]) -> str | None:
    """Return the CRC-32 of an object in parts as AWS makes it: the CRC-32 of theirs (AWS puts their
    number behind a dash). None where one is missing."""
    crcs = [part.crc for part in parts if part.crc is not None]
    if not crcs or len(crcs) < len(parts):
        return None
    return crc_of(b"".join(map(base64.b64decode, crcs)))


class UploadChecks:
    """The checks of one bucket, and what is known of its server."""

    def __init__(self, server: ServerCapabilities) -> None:
        self._server = server
        self._etags_tell = True

    def want_crc(self, headers: Mapping[str, Any]) -> bool:
        """`headers` are those that the object is to have."""
        if self._server.answers_crcs is False:
            return False
        return not self._etags_tell or is_kms(headers)

    def refused_crc(self, error: RemoteError) -> bool:
        """Whether a request may have failed because of it: then it is made once more without."""
        refused = isinstance(error, NotSupported) or s3_code(error) in _REFUSALS
        if refused and self._server.answers_crcs is None:
            self._server.answers_crcs = False
        return refused and not self._server.answers_crcs

    def compare(self, key: str, answer: Mapping[str, Any], proof: Proof) -> PartSent:
        """Compare what the server says of a body that was sent. Raises RemoteFailure."""
        etag = plain_etag(answer.get("ETag"))
        self._etags_tell = is_md5(etag) and not is_kms(answer)
        answered = answer.get("ChecksumCRC32")
        if proof.crc is not None:
            self._server.answers_crcs = answered is not None
        differs = proof.crc is not None and answered not in (None, proof.crc)
        if differs or (self._etags_tell and etag != proof.md5.hex()):
            raise RemoteFailure(f"{key}: what S3 stored is not what was sent: write it again")
        if self._etags_tell:
            self._server.md5_etags = True
        return PartSent(etag, proof.md5, answered)

    def compare_joined(
        self, key: str, answer: Mapping[str, Any], parts: Sequence[PartSent]
    ) -> None:
        """Raise RemoteFailure where the server made an object of other parts."""
        expected = joined_crc(parts)
        answered, dash, _ = str(answer.get("ChecksumCRC32") or "").partition("-")
        is_joined = dash or answer.get("ChecksumType") == "COMPOSITE"
        if expected is not None and is_joined and answered != expected:
            raise RemoteFailure(f"{key}: what S3 made of its parts is not the file: write it again")


def is_kms(found: Mapping[str, Any]) -> bool:
    """Return whether an object is encrypted with a KMS key, so that its ETag is no MD5."""
    return str(found.get("ServerSideEncryption", "")).startswith("aws:kms")
