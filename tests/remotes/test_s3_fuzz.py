"""Answers of an S3 server that are damaged in whatever way: no crash, no hang, no traceback, no
wrong bytes of what is compared, and the next right answer is as good as if nothing had been.

Some seconds of it by default. HPCFS_FUZZ_SECONDS in the environment makes it longer,
HPCFS_FUZZ_SEED repeats a run, which says its seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hpcfs.model.entries import Attributes
from hpcfs.model.errors import RemoteError
from hpcfs.model.sites import S3Root, S3Site, Secret, SiteSpec
from hpcfs.model.uploads import UploadPieceRequest, UploadRequest
from hpcfs.remotes.base import no_report
from hpcfs.remotes.s3 import deadlines, pacing, pool as pools
from hpcfs.remotes.s3.parts import Limits
from hpcfs.remotes.s3.remote import S3Remote
from hpcfs.remotes.s3.site import S3SiteConnection
from tests.support.relay import Asked, Relay, relay_before
from tests.support.s3 import S3Server
from tests.support.spoiled import spoil

SECONDS = float(os.environ.get("HPCFS_FUZZ_SECONDS", "15"))
UNIT = 64 * 1024
LIMITS = Limits(single_put=UNIT, smallest_part=UNIT, upload_part=UNIT, copy_part=UNIT)
SMALL, LARGE = b"small" * 200, bytes(range(256)) * (UNIT // 64)
SILENCE = 0.5
OUTER = 60.0
"""Seconds for one operation, however the answers to it are damaged."""


class Fuzz:
    """One site that is asked over a relay; `spoiling` damages answers, each with the chance that it
    was given."""

    def __init__(self, relay: Relay, prefix: str, state: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.spoiled: list[tuple[Asked, bytes]] = []
        self.count = 0
        self._chance = 0.0
        self._relay = relay
        server = relay.server
        relay.spoil = self._spoil
        site = S3Site(
            endpoint_url=server.endpoint_url,
            region=server.region,
            access_key=Secret(server.access_key),
            secret_key=Secret(server.secret_key),
        )
        spec = SiteSpec(site, {"ns": S3Root(server.bucket, prefix)}, str(state), 1000, 1000)
        self.site = S3SiteConnection(spec, LIMITS)
        self.remote: S3Remote = self.site.remote("ns")

    def _spoil(self, asked: Asked, answer: bytes) -> bytes:
        if self.random.random() >= self._chance:
            return answer
        self.count += 1
        damaged = spoil(self.random, answer)
        self.spoiled.append((asked, damaged))
        return damaged

    @contextlib.asynccontextmanager
    async def spoiling(self) -> AsyncIterator[None]:
        """Announced bytes that never come are waited for no longer than needs be."""
        self.spoiled.clear()
        self._chance = self.random.choice((0.1, 0.3, 0.6, 1.0))
        with pytest.MonkeyPatch.context() as patched, deadlines.silence(SILENCE):
            for name in ("SILENCE", "LISTING"):
                patched.setattr(deadlines, name, SILENCE)
            try:
                yield
            finally:
                self._chance = 0.0
                self.site.try_now()


class MemorySource:
    """Bytes as the source of an upload."""

    def __init__(self, data: bytes) -> None:
        self.size, self.name, self._data = len(data), "memory", data

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


def upload_of(path: bytes, data: bytes, **more: Any) -> UploadRequest:
    ranges = more.pop("ranges", [(0, len(data))])
    base_size = more.pop("base_size", 0)
    return UploadRequest(path, len(data), base_size, ranges, Attributes(), 0o644, **more)


async def read(remote: S3Remote, path: bytes) -> bytes:
    entry = await remote.stat(path)
    return b"".join(await remote.fetch(path, entry.version, 0, entry.size, 0))


async def names(remote: S3Remote, path: bytes) -> list[bytes]:
    return [entry.name async for page in remote.list(path) for entry in page]


# --- what is done while answers are damaged; each with what comes before, undamaged ---------------

Act = Callable[[S3Remote, bytes], Awaitable[Any]]


async def _new(remote: S3Remote, path: bytes) -> None:
    await remote.upload(upload_of(path, SMALL), MemorySource(SMALL), no_report)


async def _large(remote: S3Remote, path: bytes) -> None:
    await remote.upload(upload_of(path, LARGE), MemorySource(LARGE), no_report)


async def _folder(remote: S3Remote, path: bytes) -> None:
    await remote.make_directory(path, 0o755)
    for name in (b"a", b"b"):
        await remote.upload(upload_of(path + b"/" + name, SMALL), MemorySource(SMALL), no_report)


async def _nothing(remote: S3Remote, path: bytes) -> None:
    """The path is free."""


async def _link(remote: S3Remote, path: bytes) -> None:
    await remote.make_symlink(path, b"target")


async def _patch(remote: S3Remote, path: bytes) -> None:
    entry = await remote.stat(path)
    more = LARGE + b"x" * UNIT
    request = upload_of(
        path, more, ranges=[(len(LARGE), UNIT)], base_size=len(LARGE), base_version=entry.version
    )
    await remote.upload(request, MemorySource(more), no_report)


async def _stream(remote: S3Remote, path: bytes) -> None:
    handle, data = 7, MemorySource(LARGE)
    try:
        await remote.create(path, 0o644, handle)
        for offset in range(0, len(LARGE) - UNIT, UNIT):
            await remote.upload_piece(
                UploadPieceRequest(path, offset, UNIT, 0o644, handle, b""), data
            )
        await remote.upload(
            upload_of(path, LARGE, handle=handle, base_version=b""), data, no_report
        )
    finally:
        await remote.release(handle)


async def _rename(remote: S3Remote, path: bytes) -> None:
    await remote.rename(path, path + b".new", replace=True)


async def _read_whole(remote: S3Remote, path: bytes) -> None:
    """A size that was damaged, too, asks for less, of which nobody says anything."""
    entry = await remote.stat(path)
    found = b"".join(await remote.fetch(path, entry.version, 0, entry.size, 0))
    if len(found) == len(SMALL):
        assert found == SMALL, "damaged bytes were given out"


ACTS: dict[str, tuple[Act, Act]] = {
    "connect": (_nothing, lambda remote, path: remote.connect()),
    "stat": (_new, lambda remote, path: remote.stat(path)),
    "stat of a folder": (_folder, lambda remote, path: remote.stat(path)),
    "stat of nothing": (_nothing, lambda remote, path: remote.stat(path)),
    "list": (_folder, names),
    "read": (_new, _read_whole),
    "read a part": (_new, lambda remote, path: remote.fetch(path, b"v", 5, 9, 0)),
    "readlink": (_link, lambda remote, path: remote.read_link(path)),
    "symlink": (_nothing, _link),
    "create": (_nothing, lambda remote, path: remote.create(path, 0o644)),
    "upload": (_nothing, _new),
    "upload in parts": (_nothing, _large),
    "upload while written": (_nothing, _stream),
    "append": (_large, _patch),
    "truncate": (_new, lambda remote, path: remote.truncate(path, 9)),
    "chmod": (_new, lambda remote, path: remote.set_attributes(path, Attributes(mode=0o600))),
    "chmod of a folder": (
        _folder,
        lambda remote, path: remote.set_attributes(path, Attributes(mode=0o700)),
    ),
    "rename": (_new, _rename),
    "rename of a folder": (_folder, _rename),
    "remove": (_new, lambda remote, path: remote.remove(path)),
    "mkdir": (_nothing, lambda remote, path: remote.make_directory(path, 0o755)),
    "rmdir": (_folder, lambda remote, path: remote.remove_directory(path)),
}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server wants to be asked later is asked soon."""
    monkeypatch.setattr(pools, "TICK_SECONDS", 0.1)
    for name, seconds in (("PATIENCE", 0.3), ("UNAVAILABLE_SECONDS", 0.3), ("SHORTEST", 0.01)):
        monkeypatch.setattr(pacing, name, seconds)
    monkeypatch.setattr(pacing, "LONGEST_ASKED", 0.1)


async def damaged(fuzz: Fuzz, name: str, path: bytes) -> str:
    """Do it with damaged answers; return what came of it. Raises whatever is no RemoteError."""
    try:
        async with fuzz.spoiling(), asyncio.timeout(OUTER):
            await ACTS[name][1](fuzz.remote, path)
    except RemoteError as error:
        return type(error).__name__
    return "done"


async def works(fuzz: Fuzz, path: bytes) -> None:
    """The next right answers are as good as ever."""
    remote = fuzz.remote
    await remote.upload(upload_of(path, SMALL), MemorySource(SMALL), no_report)
    assert await read(remote, path) == SMALL
    assert paths_of(await names(remote, b"")) >= {path}
    await remote.remove(path)


async def one(fuzz: Fuzz, name: str, number: int) -> str:
    """Return what came of an act; whatever must not be fails the test, and tells the answers."""
    path = b"f%d" % number
    await ACTS[name][0](fuzz.remote, path)
    try:
        outcome = await damaged(fuzz, name, path)
        await works(fuzz, b"w%d" % number)
    except Exception as error:
        last = [(one.method, one.target, said[:600]) for one, said in fuzz.spoiled]
        raise AssertionError(f"{name}: {error!r} after {last}") from error
    return outcome


def paths_of(found: list[bytes]) -> set[bytes]:
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.timeout(SECONDS + 240)
def test_no_answer_does_lasting_damage(
    rclone: S3Server, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seed = int(os.environ.get("HPCFS_FUZZ_SEED", random.randrange(2**32)))
    stray: list[dict[str, Any]] = []
    outcomes: Counter[tuple[str, str]] = Counter()

    async def test() -> int:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: stray.append(context))
        async with relay_before(rclone) as relay:
            fuzz = Fuzz(relay, prefix, tmp_path, seed)
            end = loop.time() + SECONDS
            try:
                for number in itertools.count():
                    if loop.time() > end:
                        break
                    name = fuzz.random.choice(list(ACTS))
                    outcomes[name, await one(fuzz, name, number)] += 1
                    relay.asked.clear()
            finally:
                await fuzz.site.close()
            return fuzz.count

    with caplog.at_level(logging.INFO):
        count = asyncio.run(test())
    print(f"seed {seed}: {count} damaged answers", dict(outcomes))
    assert count > 0
    assert not [one for one in caplog.records if one.exc_info], "a traceback in the log"
    assert not [one for one in stray if not isinstance(one.get("exception"), OSError)]
