"""Accounts that let us in and have no SFTP behind the login: told as what they are, by both ways
to log in, and not tried again and again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import asyncssh
import pytest

from hpcfs.laptop.tunnel import Tunnel, TunnelPlan
from hpcfs.model.errors import LoginEnded, NoService, RemoteError, Unreachable
from hpcfs.model.sites import SiteSpec, SshSite
from hpcfs.remotes.sftp.site import SshSiteConnection
from tests.support.sshd import (
    ALIAS,
    LOOPBACK,
    ScriptedPrompter,
    SshServer,
    sftp_server_binary,
    ssh_server,
    write_key,
)

SFTP = sftp_server_binary()
transports = pytest.mark.parametrize("transport", ["asyncssh", "openssh"])


@dataclass(frozen=True)
class Account:
    """`subsystem` is the script that sshd's shell runs for SFTP, `forced` what it runs instead of
    whatever is asked for."""

    words: str
    """A pattern of what the user is told."""
    subsystem: str = f"exec {SFTP}"
    forced: str | None = None


ACCOUNTS = {
    "a .bashrc that prints": Account(
        "'Welcome! Quota: 80% used'.*bashrc", f"echo 'Welcome! Quota: 80% used'\nexec {SFTP}"
    ),
    "a .bashrc that prints an empty line": Account("bashrc", f"echo\nexec {SFTP}"),
    "a .bashrc that prints escape sequences": Account(
        r"'\[31mRED'.*bashrc", rf"printf '\033[31mRED\n'; exec {SFTP}"
    ),
    "the shell nologin": Account(
        "'This account is currently not available.'", forced="/usr/sbin/nologin"
    ),
    "the shell false": Account(r"at once \(exit code 1\).*`ssh cluster true`", forced="/bin/false"),
    "the shell true": Account(r"at once \(exit code 0\)", forced="/bin/true"),
    "no sftp-server where sshd looks": Account(r"exit code 127", "/no/sftp-server"),
    "a forced command": Account(
        "'Choose a project:'.*ask the site", forced="echo 'Choose a project:'; cat >/dev/null"
    ),
    "a password that has expired": Account(
        "exit code 1", forced="echo 'Password change required but no TTY available.' >&2; exit 1"
    ),
    "maintenance": Account("exit code 254, it says 'no'", "printf no; exit 254"),
}


def site_spec(server: SshServer, transport: str) -> SiteSpec:
    site = SshSite(ALIAS, ssh_config=str(server.ssh_config), transport=transport)
    return server.site_spec(site=site)


def of(account: Account, directory: Path) -> SshServer:
    script = directory / "subsystem"
    server = SshServer(directory, options=("LogLevel INFO",), subsystem=str(script))
    script.write_text(f"#!/bin/sh\n{account.subsystem}\n")
    script.chmod(0o755)
    if account.forced is not None:
        key = server.authorized_keys.read_text()
        server.authorized_keys.write_text(f'command="{account.forced}" {key}')
    return server


@transports
@pytest.mark.parametrize("kind", ACCOUNTS)
def test_it_is_told_and_not_tried_again(kind: str, transport: str, tmp_path: Path) -> None:
    account = ACCOUNTS[kind]
    server = of(account, tmp_path / "s")
    server.start()

    async def main() -> None:
        site = SshSiteConnection(site_spec(server, transport), ScriptedPrompter())
        try:
            for _ in range(3):
                with pytest.raises(NoService, match=account.words) as caught:
                    await site.remote("ns").connect()
                assert caught.value.message.isprintable()
        finally:
            await site.close()

    try:
        asyncio.run(main())
        assert server.log.count("Accepted ") == 1
    finally:
        server.stop()


@transports
def test_what_is_printed_as_an_error_is_no_harm(transport: str, tmp_path: Path) -> None:
    subsystem = f"echo Welcome! >&2; exec {SFTP}"
    with ssh_server(tmp_path / "s", subsystem=subsystem) as server:

        async def main() -> None:
            site = SshSiteConnection(site_spec(server, transport), ScriptedPrompter())
            try:
                await site.remote("ns").connect()
            finally:
                await site.close()

        asyncio.run(main())


@pytest.mark.parametrize("kind", ["a .bashrc that prints", "the shell false"])
def test_a_tunnel_says_so_at_once(kind: str, tmp_path: Path) -> None:
    """Its file is written over SFTP."""
    account = ACCOUNTS[kind]
    server = of(account, tmp_path / "s")
    server.start()

    async def main() -> None:
        plan = TunnelPlan(name="lap", site=server.site(), shown=ALIAS)
        async with asyncio.timeout(15):
            with pytest.raises(NoService, match=account.words):
                await Tunnel(plan, ScriptedPrompter(), lambda: None).run()

    try:
        asyncio.run(main())
    finally:
        server.stop()


# --- not let in, without a word of SSH's ----------------------------------------------------------


class Ends(asyncssh.SSHServer):
    logins = 0

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        type(self).logins += 1
        self.connection = conn

    def begin_auth(self, username: str) -> bool:
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return True


class EndsTheLogin(Ends):
    """As sshd with an account that PAM does not let in: the reason is a banner, then the end."""

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        self.connection.send_auth_banner("Your account has expired;\r\nask the helpdesk.\r\n")
        asyncio.get_running_loop().call_soon(self.connection.abort)
        return super().validate_public_key(username, key)


class EndsTheConnection(Ends):
    """As sshd whose session can't begin."""

    def session_requested(self) -> bool:
        self.connection.abort()
        return False


ENDS: list[tuple[type[Ends], type[RemoteError], str]] = [
    (
        EndsTheLogin, LoginEnded,
        "ended the connection during the login .it says 'Your account has expired; ask the",
    ),
    (
        EndsTheConnection, Unreachable,
        "let us in, and ended the connection before SFTP began",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "error", "words"), ENDS)
def test_a_connection_that_the_server_ends(
    kind: type[Ends], error: type[RemoteError], words: str, tmp_path: Path
) -> None:
    """Unlike a network that fails it does so at once, so that nobody waits."""
    kind.logins = 0
    host_key, key = write_key(tmp_path / "host_key"), write_key(tmp_path / "key")
    public = Path(f"{host_key}.pub").read_text()

    async def main() -> None:
        acceptor = await asyncssh.listen(
            LOOPBACK, 0, server_host_keys=[str(host_key)], server_factory=kind
        )
        port = acceptor.get_port()
        (tmp_path / "known").write_text(f"[{LOOPBACK}]:{port} {public}")
        config = tmp_path / "config"
        config.write_text(
            f"Host {ALIAS}\n HostName {LOOPBACK}\n Port {port}\n User me\n IdentityFile {key}\n"
            f" UserKnownHostsFile {tmp_path / 'known'}\n"
        )
        spec = SiteSpec(
            site=SshSite(ALIAS, ssh_config=str(config)), roots={}, state_dir="", uid=0, gid=0
        )
        site = SshSiteConnection(spec, ScriptedPrompter())
        for _ in range(3):
            with pytest.raises(error, match=words):
                await site._shared.get()
        await site.close()
        acceptor.close()
        await acceptor.wait_closed()

    asyncio.run(main())
    assert kind.logins == 1, "no further login within the moment after one that failed"
