"""Configurations as `ssh` reads them: each is tried with the real `ssh` and with hpcfs, on a real
server. Who gets in with one gets in with the other, and who doesn't doesn't."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpcfs.model.errors import RemoteError, Unreachable, WrongSettings
from hpcfs.model.sites import SshSite
from hpcfs.remotes.sftp.site import SshSiteConnection
from hpcfs.remotes.ssh import options
from hpcfs.remotes.ssh.settings import read_hop
from tests.support.mounts import until
from tests.support.sshd import LOOPBACK, ScriptedPrompter, SshServer, ssh_server, write_key
from tests.support.steps import is_gone

PASS_A_SOCKET = """
import array, socket, sys
there = socket.create_connection((sys.argv[1], int(sys.argv[2])))
ours = socket.socket(fileno=1)
socket.send_fds(ours, [b"x"], [there.fileno()])
"""


@dataclass
class World:
    """A server, and a user's files."""

    server: SshServer
    path: Path
    agent: str

    def lines(self, *without: str) -> str:
        """What each host needs."""
        lines = {
            "Port": str(self.server.port),
            "User": self.server.user,
            "IdentityFile": str(self.server.key),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(self.path / "known_hosts"),
        }
        return "".join(f"  {key} {value}\n" for key, value in lines.items() if key not in without)

    def write(self, text: str) -> Path:
        """{h}: HostName and common lines, {c}: common lines, {p}: port, {d}: the directory."""
        values = {
            "c": self.lines(),
            "h": f"  HostName {LOOPBACK}\n{self.lines()}",
            "nokey": f"  HostName {LOOPBACK}\n{self.lines('IdentityFile')}",
            "nokeys": f"  HostName {LOOPBACK}\n{self.lines('IdentityFile', 'IdentitiesOnly')}",
            "nouser": f"  HostName {LOOPBACK}\n{self.lines('User')}",
            "noknown": f"  HostName {LOOPBACK}\n{self.lines('UserKnownHostsFile')}",
            "noport": f"  HostName {LOOPBACK}\n{self.lines('Port')}",
            "p": self.server.port,
            "d": self.path,
            "u": self.server.user,
            "agent": self.agent,
            "python": sys.executable,
            "jump": f"Host jump\n  HostName {LOOPBACK}\n{self.lines()}",
        }
        file = self.path / "config"
        file.write_text(text.format(**values))
        return file


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("config")
    with ssh_server(base / "s") as server, agent(base / "agent", server.key) as place:
        yield World(server, base, place)


@pytest.fixture(autouse=True)
def files(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setenv("HPCFS_TEST_FILES", str(world.path))
    monkeypatch.setenv("HPCFS_TEST_AGENT", world.agent)
    host_key = world.server.known_hosts_line(world.server.host_key).split(None, 1)[1]
    port = world.server.port
    names = (f"[{LOOPBACK}]:{port}", f"[localhost]:{port}", f"[::1]:{port}")
    (world.path / "known_hosts").write_text("".join(f"{name} {host_key}" for name in names))
    (world.path / "known hosts").write_text((world.path / "known_hosts").read_text())
    (world.path / "kh-thecluster").write_text(f"thecluster {host_key}")
    (world.path / "nobody-knows").write_text("")
    for name in ("my key", f"key-cl-{port}", f"key-{LOOPBACK}-{world.server.user}"):
        shutil.copyfile(world.server.key, world.path / name)
        (world.path / name).chmod(0o600)
    if not (world.path / "other").exists():
        write_key(world.path / "other")
    shutil.copyfile(f"{world.server.key}.pub", world.path / "only.pub")
    (world.path / "pass.py").write_text(PASS_A_SOCKET)
    included = world.path / "config.d"
    shutil.rmtree(included, ignore_errors=True)
    included.mkdir()
    for number in range(10, 30):
        (included / str(number)).write_text("Host cl\n  Port 9\n  User nobody\n")
    (included / "00-mine").write_text(f"Host cl\n  HostName {LOOPBACK}\n{world.lines()}")


class agent:  # noqa: N801 (a context manager, named as what it is)
    def __init__(self, place: Path, *keys: Path) -> None:
        self._place, self._keys = place, keys

    def __enter__(self) -> str:
        line = ["ssh-agent", "-D", "-a", str(self._place)]
        self._process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not self._place.exists():
            assert time.monotonic() < deadline, "no agent"
            time.sleep(0.01)
        environ = os.environ | {"SSH_AUTH_SOCK": str(self._place)}
        for key in self._keys:
            subprocess.run(["ssh-add", "-q", str(key)], env=environ, check=True, timeout=10)
        return str(self._place)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)


def ssh_gets_in(config: Path, host: str = "cl") -> bool:
    line = ["ssh", "-F", str(config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", host, "true"]
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
    )
    return done.returncode == 0


def hpcfs_gets_in(world: World, config: Path, host: str = "cl") -> bool:
    """True, or the reason why not."""

    async def enter() -> None:
        spec = world.server.site_spec(site=SshSite(host, ssh_config=str(config)))
        site = SshSiteConnection(spec, ScriptedPrompter())
        try:
            await site.remote("ns").connect()
        finally:
            await site.close()

    try:
        asyncio.run(enter())
    except RemoteError as error:
        print(type(error).__name__, error.message)
        return False
    return True


IN = {
    "plain": "Host cl\n{h}",
    "comment at the end of a line": "Host cl\n  HostName 127.0.0.1  # login node\n{c}",
    "comment after Host": "Host cl # it's mine\n{h}",
    "comment after Match all": "Match all # defaults\nHost cl\n{h}",
    "equals": "Host=cl\n  HostName=127.0.0.1\n  Port ={p}\n  User= {u}\n{c}",
    "case and tabs": "HOST\tcl\n\thostname\t127.0.0.1\n{c}",
    "carriage returns": "Host cl\r\n  HostName 127.0.0.1\r\n{c}",
    "quoted": 'Host "cl"\n  HostName "127.0.0.1"\n  User "{u}"\n{c}',
    "quotes elsewhere": "Host other\n  ProxyCommand sh -c \"x\" # it's old\nHost cl\n{h}",
    "negated pattern": "Host * !cl\n  Port 9\nHost c?\n{h}",
    "HostName with a token":
        "Host 127.0.0.1 cl\n  HostName 127.0.0.1\nHost cl\n  HostName %h.x\n{c}",
    "units": "Host cl\n  ServerAliveInterval 1m\n  ConnectTimeout 30s\n  RekeyLimit 1G 1h\n{h}",
    "key with a space": 'Host cl\n  IdentityFile "{d}/my key"\n{nokey}',
    "key with an escaped space": "Host cl\n  IdentityFile {d}/my\\ key\n{nokey}",
    "key with tokens": "Host cl\n  IdentityFile {d}/key-%n-%p\n{nokey}",
    "key with other tokens": "Host cl\n  IdentityFile {d}/key-%h-%r\n{nokey}",
    "key with a variable": "Host cl\n  IdentityFile ${{HPCFS_TEST_FILES}}/my\\ key\n{nokey}",
    "key with a hash": "Host cl\n  IdentityFile {d}/no-%C\n{h}",
    "several keys": "Host cl\n  IdentityFile {d}/missing\n  IdentityFile {d}/other\n{h}",
    "no key file but an agent": "Host cl\n  IdentityFile none\n  IdentityAgent {agent}\n{nokeys}",
    "agent of a variable": "Host cl\n  IdentityAgent $HPCFS_TEST_AGENT\n{nokeys}",
    "agent of a variable in braces": "Host cl\n  IdentityAgent ${{HPCFS_TEST_AGENT}}\n{nokeys}",
    "agent, one key of it":
        "Host cl\n  IdentityFile {d}/only.pub\n  IdentityAgent {agent}\n{nokey}",
    "certificate with a token": "Host cl\n  CertificateFile {d}/%k-cert.pub\n{h}",
    "certificate none": "Host cl\n  CertificateFile none\n{h}",
    "several known_hosts":
        "Host cl\n  UserKnownHostsFile {d}/nobody-knows {d}/known_hosts\n{noknown}",
    "known_hosts with a space": 'Host cl\n  UserKnownHostsFile "{d}/known hosts" {d}/x\n{noknown}',
    "known_hosts with a token": "Host cl\n  HostKeyAlias thecluster\n"
    "  UserKnownHostsFile {d}/kh-%k\n{noknown}",
    "global known_hosts": "Host cl\n  UserKnownHostsFile {d}/nobody-knows\n"
    "  GlobalKnownHostsFile {d}/known_hosts\n{noknown}",
    "Match host": "Match host 127.0.0.1\n  Port 9\nMatch host cl\n{h}",
    "Match originalhost, user": "Match originalhost cl user {u}\n{h}Host cl\n{h}",
    "Match localuser": "Match localuser nobody,{u}\n  HostName 127.0.0.1\nHost cl\n{c}",
    "Match exec, equals": 'Match host other exec "test %h = x"\n  User nobody\nHost cl\n{h}',
    "Match exec, token": 'Match originalhost cl exec "test %n != cl"\n  User nobody\nHost cl\n{h}',
    "Match exec, true": 'Match exec "test %n = cl"\n{h}',
    "Match !exec": 'Match !exec "test %n = cl"\n  User nobody\nHost cl\n{h}',
    "Match final": "Host cl\n{noport}Match final host 127.0.0.1\n  Port {p}\n",
    "Match canonical": "Match canonical host 127.0.0.1\n  Port {p}\nHost cl\n"
    "  CanonicalizeHostname yes\n{noport}",
    "Include, in order": "Include {d}/config.d/*\n",
    "Include, quoted": 'Include "{d}/config.d/00*" {d}/none/*\n',
    "Include in a Host":
        "Host other\n  Include {d}/config.d/2*\nHost cl\n  Include {d}/config.d/0*\n",
    "ProxyJump": "Host cl\n  ProxyJump jump\n{h}{jump}",
    "ProxyJump with %r": "Host cl\n  ProxyJump %r@jump\n{h}{jump}  User nobody\n",
    "ProxyJump, a URI": "Host cl\n  ProxyJump ssh://{u}@localhost:{p}\n{h}Host localhost\n"
    "  UserKnownHostsFile {d}/known_hosts\n  IdentityFile {d}/my\\ key\n",
    "ProxyJump, user and port": "Host cl\n  ProxyJump {u}@jump:{p}\n{h}Host jump\n"
    "  User nobody\n  Port 9\n{h}",
    "ProxyJump, a chain": "Host cl\n  ProxyJump first,jump\n{h}{jump}  ProxyJump nowhere\n"
    "Host first\n{h}",
    "ProxyJump of a jump": "Host cl\n  ProxyJump jump\n{h}Host jump\n  ProxyJump first\n{h}"
    "Host first\n{h}",
    "ProxyJump none": "Host cl\n  ProxyJump none\n{h}Host *\n  ProxyJump nowhere\n",
    "ProxyCommand": "Host cl\n  ProxyCommand ssh -F {d}/config -W %h:%p jump\n{h}{jump}",
    "ProxyCommand with a pipe": 'Host cl\n  ProxyCommand sh -c "ssh -F {d}/config -W %h:%p jump"\n'
    "{h}{jump}",
    "ProxyCommand none": "Host cl\n  ProxyCommand none\n{h}",
    "ProxyUseFdpass": "Host cl\n  ProxyUseFdpass yes\n"
    "  ProxyCommand {python} {d}/pass.py %h %p\n{h}",
    "AddressFamily": "Host cl\n  AddressFamily inet\n{h}",
    "BindAddress": "Host cl\n  BindAddress 127.0.0.2\n{h}",
    "algorithms": "Host cl\n  Ciphers aes256-ctr\n  MACs hmac-sha2-256\n"
    "  KexAlgorithms ecdh-sha2-nistp256\n  HostKeyAlgorithms ssh-ed25519\n{h}",
    "more algorithms": "Host cl\n  Ciphers +aes128-cbc\n  MACs ^hmac-sha1\n"
    "  KexAlgorithms -curve25519-sha256\n  PubkeyAcceptedAlgorithms +ssh-rsa\n{h}",
    "what is for terminals": "Host cl\n  SetEnv A=b C=\"d e\"\n  SendEnv LC_*\n  RequestTTY force\n"
    "  LocalForward 1 localhost:1\n  ControlMaster auto\n  ControlPath {d}/m-%C\n"
    "  ForwardAgent yes\n  VisualHostKey yes\n  ClearAllForwardings yes\n{h}",
    "IgnoreUnknown": "IgnoreUnknown UseKeychain\nHost cl\n  UseKeychain yes\n{h}",
    "PKCS11Provider": "Host cl\n  PKCS11Provider /nowhere/lib.so\n{h}",
    "PKCS11Provider none": "Host cl\n  PKCS11Provider none\n{h}",
    "GSSAPI": "Host cl\n  GSSAPIAuthentication yes\n  GSSAPIDelegateCredentials no\n{h}",
    "PreferredAuthentications": "Host cl\n  PreferredAuthentications password,publickey\n{h}",
    "loopback is spared": "Host cl\n  NoHostAuthenticationForLocalhost yes\n"
    "  UserKnownHostsFile {d}/nobody-knows\n{noknown}",
}  # fmt: skip
OUT = {
    "somebody else": "Host cl\n  User CAMPUS\\alice\n{h}",
    "another key": "Host cl\n  IdentityFile {d}/other\n{nokey}",
    "no key": "Host cl\n  IdentityFile none\n{nokeys}",
    "no agent": "Host cl\n  IdentityFile {d}/only.pub\n  IdentityAgent none\n{nokey}",
    "another key of the agent":
        "Host cl\n  IdentityFile {d}/other\n  IdentityAgent {agent}\n{nokey}",
    "no public keys": "Host cl\n  PubkeyAuthentication no\n{h}",
    "a known_hosts of nobody": "Host cl\n  UserKnownHostsFile {d}/nobody-knows\n{noknown}",
    "no known_hosts": "Host cl\n  UserKnownHostsFile none\n{noknown}",
    "the other family": "Host cl\n  AddressFamily inet6\n{h}",
    "an address of others": "Host cl\n  BindAddress 203.0.113.1\n{h}",
    "the first value counts": "Host *\n  Port 9\nHost cl\n{h}",
    "an unknown option": "Host cl\n  UseKeychain yes\n{h}",
    "a bad port": "Host cl\n  Port many\n{h}",
    "an open quote": 'Host cl\n  User "me\n{h}',
    "ProxyCommand that fails": "Host cl\n  ProxyCommand echo no way there >&2; exit 1\n{h}",
    "a jump host of nobody": "Host cl\n  ProxyJump nobody@jump\n{h}{jump}",
}  # fmt: skip


@pytest.mark.parametrize("name", IN)
def test_what_ssh_takes_is_taken(world: World, name: str) -> None:
    config = world.write(IN[name])
    assert ssh_gets_in(config), "the case is wrong"
    assert hpcfs_gets_in(world, config)


@pytest.mark.parametrize("name", OUT)
def test_who_ssh_does_not_let_in_does_not_get_in(world: World, name: str) -> None:
    config = world.write(OUT[name])
    assert not ssh_gets_in(config), "the case is wrong"
    assert not hpcfs_gets_in(world, config)


# --- ssh and its answer ---------------------------------------------------------------------------


def hop(config: Path, host: str = "cl", **more: object) -> object:
    return asyncio.run(read_hop(SshSite(host, ssh_config=str(config), **more)))  # type: ignore[arg-type]


def test_the_users_name_keeps_its_backslash(world: World) -> None:
    config = world.write("Host cl\n  User CAMPUS\\alice\n  ProxyJump CAMPUS\\\\bob@gate\n{h}")
    found = asyncio.run(read_hop(SshSite("cl", ssh_config=str(config))))
    assert (found.user, found.jumps) == ("CAMPUS\\alice", ("CAMPUS\\bob@gate",))


def test_what_the_url_names_wins_and_is_told_to_ssh(world: World) -> None:
    text = "Match user other\n  HostKeyAlias of-the-other\nHost cl\n  User me\n  Port 9\n{h}"
    site = SshSite("cl", user="other", port=2022, ssh_config=str(world.write(text)))
    found = asyncio.run(read_hop(site))
    assert (found.user, found.port, found.host_keys.rules.name) == ("other", 2022, "of-the-other")


def test_a_match_exec_that_waits_has_a_deadline(world: World, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    config = world.write(f'Match exec "echo $$ > {pid}; exec sleep 100"\n{{h}}')
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"ssh -G cl.*Match exec"):
        hop(config, connect_timeout=1.0)
    assert time.monotonic() - began < 5
    until(lambda: is_gone(int(pid.read_text())))


def test_what_a_match_exec_leaves_behind_is_not_waited_for(world: World) -> None:
    config = world.write('Match exec "sleep 20 & true"\n{h}')
    began = time.monotonic()
    hop(config)
    assert time.monotonic() - began < 10


def test_a_mistake_is_told_with_its_file_and_line(world: World) -> None:
    config = world.write("Host cl\n  UseKeychain yes\n{h}")
    with pytest.raises(WrongSettings, match=r"config.* line 2: .*usekeychain"):
        hop(config)


def test_the_systems_file_is_read_after_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HOME is not ssh's own home here, as under `sudo` or in a container."""
    system = tmp_path / "ssh_config"
    system.write_text("Host *\n  Port 2022\n  User of-the-system\n  HashKnownHosts yes\n")
    monkeypatch.setattr(options, "SYSTEM_FILE", str(system))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text(
        "Host cl\n  User mine\n  UserKnownHostsFile ~/.ssh/kh\nMatch host nobody\n"
    )
    found = asyncio.run(read_hop(SshSite("cl")))
    assert (found.user, found.port) == ("mine", 2022)
    assert found.host_keys.rules.hashes_names
    assert found.host_keys.rules.user_files == (tmp_path / ".ssh" / "kh",)
    assert asyncio.run(read_hop(SshSite("cl", ssh_config=str(system)))).user == "of-the-system"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("BindInterface lo", "BindInterface lo"),
        ("KnownHostsCommand /bin/echo %H", "KnownHostsCommand"),
        ("PKCS11Provider /bin/true", "PKCS11Provider /bin/true"),
        ("ProxyCommand -", "ProxyCommand -"),
        ("ProxyJump $USER@gate", "ProxyJump $USER@gate"),
        ("ProxyJump a;id@gate", "a;id"),
        ("ProxyJump x$(id)", "ProxyJump"),
        ("User a;id\n  ProxyCommand true %r", "a;id"),
        ("HostName a;id\n  ProxyCommand true %h", "a;id"),
    ],
)
def test_what_cannot_be_obeyed_is_named(world: World, line: str, named: str) -> None:
    config = world.write(f"Host cl\n  {line}\n{{h}}")
    with pytest.raises(WrongSettings) as raised:
        hop(config)
    assert named in raised.value.message


def test_a_proxy_command_ends_with_its_connection_and_tells_why(world: World) -> None:
    text = "Host cl\n  ProxyCommand echo no way there >&2; exit 1\n{h}"
    config = world.write(text)
    with pytest.raises(Unreachable, match="ProxyCommand says: no way there"):
        enter(world, config)
    pid = world.path / "pid"
    relay = f"echo $$ > {pid}; ssh -F {world.path}/config -W %h:%p jump"
    config = world.write(f"Host cl\n  ProxyCommand sh -c '{relay}'\n{{h}}{{jump}}")
    enter(world, config)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{int(pid.read_text())}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def enter(world: World, config: Path) -> None:
    async def main() -> None:
        spec = world.server.site_spec(site=SshSite("cl", ssh_config=str(config)))
        site = SshSiteConnection(spec, ScriptedPrompter())
        try:
            await site.remote("ns").connect()
        finally:
            await site.close()

    asyncio.run(main())


def test_weak_algorithms_are_offered_where_a_configuration_names_them(world: World) -> None:
    def offered(text: str) -> tuple[list[str], list[str]]:
        found = asyncio.run(read_hop(SshSite("cl", ssh_config=str(world.write(text)))))
        return found.options["kex_algs"], found.options["mac_algs"]

    kex, macs = offered("Host cl\n{h}")
    assert not [name for name in kex + macs if "sha1" in name or "md5" in name]
    assert "hmac-sha2-256" in macs
    kex, macs = offered(
        "Host cl\n  KexAlgorithms +diffie-hellman-group14-sha1\n  MACs hmac-sha1\n{h}"
    )
    assert "diffie-hellman-group14-sha1" in kex
    assert macs == ["hmac-sha1"]


@pytest.mark.filterwarnings("ignore:Diffie-Hellman")  # cryptography's: weak is the point here
@pytest.mark.parametrize("weak", ["KexAlgorithms diffie-hellman-group14-sha1", "MACs hmac-sha1"])
def test_a_server_with_weak_algorithms_only(tmp_path: Path, weak: str) -> None:
    """The connection ends unless the user's own configuration asks for that."""
    with ssh_server(tmp_path / "s", weak, "Ciphers aes128-ctr") as server:
        plain = World(server, tmp_path, "")
        server.ssh_config.write_text(server.config_text("cl"))
        with pytest.raises(WrongSettings, match="no algorithm in common"):
            enter(plain, server.ssh_config)
        server.ssh_config.write_text(server.config_text("cl", weak))
        enter(plain, server.ssh_config)


def test_an_agent_of_many_keys_shows_the_named_one_first(tmp_path: Path) -> None:
    """Servers end the connection after a few."""
    with ssh_server(tmp_path / "s", "MaxAuthTries 2") as server:
        others = [write_key(tmp_path / f"other{number}") for number in range(4)]
        with agent(tmp_path / "agent", *others, server.key) as place:
            crowd = World(server, tmp_path, place)
            (tmp_path / "known_hosts").write_text(server.known_hosts_line(server.host_key))
            text = "Host cl\n  IdentityAgent {agent}\n  IdentityFile {u}\n{nokeys}"
            for named, gets_in in ((f"{server.key}.pub", True), (f"{others[0]}.pub", False)):
                config = crowd.write(text.replace("{u}", named))
                assert ssh_gets_in(config) == gets_in, "the case is wrong"
                assert hpcfs_gets_in(crowd, config) == gets_in


def test_a_locked_key_that_an_agent_holds_is_known_without_its_public_file(tmp_path: Path) -> None:
    with ssh_server(tmp_path / "s") as server:
        locked = tmp_path / "locked"
        shutil.copyfile(server.key, locked)
        locked.chmod(0o600)
        line = ["ssh-keygen", "-q", "-p", "-N", "open sesame", "-f", str(locked)]
        subprocess.run(line, check=True, timeout=10, capture_output=True)
        with agent(tmp_path / "agent", server.key) as place:
            holder = World(server, tmp_path, place)
            (tmp_path / "known_hosts").write_text(server.known_hosts_line(server.host_key))
            text = "Host cl\n  IdentityAgent {agent}\n  IdentityFile {d}/locked\n{nokey}"
            config = holder.write(text)
            assert ssh_gets_in(config), "the case is wrong"
            assert hpcfs_gets_in(holder, config)


# --- without ssh ----------------------------------------------------------------------------------


@pytest.fixture
def no_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.shutil, "which", lambda _: None)


@pytest.mark.parametrize(
    "name",
    [
        "plain", "comment at the end of a line", "comment after Host", "comment after Match all",
        "equals", "case and tabs", "carriage returns", "quoted", "quotes elsewhere",
        "negated pattern", "units", "key with a space", "key with tokens", "key with other tokens",
        "key with a variable", "several keys", "certificate with a token", "several known_hosts",
        "known_hosts with a space", "global known_hosts", "Include, in order", "Include, quoted",
        "Include in a Host", "ProxyJump", "ProxyJump with %r", "ProxyJump, a URI", "BindAddress",
        "ProxyJump, user and port", "ProxyJump, a chain", "ProxyJump of a jump", "algorithms",
        "ProxyUseFdpass", "no key file but an agent", "what is for terminals",
        "agent of a variable",
    ],
)  # fmt: skip
def test_without_ssh_what_is_plain_is_taken(world: World, no_ssh: None, name: str) -> None:
    assert hpcfs_gets_in(world, world.write(IN[name]))


def test_a_user_of_no_database_is_as_without_ssh(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ssh says "No user exists for uid ..."; in a container that must not stop a mount."""
    monkeypatch.setattr(options, "home_of_ssh", lambda: None)
    assert hpcfs_gets_in(world, world.write(IN["plain"]))
    with pytest.raises(WrongSettings, match="line 1: Match"):
        hop(world.write(IN["Match host"]))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Match host", "line 1: Match"), ("Match exec, true", "line 1: Match"),
        ("IgnoreUnknown", "line 1: ignoreunknown"), ("more algorithms", "line 2: ciphers with"),
        ("known_hosts with a token", "line 3: the token"), ("key with a hash", "no token %C"),
    ],
)  # fmt: skip
def test_without_ssh_what_is_not_understood_is_refused(
    world: World, no_ssh: None, name: str, line: str
) -> None:
    with pytest.raises(WrongSettings, match=line):
        hop(world.write(IN[name]))


@pytest.mark.parametrize("name", [*OUT])
def test_without_ssh_nobody_else_gets_in(world: World, no_ssh: None, name: str) -> None:
    assert not hpcfs_gets_in(world, world.write(OUT[name]))
