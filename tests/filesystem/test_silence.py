"""A namespace that falls silent, in virtual time: each call is answered within the patience,
however many others wait for the same directory, file or upload; and at once after it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from hpcfs.model.entries import BLOCK_BYTES, Attributes
from hpcfs.model.errors import HpcfsError, TimedOut
from hpcfs.protocol import messages as m
from hpcfs.site.calls import PatientCalls
from hpcfs.site.namespace import Delivery, WriteMode
from hpcfs.site.patience import Patience
from tests.filesystem.world import KINDS, World, world
from tests.support.memory_remote import MemoryRemote, MemorySite

PATIENCE = 30.0
AT_ONCE = 0.5
"""Virtual seconds; pauses between attempts are part of it."""


class SilentSite(MemorySite):
    """Its remote answers nothing while it `is_silent`."""

    is_silent = False

    async def call(
        self,
        namespace: str,
        request: m.Request,
        kind: type[Any],
        timeout: float = 30.0,
        on_progress: Callable[[int], None] | None = None,
        delivery: Delivery | None = None,
    ) -> Any:
        await self._maybe_nothing(timeout)
        return await super().call(namespace, request, kind, timeout, on_progress, delivery)

    async def call_pages(
        self,
        namespace: str,
        request: m.List,
        on_page: Callable[[bytes], None],
        timeout: float = 30.0,
    ) -> None:
        await self._maybe_nothing(timeout)
        await super().call_pages(namespace, request, on_page, timeout)

    async def _maybe_nothing(self, timeout: float) -> None:
        if self.is_silent:
            await trio.sleep(timeout)
            raise TimedOut(f"no answer within {timeout:g} s")

    def asked_within(self, seconds: float) -> bool:
        return False

    def note_silence(self, reason: str) -> None:
        """Nobody is told here."""


class PatientSite(SilentSite):
    """The same with patience, as a mount has it."""

    def __init__(self, remotes: dict[str, MemoryRemote], nursery: trio.Nursery) -> None:
        super().__init__(remotes)
        self.inner = SilentSite(remotes)
        patience = Patience(PATIENCE, trio.current_time)
        self.outer = PatientCalls(self.inner, "ns", patience, nursery)  # type: ignore[arg-type]

    @property
    def is_away(self) -> bool:  # type: ignore[override]
        return self.outer.is_away

    @property
    def patience(self) -> float:  # type: ignore[override]
        return self.outer.patience

    async def call(self, *arguments: Any, **more: Any) -> Any:
        return await self.outer.call(*arguments, **more)

    async def call_pages(self, *arguments: Any, **more: Any) -> None:
        await self.outer.call_pages(*arguments, **more)


@asynccontextmanager
async def patient_world(
    directory: Path, kind: str, write: WriteMode = "through"
) -> AsyncIterator[tuple[World, SilentSite]]:
    remotes = {"ns": MemoryRemote(kind)}
    for name in (b"read", b"written", b"renamed", b"removed", b"replaced", b"set", b"listed"):
        remotes["ns"].put(name, os.urandom(3 * BLOCK_BYTES))
    async with trio.open_nursery() as looking:
        site = PatientSite(remotes, looking)
        async with world(directory, remotes, sites={"ns": site}, write=write) as w:
            await w.namespaces[0].capabilities()
            yield w, site.inner
            site.inner.is_silent = False
        looking.cancel_scope.cancel()


Calls = dict[str, Callable[[], Awaitable[object]]]


def _calls(w: World, reader: int, writers: list[int]) -> Calls:
    """Those that wait for the same things, several of each."""
    kernel = w.kernel
    calls: Calls = {}
    for n in range(4):
        calls |= {
            f"read {n}": partial(kernel.pread, reader, 0, 100),
            f"read elsewhere {n}": partial(kernel.pread, reader, (n % 3) * BLOCK_BYTES, 10),
            f"stat {n}": partial(kernel.stat, "ns/set"),
            f"stat what is missing {n}": partial(kernel.stat, f"ns/missing{n}"),
            f"ls {n}": partial(kernel.listdir, "ns"),
            f"open {n}": partial(kernel.read_file, "ns/listed"),
            f"make {n}": partial(kernel.write_file, f"ns/made{n}", b"new"),
            f"close {n}": partial(w.fs.files.flush_handle, writers[n]),
            f"fsync {n}": partial(kernel.fsync, writers[n]),
            f"chmod {n}": partial(kernel.setattr, "ns/set", Attributes(mode=0o600 + n)),
            f"truncate {n}": partial(kernel.truncate, "ns/set", n),
        }
    return calls | {
        "rename": partial(kernel.rename, "ns/renamed", "ns/replaced"),
        "rename what is written": partial(kernel.rename, "ns/written", "ns/other"),
        "remove": partial(kernel.unlink, "ns/removed"),
        "remove what is written": partial(kernel.unlink, "ns/written"),
        "mkdir": partial(kernel.mkdir, "ns/directory"),
    }


async def _measured(calls: Calls, *, at_once: bool) -> dict[str, float]:
    """How many seconds each took: all at the same time, or one after the other."""
    took: dict[str, float] = {}

    async def measure(name: str, call: Callable[[], Awaitable[object]]) -> None:
        began = trio.current_time()
        with suppress(HpcfsError):
            await call()
        took[name] = trio.current_time() - began

    async with trio.open_nursery() as nursery:
        for name, call in calls.items():
            if at_once:
                nursery.start_soon(measure, name, call)
            else:
                await measure(name, call)
    return took


@pytest.mark.parametrize("write", ["through", "back"])
@pytest.mark.parametrize("kind", KINDS)
def test_nobody_waits_longer_than_the_patience(kind: str, write: WriteMode, tmp_path: Path) -> None:
    async def main() -> None:
        async with patient_world(tmp_path, kind, write) as (w, site):
            await w.kernel.stat("ns/set")
            reader = await w.kernel.open("ns/read", os.O_RDONLY)
            writers = [await w.kernel.open("ns/written") for _ in range(4)]
            for number, writer in enumerate(writers):
                await w.kernel.pwrite(writer, number, b"new")
            site.is_silent = True
            w.clock.expire_attributes()
            calls = _calls(w, reader, writers)
            first = await _measured(calls, at_once=True)
            late = {name: took for name, took in first.items() if took > PATIENCE + AT_ONCE}
            assert not late
            assert sum(took >= PATIENCE for took in first.values()) > len(first) / 2
            w.clock.expire_attributes()
            later = await _measured(calls, at_once=False)
            assert {name: took for name, took in later.items() if took > AT_ONCE} == {}

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.05))
