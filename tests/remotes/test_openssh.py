"""SFTP through a child `ssh`; what all transports share is in test_contract.py."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import asyncssh
import msgspec
import pytest

from hpcfs.model.errors import (
    AccessRefused,
    HostKeyRefused,
    LoginNeeded,
    NoService,
    NotConnected,
    RemoteError,
    Unreachable,
    WrongSettings,
)
from hpcfs.model.sites import SftpRoot, SiteSpec, SshSite
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.sftp.site import SshSiteConnection
from hpcfs.remotes.sftp.stdio import OpenSshLogin
from hpcfs.remotes.ssh.openssh import OpenSshTarget, command, read_target
from hpcfs.remotes.ssh.stderr import ending
from tests.remotes.contract import get, put
from tests.remotes.test_sftp_uploads import verify_uploads, verifying
from tests.support.evil_sftp import USER, EvilSite, Login, Plain, evil_site
from tests.support.mounts import until
from tests.support.sshd import (
    ALIAS,
    LOOPBACK,
    ScriptedPrompter,
    SshServer,
    free_port,
    ssh_server,
    write_key,
)


def by_ssh(spec: SiteSpec, **changes: object) -> SiteSpec:
    site = msgspec.structs.replace(spec.site, transport="openssh", **changes)
    return msgspec.structs.replace(spec, site=site)


def run(spec: SiteSpec, story: Callable[[SftpRemote], Awaitable[None]]) -> None:
    async def main() -> None:
        site = SshSiteConnection(by_ssh(spec), ScriptedPrompter())
        try:
            await story(site.remote("ns"))
        finally:
            await site.close()

    asyncio.run(main())


def refused(spec: SiteSpec, error: type[RemoteError], match: str) -> None:
    async def story(remote: SftpRemote) -> None:
        for _ in range(2):
            with pytest.raises(error, match=match):
                await remote.connect()

    run(spec, story)


async def enter(spec: SiteSpec, *answers: str | None) -> list[tuple[str, bool]]:
    """Connects once; returns what was asked."""
    prompter = ScriptedPrompter(*answers)
    site = SshSiteConnection(by_ssh(spec), prompter)
    try:
        await site.remote("ns").connect()
    finally:
        await site.close()
    return prompter.asked


def login_of(remote: SftpRemote) -> OpenSshLogin:
    session = remote._shared._session
    assert session is not None
    assert isinstance(session.login, OpenSshLogin)
    return session.login


def pids(remote: SftpRemote) -> list[int]:
    return [program.pid for program in login_of(remote).programs]


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def with_config(server: SshServer, file: Path, **replaced: str) -> SiteSpec:
    """Lines of the ssh_config with other values, or none for ""."""
    lines = []
    for line in server.config_text().splitlines():
        key = line.split()[0]
        value = replaced.pop(key, None)
        lines += [line] if value is None else [f"    {key} {value}"] if value else []
    lines += [f"    {key} {value}" for key, value in replaced.items()]
    file.write_text("\n".join(lines) + "\n")
    return server.site_spec(site=SshSite(ALIAS, ssh_config=str(file)))


# --- the command line ---------------------------------------------------------------------------


def test_the_command_line_has_what_is_configured(tmp_path: Path) -> None:
    key = write_key(tmp_path / "key")
    site = SshSite("-oProxyCommand=evil", "me", 2222, "/some/config", str(key), 2.5, "openssh")
    line = command(site)
    assert line[-4:] == ["-s", "--", "-oProxyCommand=evil", "sftp"]
    for option, value in (("-l", "me"), ("-p", "2222"), ("-F", "/some/config"), ("-i", str(key))):
        assert line[line.index(option) + 1] == value
    assert "ConnectTimeout=3" in line
    assert not any(word.startswith(("Ciphers", "StrictHostKeyChecking")) for word in line)


def test_a_missing_identity_file_is_named(sshd: SshServer) -> None:
    spec = by_ssh(sshd.site_spec(), identity_file="/no/such/key")
    refused(spec, WrongSettings, "/no/such/key for cluster does not exist")


def test_ssh_says_who_and_where(sshd: SshServer) -> None:
    target = asyncio.run(read_target(sshd.site(transport="openssh")))
    assert (target.host, target.port, target.user) == (LOOPBACK, str(sshd.port), sshd.user)
    assert target.shown == "cluster (127.0.0.1)"
    assert target.control_path is None


def test_a_configuration_that_ssh_does_not_understand(sshd: SshServer, tmp_path: Path) -> None:
    refused(
        with_config(sshd, tmp_path / "config", Nonsense="yes"),
        WrongSettings,
        "not usable: .*(?i:bad configuration option)",
    )


def test_without_ssh_it_says_what_to_install(
    sshd: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(sshd.site_spec(), WrongSettings, "needs the program ssh.*openssh-client")


# --- host keys and credentials ------------------------------------------------------------------


def test_a_key_that_is_not_authorized_is_refused(tmp_path: Path) -> None:
    with ssh_server(tmp_path / "s") as server:
        server.authorized_keys.write_text("")
        refused(server.site_spec(), AccessRefused, r"Permission denied \(publickey\).*ssh cluster")


def test_a_changed_host_key_is_refused(sshd: SshServer, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_text(sshd.known_hosts_line(write_key(tmp_path / "other")))
    spec = with_config(sshd, tmp_path / "config", UserKnownHostsFile=str(known))
    refused(spec, HostKeyRefused, "Host key verification failed.*ssh cluster")


def test_an_unknown_host_key_is_asked_about(sshd: SshServer, tmp_path: Path) -> None:
    known = tmp_path / "known"
    spec = with_config(sshd, tmp_path / "config", UserKnownHostsFile=str(known))
    refused(spec, HostKeyRefused, "no terminal to ask on")
    assert not known.exists()
    ((question, echo),) = asyncio.run(enter(spec, "yes"))
    fingerprint = asyncssh.read_public_key(f"{sshd.host_key}.pub").get_fingerprint()
    assert fingerprint in question
    assert echo
    assert asyncio.run(enter(spec)) == [], "known from now on"


def test_a_host_key_that_the_user_does_not_accept(sshd: SshServer, tmp_path: Path) -> None:
    spec = with_config(sshd, tmp_path / "config", UserKnownHostsFile=str(tmp_path / "known"))
    with pytest.raises(HostKeyRefused):
        asyncio.run(enter(spec, "no"))


def test_a_passphrase_is_asked_for(tmp_path: Path) -> None:
    with ssh_server(tmp_path / "s") as server:
        locked = tmp_path / "locked"
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "open sesame", "-f", str(locked)]
        subprocess.run(keygen, check=True, timeout=20)
        server.authorized_keys.write_text(Path(f"{locked}.pub").read_text())
        spec = with_config(server, tmp_path / "config", IdentityFile=str(locked))
        asked = asyncio.run(enter(spec, "wrong", "open sesame"))
        assert [(str(locked) in text, echo) for text, echo in asked] == [(True, False)] * 2
        refused(spec, AccessRefused, "no terminal to ask on.*ssh -MNf cluster")


def on_evil(
    base: Path, login: Login, story: Callable[[SiteSpec, EvilSite], Awaitable[None]]
) -> None:
    async def main() -> None:
        async with evil_site(base, Plain, login=login) as evil:
            await story(evil.spec, evil)

    asyncio.run(main())


def test_a_password_is_asked_for_up_to_three_times(tmp_path: Path) -> None:
    login = Login(password="right")

    async def story(spec: SiteSpec, _: EvilSite) -> None:
        asked = await enter(spec, "wrong", "right")
        assert [echo for _text, echo in asked] == [False, False]
        assert "tester@" in asked[0][0]
        login.tries = login.connections = 0
        with pytest.raises(AccessRefused):
            await enter(spec, "a", "b", "c", "right")
        assert (login.tries, login.connections) == (3, 1)

    on_evil(tmp_path, login, story)


def test_a_password_that_nobody_can_be_asked_for_is_not_sent(tmp_path: Path) -> None:
    login = Login(password="right")

    async def story(spec: SiteSpec, _: EvilSite) -> None:
        with pytest.raises(AccessRefused, match="no terminal"):
            await enter(spec, None)
        assert login.tries == 0

    on_evil(tmp_path, login, story)


def test_a_second_factor_is_asked_for(tmp_path: Path) -> None:
    login = Login(dialogue=[("Password: ", False, "pw"), ("Code: ", True, "123456")])

    async def story(spec: SiteSpec, _: EvilSite) -> None:
        (first, _echo), (second, _echo) = await enter(spec, "pw", "123456")
        assert "Password: " in first
        assert "Code: " in second

    on_evil(tmp_path, login, story)


IMITATED = "Passphrase for the key /home/me/.ssh/id_ed25519: "


def test_a_server_s_question_passes_for_nobody_else_s(tmp_path: Path) -> None:
    """A line of its own without the server's name could be that of a key, or of another host."""
    login = Login(dialogue=[(f"one\r\n{IMITATED}\nTrust it? (yes/no): ", True, "secret")])

    async def story(spec: SiteSpec, _: EvilSite) -> None:
        ((text, echo),) = await enter(spec, "secret")
        lines = text.split("\n")
        assert len(lines) == 3
        assert all(line.startswith(f"({USER}@127.0.0.1) ") for line in lines)
        assert not echo, "what a server asks is no question of ssh's about a host key"

    on_evil(tmp_path, login, story)


def test_nothing_of_a_question_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = tmp_path / "tmp"
    private.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(private))
    seen: list[int] = []

    class Looking(ScriptedPrompter):
        async def ask(self, text: str, *, echo: bool = False) -> str | None:
            (folder,) = private.iterdir()
            seen.append(folder.stat().st_mode & 0o777)
            return await super().ask(text, echo=echo)

    async def story(spec: SiteSpec, _: EvilSite) -> None:
        site = SshSiteConnection(by_ssh(spec), Looking("right"))
        try:
            await site.remote("ns").connect()
            assert list(private.iterdir()) == []
        finally:
            await site.close()

    on_evil(tmp_path, Login(password="right"), story)
    assert seen == [0o700]


def test_a_login_given_up_while_the_user_types_leaves_nothing(tmp_path: Path) -> None:
    asked = asyncio.Event()
    withdrawn = asyncio.Event()

    class Away:
        async def ask(self, text: str, *, echo: bool = False) -> str | None:
            asked.set()
            try:
                await asyncio.Event().wait()
                return None
            finally:
                withdrawn.set()

    async def story(spec: SiteSpec, _: EvilSite) -> None:
        site = SshSiteConnection(by_ssh(spec), Away())
        request = asyncio.ensure_future(site.remote("ns").connect())
        await asked.wait()
        children = children_of(os.getpid())
        assert children
        await site.close()
        assert withdrawn.is_set()
        assert not any(map(is_there, children))
        request.cancel()
        await asyncio.wait([request])

    on_evil(tmp_path, Login(password="right"), story)


def children_of(pid: int) -> list[int]:
    """Those that are called ssh."""
    found = [
        int(child)
        for file in Path(f"/proc/{pid}/task").glob("*/children")
        for child in file.read_text().split()
    ]
    return [child for child in found if Path(f"/proc/{child}/comm").read_text() == "ssh\n"]


# --- the way to the server ----------------------------------------------------------------------


def test_nothing_listens_there(sshd: SshServer) -> None:
    refused(by_ssh(sshd.site_spec(), port=free_port()), Unreachable, "Connection refused")


def test_a_host_name_that_is_not_known(sshd: SshServer, tmp_path: Path) -> None:
    spec = with_config(sshd, tmp_path / "config", HostName="nowhere.invalid")
    refused(spec, Unreachable, "Could not resolve hostname nowhere.invalid")


def test_a_server_without_sftp(tmp_path: Path) -> None:
    with ssh_server(tmp_path / "s", subsystem=None) as server:
        refused(server.site_spec(), WrongSettings, "no SFTP service.*subsystem request failed")


def test_a_server_that_prints_text_first(tmp_path: Path) -> None:
    with ssh_server(tmp_path / "s", subsystem="/bin/echo Welcome to the cluster") as server:
        refused(server.site_spec(), NoService, r"\('Welcome to the cluster'\).*bashrc")


def test_a_proxy_command_is_used(tmp_path: Path, sshd: SshServer) -> None:
    relay = f'{sys.executable} -c "{_RELAY}" {LOOPBACK} {sshd.port}'
    spec = with_config(sshd, tmp_path / "config", ProxyCommand=relay, HostKeyAlias="none")
    (tmp_path / "known").write_text(f"none {Path(f'{sshd.host_key}.pub').read_text()}")
    config = tmp_path / "config"
    config.write_text(config.read_text().replace(str(sshd.known_hosts), str(tmp_path / "known")))

    async def story(remote: SftpRemote) -> None:
        await put(remote, b"through a proxy", b"content")
        assert await get(remote, b"through a proxy") == b"content"

    run(spec, story)


def test_a_jump_host_asks_too(sshd: SshServer, tmp_path: Path) -> None:
    """Its key is not known; without an answer nothing goes on to the target."""
    known = tmp_path / "known"
    spec = with_config(sshd, tmp_path / "config", ProxyJump="gate")
    gate = sshd.config_text("gate").replace(str(sshd.known_hosts), str(known))
    with (tmp_path / "config").open("a") as config:
        config.write(gate)
    refused(spec, HostKeyRefused, "no terminal to ask on")
    ((question, echo),) = asyncio.run(enter(spec, "yes"))
    assert "authenticity of host" in question
    assert echo


def test_what_a_proxy_command_leaves_behind_does_not_hold_us(
    tmp_path: Path, sshd: SshServer
) -> None:
    """It has ssh's stderr still open."""
    left = tmp_path / "left"
    script = tmp_path / "proxy"
    script.write_text(
        f"#!/bin/sh\nsetsid sleep 600 &\necho $! > {left}\n"
        f'exec {sys.executable} -c "{_RELAY}" {LOOPBACK} {sshd.port}\n'
    )
    script.chmod(0o700)
    spec = with_config(sshd, tmp_path / "config", ProxyCommand=str(script))

    async def main() -> None:
        site = SshSiteConnection(by_ssh(spec), ScriptedPrompter())
        await site.remote("ns").connect()
        children = pids(site.remote("ns"))
        async with asyncio.timeout(20):
            await site.close()
        assert not any(map(is_there, children))

    try:
        asyncio.run(main())
    finally:
        pid = int(left.read_text())
        assert is_there(pid)
        os.kill(pid, signal.SIGKILL)


_RELAY = (
    "import os,socket,sys,threading;"
    "s=socket.create_connection(sys.argv[1:3]);"
    "t=lambda:[s.sendall(b) for b in iter(lambda:os.read(0,65536),b'')];"
    "threading.Thread(target=t,daemon=True).start();"
    "[os.write(1,b) for b in iter(lambda:s.recv(65536),b'')]"
)


@pytest.fixture
def master(tmp_path: Path) -> Iterator[SiteSpec]:
    """A server, and a ControlMaster connection to it that the user made; the key is gone since."""
    with ssh_server(tmp_path / "s") as server:
        control = tmp_path / "control"
        spec = with_config(server, tmp_path / "config", ControlPath=str(control))
        site = spec.site
        assert isinstance(site, SshSite)
        ssh = ["ssh", "-F", str(site.ssh_config)]
        subprocess.run(
            [*ssh, "-MNf", ALIAS], check=True, timeout=20,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        server.authorized_keys.write_text("")
        yield spec
        subprocess.run([*ssh, "-O", "exit", ALIAS], check=True, timeout=20, capture_output=True)
        until(lambda: not control.exists())  # it answers before it goes


def test_a_control_master_needs_no_login_and_gives_two_channels(master: SiteSpec) -> None:
    async def story(remote: SftpRemote) -> None:
        await put(remote, b"file", b"content")
        assert await get(remote, b"file") == b"content"
        assert len(login_of(remote).channels) == 2
        ended = pids(remote)
        await login_of(remote).close()
        assert not any(map(is_there, ended))
        assert await get(remote, b"file") == b"content", "the master is still there"

    run(master, story)


def test_a_control_master_verifies_uploads(master: SiteSpec) -> None:
    (root,) = master.roots.values()
    assert isinstance(root, SftpRoot)
    run(verifying(master), lambda remote: verify_uploads(remote, Path(root.path)))


# --- how it ends --------------------------------------------------------------------------------


def test_one_channel_where_a_second_login_would_be_needed(sshd: SshServer) -> None:
    async def story(remote: SftpRemote) -> None:
        await remote.connect()
        assert len(login_of(remote).channels) == len(pids(remote)) == 1

    run(sshd.site_spec(), story)


def test_a_killed_child_is_replaced(sshd: SshServer) -> None:
    async def story(remote: SftpRemote) -> None:
        await put(remote, b"file", b"content")
        (pid,) = pids(remote)
        session = remote._shared._session
        assert session is not None
        os.kill(pid, signal.SIGKILL)
        await session.ended.wait()
        assert await get(remote, b"file") == b"content"
        assert not is_there(pid)
        assert pids(remote) != [pid]

    run(sshd.site_spec(), story)


def test_a_child_killed_in_flight_is_unreachable_and_comes_back(sshd: SshServer) -> None:
    data = bytes(64 * 1024 * 1024)

    async def story(remote: SftpRemote) -> None:
        await remote.connect()
        begun = asyncio.Event()

        class Begun(list[int]):
            def append(self, done: int) -> None:
                begun.set()

        upload = asyncio.ensure_future(put(remote, b"big", data, progress=Begun()))
        await begun.wait()
        os.kill(pids(remote)[0], signal.SIGKILL)
        with pytest.raises(Unreachable, match="lost"):
            await upload
        await put(remote, b"small", b"content")
        assert await get(remote, b"small") == b"content"

    run(sshd.site_spec(), story)


def test_a_child_that_does_not_react_is_killed(sshd: SshServer) -> None:
    async def main() -> None:
        site = SshSiteConnection(by_ssh(sshd.site_spec()), ScriptedPrompter())
        remote = site.remote("ns")
        await remote.connect()
        (pid,) = pids(remote)
        os.kill(pid, signal.SIGSTOP)
        await site.close()
        assert not is_there(pid)

    asyncio.run(main())


TARGET = OpenSshTarget(SshSite(ALIAS), LOOPBACK, "22", "me", None)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("me@127.0.0.1: Permission denied (publickey,password).", AccessRefused),
        ("Received disconnect from ::1 port 2: Too many authentication failures", AccessRefused),
        ("Host key verification failed.", HostKeyRefused),
        ("No ED25519 host key is known for x and you have requested ...", HostKeyRefused),
        ("subsystem request failed on channel 0", NoService),
        ("ssh_askpass: exec(/tmp/x): Permission denied", WrongSettings),
        ("Unable to negotiate with 1.2.3.4 port 22: no matching cipher found", WrongSettings),
        ("ssh: connect to host x port 22: Connection timed out", NotConnected),
        ("Connection closed by 1.2.3.4 port 22", Unreachable),
    ],
)
def test_what_ssh_says_last_decides(line: str, error: type[RemoteError]) -> None:
    found = ending(TARGET, ["something before", line], None)
    assert type(found) is error
    assert line in found.message


def test_what_was_typed_in_vain_is_not_offered_again_by_itself() -> None:
    line = "me@127.0.0.1: Permission denied (password)."
    assert type(ending(TARGET, [line], None, answered=True)) is LoginNeeded
    assert type(ending(TARGET, [], "Password: ")) is LoginNeeded


def test_an_end_without_a_word() -> None:
    assert ending(TARGET, [], None).message.endswith("it gives no reason")
