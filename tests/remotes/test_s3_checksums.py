"""What tells that S3 stored what was sent, where ETags don't.

Neither moto nor rclone's server minds a CRC-32; `Minding` makes a bucket of moto's answer as AWS
documents it.
"""

from __future__ import annotations

import base64
import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from hpcfs.model.errors import RemoteFailure
from hpcfs.remotes.s3.checksums import PartSent, crc_of, joined_crc
from hpcfs.remotes.s3.parts import MIB
from hpcfs.remotes.s3.remote import S3Remote
from hpcfs.remotes.s3.translate import translate
from tests.remotes.test_s3 import Bytes, content, put_directly, remote_of, run
from tests.remotes.test_s3_uploads import LIMITS, upload
from tests.support.s3 import S3Server

SIZES = [10, 12 * MIB]


@pytest.fixture
def encrypting(moto: S3Server, prefix: str) -> S3Server:
    """A bucket whose objects are encrypted with the server's keys: their ETags tell nothing."""
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms"}}
    with moto.client() as client:
        client.create_bucket(Bucket=prefix)
        client.put_bucket_encryption(
            Bucket=prefix, ServerSideEncryptionConfiguration={"Rules": [rule]}
        )
    return replace(moto, bucket=prefix)


class Minding:
    """The server as one that minds a CRC-32, or with `refuses` one that knows of none. `damage`
    is what happens to a body on its way."""

    def __init__(self, remote: S3Remote, *, refuses: bool = False) -> None:
        self._bucket = remote._bucket
        self._really, self._by_client = self._bucket._directly, self._bucket.call
        self._refuses = refuses
        self._parts: dict[int, str] = {}
        self.damage = self.misjoins = False
        self.crcs: list[str | None] = []
        """Of each body that came."""
        self._bucket._directly = self._direct  # type: ignore[method-assign]
        self._bucket.call = self._call  # type: ignore[method-assign]

    async def _direct(
        self, operation: str, subject: str, asked: Any, *limit: int, **more: Any
    ) -> Any:
        if "Body" not in asked:
            return await self._really(operation, subject, asked, *limit, **more)
        crc = asked.get("ChecksumCRC32")
        self.crcs.append(crc)
        self._refuse(crc, subject)
        received = bytes(reversed(asked["Body"])) if self.damage else asked["Body"]
        answer = await self._really(operation, subject, {**asked, "Body": received}, **more)
        encrypted = {"ETag": f'"{os.urandom(16).hex()}"', "ServerSideEncryption": "aws:kms"}
        if "PartNumber" in asked:
            self._parts[asked["PartNumber"]] = crc_of(received)
            encrypted.pop("ETag")  # moto wants to have it again
        return {**answer, **encrypted, **({"ChecksumCRC32": crc_of(received)} if crc else {})}

    async def _call(self, operation: str, subject: str, **asked: Any) -> Any:
        self._refuse(asked.get("ChecksumAlgorithm"), subject)
        if self._refuses or operation != "complete_multipart_upload":
            return await self._by_client(operation, subject, **asked)
        listed = [part.get("ChecksumCRC32") for part in asked["MultipartUpload"]["Parts"]]
        assert listed == list(dict(sorted(self._parts.items())).values())
        answer = await self._by_client(operation, subject, **asked)
        self._parts.clear()
        crcs = b"".join(base64.b64decode(crc) for crc in listed)
        joined = f"{crc_of(crcs)}-{len(listed)}"
        return {**answer, "ChecksumCRC32": joined[::-1] if self.misjoins else joined}

    def _refuse(self, asked: object, subject: str) -> None:
        if self._refuses and asked:
            refusal: Any = {"Error": {"Code": "InvalidRequest", "Message": "what is that?"}}
            error = ClientError(refusal, "PutObject")
            raise translate(error, subject) from error


def test_the_form_of_a_crc() -> None:
    """From docs.aws.amazon.com: of "Hello world" it is i9aeUg==."""
    assert crc_of(b"Hello world") == "i9aeUg=="
    assert base64.b64decode(crc_of(b"x")) == zlib.crc32(b"x").to_bytes(4, "big")
    assert joined_crc([PartSent("a", crc="i9aeUg=="), PartSent("b")]) is None
    assert joined_crc([PartSent("a", crc="i9aeUg==")]) == crc_of(b"\x8b\xd6\x9eR")


@pytest.mark.parametrize("size", SIZES)
def test_where_etags_tell_nothing_a_crc_goes_along(
    encrypting: S3Server, prefix: str, tmp_path: Path, size: int
) -> None:
    async def test() -> None:
        async with remote_of(encrypting, prefix, tmp_path, limits=LIMITS) as remote:
            server = Minding(remote)
            data = os.urandom(size)
            await upload(remote, Bytes(b"the first shows it"))
            assert server.crcs == [None]
            await upload(remote, Bytes(data))
            assert None not in server.crcs[1:]
            assert remote._bucket.server.answers_crcs
            assert await content(remote, b"f") == data
            server.damage = True
            with pytest.raises(RemoteFailure, match="not what was sent"):
                await upload(remote, Bytes(data))

    run(test())


def test_parts_that_make_another_object_are_noticed(
    encrypting: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with remote_of(encrypting, prefix, tmp_path, limits=LIMITS) as remote:
            server = Minding(remote)
            await upload(remote, Bytes(b"the first shows it"))
            server.misjoins = True
            with pytest.raises(RemoteFailure, match="made of its parts"):
                await upload(remote, Bytes(os.urandom(12 * MIB)))

    run(test())


@pytest.mark.parametrize("size", SIZES)
def test_a_server_that_refuses_crcs_is_spared_them(
    encrypting: S3Server, prefix: str, tmp_path: Path, size: int
) -> None:
    async def test() -> None:
        async with remote_of(encrypting, prefix, tmp_path, limits=LIMITS) as remote:
            server = Minding(remote, refuses=True)
            await upload(remote, Bytes(b"the first shows it"))
            for _ in range(2):
                data = os.urandom(size)
                server.crcs.clear()
                await upload(remote, Bytes(data))
                assert await content(remote, b"f") == data
            assert set(server.crcs) == {None}

    run(test())


@pytest.mark.parametrize("size", SIZES)
def test_a_server_that_ignores_crcs_is_spared_them(
    encrypting: S3Server, prefix: str, tmp_path: Path, size: int
) -> None:
    async def test() -> None:
        async with remote_of(encrypting, prefix, tmp_path, limits=LIMITS) as remote:
            for _ in range(3):
                data = os.urandom(size)
                await upload(remote, Bytes(data))
                assert await content(remote, b"f") == data
            assert remote._bucket.server.answers_crcs is False

    run(test())


def test_where_etags_tell_no_crc_is_sent(server: S3Server, prefix: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with remote_of(server, prefix, tmp_path, limits=LIMITS) as remote:
            for size in (10, 12 * MIB, 10):
                await upload(remote, Bytes(os.urandom(size)))
            assert remote._bucket.server.answers_crcs is None

    run(test())


def test_an_encrypted_object_is_replaced_with_a_crc(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    """What it is encrypted with is known before the first answer."""
    put_directly(moto, f"{prefix}/f", b"old", ServerSideEncryption="aws:kms")

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            server = Minding(remote)
            await upload(remote, Bytes(b"new"))
            assert server.crcs == [crc_of(b"new")]

    run(test())
