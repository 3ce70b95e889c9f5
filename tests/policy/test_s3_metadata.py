"""Attributes as user metadata, and what may be remembered of them."""

from __future__ import annotations

import asyncio
import itertools
import re
import stat
from typing import Any
from urllib.parse import quote

import pytest
from botocore import exceptions as boto
from hypothesis import given, strategies as st

from hpcfs.model.backoff import UNREACHED
from hpcfs.model.entries import Attributes
from hpcfs.model.errors import (
    AccessRefused,
    Changed,
    NoSpace,
    NotConnected,
    NotFound,
    PermissionDenied,
    ProtocolError,
    RemoteError,
    Throttled,
    TimedOut,
    Unreachable,
    WrongSettings,
)
from hpcfs.remotes.s3.caches import ExpiringCache, MetadataCache
from hpcfs.remotes.s3.health import Health, LastingFailure
from hpcfs.remotes.s3.metadata import MAX_TIME_NS, Metadata, decode, encode, format_time, parse_time
from hpcfs.remotes.s3.objects import Info, Summary
from hpcfs.remotes.s3.parts import Limits
from hpcfs.remotes.s3.refusal import LOOK_SECONDS
from hpcfs.remotes.s3.translate import translate

SECOND = 1_000_000_000
times = st.integers(-MAX_TIME_NS, MAX_TIME_NS)
permissions = st.integers(0, 0o7777)
kinds = st.sampled_from([stat.S_IFREG, stat.S_IFLNK])


@given(times)
def test_times_keep_every_nanosecond(time_ns: int) -> None:
    assert parse_time(format_time(time_ns)) == time_ns


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("1700000000", 1700000000 * SECOND),
        ("1700000000.5", 1700000000 * SECOND + SECOND // 2),
        ("1700000000.000000001", 1700000000 * SECOND + 1),
        ("1700000000.0000000019", 1700000000 * SECOND + 1),
        ("-0.5", -SECOND // 2),
        ("", None),
        ("yesterday", None),
        ("1e9", None),
        ("99999999999999999999", None),
        ("1" * 5000, None),
        (None, None),
    ],
)
def test_times_that_others_wrote(text: str | None, time_ns: int | None) -> None:
    assert parse_time(text) == time_ns


def test_the_form_that_rclone_and_s3fs_read() -> None:
    metadata = Metadata(0o100644, 1000, 100, 1700000000 * SECOND + 5)
    assert encode(metadata) == {
        "mode": "33188",
        "uid": "1000",
        "gid": "100",
        "mtime": "1700000000.000000005",
    }


@given(permissions, kinds)
def test_modes_survive_in_decimal_and_in_rclones_octal(bits: int, kind: int) -> None:
    mode = kind | bits
    assert decode(encode(Metadata(mode=mode))).mode == mode
    assert decode({"mode": f"{mode:o}"}).mode == mode
    assert decode({"mode": f"0{mode:o}"}).mode == mode


@given(permissions)
def test_modes_of_directories(bits: int) -> None:
    mode = stat.S_IFDIR | bits
    assert decode({"mode": str(mode)}, directory=True).mode == mode
    assert decode({"mode": f"0{mode:o}"}, directory=True).mode == mode
    assert decode({"mode": str(mode)}).mode != mode, "no file may turn into a directory"


@given(st.text(max_size=30), st.booleans())
def test_no_text_gives_a_mode_of_another_kind(text: str, directory: bool) -> None:
    mode = decode({"mode": text}, directory=directory).mode
    assert mode is None or stat.S_ISDIR(mode) is directory


def test_a_mode_without_a_type_is_permissions() -> None:
    assert decode({"mode": "420"}).mode == 0o100644
    assert decode({"mode": "0640"}).mode == 0o100640


def test_metadata_of_others_is_kept_whatever_the_case_of_its_keys() -> None:
    found = decode({"Mtime": "5", "Owner-Team": "ice", "note": "naïve\r\nX: y"})
    changed = found.changed(Attributes(mode=0o600), 0o100644)
    again = encode(changed)
    assert again["owner-team"] == "ice"
    assert again["mtime"] == "5"
    assert again["mode"] == str(0o100600)
    assert again["note"].isascii()
    assert again["note"].isprintable()


# --- extended attributes --------------------------------------------------------------------------

names = st.binary(min_size=1, max_size=250).filter(lambda name: b"\0" not in name)
xattrs = st.dictionaries(st.builds(b"user.".__add__, names), st.binary(max_size=300), max_size=5)


@given(xattrs)
def test_extended_attributes_survive_whatever_their_bytes(found: dict[bytes, bytes]) -> None:
    metadata = Metadata(xattrs=tuple(found.items()))
    text = encode(metadata).get("xattr", "")
    assert re.fullmatch(r"[\w.~%-]*", text, re.ASCII)
    assert decode(encode(metadata)) == metadata


@given(st.text(max_size=50) | st.builds(quote, st.text(max_size=50)))
def test_no_text_of_others_makes_extended_attributes_fail(text: str) -> None:
    """What is not understood is kept as it is."""
    found = decode({"xattr": text})
    assert found.xattrs == () or "xattr" in encode(found)
    assert found.xattrs or not found.foreign or dict(found.foreign) == {"xattr": text}


S3FS_WROTE = (
    "%7B%22system.posix_acl_access%22%3A%22AgA%3D%22%2C"
    "%22user.a%22%3A%22AAH%2FIHg%3D%22%2C%22user.empty%22%3A%22%22%7D"
)


def test_the_form_that_s3fs_reads_and_writes() -> None:
    found = decode({"Xattr": S3FS_WROTE})
    assert found.xattrs == (
        (b"system.posix_acl_access", b"\2\0"),
        (b"user.a", b"\0\1\xff x"),
        (b"user.empty", b""),
    )
    assert encode(found) == {"xattr": S3FS_WROTE}


def test_extended_attributes_change_one_by_one() -> None:
    old = Metadata(xattrs=((b"user.a", b"1"), (b"user.b", b"2")))
    changes = Attributes(xattrs={b"user.a": None, b"user.b": b"3", b"user.c": b"", b"user.d": None})
    changed = old.changed(changes, 0o100644)
    assert changed.xattrs == ((b"user.b", b"3"), (b"user.c", b""))
    assert changed.changed(Attributes(mode=0o600), 0o100644).xattrs == changed.xattrs


def test_no_more_than_an_object_can_carry() -> None:
    room = Attributes(xattrs={b"user.a": bytes(1200)})
    assert Metadata().changed(room, 0o100644).xattrs
    with pytest.raises(NoSpace):
        Metadata(foreign=(("note", "x" * 1000),)).changed(room, 0o100644)


# --- what may be remembered -----------------------------------------------------------------------


def info(modified: int, now: int, mtime: int | None = None, etag: str = "e") -> Info:
    metadata = Metadata(mtime_ns=mtime)
    return Info("k", 3, etag, modified, metadata=metadata, server_time_ns=now)


def test_headers_are_remembered_until_the_listing_shows_a_change() -> None:
    cache = MetadataCache()
    listed = Summary("k", 3, "e", 10 * SECOND)
    cache.put(listed, info(10 * SECOND, 20 * SECOND))
    assert cache.get(listed) is not None
    for other in (
        Summary("k", 4, "e", 10 * SECOND),
        Summary("k", 3, "f", 10 * SECOND),
        Summary("k", 3, "e", 11 * SECOND),
    ):
        assert cache.get(other) is None


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        (Summary("k", 3, "e", 10 * SECOND), info(10 * SECOND, 11 * SECOND)),  # too young
        (Summary("k", 3, "e", 10 * SECOND), info(10 * SECOND, 99 * SECOND, 10 * SECOND)),
        (Summary("k", 3, "e", 10 * SECOND), info(12 * SECOND, 99 * SECOND)),
        (Summary("k", 3, "e", 10 * SECOND), info(10 * SECOND, 99 * SECOND, etag="f")),
        (Summary("k", 3, "", 10 * SECOND), info(10 * SECOND, 99 * SECOND, etag="")),
    ],
)
def test_headers_that_could_change_unseen_are_not_remembered(listed: Summary, found: Info) -> None:
    cache = MetadataCache()
    cache.put(listed, found)
    assert cache.get(listed) is None


def test_what_is_remembered_is_bounded() -> None:
    cache = MetadataCache(size=2)
    listed = [Summary(str(number), 3, "e", 10 * SECOND) for number in range(3)]
    for one in listed:
        cache.put(one, info(10 * SECOND, 20 * SECOND))
    assert [cache.get(one) is not None for one in listed] == [False, True, True]


def test_known_things_are_forgotten_by_age_and_number() -> None:
    now = 0.0
    known: ExpiringCache[int] = ExpiringCache(5, 2, lambda: now)
    for number in range(3):
        known.put(str(number), number)
    assert [known.get(str(number)) for number in range(3)] == [None, 1, 2]
    now = 6.0
    assert known.get("2") is None


# --- failures -----------------------------------------------------------------------------------


def refusal(code: str, status: int = 400) -> boto.ClientError:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return boto.ClientError(answer, "HeadObject")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (refusal("InvalidAccessKeyId", 403), AccessRefused),
        (refusal("SignatureDoesNotMatch", 403), AccessRefused),
        (refusal("ExpiredToken"), AccessRefused),
        (boto.NoCredentialsError(), AccessRefused),
        (boto.UnauthorizedSSOTokenError(), AccessRefused),
        (boto.ProfileNotFound(profile="x"), WrongSettings),
        (ValueError("could not convert string to float: 'x'"), ProtocolError),
        (refusal("NoSuchBucket", 404), WrongSettings),
        (refusal("301", 301), WrongSettings),
        (refusal("AuthorizationHeaderMalformed"), WrongSettings),
        (refusal("AccessDenied", 403), PermissionDenied),
        (refusal("403", 403), PermissionDenied),
        (refusal("404", 404), NotFound),
        (refusal("Unheard-of", 412), Changed),
        (refusal("SlowDown", 503), Throttled),
        (boto.EndpointConnectionError(endpoint_url="x"), NotConnected),
        (boto.ReadTimeoutError(endpoint_url="x"), TimedOut),
        (ConnectionResetError(), Unreachable),
    ],
)
def test_every_failure_has_its_class_and_a_sentence(
    error: Exception, kind: type[RemoteError]
) -> None:
    found = translate(error, "a/new\nline")
    assert type(found) is kind
    assert "\n" not in found.message
    assert not found.message.endswith(".")


def test_refused_credentials_are_offered_again_once_they_are_others_or_rarely() -> None:
    now, others, looks = 100.0, False, 0

    async def renew() -> bool:
        nonlocal looks
        looks += 1
        return others

    async def ask(health: Health, answer: Exception | None) -> str:
        try:
            with health.watching("x"):
                async with health.refusal.outlived(renew):
                    await asyncio.sleep(0)
                    asked.append(now)
                    if answer is not None:
                        raise answer
        except AccessRefused:
            return "refused"
        return "answered"

    asked: list[float] = []

    async def main() -> None:
        nonlocal now, others
        health = Health(lambda: now)
        while now < 700:
            refused = refusal("InvalidAccessKeyId", 403)
            assert (
                await asyncio.gather(*(ask(health, refused) for _ in range(3))) == ["refused"] * 3
            )
            now += 1
        waits = [later - at for at, later in itertools.pairwise(sorted(set(asked)))]
        assert waits == [60, 120, 240]
        assert len(asked) == 6, "of those that ask together one tries, but for the first time"
        assert 500 / LOOK_SECONDS < looks < 600 / LOOK_SECONDS, "on use, and not too often"
        now += 240
        assert await asyncio.gather(*(ask(health, None) for _ in range(3))) == ["answered"] * 3

        assert await ask(health, refusal("InvalidAccessKeyId", 403)) == "refused"
        others = True
        assert await ask(health, None) == "refused", "that was a moment ago"
        now += LOOK_SECONDS
        assert await asyncio.gather(*(ask(health, None) for _ in range(3))) == ["answered"] * 3

    asyncio.run(main())


def test_a_server_that_has_too_much_to_do_says_nothing_of_refused_credentials() -> None:
    health = Health()
    for code, kind in (("InvalidAccessKeyId", AccessRefused), ("SlowDown", Throttled)):
        with pytest.raises(kind), health.watching("x"):
            raise refusal(code, 503)
    assert health.refusal._counts()
    health.answered()
    assert not health.refusal._counts()


def test_one_denied_object_does_not_close_the_site() -> None:
    health = Health()
    with pytest.raises(PermissionDenied), health.watching("x"):
        raise refusal("AccessDenied", 403)
    health.check()


def test_a_dead_endpoint_is_asked_again_soon() -> None:
    """An outage ends for the user within two seconds of the link's return."""
    now = 100.0
    health = Health(lambda: now, draw=lambda: 0.0)
    delays = []
    for _ in range(5):
        with pytest.raises(Unreachable, match="can't be reached"), health.watching("x"):
            raise ConnectionResetError
        health.failed(Unreachable("a second request failed at the same time"), answered=False)
        start = now
        while True:
            try:
                health.check()
                break
            except Unreachable:
                now += 0.25
        delays.append(now - start)
    assert delays == [0.5, 1, 2, 2, UNREACHED.longest]
    health.answered()
    with pytest.raises(Unreachable), health.watching("x"):
        raise ConnectionResetError
    now += UNREACHED.first
    health.check()


@pytest.mark.parametrize(
    "error",
    [boto.ReadTimeoutError(endpoint_url="x"), ConnectionResetError(), ConnectionRefusedError()],
)
def test_in_a_pause_nothing_is_sent(error: Exception) -> None:
    """And so the daemon may make the request again, whatever it is."""
    health = Health(lambda: 100.0, draw=lambda: 0.0)
    with pytest.raises(Unreachable), health.watching("x"):
        raise error
    with pytest.raises(NotConnected):
        health.check()


def test_what_only_a_person_mends_is_looked_at_again_rarely() -> None:
    now = 0.0
    failure = LastingFailure(lambda: now, lambda: 0.0)
    failure.failed(WrongSettings("no such bucket"))
    failure.check()  # one answer may be damaged
    asked = []
    while now < 100:
        try:
            failure.check()
        except WrongSettings:
            now += 0.25
        else:
            asked.append(now)
            failure.failed(WrongSettings("no such bucket"))
    assert asked == [0, 1, 3, 7, 15, 31, 61, 91]
    now += 30
    failure.check()
    failure.succeeded()
    failure.failed(WrongSettings("again"))
    failure.check()


def test_a_server_that_answers_is_there_whatever_it_says() -> None:
    health = Health()
    for status in (500, 502, 503, 504, 429):
        with pytest.raises(RemoteError), health.watching("x"):
            raise refusal("", status)
        health.check()


@given(st.integers(1, 5 * 2**40))
def test_ten_thousand_parts_hold_any_file(size: int) -> None:
    limits = Limits()
    part = limits.part_size(size, limits.upload_part)
    assert part >= 8 * 2**20
    assert part % 2**20 == 0
    assert -(-size // part) <= 10_000
    assert part <= 5 * 2**30
