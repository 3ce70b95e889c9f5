"""Getting an SSH connection and keeping it: host keys, credentials, jump hosts, loss and return."""

from __future__ import annotations

import asyncio
import contextlib
import stat
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import asyncssh
import msgspec
import pytest

from hpcfs.model.errors import (
    AccessRefused,
    HostKeyRefused,
    RemoteError,
    Unreachable,
    WrongSettings,
)
from hpcfs.model.sites import SiteSpec, SshSite
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.sftp.site import SshSiteConnection
from hpcfs.remotes.ssh.hostkeys import HostKeys, Rules
from hpcfs.remotes.ssh.login_clock import MOST_LETTERS, MOST_QUESTIONS
from hpcfs.remotes.ssh.settings import FAST_CIPHER, jump_site, read_hop
from tests.remotes.contract import get, listed, put
from tests.support.evil_sftp import USER, EvilSite, Login, Plain, evil_site
from tests.support.sshd import (
    ALIAS,
    LOOPBACK,
    ScriptedPrompter,
    SshServer,
    free_port,
    ssh_server,
    write_key,
)


def connect(spec: SiteSpec, *answers: str | None) -> ScriptedPrompter:
    """Connect once and list the root; returns what was asked."""
    prompter = ScriptedPrompter(*answers)

    async def main() -> None:
        site = SshSiteConnection(spec, prompter)
        try:
            await site.remote("ns").connect()
        finally:
            await site.close()

    asyncio.run(main())
    return prompter


def refused(spec: SiteSpec, error: type[RemoteError], match: str) -> None:
    """The first request and all later ones fail alike, and at once."""

    async def main() -> None:
        site = SshSiteConnection(spec, ScriptedPrompter())
        try:
            for _ in range(3):
                with pytest.raises(error, match=match):
                    await site.remote("ns").connect()
        finally:
            await site.close()

    asyncio.run(main())


@pytest.fixture
def fresh(sshd: SshServer, tmp_path: Path) -> SiteSpec:
    """The shared server, through an ssh_config whose known_hosts does not exist yet."""
    return with_known_hosts(sshd, tmp_path, None)


def with_known_hosts(server: SshServer, tmp_path: Path, text: str | None) -> SiteSpec:
    known = tmp_path / "dot-ssh" / "known_hosts"
    if text is not None:
        known.parent.mkdir()
        known.write_text(text)
    config = tmp_path / "ssh_config"
    config.write_text(
        server.config_text(
            ALIAS,
        ).replace(str(server.known_hosts), str(known))
    )
    return server.site_spec(site=SshSite(ALIAS, ssh_config=str(config)))


# --- host keys ----------------------------------------------------------------------------------


def test_an_unknown_host_key_without_a_terminal_is_refused(
    fresh: SiteSpec, sshd: SshServer
) -> None:
    fingerprint = asyncssh.read_public_key(f"{sshd.host_key}.pub").get_fingerprint()
    refused(fresh, HostKeyRefused, "run 'hpcfs login' on one")
    refused(fresh, HostKeyRefused, fingerprint.replace("+", r"\+"))


def test_an_unknown_host_key_is_shown_asked_about_and_kept(
    fresh: SiteSpec, sshd: SshServer, tmp_path: Path
) -> None:
    fingerprint = asyncssh.read_public_key(f"{sshd.host_key}.pub").get_fingerprint()
    prompter = connect(fresh, "maybe", "yes")
    text, echo = prompter.asked[0]
    assert fingerprint in text
    assert "ED25519" in text
    assert f"[{LOOPBACK}]:{sshd.port}" in text
    assert echo
    assert len(prompter.asked) == 2
    known = tmp_path / "dot-ssh" / "known_hosts"
    key = Path(f"{sshd.host_key}.pub").read_text().split()[:2]
    assert known.read_text().split()[:3] == [f"[{LOOPBACK}]:{sshd.port}", *key]
    assert stat.S_IMODE(known.stat().st_mode) == 0o600
    assert stat.S_IMODE(known.parent.stat().st_mode) == 0o700
    assert connect(fresh).asked == [], "known from now on"


def test_a_host_key_that_the_user_does_not_accept(fresh: SiteSpec, tmp_path: Path) -> None:
    with pytest.raises(HostKeyRefused, match="not accepted"):
        connect(fresh, "no")
    assert not (tmp_path / "dot-ssh" / "known_hosts").exists()


def test_a_changed_host_key_is_refused_whatever_the_user_says(
    sshd: SshServer, tmp_path: Path
) -> None:
    other = write_key(tmp_path / "other")
    spec = with_known_hosts(sshd, tmp_path, sshd.known_hosts_line(other))
    with pytest.raises(HostKeyRefused, match=r"ssh-keygen -R .* -f .*known_hosts"):
        connect(spec, "yes", "yes")


def test_a_changed_host_key_of_another_kind_is_refused(sshd: SshServer, tmp_path: Path) -> None:
    other = asyncssh.generate_private_key("ecdsa-sha2-nistp256").export_public_key().decode()
    spec = with_known_hosts(sshd, tmp_path, f"[{LOOPBACK}]:{sshd.port} {other}")
    with pytest.raises(HostKeyRefused, match="ssh-keygen -R"):
        connect(spec, "yes", "yes")


def test_the_kind_of_key_that_is_known_is_the_one_negotiated(tmp_path: Path) -> None:
    """The server has two; ssh and we ask for the one that known_hosts has."""
    second = tmp_path / "ecdsa"
    key = asyncssh.generate_private_key("ecdsa-sha2-nistp256")
    key.write_private_key(second)
    second.chmod(0o600)
    with ssh_server(tmp_path / "s", f"HostKey {second}") as server:
        public = key.export_public_key().decode()
        spec = with_known_hosts(server, tmp_path, f"[{LOOPBACK}]:{server.port} {public}")
        assert connect(spec).asked == []


def test_hashed_and_odd_lines_of_known_hosts(sshd: SshServer, tmp_path: Path) -> None:
    import base64
    import hashlib
    import hmac

    salt = b"s" * 20
    name = f"[{LOOPBACK}]:{sshd.port}".encode()
    digest = hmac.new(salt, name, hashlib.sha1).digest()
    hashed = "|1|" + "|".join(base64.b64encode(part).decode() for part in (salt, digest))
    public = Path(f"{sshd.host_key}.pub").read_text()
    text = f"# comment\n@nonsense line here\nbroken\n\n{hashed} {public}"
    assert connect(with_known_hosts(sshd, tmp_path, text)).asked == []


def test_a_revoked_host_key_is_refused(sshd: SshServer, tmp_path: Path) -> None:
    line = sshd.known_hosts_line(sshd.host_key)
    spec = with_known_hosts(sshd, tmp_path, f"{line}@revoked {line}")
    with pytest.raises(HostKeyRefused, match="revoked"):
        connect(spec, "yes")


def test_a_key_known_for_the_address_only_is_not_trusted(tmp_path: Path) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519").convert_to_public()
    known = tmp_path / "known"
    known.write_text(f"10.0.0.1 {key.export_public_key().decode()}")
    keys = HostKeys(Rules("login", user_files=(known,)))
    assert keys.judge(key, "10.0.0.1").kind == "unknown"
    assert HostKeys(Rules("10.0.0.1", user_files=(known,))).judge(key, "10.0.0.1").is_trusted


def test_known_hosts_none_does_not_mean_trust_all(sshd: SshServer, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(sshd.config_text().replace(str(sshd.known_hosts), "none"))
    spec = sshd.site_spec(site=SshSite(ALIAS, ssh_config=str(config)))
    refused(spec, HostKeyRefused, "unknown")


# --- credentials --------------------------------------------------------------------------------


def test_a_key_that_the_server_does_not_know_is_refused_once(tmp_path: Path) -> None:
    login = Login(key=asyncssh.generate_private_key("ssh-ed25519"))

    async def story(spec: SiteSpec, evil: EvilSite) -> None:
        site = SshSiteConnection(spec, ScriptedPrompter())
        try:
            for _ in range(3):
                with pytest.raises(AccessRefused, match="ssh cluster"):
                    await site.remote("ns").stat(b"")
        finally:
            await site.close()
        assert login.connections == 1, "never tried again by itself"

    on_evil(tmp_path, login, story)


def test_sshd_refuses_a_key_that_is_not_authorized(tmp_path: Path) -> None:
    with ssh_server(tmp_path / "s") as server:
        server.authorized_keys.write_text("")
        refused(server.site_spec(), AccessRefused, "refused the login")


def test_a_server_that_has_had_enough_of_our_keys_is_not_asked_again(tmp_path: Path) -> None:
    with ssh_server(tmp_path / "s", "MaxAuthTries 1") as server:
        others = [write_key(tmp_path / name) for name in ("one", "two", "three")]
        more = [f"IdentityFile {key}" for key in others]
        server.ssh_config.write_text(
            server.config_text(ALIAS, *more).replace(f"IdentityFile {server.key}\n", "# none\n")
        )
        refused(server.site_spec(), AccessRefused, "Too many authentication failures")


def on_evil(
    base: Path, login: Login, story: Callable[[SiteSpec, EvilSite], Awaitable[None]], *config: str
) -> None:
    async def main() -> None:
        async with evil_site(base, Plain, login=login) as evil:
            add_lines(evil.spec, config)
            await story(evil.spec, evil)

    asyncio.run(main())


def add_lines(spec: SiteSpec, config: Sequence[str]) -> None:
    assert isinstance(spec.site, SshSite)
    with Path(str(spec.site.ssh_config)).open("a") as file:
        file.writelines(f"    {line}\n" for line in config)


async def enter(spec: SiteSpec, *answers: str | None) -> ScriptedPrompter:
    prompter = ScriptedPrompter(*answers)
    site = SshSiteConnection(spec, prompter)
    try:
        await site.remote("ns").connect()
    finally:
        await site.close()
    return prompter


def test_a_password_is_asked_for_without_echo_and_up_to_three_times(tmp_path: Path) -> None:
    login = Login(password="right")

    async def story(spec: SiteSpec, _: EvilSite) -> None:
        prompter = await enter(spec, "wrong", "right")
        assert [echo for _, echo in prompter.asked] == [False, False]
        assert "tester@127.0.0.1" in prompter.asked[0][0]
        login.tries = login.connections = 0
        with pytest.raises(AccessRefused):
            await enter(spec, "a", "b", "c", "right")
        assert (login.tries, login.connections) == (3, 1)

    on_evil(tmp_path, login, story)


def test_a_password_that_nobody_can_be_asked_for(tmp_path: Path) -> None:
    login = Login(password="right")

    async def story(spec: SiteSpec, _: EvilSite) -> None:
        with pytest.raises(AccessRefused, match="no terminal"):
            await enter(spec, None)
        assert login.tries == 0

    on_evil(tmp_path, login, story)


def test_a_second_factor_is_asked_for(tmp_path: Path) -> None:
    login = Login(dialogue=[("Password: ", False, "pw"), ("Code: ", True, "123456")])

    async def story(spec: SiteSpec, _: EvilSite) -> None:
        prompter = await enter(spec, "pw", "123456")
        (first, hidden), (second, visible) = prompter.asked
        assert "Second factor" in first
        assert "phone ready" in first
        assert first.endswith("Password: ")
        assert second.endswith("Code: ")
        assert (hidden, visible) == (False, True)

    on_evil(tmp_path, login, story)


IMITATED = "Passphrase for the key /home/me/.ssh/id_ed25519: "


def test_a_server_s_question_passes_for_nobody_else_s(tmp_path: Path) -> None:
    """A line of its own without the server's name could be that of a key, or of another host."""
    login = Login(dialogue=[(f"one\r\n{IMITATED}\nTrust it? (yes/no): ", True, "secret")])

    async def story(spec: SiteSpec, _: EvilSite) -> None:
        ((text, _),) = (await enter(spec, "secret")).asked
        lines = text.split("\n")
        assert len(lines) >= 3
        assert all(line.startswith(f"({USER}@127.0.0.1) ") for line in lines)

    on_evil(tmp_path, login, story)


@pytest.mark.parametrize(
    "dialogue",
    [[("Code: ", True, "1")] * 500, [("?" * 100_000 + "Code: ", True, "1")]],
    ids=["many", "long"],
)
def test_a_server_asks_only_so_much(tmp_path: Path, dialogue: list[tuple[str, bool, str]]) -> None:
    async def story(spec: SiteSpec, _: EvilSite) -> None:
        prompter = ScriptedPrompter(*["1"] * 1000)
        site = SshSiteConnection(spec, prompter)
        with contextlib.suppress(AccessRefused):
            await site.remote("ns").connect()
        await site.close()
        assert 1 <= len(prompter.asked) <= MOST_QUESTIONS
        assert all(len(text) < MOST_LETTERS + 100 for text, _ in prompter.asked)
        assert prompter.asked[0][0].endswith("Code: ")

    on_evil(tmp_path, Login(dialogue=dialogue), story)


def test_the_clock_stands_still_while_the_user_types(tmp_path: Path) -> None:
    login = Login(password="right")

    class Slow(ScriptedPrompter):
        async def ask(self, text: str, *, echo: bool = False) -> str | None:
            loop = asyncio.get_running_loop()
            done = loop.create_future()
            loop.call_later(1.5, done.set_result, None)
            await done
            return await super().ask(text, echo=echo)

    async def story(spec: SiteSpec, _: EvilSite) -> None:
        quick = msgspec.structs.replace(
            spec, site=msgspec.structs.replace(spec.site, connect_timeout=1.0)
        )
        site = SshSiteConnection(quick, Slow("right"))
        try:
            await site.remote("ns").connect()
        finally:
            await site.close()

    on_evil(tmp_path, login, story)


def test_a_passphrase_is_asked_for(tmp_path: Path) -> None:
    key_file = write_key(tmp_path / "locked", "open sesame")
    key = asyncssh.read_private_key(key_file, "open sesame")

    async def story(spec: SiteSpec, _: EvilSite) -> None:
        prompter = await enter(spec, "wrong", "open sesame")
        assert all(str(key_file) in text and not echo for text, echo in prompter.asked)
        assert len(prompter.asked) == 2
        with pytest.raises(AccessRefused, match="no terminal"):
            await enter(spec, None)

    on_evil(tmp_path, Login(key=key), story, f"IdentityFile {key_file}")


def test_a_plain_key_beside_a_locked_one_asks_nothing(tmp_path: Path) -> None:
    locked = write_key(tmp_path / "locked", "open sesame")
    plain = write_key(tmp_path / "plain")

    async def story(spec: SiteSpec, _: EvilSite) -> None:
        assert (await enter(spec)).asked == []

    on_evil(
        tmp_path, Login(key=asyncssh.read_private_key(plain)), story,
        f"IdentityFile {locked}", f"IdentityFile {plain}", "IdentityFile ~/.ssh/not_there",
    )  # fmt: skip


# --- settings -----------------------------------------------------------------------------------


def test_an_identity_file_that_is_not_there(sshd: SshServer) -> None:
    site = SshSite(ALIAS, ssh_config=str(sshd.ssh_config), identity_file="~/missing_key")
    refused(sshd.site_spec(site=site), WrongSettings, "missing_key")


def test_an_ssh_config_that_is_not_there_or_broken(sshd: SshServer, tmp_path: Path) -> None:
    site = SshSite(ALIAS, ssh_config=str(tmp_path / "nowhere"))
    refused(sshd.site_spec(site=site), WrongSettings, "nowhere can't be read")
    broken = tmp_path / "broken"
    broken.write_text("Host *\n    Port many\n")
    site = SshSite(ALIAS, ssh_config=str(broken))
    refused(sshd.site_spec(site=site), WrongSettings, "line 2")


def test_given_settings_win_over_the_configuration(sshd: SshServer) -> None:
    bare = SshSite("somewhere", ssh_config=str(sshd.ssh_config))
    hop = asyncio.run(read_hop(bare))
    assert (hop.host, hop.port) == ("somewhere", 22)
    hop = asyncio.run(read_hop(msgspec.structs.replace(sshd.site(), user="me", port=2022)))
    assert (hop.host, hop.port, hop.user) == (LOOPBACK, 2022, "me")
    assert hop.options["encryption_algs"][0] == FAST_CIPHER


def test_the_users_ciphers_are_kept(sshd: SshServer, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(sshd.config_text(ALIAS, "Ciphers aes256-ctr"))
    site = SshSite(ALIAS, ssh_config=str(config))
    assert asyncio.run(read_hop(site)).options["encryption_algs"] == ["aes256-ctr"]
    assert connect(sshd.site_spec(site=site)).asked == []


@pytest.mark.parametrize(
    ("jump", "user", "host", "port"),
    [
        ("gate", None, "gate", None), ("me@gate:2200", "me", "gate", 2200),
        ("[::1]:22", None, "::1", 22), ("::1", None, "::1", None),
        ("a@b@gate", "a@b", "gate", None),
    ],
)  # fmt: skip
def test_jump_host_syntax(jump: str, user: str | None, host: str, port: int | None) -> None:
    site = jump_site(jump, SshSite("target", ssh_config="config"))
    assert (site.user, site.host, site.port, site.ssh_config) == (user, host, port, "config")


def test_a_jump_host_is_passed_through_and_its_key_checked(sshd: SshServer, tmp_path: Path) -> None:
    with ssh_server(tmp_path / "gate") as gate:
        known = tmp_path / "known_hosts"
        known.write_text(sshd.known_hosts.read_text())
        text = sshd.config_text(ALIAS, "ProxyJump gate") + gate.config_text("gate")
        for server in (sshd, gate):
            text = text.replace(str(server.known_hosts), str(known))
        config = tmp_path / "config"
        config.write_text(text)
        spec = sshd.site_spec(site=SshSite(ALIAS, ssh_config=str(config)))
        refused(spec, HostKeyRefused, str(gate.port))
        prompter = connect(spec, "yes")
        assert str(gate.port) in prompter.asked[0][0]
        assert connect(spec).asked == []
        gate.stop()
        refused(spec, Unreachable, "connection refused")


def test_jump_hosts_in_a_loop(sshd: SshServer, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host *\n    ProxyJump gate\n")
    site = SshSite(ALIAS, ssh_config=str(config))
    refused(sshd.site_spec(site=site), WrongSettings, "loop")


# --- reaching and losing ------------------------------------------------------------------------


def test_nothing_listens(sshd: SshServer) -> None:
    site = msgspec.structs.replace(sshd.site(), port=free_port())
    refused(sshd.site_spec(site=site), Unreachable, "connection refused")


def test_a_host_name_that_does_not_exist(sshd: SshServer, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host nowhere\n    HostName nowhere.invalid\n")
    site = SshSite("nowhere", ssh_config=str(config))
    refused(sshd.site_spec(site=site), Unreachable, "nowhere.invalid is not known")


def test_a_server_that_says_nothing_is_given_up(sshd: SshServer) -> None:
    left = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        left.set()

    async def main() -> None:
        quiet = await asyncio.start_server(say_nothing, LOOPBACK, 0)
        port = quiet.sockets[0].getsockname()[1]
        settings = msgspec.structs.replace(sshd.site(connect_timeout=0.3), port=port)
        site = SshSiteConnection(sshd.site_spec(site=settings), ScriptedPrompter())
        try:
            with pytest.raises(Unreachable, match=r"did not answer within 0.3 s"):
                await site.remote("ns").connect()
        finally:
            await site.close()
            await left.wait()
            quiet.close()
            await quiet.wait_closed()

    asyncio.run(main())


def test_a_server_that_is_no_ssh_server(sshd: SshServer) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async def main() -> None:
        web = await asyncio.start_server(serve, LOOPBACK, 0)
        port = web.sockets[0].getsockname()[1]
        settings = msgspec.structs.replace(sshd.site(), port=port)
        site = SshSiteConnection(sshd.site_spec(site=settings), ScriptedPrompter())
        try:
            with pytest.raises(Unreachable, match=r"reset by peer|ended the connection"):
                await site.remote("ns").connect()
        finally:
            await site.close()
            web.close()
            await web.wait_closed()

    asyncio.run(main())


def test_concurrent_requests_share_one_connection(tmp_path: Path) -> None:
    login = Login()

    async def story(spec: SiteSpec, _: EvilSite) -> None:
        site = SshSiteConnection(spec, ScriptedPrompter())
        try:
            await asyncio.gather(*(site.remote("ns").stat(b"") for _ in range(20)))
        finally:
            await site.close()
        assert login.connections == 1

    on_evil(tmp_path, login, story)


def test_a_lost_connection_is_made_anew_and_handles_with_it(tmp_path: Path) -> None:
    with ssh_server(tmp_path / "s") as server:

        async def story(remote: SftpRemote) -> None:
            await put(remote, b"file", b"content")
            version = (await remote.stat(b"file")).version
            assert b"".join(await remote.fetch(b"file", version, 0, 7, 1)) == b"content"
            server.kill()
            with pytest.raises(Unreachable):
                await remote.stat(b"file")
            with pytest.raises(Unreachable, match="connection refused"):
                await remote.stat(b"file")
            server.start()
            remote._shared.try_now()  # the pause is over
            assert await remote.stat_open(1) is None, "handles ended with their connection"
            assert b"".join(await remote.fetch(b"file", version, 0, 7, 1)) == b"content"
            assert set(await listed(remote, b"")) == {b"file"}
            server.restart()
            await lost(remote)
            assert await get(remote, b"file") == b"content", "noticed before the request"

        run(server.site_spec(), story)


def test_a_connection_lost_in_flight_is_unreachable(tmp_path: Path) -> None:
    with ssh_server(tmp_path / "s") as server:
        data = bytes(64 * 1024 * 1024)

        async def story(remote: SftpRemote) -> None:
            begun = asyncio.Event()

            class Begun(list[int]):
                def append(self, done: int) -> None:
                    begun.set()

            upload = asyncio.ensure_future(put(remote, b"big", data, progress=Begun()))
            await begun.wait()
            server.kill()
            with pytest.raises(Unreachable, match="lost"):
                await upload

        run(server.site_spec(), story)


async def lost(remote: SftpRemote) -> None:
    session = remote._shared._session
    assert session is not None
    await session.ended.wait()


def run(spec: SiteSpec, story: Callable[[SftpRemote], Awaitable[None]]) -> None:
    async def main() -> None:
        site = SshSiteConnection(spec, ScriptedPrompter())
        try:
            await story(site.remote("ns"))
        finally:
            await site.close()

    asyncio.run(main())
