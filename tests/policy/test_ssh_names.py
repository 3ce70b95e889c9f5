"""Host and user names: what this ssh takes is taken, what it refuses never comes in.

They end in a ProxyCommand's %h and %r, which a shell reads. Each case is asked of the `ssh` of this
machine, which refuses them with the fix of CVE-2023-51385.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hpcfs.config import config, rclone_conf, ssh_config, tunnel, urls
from hpcfs.model import ssh_syntax
from hpcfs.model.errors import SetupError

HOSTS = [
    "login3", "login3.example.org", "127.0.0.1", "::1", "fe80::1%eth0", "a_b", "höst", "a:b", "a,b",
    "x$(touch${IFS}f).host", "x`id`", "a;b", "a&b", "a|b", "a<b", "a>b", "a'b", 'a"b', "a\\b",
    "a(b", "a)b", "a{b", "a}b", "a b", "a\tb", "a\nb", "-oProxyCommand=id", "-", "a$b", "a\x7fb",
]  # fmt: skip
USERS = [
    "me", "CAMPUS\\alice", "first last", "a.b-c", "user%realm", "a$b", "jürgen", "a@b", "me\\",
    "-l", "a -oX=1", "a\t-x", "a;id", "a`id`", "a'b", 'a"b', "a&b", "a|b", "a<b", "a>b", "a(b)",
    "a{b}", "$(id)", "${IFS}x",
]  # fmt: skip
HOSTILE_HOSTS = ["x$(touch${IFS}f).h", "a;b", "a`id`", "a|b", "-oProxyCommand=id", "a'b"]
HOSTILE_USERS = ["a;id", "a`id`", "$(id)", "-oX", "a|b", "me\\"]


def ssh_takes(*line: str) -> bool:
    command = ["ssh", "-G", "-F", "none", *line]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 0 or "invalid characters" in done.stderr, done.stderr
    return done.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_hosts_are_those_that_ssh_takes(host: str) -> None:
    assert ssh_syntax.is_valid_host(host) == ssh_takes("--", host)


@pytest.mark.slow
@pytest.mark.parametrize("user", USERS)
def test_users_are_those_that_ssh_takes(user: str) -> None:
    assert ssh_syntax.is_valid_user(user) == ssh_takes("-l", user, "--", "host")


def test_control_characters_are_in_no_user_name() -> None:
    """OpenSSH refuses them since 10.1 (CVE-2025-61984)."""
    assert not any(ssh_syntax.is_valid_user(f"a{letter}b") for letter in "\n\0\x1b\x7f")
    assert not ssh_syntax.is_valid_user("")
    assert not ssh_syntax.is_valid_host("")


AROUND = urls.UrlContext(ssh_aliases=[], remotes=dict)


@pytest.mark.parametrize("host", HOSTILE_HOSTS)
def test_a_hostile_host_comes_in_nowhere(host: str, tmp_path: Path) -> None:
    for url in (f"{host}:", f"me@{host}:x", f"sftp://{host}/x"):
        with pytest.raises(SetupError, match=r"no host name|no URL|names no host"):
            urls.parse(url, AROUND)
    with pytest.raises(SetupError, match="host"):
        table(tmp_path, f"host = {host!r}" if "'" not in host else f'host = "{host}"')
    with pytest.raises(SetupError, match="ssh takes in none"):
        rclone(f"host = {host}", tmp_path)
    (tmp_path / "config").write_text(f'Host good "{host}"\n')
    assert ssh_config.aliases(tmp_path / "config") == ["good"]


@pytest.mark.parametrize("user", HOSTILE_USERS)
def test_a_hostile_user_comes_in_nowhere(user: str, tmp_path: Path) -> None:
    for url in (f"{user}@h:", f"sftp://{user}@h/x"):
        with pytest.raises(SetupError, match=r"no user name|no URL"):
            urls.parse(url, AROUND)
    with pytest.raises(SetupError, match="no user name"):
        table(tmp_path, f"host = 'h'\nuser = '{user}'")
    with pytest.raises(SetupError, match=r"no user name|must be an alias"):
        table(tmp_path, f"host = '{user}@h'")
    with pytest.raises(SetupError, match="ssh takes in none"):
        rclone(f"host = h\nuser = {user}", tmp_path)


@pytest.mark.parametrize(
    "host", ["a;id", "a;id@h", "me@h|id", "sftp://a%3Bid@h", "x$(id)", "-oProxyCommand=id"]
)
def test_a_hostile_host_of_a_tunnel_comes_in_neither(host: str, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("")
    with pytest.raises(SetupError, match=r"no host name|no user name|no URL"):
        tunnel.load(tmp_path / "config", host, "laptop", [str(tmp_path)])
    (tmp_path / "config").write_text(f"[tunnel]\nhost = '{host}'\nshares = ['{tmp_path}']\n")
    with pytest.raises(SetupError, match=r"no host name|no user name|no URL|host"):
        tunnel.load(tmp_path / "config", None)


def test_a_user_that_is_escaped_in_a_url_is_looked_at_as_it_will_be_used() -> None:
    with pytest.raises(SetupError, match="no user name"):
        urls.parse("sftp://a%3Bid@h/x", AROUND)
    site = urls.parse("sftp://CAMPUS%5Calice@h/x", AROUND).site
    assert getattr(site, "user", None) == "CAMPUS\\alice"


def table(tmp_path: Path, lines: str) -> None:
    config.parse(f"mountpoint = '/m'\n[namespaces.n]\ntype = 'sftp'\n{lines}\n", tmp_path / "c")


def rclone(lines: str, tmp_path: Path) -> None:
    rclone_conf.parse(f"[r]\ntype = sftp\n{lines}\n", tmp_path / "r")["r"].site(10.0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Host a b", ["host", "a", "b"]),
        ("  HostName=x  # comment", ["hostname", "x"]),
        ("HostName = x", ["hostname", "x"]),
        ('IdentityFile "~/my key"', ["identityfile", "~/my key"]),
        ("IdentityFile '~/my key'#x", ["identityfile", "~/my key#x"]),
        (r"IdentityFile ~/my\ key", ["identityfile", "~/my key"]),
        (r"User CAMPUS\alice", ["user", r"CAMPUS\alice"]),
        (r"User CAMPUS\\alice", ["user", r"CAMPUS\alice"]),
        ('Match exec "test %h = x"', ["match", "exec", "test %h = x"]),
        ("# it's", []),
        ("", []),
        ("Host a # it's", ["host", "a"]),
    ],
)
def test_words_of_a_line(line: str, words: list[str]) -> None:
    assert ssh_syntax.split(line) == words


def test_a_quote_that_does_not_end() -> None:
    with pytest.raises(ssh_syntax.BadQuotes):
        ssh_syntax.split('User "me')
