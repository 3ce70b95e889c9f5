"""Host keys: what `ssh` trusts, refuses and remembers, hpcfs trusts, refuses and remembers.

Each case is tried with the real `ssh` first, on the same server, configuration and known_hosts;
then with hpcfs, and what both left in known_hosts is compared.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncssh
import pytest

from hpcfs.model.errors import HostKeyRefused, RemoteError
from hpcfs.model.sites import SshSite
from hpcfs.remotes.sftp.site import SshSiteConnection
from hpcfs.remotes.ssh import knownhosts
from hpcfs.remotes.ssh.hostkeys import HostKeys, Rules
from tests.support.evil_sftp import Login, Plain, evil_site
from tests.support.sshd import LOOPBACK, ScriptedPrompter, SshServer, ssh_server, write_key


@dataclass
class Case:
    """`known` has {key} (the server's), {other}, {ca}, {rsa} and {p}; `ssh` is what ssh must do."""

    known: str
    lines: str = ""
    gets_in: bool = True
    revoked: str = ""
    error: type[RemoteError] = HostKeyRefused


YES, ASK, NEW, NO = (
    f"StrictHostKeyChecking {value}" for value in ("yes", "ask", "accept-new", "no")
)
HOST = f"[{LOOPBACK}]:{{p}}"
CASES = {
    "known": Case(f"{HOST} {{key}}"),
    "known, strictly": Case(f"{HOST} {{key}}", YES),
    "known among others": Case(f"{HOST} {{other}}\n{HOST} {{key}}"),
    "known on any port": Case(f"{LOOPBACK} {{key}}", YES),
    "known by a pattern": Case("!x,[127.*]:{p} {key}", YES),
    "negated pattern": Case("!*127*,* {key}", YES, gets_in=False),
    "in capitals": Case("[LOCALHOST]:{p} {key}", "HostName localhost\n" + YES),
    "unknown": Case("", ASK, gets_in=False),
    "unknown, strictly": Case("", YES, gets_in=False),
    "unknown, accepted": Case("", NEW),
    "unknown, not checked": Case("", NO),
    "unknown, and no file for it": Case("", NO + "\nUserKnownHostsFile none", gets_in=False),
    "unknown, and hashed": Case("", NEW + "\nHashKnownHosts yes"),
    "changed": Case(f"{HOST} {{other}}", ASK, gets_in=False),
    "changed, accepting new ones": Case(f"{HOST} {{other}}", NEW, gets_in=False),
    "changed, not checked": Case(f"{HOST} {{other}}", NO),
    "changed to another kind": Case(f"{HOST} {{rsa}}", NEW, gets_in=False),
    "another key on any port": Case(f"{LOOPBACK} {{other}}", NEW),
    "another key on any port, asked": Case(f"{LOOPBACK} {{other}}", ASK, gets_in=False),
    "alias": Case("thecluster {key}", "HostKeyAlias TheCluster\n" + YES),
    "alias, not the host": Case(
        f"{HOST} {{key}}", "HostKeyAlias thecluster\n" + YES, gets_in=False
    ),
    "alias, without its port": Case(
        "[thecluster]:{p} {key}", "HostKeyAlias thecluster\n" + YES, gets_in=False
    ),
    "alias, changed": Case("thecluster {other}", "HostKeyAlias thecluster\n" + NEW, gets_in=False),
    "alias, changed, not checked": Case("thecluster {other}", "HostKeyAlias thecluster\n" + NO),
    "alias, new": Case("", "HostKeyAlias thecluster\n" + NEW),
    "alias, new, hashed": Case("", "HostKeyAlias thecluster\nHashKnownHosts yes\n" + NEW),
    "revoked": Case(f"{HOST} {{key}}\n@revoked * {{key}}", NEW, gets_in=False),
    "revoked, not checked": Case(f"{HOST} {{key}}\n@revoked * {{key}}", NO),
    "revoked by a list": Case(f"{HOST} {{key}}", YES, gets_in=False, revoked="{key}\n"),
    "revoked by a list, not checked": Case(f"{HOST} {{key}}", NO, gets_in=False, revoked="{key}\n"),
    "not in the list": Case(f"{HOST} {{key}}", YES, revoked="# none\n{other}\n"),
    "revoked by a KRL": Case(f"{HOST} {{key}}", YES, gets_in=False, revoked="KRL {key}\n"),
    "not in the KRL": Case(f"{HOST} {{key}}", YES, revoked="KRL {other}\n"),
    "a list that is not there": Case(
        f"{HOST} {{key}}", YES + "\nRevokedHostKeys /nowhere/revoked", gets_in=False
    ),
    "a global file": Case("", YES + "\nGlobalKnownHostsFile {d}/global"),
    "BatchMode": Case("", "BatchMode yes", gets_in=False),
    "a kind of key that is not wanted": Case(
        f"{HOST} {{key}}",
        YES + "\nHostKeyAlgorithms rsa-sha2-512",
        gets_in=False,
        error=RemoteError,  # the server may end the connection before we can
    ),
    "loopback is not checked": Case(f"{HOST} {{other}}", "NoHostAuthenticationForLocalhost yes"),
    "loopback is checked with an alias": Case(
        "x {other}", "NoHostAuthenticationForLocalhost yes\nHostKeyAlias x", gets_in=False
    ),
    "an authority that signed nothing": Case(f"@cert-authority * {{ca}}\n{HOST} {{key}}", YES),
    "RequiredRSASize": Case(f"{HOST} {{key}}", YES + "\nRequiredRSASize 4096"),
    "lines without sense": Case(f"# x\n@nonsense a b\nbroken\n\n{HOST} {{key}}", YES),
}


@dataclass
class World:
    server: SshServer
    path: Path
    keys: dict[str, str]

    def write(self, case: Case) -> Path:
        """The ssh_config, with fresh known_hosts."""
        values = self.keys | {"p": str(self.server.port), "d": str(self.path)}
        (self.path / "known_hosts").write_text(
            case.known.format(**values) + "\n" * bool(case.known)
        )
        (self.path / "global").write_text(f"{HOST} {{key}}\n".format(**values))
        lines = case.lines.format(**values)
        if case.revoked:
            self._revoke(case.revoked.format(**values))
            lines += f"\nRevokedHostKeys {self.path}/revoked"
        config = self.path / "config"
        config.write_text(
            f"Host cl\n{lines}\n  HostName {LOOPBACK}\n  Port {self.server.port}\n"
            f"  User {self.server.user}\n  IdentityFile {self.server.key}\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {self.path}/known_hosts\n"
            f"  GlobalKnownHostsFile {self.path}/no-global\n"
        )
        return config

    def _revoke(self, text: str) -> None:
        listed = self.path / "listed"
        listed.write_text(text.removeprefix("KRL "))
        if text.startswith("KRL "):
            (self.path / "revoked").unlink(missing_ok=True)
            line = ["ssh-keygen", "-q", "-k", "-f", str(self.path / "revoked"), str(listed)]
            subprocess.run(line, check=True, capture_output=True, timeout=10)
        else:
            shutil.copyfile(listed, self.path / "revoked")

    def remembered(self) -> list[tuple[bool, str]]:
        """Lines: whether the name is hashed, and the key."""
        lines = (self.path / "known_hosts").read_text().splitlines()
        return [(line.startswith("|1|"), line.split(" ", 1)[-1]) for line in lines]

    def name_of(self, alias: str) -> bool:
        """ssh-keygen finds it."""
        line = ["ssh-keygen", "-F", alias, "-f", str(self.path / "known_hosts")]
        return subprocess.run(line, capture_output=True, timeout=10, check=False).returncode == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("hostkeys")
    with ssh_server(base / "s") as server:
        rsa = asyncssh.generate_private_key("ssh-rsa", key_size=2048)
        yield World(
            server,
            base,
            {
                "key": public(server.host_key),
                "other": public(write_key(base / "other")),
                "ca": public(write_key(base / "ca")),
                "rsa": rsa.export_public_key().decode().strip(),
            },
        )


def public(key: Path) -> str:
    return " ".join(Path(f"{key}.pub").read_text().split()[:2])


def ssh_gets_in(config: Path) -> bool:
    line = ["ssh", "-F", str(config), "-o", "ConnectTimeout=5", "cl", "true"]
    return (
        subprocess.run(
            ["setsid", *line],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=False,
        ).returncode
        == 0
    )


def enter(world: World, config: Path, *answers: str | None) -> ScriptedPrompter:
    prompter = ScriptedPrompter(*answers)

    async def main() -> None:
        spec = world.server.site_spec(site=SshSite("cl", ssh_config=str(config)))
        site = SshSiteConnection(spec, prompter)
        try:
            await site.remote("ns").connect()
        finally:
            await site.close()

    asyncio.run(main())
    return prompter


@pytest.mark.parametrize("name", CASES)
def test_as_ssh_does_it(world: World, name: str) -> None:
    case = CASES[name]
    config = world.write(case)
    assert ssh_gets_in(config) == case.gets_in, "the case is wrong"
    by_ssh = world.remembered()
    config = world.write(case)
    if case.gets_in:
        enter(world, config)
    else:
        with pytest.raises(case.error):
            enter(world, config)
    assert world.remembered() == by_ssh


@pytest.mark.parametrize(
    ("lines", "name"),
    [("", HOST), ("HashKnownHosts yes", HOST), ("HostKeyAlias it\nHashKnownHosts yes", "it")],
)
def test_what_is_accepted_is_remembered_by_the_name_that_ssh_looks_for(
    world: World, lines: str, name: str
) -> None:
    config = world.write(Case("", lines))
    fingerprint = asyncssh.read_public_key(f"{world.server.host_key}.pub").get_fingerprint()
    assert len(enter(world, config, "sure", fingerprint).asked) == 2
    assert world.name_of(name.format(p=world.server.port))
    assert ssh_gets_in(config)
    assert enter(world, config).asked == []


def test_a_changed_key_with_an_alias_and_a_port_is_never_asked_about(world: World) -> None:
    config = world.write(Case("it {other}", "HostKeyAlias it"))
    with pytest.raises(HostKeyRefused, match=r"ssh-keygen -R 'it' -f .*known_hosts"):
        enter(world, config, "yes", "yes")


def test_strict_checking_names_itself(world: World) -> None:
    config = world.write(Case("", YES))
    with pytest.raises(HostKeyRefused, match="StrictHostKeyChecking is yes"):
        enter(world, config, "yes")


def test_who_shows_another_key_gets_no_password(tmp_path: Path) -> None:
    """StrictHostKeyChecking no lets a changed key pass as ssh does: keys yes, passwords no."""
    login = Login(password="right", dialogue=[("Password: ", False, "right")])

    def show_another_key(site: SshSite) -> None:
        config, known = Path(str(site.ssh_config)), tmp_path / "wrong"
        known.write_text(f"* {public(write_key(tmp_path / 'k'))}\n")
        lines = f"Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile {known}\n"
        config.write_text(lines + config.read_text())

    async def main() -> None:
        async with evil_site(tmp_path, Plain, login=login) as evil:
            assert isinstance(evil.spec.site, SshSite)
            show_another_key(evil.spec.site)
            prompter = ScriptedPrompter("right", "right")
            site = SshSiteConnection(evil.spec, prompter)
            try:
                with pytest.raises(RemoteError, match="refused the login"):
                    await site.remote("ns").connect()
            finally:
                await site.close()
            assert prompter.asked == []
            assert login.tries == 0

    asyncio.run(main())


# --- host certificates ----------------------------------------------------------------------------


def certified(base: Path, server: SshServer, *principals: str) -> Path:
    """Signs the server's key; the authority."""
    authority = write_key(base / "authority")
    line = [
        "ssh-keygen",
        "-q",
        "-s",
        str(authority),
        "-I",
        "host",
        "-h",
        "-n",
        ",".join(principals),
    ]
    subprocess.run([*line, f"{server.host_key}.pub"], check=True, timeout=10, capture_output=True)
    return authority


@pytest.mark.parametrize(
    ("known", "lines", "gets_in"),
    [
        ("@cert-authority * {authority}", "", True),
        ("@cert-authority nobody {authority}", "", False),
        ("@cert-authority it {authority}", "HostKeyAlias it", True),
        ("@cert-authority it {authority}\n@revoked * {key}", "HostKeyAlias it", False),
        ("@cert-authority * {authority}\n@revoked * {authority}", "", False),
        (f"{HOST} {{key}}", "", True),
        ("@cert-authority * {authority}", "RevokedHostKeys {d}/key.pub", False),
        ("@cert-authority * {authority}", "RevokedHostKeys {d}/authority.pub", False),
        ("@cert-authority * {authority}", "RevokedHostKeys {d}/other.pub", True),
    ],
)
def test_host_certificates(tmp_path: Path, known: str, lines: str, gets_in: bool) -> None:
    server = SshServer(tmp_path / "s")
    authority = certified(tmp_path, server, LOOPBACK, "it")
    server.options = (f"HostCertificate {server.host_key}-cert.pub",)
    shutil.copyfile(f"{server.host_key}.pub", tmp_path / "key.pub")
    keys = {"key": public(server.host_key), "authority": public(authority)}
    keys |= {"other": public(write_key(tmp_path / "other")), "ca": "", "rsa": ""}
    server.start()
    try:
        world = World(server, tmp_path, keys)
        config = world.write(Case(known, YES + "\n" + lines))
        assert ssh_gets_in(config) == gets_in, "the case is wrong"
        if gets_in:
            enter(world, config)
        else:
            with pytest.raises(HostKeyRefused):
                enter(world, config, "yes")
    finally:
        server.stop()


# --- rules that need another network --------------------------------------------------------------


def a_key() -> asyncssh.SSHKey:
    return asyncssh.generate_private_key("ssh-ed25519").convert_to_public()


def test_the_address_may_have_another_key(tmp_path: Path) -> None:
    """CheckHostIP, which was ssh's default until 8.5."""
    known, key, other = tmp_path / "known", a_key(), a_key()
    rules = Rules("login", user_files=(known,), checks_address=True)
    knownhosts.add(known, "login", key, hashed=False)
    assert HostKeys(rules).judge(key, "192.0.2.1").is_trusted
    assert [entry.key for entry in knownhosts.find(known, "192.0.2.1")] == [key], "as ssh adds it"
    known.write_text("")
    knownhosts.add(known, "login", key, hashed=False)
    knownhosts.add(known, "192.0.2.1", other, hashed=True)
    assert HostKeys(rules).judge(key, "192.0.2.1").kind == "unknown"
    assert HostKeys(rules).judge(key, "192.0.2.2").kind == "trusted"
    strictly = Rules("login", user_files=(known,), checks_address=True, strict="accept-new")
    assert HostKeys(strictly).judge(key, "192.0.2.1").kind == "refused"


def test_a_short_rsa_key_is_refused(tmp_path: Path) -> None:
    known = tmp_path / "known"
    key = asyncssh.generate_private_key("ssh-rsa", key_size=1024).convert_to_public()
    knownhosts.add(known, "login", key, hashed=False)
    assert HostKeys(Rules("login", user_files=(known,))).judge(key, "").is_trusted
    judged = HostKeys(Rules("login", user_files=(known,), least_rsa_bits=2048)).judge(key, "")
    assert judged.kind == "refused"
    assert "RequiredRSASize" in judged.text


def test_a_file_whose_last_line_has_no_end(tmp_path: Path) -> None:
    known, key, other = tmp_path / "known", a_key(), a_key()
    knownhosts.add(known, "a", key, hashed=False)
    known.write_text(known.read_text().rstrip("\n"))
    knownhosts.add(known, "b", other, hashed=False)
    assert [entry.line for entry in knownhosts.find(known, "b")] == [2]
