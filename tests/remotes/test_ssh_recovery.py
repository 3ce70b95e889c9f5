"""A refused SSH login recovers by itself once its keys are others, and not by trying in vain."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hpcfs.model.errors import AccessRefused, HostKeyRefused, LoginNeeded, RemoteError
from hpcfs.model.sites import SiteSpec
from hpcfs.remotes.base import Prompter
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.sftp.site import SshSiteConnection
from hpcfs.remotes.ssh import shared_session
from tests.remotes.test_ssh_config import agent
from tests.support.evil_sftp import Login, Plain, evil_site
from tests.support.sshd import ALIAS, ScriptedPrompter, SshServer, ssh_server, write_key

Story = Callable[[SshSiteConnection, SftpRemote], Awaitable[None]]


@pytest.fixture(autouse=True)
def _looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each use looks at what would be offered."""
    monkeypatch.setattr(shared_session, "LOOK_SECONDS", 0.0)


def tell(spec: SiteSpec, story: Story, prompter: Prompter | None = None) -> None:
    async def main() -> None:
        site = SshSiteConnection(spec, prompter or ScriptedPrompter())
        try:
            await story(site, site.remote("ns"))
        finally:
            await site.close()

    asyncio.run(main())


async def refused(remote: SftpRemote, kind: type[RemoteError]) -> None:
    with pytest.raises(RemoteError) as found:
        await remote.stat(b"")
    assert type(found.value) is kind


def replace_key(server: SshServer, with_: Path) -> None:
    shutil.copy(with_, server.key)
    shutil.copy(f"{with_}.pub", f"{server.key}.pub")


@pytest.mark.parametrize("transport", ["asyncssh", "openssh"])
def test_another_key_in_the_file_is_offered_at_once(transport: str, tmp_path: Path) -> None:
    with ssh_server(tmp_path / "s", "LogLevel VERBOSE") as server:
        good, other = tmp_path / "good", write_key(tmp_path / "other")
        shutil.copy(server.key, good)
        shutil.copy(f"{server.key}.pub", f"{good}.pub")
        replace_key(server, other)

        async def story(site: SshSiteConnection, remote: SftpRemote) -> None:
            for _ in range(3):
                await refused(remote, AccessRefused)
            assert server.log.count("Connection from") == before + 1, "not in vain"
            replace_key(server, good)
            await remote.stat(b"")

        before = server.log.count("Connection from")
        tell(server.site_spec(site=server.site(transport=transport)), story)


def test_a_key_that_an_agent_gets_is_offered_at_once(tmp_path: Path) -> None:
    first = write_key(tmp_path / "first")
    with ssh_server(tmp_path / "s") as server, agent(tmp_path / "agent", first) as place:
        text = server.config_text(ALIAS, f"IdentityAgent {place}")
        text = text.replace("IdentitiesOnly yes", "IdentitiesOnly no")
        server.ssh_config.write_text(
            text.replace(f"IdentityFile {server.key}", "IdentityFile none")
        )

        async def story(site: SshSiteConnection, remote: SftpRemote) -> None:
            await refused(remote, AccessRefused)
            await refused(remote, AccessRefused)
            adding = await asyncio.create_subprocess_exec(
                "ssh-add", str(server.key), env={"SSH_AUTH_SOCK": str(place)},
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            assert await adding.wait() == 0
            await remote.stat(b"")

        tell(server.site_spec(), story)


@pytest.mark.parametrize("transport", ["asyncssh", "openssh"])
def test_a_host_that_known_hosts_gets_is_asked_at_once(transport: str, tmp_path: Path) -> None:
    with ssh_server(tmp_path / "s") as server:
        server.known_hosts.write_text("")

        async def story(site: SshSiteConnection, remote: SftpRemote) -> None:
            await refused(remote, HostKeyRefused)
            await refused(remote, HostKeyRefused)
            server.known_hosts.write_text(server.known_hosts_line(server.host_key))
            await remote.stat(b"")

        tell(server.site_spec(site=server.site(transport=transport)), story)


def test_a_key_that_the_server_gets_counts_after_a_minute(tmp_path: Path) -> None:
    with ssh_server(tmp_path / "s") as server:
        keys = server.authorized_keys.read_text()
        server.authorized_keys.write_text("")

        async def story(site: SshSiteConnection, remote: SftpRemote) -> None:
            await refused(remote, AccessRefused)
            server.authorized_keys.write_text(keys)
            await refused(remote, AccessRefused)
            remote._shared._backoff.retry_at -= 60
            await remote.stat(b"")

        tell(server.site_spec(), story)


def test_a_refused_password_is_not_sent_again_before_somebody_types_one(tmp_path: Path) -> None:
    login = Login(password="right")

    async def main() -> None:
        async with evil_site(tmp_path, Plain, login=login) as evil:
            prompter = ScriptedPrompter("wrong", "wrong", "wrong")
            site = SshSiteConnection(evil.spec, prompter)
            remote = site.remote("ns")
            try:
                await refused(remote, LoginNeeded)
                remote._shared._backoff.retry_at = 0.0
                await refused(remote, LoginNeeded)
                assert (login.connections, len(prompter.asked)) == (1, 3)
                prompter._answers.append("right")
                await site.renew()
                await remote.stat(b"")
                session = remote._shared.session
                assert session is not None
                assert session.attended, "the next login would ask again"
            finally:
                await site.close()

    asyncio.run(main())
