"""How often a first connection logs in: once, whatever the user is asked on the way."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import asyncssh
import msgspec
import pytest

from hpcfs.model.errors import LoginNeeded
from hpcfs.model.sites import SiteSpec, SshSite
from hpcfs.remotes.sftp.site import SshSiteConnection
from hpcfs.remotes.ssh import login_clock
from tests.support.evil_sftp import EvilSite, Login, Plain, evil_site
from tests.support.sshd import ALIAS, ScriptedPrompter, SshServer, ssh_server

TRANSPORTS = ("asyncssh", "openssh")
REQUESTS = 5
TELLS_LOGINS = "LogLevel INFO"

transports = pytest.mark.parametrize("transport", TRANSPORTS)


def logins(server: SshServer) -> int:
    return server.log.count("\nAccepted ") + server.log.startswith("Accepted ")


async def use(spec: SiteSpec, *answers: str) -> list[str]:
    """Connects and goes on for some requests; returns what was asked."""
    prompter = ScriptedPrompter(*answers)
    site = SshSiteConnection(spec, prompter)
    try:
        await site.remote("ns").connect()
        for _ in range(REQUESTS):
            await site.remote("ns").stat(b"")
    finally:
        await site.close()
    return [text for text, _ in prompter.asked]


def unknown(server: SshServer, transport: str, *more: str, **replaced: str) -> SiteSpec:
    """A configuration whose known_hosts does not exist yet."""
    text = server.config_text(ALIAS, *more)
    replaced[str(server.known_hosts)] = str(server.directory / "first-known")
    for old, new in replaced.items():
        text = text.replace(old, new)
    config = server.directory / "first-config"
    config.write_text(text)
    return server.site_spec(
        site=SshSite(ALIAS, ssh_config=str(config), transport=transport, connect_timeout=10)
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SshServer]:
    with ssh_server(tmp_path / "s", TELLS_LOGINS) as found:
        yield found


@contextlib.contextmanager
def agent_with(key: Path, place: Path) -> Iterator[str]:
    """Its socket."""
    command = ["ssh-agent", "-D", "-a", str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        agent.stdout.readline()  # it listens by then
        try:
            environment = {"SSH_AUTH_SOCK": str(place), "PATH": "/usr/bin:/bin"}
            subprocess.run(
                ["ssh-add", "-q", str(key)], env=environment, check=True, timeout=20,
                stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            yield str(place)
        finally:
            agent.terminate()


@transports
def test_with_a_key(server: SshServer, transport: str) -> None:
    spec = unknown(server, transport)
    assert len(asyncio.run(use(spec, "yes"))) == 1
    assert logins(server) == 1
    assert asyncio.run(use(spec)) == [], "known from now on"
    assert logins(server) == 2


@transports
def test_with_an_agent(
    server: SshServer, transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = unknown(server, transport, **{f"IdentityFile {server.key}": "IdentityFile none"})
    text = server.directory / "first-config"
    text.write_text(text.read_text().replace("IdentitiesOnly yes", "IdentitiesOnly no"))
    with agent_with(server.key, tmp_path / "agent") as place:
        monkeypatch.setenv("SSH_AUTH_SOCK", place)
        assert len(asyncio.run(use(spec, "yes"))) == 1
    assert logins(server) == 1


@transports
def test_with_a_passphrase(server: SshServer, transport: str, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "open sesame", "-f", str(locked)]
    subprocess.run(keygen, check=True, timeout=20)
    server.authorized_keys.write_text(Path(f"{locked}.pub").read_text())
    spec = unknown(server, transport, **{str(server.key): str(locked)})
    asked = asyncio.run(use(spec, "yes", "wrong", "open sesame"))
    assert [str(locked) in text for text in asked] == [False, True, True]
    assert logins(server) == 1


@transports
@pytest.mark.parametrize(
    ("login", "answers"),
    [
        (Login(password="right"), ["right"]),
        (Login(password="right"), ["wrong", "right"]),
        (Login(dialogue=[("Password: ", False, "pw"), ("Code: ", True, "1")]), ["pw", "1"]),
    ],
    ids=["password", "second-password", "second-factor"],
)
def test_with_what_is_typed(
    login: Login, answers: list[str], transport: str, tmp_path: Path
) -> None:
    """It is asked for once, and sent once: a code counts only once, and a ban comes soon."""
    login = Login(login.password, login.dialogue)
    tries = answers.count("wrong") + 1

    async def main() -> None:
        async with evil_site(tmp_path, Plain, login=login) as evil:
            evil.known_hosts.unlink()
            site = msgspec.structs.replace(evil.spec.site, transport=transport)
            spec = msgspec.structs.replace(evil.spec, site=site)
            asked = await use(spec, "yes", *answers)
            assert len(asked) == 1 + len(answers)
        assert login.tries == tries

    asyncio.run(main())


CONNECT_SECONDS = 2.0


def phone_site(evil: EvilSite, transport: str = "asyncssh") -> SiteSpec:
    site = msgspec.structs.replace(
        evil.spec.site, transport=transport, connect_timeout=CONNECT_SECONDS
    )
    return msgspec.structs.replace(evil.spec, site=site)


@transports
@pytest.mark.parametrize("dialogue", [(), [("1 for a push: ", True, "1")]], ids=["auto", "asked"])
def test_a_login_that_is_confirmed_on_a_phone_has_the_time(
    dialogue: list[tuple[str, bool, str]], transport: str, tmp_path: Path
) -> None:
    async def confirmed() -> bool:
        await asyncio.sleep(CONNECT_SECONDS + 1.0)
        return True

    async def main() -> None:
        login = Login(dialogue=dialogue, confirmed=confirmed)
        async with evil_site(tmp_path, Plain, login=login) as evil:
            assert len(await use(phone_site(evil, transport), "1")) == len(dialogue)
        assert login.tries == 1

    asyncio.run(main())


@pytest.mark.parametrize("dialogue", [(), [("1 for a push: ", True, "1")]], ids=["auto", "asked"])
@pytest.mark.parametrize("answers_late", [True, False])
def test_a_login_that_nobody_confirms_is_not_tried_again_by_itself(
    answers_late: bool,
    dialogue: list[tuple[str, bool, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A phone that asks again and again has the account locked, or somebody confirm it at last."""
    monkeypatch.setattr(login_clock, "LOGIN_SECONDS", 30.0 if answers_late else CONNECT_SECONDS)
    never = asyncio.Event()

    async def confirmed() -> bool:
        if not answers_late:
            await never.wait()
        return False

    async def main() -> None:
        login = Login(dialogue=dialogue, confirmed=confirmed)
        async with evil_site(tmp_path, Plain, login=login) as evil:
            site = SshSiteConnection(phone_site(evil), ScriptedPrompter("1"))
            try:
                for _ in range(REQUESTS):
                    with pytest.raises(LoginNeeded):
                        await site.remote("ns").connect()
                    site._shared.try_now()
            finally:
                await site.close()
            assert login.connections == 1

    asyncio.run(main())


@transports
def test_through_a_jump_host(server: SshServer, transport: str, tmp_path: Path) -> None:
    with ssh_server(tmp_path / "gate", TELLS_LOGINS) as gate:
        spec = unknown(server, transport, "ProxyJump gate")
        config = server.directory / "first-config"
        known = str(server.directory / "first-known")
        gates = gate.config_text("gate").replace(str(gate.known_hosts), known)
        config.write_text(config.read_text() + gates)
        asked = asyncio.run(use(spec, "yes", "yes"))
        assert [str(one.port) in text for one, text in zip((gate, server), asked, strict=True)]
        assert (logins(gate), logins(server)) == (1, 1)
        assert asyncio.run(use(spec)) == []
        assert (logins(gate), logins(server)) == (2, 2)


def test_a_connection_that_ends_after_that_is_noticed(server: SshServer) -> None:
    """What ended the first connection, which asked for the key, tells nothing of the second."""

    async def main() -> None:
        site = SshSiteConnection(unknown(server, "asyncssh"), ScriptedPrompter("yes"))
        try:
            await site.remote("ns").connect()
            session = site._shared.session
            assert session is not None
            server.kill_sessions()
            async with asyncio.timeout(10):
                await session.ended.wait()
            await site.remote("ns").stat(b"")
            assert logins(server) == 2
        finally:
            await site.close()

    asyncio.run(main())


def test_a_key_that_is_accepted_is_the_one_of_that_login(server: SshServer) -> None:
    fingerprint = asyncssh.read_public_key(f"{server.host_key}.pub").get_fingerprint()
    (text,) = asyncio.run(use(unknown(server, "asyncssh"), "yes"))
    assert fingerprint in text
