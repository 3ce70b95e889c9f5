"""The configuration file: what it means, and that each mistake names file, line and remedy."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hpcfs.config import config, values as config_values
from hpcfs.config.config import Config
from hpcfs.config.toml_lines import KeyPath, find_lines
from hpcfs.model.errors import SetupError
from hpcfs.model.sites import S3Root, S3Site, SftpRoot, SshSite, TunnelSite
from hpcfs.system import paths
from hpcfs.system.disk import DEFAULT_MIN_FREE, MinFree

FILE = Path("/c/config.toml")
FULL = """\
mountpoint = "~/cluster"
cache_dir = "$CACHE/hpcfs"
cache_size = "20 GiB"
cache_min_free = "2.5 %"
journal_size = "1 GiB"
log_level = "debug"

[namespaces.home]
type = "sftp"
host = "me@login3"
path = "~/work"
port = 2222
identity_file = "~/.ssh/id"
ssh_config = "~/.ssh/config"
connect_timeout = 5
write = "back"
verify = true

[namespaces."data.2"]
type = "s3"
bucket = "training-data"
prefix = "/a/b/"
endpoint_url = "https://storage.example.org"
region = "eu-north1"
profile = "default"
read_only = true
verify = true
xattrs = false
"""
HEAD = '[namespaces.home]\ntype = "sftp"\nhost = "login3"\n'
TUNNEL_HEAD = '[namespaces.lap]\ntype = "tunnel"\n'
S3_HEAD = '[namespaces.data]\ntype = "s3"\nbucket = "b"\n'


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CACHE", "/fast")
    for variable in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR", "RCLONE_CONFIG"):
        monkeypatch.delenv(variable, raising=False)


def parse(text: str) -> Config:
    return config.parse(text, FILE)


def test_all_keys(tmp_path: Path) -> None:
    found = parse(FULL)
    assert found.mountpoint == tmp_path / "cluster"
    assert found.cache_dir == Path("/fast/hpcfs")
    assert found.cache_size == 20 * 1024**3
    assert found.cache_min_free == MinFree(percent=2.5)
    assert found.journal_size == 1024**3
    assert found.log_level == "DEBUG"
    assert found.root_namespace is None
    home, data = found.namespaces["home"], found.namespaces["data.2"]
    assert home.site == SshSite(
        host="login3",
        user="me",
        port=2222,
        identity_file=str(tmp_path / ".ssh/id"),
        ssh_config=str(tmp_path / ".ssh/config"),
        connect_timeout=5.0,
    )
    assert home.root == SftpRoot("work", verify=True)
    assert (home.write, data.write) == ("back", "through")
    assert home.url == "sftp://me@login3:2222/~/work"
    assert not home.read_only
    assert data.site == S3Site("https://storage.example.org", "eu-north1", "default")
    assert data.root == S3Root("training-data", "a/b", read_only=True, verify=True)
    assert data.read_only
    assert not data.xattrs


def test_tunnels(tmp_path: Path) -> None:
    """A tunnel has its namespace's name, shows all, and left its file in the home directory."""
    found = parse(
        '[namespaces.lap]\ntype = "tunnel"\n'
        '[namespaces.other]\ntype = "tunnel"\ntunnel = "my-laptop"\npath = "data/run7/"\n'
        'directory = "~/login/.hpcfs/tunnels"\nconnect_timeout = 5\nread_only = true\n'
    ).namespaces
    assert found["lap"].site == TunnelSite("lap", str(tmp_path / ".hpcfs/tunnels"))
    assert found["lap"].root == SftpRoot("/")
    directory = str(tmp_path / "login/.hpcfs/tunnels")
    assert found["other"].site == TunnelSite("my-laptop", directory, 5.0)
    assert found["other"].root == SftpRoot("/data/run7", read_only=True)
    assert (found["lap"].url, found["other"].url) == ("tunnel:lap", "tunnel:my-laptop/data/run7")
    assert not found["lap"].keeps_xattrs


def test_extended_attributes_are_s3s() -> None:
    found = parse(f"{HEAD}{S3_HEAD}").namespaces
    assert (found["home"].keeps_xattrs, found["data"].keeps_xattrs) == (False, True)
    for key in ("xattrs = false", "read_only = true"):
        assert not parse(f"{S3_HEAD}{key}\n").namespaces["data"].keeps_xattrs


def test_defaults() -> None:
    found = parse(HEAD)
    assert found == Config(namespaces=found.namespaces)
    assert found.namespaces["home"].root == SftpRoot("~")
    assert found.namespaces["home"].write == "through"
    assert found.journal_size == 10 * 1024**3


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('mountpiont = "x"\n' + HEAD, 1, "did you mean mountpoint"),
        (HEAD + 'hots = "x"\n', 4, "did you mean host"),
        (HEAD + 'bucket = "x"\n', 4, "the keys are type"),
        (S3_HEAD + 'endpoint = "https://x"\n', 4, "did you mean endpoint_url"),
        (S3_HEAD + '\n# more\nacces_key = "x"\n', 6, "unknown key"),
        (S3_HEAD + 'secret_access_key = "x"\n', 4, "AWS chain"),
        (S3_HEAD + 'access_key = "x"\n', 4, "AWS chain"),
        (HEAD + 'password = "x"\n', 4, "by key, agent or a prompt"),
        ('password = "x"\n' + HEAD, 1, "does not belong here"),
        (HEAD + "port = 0\n", 4, "1 to 65535"),
        (HEAD + "port = true\n", 4, "not true"),
        (HEAD + 'port = "22"\n', 4, 'not "22"'),
        (HEAD + 'read_only = "yes"\n', 4, "true or false"),
        (HEAD + "connect_timeout = -1\n", 4, "above 0"),
        (HEAD + "connect_timeout = inf\n", 4, "above 0"),
        (HEAD + 'transport = "openshh"\n', 4, "did you mean openssh"),
        (HEAD + 'write = "bakc"\n', 4, '"through" or "back", not "bakc": did you mean back'),
        (HEAD + "write = true\n", 4, 'must be "through" or "back", not true'),
        (HEAD + 'writes = "back"\n', 4, "did you mean write"),
        (HEAD + 'symlinks = "folow"\n', 4, '"contain", "follow" or "hide", not "folow": did you'),
        (HEAD + "symlinks = true\n", 4, "not true"),
        (S3_HEAD + 'verify = "yes"\n', 4, "true or false"),
        (HEAD + "xattrs = true\n", 4, "unknown key 'xattrs'"),
        ('journal_size = "1 MiB"\n' + HEAD, 1, "journal_size must be at least 16 MiB"),
        ('journalsize = "1 GiB"\n' + HEAD, 1, "did you mean journal_size"),
        (HEAD + "transport = 3\n", 4, 'must be "asyncssh" or "openssh", not 3'),
        (HEAD + 'path = "~root/x"\n', 4, "another user's home"),
        (HEAD + 'identity_file = "id"\n', 4, "absolute"),
        (HEAD + 'identity_file = "$UNSET_X/id"\n', 4, r"\$UNSET_X, which is not set"),
        (HEAD + 'user = "x"\n[namespaces.b]\n', 5, "type is missing"),
        ('[namespaces.a]\ntype = "ssh"\n', 2, '"sftp", "s3" or "tunnel"'),
        (TUNNEL_HEAD + 'tunnel = "../x"\n', 3, "the name that 'hpcfs tunnel' was given"),
        (TUNNEL_HEAD + 'directory = "tunnels"\n', 3, "an absolute path"),
        (TUNNEL_HEAD + 'path = ""\n', 3, "not empty"),
        (TUNNEL_HEAD + 'host = "x"\n', 3, "the keys are type"),
        ('[namespaces.a]\ntype = "sftp"\n', 1, "host is missing"),
        ('[namespaces.a]\ntype = "s3"\n', 1, "bucket is missing"),
        ('[namespaces.a]\ntype = "sftp"\nhost = "a@b"\nuser = "c"\n', 4, "given twice"),
        ('[namespaces.a]\ntype = "sftp"\nhost = "h:22"\n', 3, "without port"),
        ('[namespaces.a]\ntype = "s3"\nbucket = "s3://b"\n', 3, "bare name"),
        (S3_HEAD + 'endpoint_url = "storage:9000"\n', 4, "must be like https"),
        (S3_HEAD + 'endpoint_url = "https://me:pw@host"\n', 4, "password or a key"),
        ("[namespaces]\nhome = 3\n", 2, "must be a table"),
        ("namespaces = 3\n", 1, "must be a table"),
        ('[namespaces."a/b"]\ntype = "s3"\n', 1, "can't name a namespace"),
        ('[namespaces.".."]\ntype = "s3"\n', 1, "can't name a namespace"),
        ('[namespaces.""]\ntype = "s3"\n', 1, "can't name a namespace"),
        ('cache_size = "20 GB!"\n' + HEAD, 1, "must be a size"),
        ("cache_size = 1.5\n" + HEAD, 1, "must be a size"),
        ("cache_size = -1\n" + HEAD, 1, "must be a size"),
        ("cache_size = 1024\n" + HEAD, 1, "at least 16 MiB"),
        ('cache_min_free = "most"\n' + HEAD, 1, "or a part such as"),
        ('cache_min_free = "95%"\n' + HEAD, 1, "or a part such as"),
        ('cache_dir = "cache"\n' + HEAD, 1, "absolute"),
        ('mountpoint = ""\n' + HEAD, 1, "not empty"),
        ('log_level = "LOUD"\n' + HEAD, 1, "one of DEBUG"),
        ("a = 1\nb = = 2\n", 2, "not valid TOML"),
        (HEAD + 'host = "again"\n', 4, "not valid TOML"),
        ('a = """\nnever closed\n', 3, "not valid TOML"),
        ('namespaces.home = { type = "sftp",\thots = "x" }\n', 1, "host"),
    ],
)
def test_a_mistake_names_its_line_and_what_to_do(text: str, line: int, said: str) -> None:
    with pytest.raises(SetupError, match=said) as caught:
        parse(text)
    assert str(caught.value).startswith(f"{FILE}:{line}: ")
    assert "pw@" not in str(caught.value)


def test_how_much_of_the_disk_stays_free() -> None:
    assert parse(HEAD).cache_min_free == DEFAULT_MIN_FREE
    assert parse('cache_min_free = "1 GiB"\n' + HEAD).cache_min_free == MinFree(size=1024**3)
    assert parse("cache_min_free = 0\n" + HEAD).cache_min_free == MinFree(size=0)


def test_a_file_without_namespaces_is_no_use_unless_urls_are_given() -> None:
    with pytest.raises(SetupError, match="no namespace says what to mount"):
        parse('cache_size = "1 GiB"\n')
    assert config.parse("", FILE, needs_namespaces=False).namespaces == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20 GiB", 20 * 1024**3),
        ("500MB", 500 * 1000**2),
        ("1.5 TiB", 1024**4 * 3 // 2),
        ("64k", 64 * 1024),
        ("10G", 10 * 1024**3),
        ("12 b", 12),
        (" 7 ", 7),
        (4096, 4096),
        (0, 0),
    ],
)
def test_sizes(text: object, expected: int) -> None:
    assert config_values.size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "1 QiB", "1ib", "-1", "1 2", "1e3", True, None, [1]])
def test_no_sizes(text: object) -> None:
    with pytest.raises(config_values.BadValue, match="must be a size"):
        config_values.size(text)


TRICKY = '''\
# [not.a.table]
title = "a [b] = 'c' # d"   # comment = 1
multi = """
[fake]
x = 1 \\"""
"""
literal = \'\'\'
key = "v"
\'\'\'
quoted."a.b".'c d' = 1
"esc\\"aped" = 'x'
list = [ # one
  1,
  { deep = 2, "o.p" = [3, 4] },
  "]",
]
inline = { a = 1, b.c = { d = "}" } }
when = 1979-05-27 07:32:00
neg = -1.5e3

[ table . "sub t" ]
k = true
[[array]]
v = 1
[[array.nested]]
w = [[1], [2]]
[[array.nested]]
[[array]]
[array.nested]
z = 0xff
'''


def _flatten(value: object, path: KeyPath = ()) -> Iterator[KeyPath]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _flatten(inner, (*path, index))


def test_every_key_has_its_line() -> None:
    lines = find_lines(TRICKY)
    assert set(lines) == set(_flatten(tomllib.loads(TRICKY)))
    rows = TRICKY.splitlines()
    found = {path: rows[number - 1].strip() for path, number in lines.items()}
    assert found[("title",)].startswith("title")
    assert found[("literal",)].startswith("literal")
    assert found[("quoted", "a.b", "c d")].startswith("quoted")
    assert found[('esc"aped',)].startswith('"esc')
    assert found[("list", 1, "o.p", 1)].startswith("{ deep")
    assert found[("list", 2)] == '"]",'
    assert found[("inline", "b", "c", "d")].startswith("inline")
    assert found[("table", "sub t", "k")] == "k = true"
    assert found[("array", 0, "nested", 0, "w", 1, 0)] == "w = [[1], [2]]"
    assert found[("array", 1, "nested", "z")] == "z = 0xff"
    assert lines[("array", 1)] == rows.index("[array.nested]")


def test_windows_line_ends_count_once() -> None:
    assert find_lines("a = 1\r\n\r\nb = 2\r\n") == {("a",): 1, ("b",): 3}


# --- files and URLs ----------------------------------------------------------------------------


def write_default(text: str) -> Path:
    file = paths.config_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_without_file_and_url_the_error_says_how_to_begin() -> None:
    with pytest.raises(SetupError, match=r"hpcfs init.*hpcfs mount login3:data ~/mnt"):
        config.load(None)


def test_a_named_file_must_be_there_and_readable(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="there is no configuration file"):
        config.load(tmp_path / "no.toml", [(None, "login3:")])
    with pytest.raises(SetupError, match="can't be read"):
        config.load(tmp_path)
    (tmp_path / "latin").write_bytes(b'mountpoint = "x"\n# \xfc\n')
    with pytest.raises(SetupError, match="latin:2: this is not UTF-8"):
        config.load(tmp_path / "latin")


def test_urls_replace_the_files_namespaces_but_not_its_cache() -> None:
    write_default('cache_size = "1 GiB"\ncache_dir = "/fast"\n' + HEAD)
    assert list(config.load(None).namespaces) == ["home"]
    found = config.load(None, [("a", "login3:x"), ("b", "s3://bucket")])
    assert list(found.namespaces) == ["a", "b"]
    assert found.root_namespace is None
    assert found.cache_size == 1024**3
    assert found.cache_dir == Path("/fast")


def test_one_url_without_a_name_is_the_root() -> None:
    found = config.load(None, [(None, "me@login3:x")])
    assert found.root_namespace == "login3"
    assert found.namespaces["login3"].url == "sftp://me@login3/~/x"
    assert config.load(None, [("n", "login3:")]).root_namespace is None


def test_several_urls_need_different_names() -> None:
    with pytest.raises(SetupError, match="needs a name"):
        config.load(None, [(None, "a:"), ("b", "b:")])
    with pytest.raises(SetupError, match="two remotes are named 'a'"):
        config.load(None, [("a", "a:"), ("a", "b:")])


def test_aliases_of_ssh_config_win_over_rclone(tmp_path: Path) -> None:
    (tmp_path / ".rclone.conf").write_text("[store]\ntype = s3\n[alias]\ntype = s3\n")
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "more").write_text("Host alias\n")
    (tmp_path / ".ssh" / "config").write_text("Include more\nHost *.org !x\n  User me\n")
    assert isinstance(config.load(None, [(None, "store:b")]).namespaces["b"].site, S3Site)
    assert config.load(None, [(None, "alias:b")]).namespaces["alias"].site == SshSite("alias")


def test_read_only_covers_every_namespace() -> None:
    found = config.read_only(parse(FULL))
    assert all(namespace.read_only for namespace in found.namespaces.values())
    assert found.namespaces["home"].root == SftpRoot("work", read_only=True, verify=True)


def test_a_way_of_writing_covers_every_namespace() -> None:
    for mode in ("back", "through"):
        found = config.writing(parse(FULL), config_values.write_mode(mode))
        assert {namespace.write for namespace in found.namespaces.values()} == {mode}
        assert found.namespaces["data.2"].root == parse(FULL).namespaces["data.2"].root


def test_where_links_may_lead() -> None:
    """Safe unless it is said, in the file, in a URL or for all."""
    found = parse(f'{HEAD}symlinks = "follow"\n[namespaces.b]\ntype = "s3"\nbucket = "b"\n')
    assert [one.symlinks for one in found.namespaces.values()] == ["follow", "contain"]
    assert {one.symlinks for one in config.with_symlinks(found, "hide").namespaces.values()} == {
        "hide"
    }
    urls = {
        "h:x": "contain",
        "sftp://h/x?symlinks=follow": "follow",
        "s3://b/p?region=eu&symlinks=hide": "hide",
        "tunnel:lap/data?symlinks=follow": "follow",
        "tunnel:lap": "contain",
    }
    for url, mode in urls.items():
        (one,) = config.with_urls(config.Config({}), [(None, url)]).namespaces.values()
        assert one.symlinks == mode
        assert "?" not in one.url or one.url.startswith("s3://b/p?region=eu")
    with pytest.raises(SetupError, match=r'symlinks in a URL must be .*, not "no"'):
        config.with_urls(config.Config({}), [(None, "s3://b?symlinks=no")])


def test_settings_of_two_mounts_share_no_file(tmp_path: Path) -> None:
    chosen = replace(parse(HEAD), log_level="DEBUG", journal_size=7)
    first = config.settings(chosen, Path("/m/a"), tmp_path / "a")
    second = config.settings(chosen, Path("/m/b"), tmp_path / "b")
    assert first.log_level == "DEBUG"
    assert first.journal_size == 7
    for name in ("log_file", "socket", "cache_dir", "mountpoint"):
        assert getattr(first, name) != getattr(second, name)
        assert getattr(first, name).is_absolute()


@pytest.mark.parametrize(
    ("text", "down", "up"),
    [
        ('"10 MB"', 10_000_000, 10_000_000),
        ('"1 MiB/s"', 1024**2, 1024**2),
        ('{ up = "2 MB", down = "20 MB" }', 20_000_000, 2_000_000),
        ('{ up = "100k" }', 0, 102_400),
    ],
)
def test_a_limit_of_transfers(text: str, down: int, up: int) -> None:
    text = f'[namespaces.a]\ntype = "sftp"\nhost = "h"\nbandwidth_limit = {text}\n'
    assert parse(text).namespaces["a"].bandwidth_limit == (down, up)


@pytest.mark.parametrize("text", ['"1 kB"', "{}", '{ upwards = "1 MB" }', "true", '"fast"'])
def test_no_limit_of_transfers(text: str) -> None:
    text = f'[namespaces.a]\ntype = "sftp"\nhost = "h"\nbandwidth_limit = {text}\n'
    with pytest.raises(SetupError, match=r"4: .*bandwidth_limit must"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [('"30 s"', 30), ('"15 min"', 900), ('"2h"', 7200), ("45", 45), ("1.5", 1.5), ('"1 d"', 86400)],
)
def test_patience_is_a_time(text: str, seconds: float) -> None:
    text = f'[namespaces.a]\ntype = "sftp"\nhost = "h"\npatience = {text}\n'
    found = parse(text)
    assert found.namespaces["a"].patience == seconds
    assert config.unattended(found).namespaces["a"].patience == seconds, "the user said so"


@pytest.mark.parametrize("text", ['"0.5 s"', "-1", '"8 d"', '"soon"', "true", "[]", '"15 parsec"'])
def test_no_patience(text: str) -> None:
    text = f'[namespaces.a]\ntype = "sftp"\nhost = "h"\npatience = {text}\n'
    with pytest.raises(SetupError, match=r"4: .*patience must be a time"):
        parse(text)


def test_the_patience_of_what_nobody_watches() -> None:
    found = parse('[namespaces.a]\ntype = "sftp"\nhost = "h"\n')
    assert found.namespaces["a"].patience == 30
    assert config.unattended(found).namespaces["a"].patience == 900


def test_how_much_an_s3_site_may_be_asked() -> None:
    text = '[namespaces.a]\ntype = "s3"\nbucket = "bucket"\n'
    assert parse(text).namespaces["a"].site == S3Site(connections=96, requests=5000)
    site = parse(text + "connections = 8\nrequests = 50\n").namespaces["a"].site
    assert site == S3Site(connections=8, requests=50)
    for wrong in ("0", "-1", "1.5", "true", '"8"', "10001"):
        with pytest.raises(SetupError, match=r"4: .*connections must be a number from 1 to 10000"):
            parse(text + f"connections = {wrong}\n")
