"""Bytes that move renew the deadlines of transfers, and of nothing else: in virtual time."""

from __future__ import annotations

import pytest
import trio

from hpcfs.model.entries import Entry
from hpcfs.model.errors import TimedOut
from hpcfs.protocol import messages as m
from hpcfs.site.client import SiteClient
from tests.policy.test_worker_nonsense import MadWorkers, with_workers

FETCH = m.Fetch(b"name", b"v", 0, 10, "/nowhere", 1)


async def _ends_after(client: SiteClient, request: m.Request, every: int, until: float) -> float:
    """The seconds after which the request fails, of which nothing is heard but that so many bytes
    move each second, until then."""
    began = trio.current_time()

    async def move() -> None:
        while trio.current_time() - began < until:
            await trio.sleep(1)
            assert client._child is not None
            client._dispatch(client._child, m.Moved(every))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(move)
        with pytest.raises(TimedOut):
            await client.call("ns", request, m.Fetched | Entry, 30)  # type: ignore[arg-type]
        nursery.cancel_scope.cancel()
    return trio.current_time() - began


@pytest.mark.parametrize(
    ("request_", "every", "until", "ends"),
    [
        (FETCH, 100_000, 0, 30),
        (FETCH, 100_000, 200, 230),
        (m.Stat(b"name"), 100_000, 200, 30),
        (FETCH, 32 * 1024 * 1024, 200, 32),  # its turn was there: this one is stuck
    ],
)
def test_a_transfer_waits_while_its_site_moves(
    monkeypatch: pytest.MonkeyPatch, request_: m.Request, every: int, until: float, ends: float
) -> None:
    async def story(client: SiteClient, workers: MadWorkers) -> None:
        workers.answering = lambda call: b""
        took = await _ends_after(client, request_, every, until)
        assert ends <= took <= ends + 6  # the confirmation that nothing is written any more

    with_workers(monkeypatch, story)
