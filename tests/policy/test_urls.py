"""What a URL names, what is refused, and that no refusal repeats a secret."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from hpcfs.config import rclone_conf, urls
from hpcfs.model.errors import SetupError
from hpcfs.model.sites import S3Root, S3Site, Secret, SftpRoot, SshSite, TunnelSite

RCLONE = """
[cluster]
type = sftp
host = login.example.org
user = me
port = 2222
key_file = ~/.ssh/cluster
pass = obscured-xyz

[store]
type = s3
provider = Other
access_key_id = AKID
secret_access_key = very%secret
endpoint = minio.example.org:9000
region = eu

[chain]
type = s3
env_auth = true
profile = work

[my drive]
type = drive
token = {"access_token":"tok"}
"""
POINT = "arn:aws:s3:us-west-2:123456789012:accesspoint"
REMOTES = rclone_conf.parse(RCLONE, Path("/c/rclone.conf"))
AROUND = urls.UrlContext(ssh_aliases=["login3"], remotes=lambda: REMOTES)


def parse(text: str) -> urls.ParsedUrl:
    return urls.parse(text, AROUND)


@pytest.mark.parametrize(
    ("text", "site", "path"),
    [
        ("login3:", SshSite("login3"), "~"),
        ("login3:data", SshSite("login3"), "data"),
        ("login3:~", SshSite("login3"), "~"),
        ("login3:~/a b", SshSite("login3"), "a b"),
        ("login3:~/~", SshSite("login3"), "./~"),
        ("me@host:/scratch/x", SshSite("host", user="me"), "/scratch/x"),
        ("[fe80::1]:data", SshSite("fe80::1"), "data"),
        ("me@[::1]:/", SshSite("::1", user="me"), "/"),
        ("host:a:b@c", SshSite("host"), "a:b@c"),
        ("host:dir/me@x:y", SshSite("host"), "dir/me@x:y"),
        ("sftp://host", SshSite("host"), "~"),
        ("sftp://host/", SshSite("host"), "/"),
        ("sftp://host/~", SshSite("host"), "~"),
        ("sftp://host/~/x/y", SshSite("host"), "x/y"),
        ("sftp://host/%7E/x", SshSite("host"), "/~/x"),
        ("SFTP://me@host:2222/a%20b", SshSite("host", user="me", port=2222), "/a b"),
        ("sftp://[::1]:22/x", SshSite("::1", port=22), "/x"),
    ],
)
def test_ssh_urls(text: str, site: SshSite, path: str) -> None:
    assert parse(text) == urls.ParsedUrl(site, SftpRoot(path))


@pytest.mark.parametrize(
    ("text", "site", "root"),
    [
        ("s3://b", S3Site(), S3Root("b")),
        ("s3://b/", S3Site(), S3Root("b")),
        ("s3://b/p/q/", S3Site(), S3Root("b", "p/q")),
        ("s3://b/100%25", S3Site(), S3Root("b", "100%25")),
        (
            "s3://b/p?endpoint_url=http://127.0.0.1:9000&region=eu&profile=x",
            S3Site("http://127.0.0.1:9000", "eu", "x"),
            S3Root("b", "p"),
        ),
        ("s3://b?read_only=true", S3Site(), S3Root("b", "", read_only=True)),
        ("s3://b?anonymous=true", S3Site(anonymous=True), S3Root("b")),
        ("s3://team:b/p", S3Site(), S3Root("team:b", "p")),
        ("s3://:b", S3Site(), S3Root(":b")),
        (f"s3://{POINT}:ap", S3Site(), S3Root(f"{POINT}:ap")),
        (f"s3://{POINT}/ap/p/q?region=x", S3Site(region="x"), S3Root(f"{POINT}:ap", "p/q")),
    ],
)
def test_s3_urls(text: str, site: S3Site, root: S3Root) -> None:
    assert parse(text) == urls.ParsedUrl(site, root)


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("tunnel:my-laptop", "my-laptop", "/"),
        ("tunnel:my-laptop/", "my-laptop", "/"),
        ("tunnel:my-laptop/data", "my-laptop", "/data"),
        ("tunnel:l.2/da ta/100%25/", "l.2", "/da ta/100%25"),
    ],
)
def test_tunnel_urls(
    text: str, name: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = parse(text)
    site = TunnelSite(name, str(tmp_path / ".hpcfs" / "tunnels"))
    assert found == urls.ParsedUrl(site, SftpRoot(path))
    assert parse(urls.show(found.site, found.root)) == found


def test_an_rclone_remote_of_type_sftp() -> None:
    found = parse("cluster:x/y")
    key = str(Path.home() / ".ssh" / "cluster")
    assert found.site == SshSite("login.example.org", "me", 2222, identity_file=key)
    assert found.root == SftpRoot("x/y")
    assert "not used" in found.notes[0]
    assert "obscured" not in found.notes[0]
    assert parse("cluster:").root == SftpRoot("~")


def test_an_rclone_remote_of_type_s3() -> None:
    found = parse("store:bucket/some/prefix/")
    assert found.site == S3Site(
        "https://minio.example.org:9000",
        "eu",
        access_key=Secret("AKID"),
        secret_key=Secret("very%secret"),
    )
    assert found.root == S3Root("bucket", "some/prefix")
    assert "very" not in repr(found)
    assert "AKID" not in urls.show(found.site, found.root)
    assert parse("chain:b").site == S3Site(profile="work")
    with pytest.raises(SetupError, match="name a bucket"):
        parse("store:")


def test_an_ssh_alias_wins_over_an_rclone_remote_of_its_name() -> None:
    around = urls.UrlContext(ssh_aliases=["cluster"], remotes=lambda: REMOTES)
    assert urls.parse("cluster:x", around).site == SshSite("cluster")


def test_a_broken_rclone_conf_does_not_matter_to_an_alias_or_a_scheme() -> None:
    def broken() -> dict[str, rclone_conf.RcloneRemote]:
        raise SetupError("encrypted")

    around = urls.UrlContext(ssh_aliases=["login3"], remotes=broken)
    assert urls.parse("login3:x", around).site == SshSite("login3")
    assert urls.parse("s3://b", around).site == S3Site()
    with pytest.raises(SetupError, match="encrypted"):
        urls.parse("other:x", around)


def test_other_types_of_rclone_remotes_are_named() -> None:
    with pytest.raises(SetupError, match="of type 'drive'") as caught:
        parse("my drive:x")
    assert "tok" not in str(caught.value)


def test_an_encrypted_rclone_conf_is_named_as_such() -> None:
    text = "# Encrypted rclone configuration File\n\nRCLONE_ENCRYPT_V0:\nabcdef\n"
    with pytest.raises(SetupError, match="is encrypted"):
        rclone_conf.parse(text, Path("/c/rclone.conf"))


def test_a_malformed_rclone_conf_is_not_quoted() -> None:
    with pytest.raises(SetupError, match="not the form") as caught:
        rclone_conf.parse("[a]\ntype = s3\nsecret stuff\n", Path("/c/rclone.conf"))
    assert "stuff" not in str(caught.value)


def test_rclone_conf_is_found_where_rclone_looks(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    assert rclone_conf.load(environ) == {}
    (tmp_path / ".rclone.conf").write_text("[old]\ntype = sftp\nhost = h\n")
    assert list(rclone_conf.load(environ)) == ["old"]
    (tmp_path / ".config" / "rclone").mkdir(parents=True)
    (tmp_path / ".config" / "rclone" / "rclone.conf").write_text("[new]\ntype = s3\n")
    assert list(rclone_conf.load(environ)) == ["new"]
    environ["RCLONE_CONFIG"] = str(tmp_path / ".rclone.conf")
    assert list(rclone_conf.load(environ)) == ["old"]


@pytest.mark.parametrize(
    "text",
    [
        "sftp://me:hunter2@host/x",
        "me:hunter2@host:x",
        "s3://AKIA:hunter2@bucket/x",
        "s3://bucket?secret_access_key=hunter2",
        "s3://bucket?password=hunter2",
        "s3://bucket?endpoint_url=https://me:hunter2@host",
        "http://me:hunter2@host/",
        "hunter2@",
        "sftp://hunter2@/x",
    ],
)
def test_a_secret_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(SetupError) as caught:
        parse(text)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://host/x", "http://"),
        ("nothing", "no URL"),
        ("s3://", "name a bucket"),
        ("s3://b?regoin=eu", "did you mean region"),
        ("sftp://h/x?symlink=hide", "did you mean symlinks"),
        ("tunnel:lap?to=hide", "there are symlinks"),
        ("s3://b?endpoint_url=host:9000", "must be like https"),
        ("sftp:///x", "names no host"),
        ("sftp://host:99999/x", "no port"),
        ("host:~other/x", "another user's home"),
        ("-oProxyCommand=x:y", "no host name"),
        ("sftp://-oProxyCommand=x/y", "no host name"),
        (":x", "no URL"),
        ("tunnel:", "names no tunnel"),
        ("tunnel:../x", "the form is tunnel:NAME/SHARE"),
        ("tunnel:me@login3", "names no tunnel"),
    ],
)
def test_mistakes_say_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(SetupError, match=said):
        parse(text)


@pytest.mark.parametrize("text", ["./a:b", "/a:b", "~/x", "a/b:c", "plain"])
def test_local_paths_are_no_urls(text: str) -> None:
    assert not urls.looks_like_url(text)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_what_is_shown_is_read_back(path: str) -> None:
    for text in (f"~/{path}", f"/{path}"):
        target = urls.ParsedUrl(SshSite("h", "me", 22), SftpRoot(urls.home_path(text)))
        assert urls.parse(urls.show(target.site, target.root), AROUND) == target


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused_with_a_sentence(text: str) -> None:
    with suppress(SetupError):
        assert isinstance(parse(text), urls.ParsedUrl)
