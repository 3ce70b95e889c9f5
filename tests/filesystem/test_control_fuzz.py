"""Requests of the control socket that make no sense: each is answered, and none harms the mount.

HPCFS_EXAMPLES sets how many lists of requests are tried.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import trio
from hypothesis import HealthCheck, given, settings, strategies as st

from hpcfs.config import config
from hpcfs.control import control
from hpcfs.control.control import ControlReply, ControlRequest
from hpcfs.daemon.cache_commands import CacheCommands
from hpcfs.daemon.write_commands import WriteCommands
from hpcfs.model.errors import NotConnected, SetupError
from hpcfs.protocol.messages import Upload
from tests.filesystem.world import World, world
from tests.support.memory_remote import MemoryRemote

EXAMPLES = int(os.environ.get("HPCFS_EXAMPLES", "15"))
COMMANDS = ["cache", "clear", "verify", "warm", "pin", "unpin"]
COMMANDS += ["pending", "sync", "retry", "discard", "recover"]
paths = st.one_of(
    st.sampled_from(
        [b"", b"ns", b"ns/f", b"ns/d", b"ns/d/g", b"ns/waits", b"ns//", b"/", b"gone/x"]
    ),
    st.binary(max_size=40),
    st.binary(max_size=5).map(lambda one: b"ns/" + one),
    st.just(b"ns/" + b"x/" * 3000),
)
requests = st.builds(
    ControlRequest,
    command=st.sampled_from(COMMANDS),
    path=paths,
    pinned=st.booleans(),
    to=st.sampled_from([b"", b"/dev/null", b"/nowhere/at/all", b"\xff\0"]),
    before=st.floats(),
    patience=st.floats(max_value=0.01),
)


async def _answered(w: World, request: ControlRequest) -> None:
    """By a reply that fits into a line, or by a sentence."""
    chosen = config.settings(
        config.with_urls(config.Config({}), [("ns", "h:")]), Path("/m"), w.directory
    )

    async def tell(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    try:
        if request.command in control.WRITE_COMMANDS:
            reply = await WriteCommands(chosen, w.pending).answer(request, tell)
        else:
            service = CacheCommands(chosen, w.store, w.fs, {"ns": "memory:ns"})
            reply = await service.answer(request, tell)
    except SetupError as refused:
        reply = ControlReply(error=str(refused))
    assert msgspec.json.decode(msgspec.json.encode(reply), type=ControlReply)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(requests, min_size=1, max_size=12))
def test_every_request_is_answered(asked: list[ControlRequest]) -> None:
    async def run(directory: Path) -> None:
        remote = MemoryRemote("sftp")
        remote.put(b"f", b"f" * 70000)
        await remote.make_directory(b"d", 0o755)
        remote.put(b"d/g", b"g")
        async with world(directory, {"ns": remote}, write="back") as w:
            w.cues.fail(Upload, NotConnected("the link is down"), times=10_000)
            await w.kernel.write_file("ns/waits", b"waits")
            for request in asked:
                with trio.fail_after(30):
                    await _answered(w, request)
            assert await w.kernel.read_file("ns/f") == b"f" * 70000
            assert await w.kernel.read_file("ns/d/g") == b"g"
            w.cues.clear()
            await w.queue.wait_for(w.closer.dirty())
            given_up = any(one.command == "discard" for one in asked)
            assert given_up or remote.get(b"waits") == b"waits"

    with TemporaryDirectory() as directory:
        trio.run(run, Path(directory) / "cache")
