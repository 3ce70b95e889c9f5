"""`back` mode while a site is out of reach: who waits for uploads, how long, and what goes on."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import trio

from hpcfs.model.errors import (
    AccessRefused,
    NoSpace,
    NotConnected,
    RemoteError,
    TimedOut,
    Unreachable,
)
from hpcfs.protocol import messages as m
from hpcfs.writeback import queue, schedule
from tests.filesystem.world import KINDS, World, live, until, world
from tests.support.memory_remote import MemoryRemote

LOST = Unreachable("the connection was lost")
AWAY = NotConnected("nothing answers")
FOR_EVER = 10**9
back = partial(live, write="back")


async def write_files(w: World, number: int, top: str = "ns") -> set[bytes]:
    for one in range(number):
        await w.kernel.write_file(f"{top}/f{one}", b"content")
    return {b"f%d" % one for one in range(number)}


async def wait(w: World, patience: float) -> None:
    await w.queue.wait_for(w.closer.dirty(), patience=patience)


async def go_away(w: World, name: str = "ns") -> None:
    """After the first connection."""
    (namespace,) = [one for one in w.namespaces if one.name == name]
    await namespace.capabilities()
    cues = w.sites[name].cues
    cues.fail(m.Upload, AWAY, times=FOR_EVER)
    cues.fail(m.Connect, AWAY, times=FOR_EVER)


@back()
async def test_a_lost_connection_uses_no_attempt_up(w: World) -> None:
    w.cues.fail(m.Upload, LOST, times=3)
    names = await write_files(w, 20)
    await wait(w, 15)
    assert set(w.remote.paths()) == names
    assert w.journal.rows == []


@back()
async def test_it_is_tried_until_the_site_is_back(w: World) -> None:
    await go_away(w)
    names = await write_files(w, 60)

    async def come_back() -> None:
        await until(lambda: w.cues.count(m.Connect) >= 3)
        tried = w.cues.count(m.Upload)
        await until(lambda: w.cues.count(m.Connect) >= 4)
        assert w.cues.count(m.Upload) == tried, "the site is asked, not each file tried again"
        w.cues.clear()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come_back)
        await wait(w, 18)
    assert set(w.remote.paths()) == names


@back()
async def test_patience_ends(w: World) -> None:
    await go_away(w)
    await write_files(w, 3)
    began = trio.current_time()
    with pytest.raises(RemoteError, match="nothing answers"):
        await wait(w, 1.5)
    assert 1.5 <= trio.current_time() - began < 10
    assert len(w.journal.rows) == 3
    assert {row.reason for row in w.journal.rows} == {""}, "the next mount tries by itself"


@back()
async def test_who_has_no_patience_is_told_at_once(w: World) -> None:
    await go_away(w)
    await write_files(w, 1)
    with pytest.raises(RemoteError, match="nothing answers"):
        await wait(w, 0)


@back()
async def test_a_refusal_is_told_at_once(w: World) -> None:
    w.cues.fail(m.Upload, NoSpace("the quota is used up"))
    await write_files(w, 1)
    with trio.fail_after(5), pytest.raises(RemoteError, match="the quota is used up"):
        await wait(w, 1000)


@back()
async def test_credentials_that_are_refused_meanwhile_are_told(w: World) -> None:
    """The site is back, and wants a second factor."""
    refused = AccessRefused("there is no terminal to ask on")
    await w.namespaces[0].capabilities()
    w.cues.fail(m.Upload, LOST)
    w.cues.fail(m.Connect, refused, times=FOR_EVER)
    w.cues.fail(m.Upload, refused, times=FOR_EVER)
    await write_files(w, 1)
    with trio.fail_after(10), pytest.raises(RemoteError, match="no terminal"):
        await wait(w, 1000)


@back()
async def test_who_waits_hears_why(w: World) -> None:
    await go_away(w)
    await write_files(w, 1)
    told = set()

    async def tell(progress: queue.SyncProgress) -> None:
        told.add(progress.reason)

    with pytest.raises(RemoteError):
        await w.queue.wait_for(w.closer.dirty(), tell, patience=1.0)
    assert "nothing answers" in told


@back()
async def test_what_nobody_waits_for_goes_up_with_the_first_that_does(w: World) -> None:
    """Files that failed long ago have their next attempt half a minute later."""
    w.cues.fail(m.Upload, AWAY, times=40)
    await write_files(w, 10)
    files = w.queue
    await until(lambda: w.cues.count(m.Upload) >= 30)
    w.cues.clear()
    await until(lambda: not len(files.schedule))
    assert len(w.remote.paths()) == 10


@back()
async def test_what_nobody_waits_for_goes_up_once_the_namespace_is_back(w: World) -> None:
    await go_away(w)
    w.sites["ns"].is_away = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "pause_after", lambda attempts: 3600.0)
        names = await write_files(w, 3)
        await until(lambda: w.cues.count(m.Upload) >= 3)
        await trio.sleep(2 * queue.RETURN_SECONDS)
        assert w.cues.count(m.Upload) == 3
        w.cues.clear()
        w.sites["ns"].is_away = False
        await until(lambda: not len(w.queue.schedule))
    assert set(w.remote.paths()) == names


@back()
async def test_retry_asks_the_site_now(w: World) -> None:
    await go_away(w)
    await write_files(w, 2)
    with pytest.raises(RemoteError):
        await wait(w, 0)
    w.cues.clear()
    await w.pending.retry([row.id for row in w.pending.pending()])
    await until(lambda: not len(w.queue.schedule))
    assert m.Connect(now=True) in w.cues.calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_that_is_away_keeps_nothing_of_another(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async def main() -> None:
        remotes = {"ns": MemoryRemote(kind), "away": MemoryRemote(kind)}
        async with world(tmp_path_factory.mktemp("w"), remotes, write="back") as w:
            await go_away(w, "away")
            await write_files(w, 3, "away")
            names = await write_files(w, 30)
            with trio.fail_after(15), pytest.raises(RemoteError, match="away/f0: nothing"):
                await wait(w, 1.0)
            assert set(remotes["ns"].paths()) == names
            assert remotes["away"].paths() == {}

    trio.run(main)


# --- at the end -----------------------------------------------------------------------------------


@back()
async def test_a_lost_connection_is_made_anew_at_the_end(w: World) -> None:
    """However the mount ended: `fusermount3 -u`, a signal."""
    w.cues.fail(m.Upload, LOST, times=5)
    names = await write_files(w, 20)
    await w.queue.drain()
    assert set(w.remote.paths()) == names


@back()
async def test_the_end_does_not_wait_long_for_a_site_that_is_away(
    w: World,
) -> None:
    await go_away(w)
    await write_files(w, 2)
    with pytest.MonkeyPatch.context() as patch, trio.fail_after(10):
        patch.setattr(queue, "LAST_PATIENCE", 1.0)
        await w.queue.drain()
    assert len(w.journal.rows) == 2


@live()
async def test_an_upload_that_gets_no_answer_is_not_repeated_for_ever(w: World) -> None:
    """The site answers others, so only this upload's own time counts."""
    site = w.sites["ns"]
    perform = site._perform
    tried = 0

    async def silent(remote: MemoryRemote, request: m.Request, *rest: Any) -> object:
        nonlocal tried
        if not isinstance(request, m.Upload):
            return await perform(remote, request, *rest)
        tried += 1
        await trio.sleep(0.3)
        raise TimedOut("no answer to Upload")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "patience", 0.2)
        patch.setattr(site, "_perform", silent)
        with pytest.raises(TimedOut), trio.fail_after(15):
            await w.kernel.write_file("ns/f", b"content")
    assert 2 <= tried <= 4
