"""Whether a login would offer something else than the last one: an agent that is slow does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from asyncssh.packet import String, UInt32

from hpcfs.model.sites import SshSite
from hpcfs.remotes.ssh import offer
from hpcfs.remotes.ssh.offer import LoginOffer

IDENTITIES_ANSWER = 12
"""SSH_AGENT_IDENTITIES_ANSWER (draft-miller-ssh-agent)."""


class Agent:
    """An agent with `keys`, which may be busy."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.answers = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while header := await reader.read(4):
            await reader.readexactly(int.from_bytes(header, "big"))
            if self.answers:
                keys = b"".join(String(key) + String(b"comment") for key in self.keys)
                body = bytes([IDENTITIES_ANSWER]) + UInt32(len(self.keys)) + keys
                writer.write(String(body))
        writer.close()


@asynccontextmanager
async def agent_at(place: Path) -> AsyncIterator[Agent]:
    agent = Agent()
    async with await asyncio.start_unix_server(agent.serve, place):
        yield agent


@pytest.mark.parametrize(("then", "now"), [(True, False), (False, True), (False, False)])
def test_an_agent_that_does_not_answer_changes_nothing(
    then: bool, now: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with agent_at(tmp_path / "agent") as agent:
            found = LoginOffer(SshSite("host"))
            found.begin()
            agent.keys = [_key(1)]
            monkeypatch.setattr(offer, "AGENT_SECONDS", 20.0 if then else 0.05)
            agent.answers = then
            await found.note([], str(tmp_path / "agent"))
            monkeypatch.setattr(offer, "AGENT_SECONDS", 20.0 if now else 0.05)
            agent.answers = now
            assert not await found.is_else()

    asyncio.run(main())


def test_another_key_of_an_agent_is_something_else(tmp_path: Path) -> None:
    async def main() -> None:
        async with agent_at(tmp_path / "agent") as agent:
            found = LoginOffer(SshSite("host"))
            found.begin()
            agent.keys = [_key(1)]
            await found.note([], str(tmp_path / "agent"))
            assert not await found.is_else()
            agent.keys = [_key(1), _key(2)]
            assert await found.is_else()

    asyncio.run(main())


def _key(number: int) -> bytes:
    return String(b"ssh-ed25519") + String(bytes([number]) * 32)
