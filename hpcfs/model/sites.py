"""Sites and folders: everything that opening a remote takes."""

from __future__ import annotations

import msgspec


class Secret(msgspec.Struct, frozen=True):
    """A value that must not appear in a log, a traceback or a status: its repr hides it."""

    value: str

    def __repr__(self) -> str:
        return "Secret(…)"


class SshSite(msgspec.Struct, frozen=True, tag="ssh"):
    """One SSH login. `host` may be an alias of ~/.ssh/config, and None leaves a value to that file.
    `transport` is "asyncssh", or "openssh" for the user's own ssh as a child process.
    `connect_timeout` is in seconds, and so is `idle_timeout`, after which a connection that nobody
    uses is closed."""

    host: str
    user: str | None = None
    port: int | None = None
    ssh_config: str | None = None
    identity_file: str | None = None
    connect_timeout: float = 10.0
    transport: str = "asyncssh"
    idle_timeout: float = 600.0


class S3Site(msgspec.Struct, frozen=True, tag="s3"):
    """One S3 endpoint and its credentials. Without `access_key` the AWS chain finds them.
    `connections` may be open at once, and `requests` made in a second."""

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    access_key: Secret | None = None
    secret_key: Secret | None = None
    connect_timeout: float = 10.0
    anonymous: bool = False
    """Ask without credentials even where there are some."""
    connections: int = 96
    requests: int = 5000


class TunnelSite(msgspec.Struct, frozen=True, tag="tunnel"):
    """The laptop at the other end of the tunnel of that name. `directory` is where the tunnel left
    its rendezvous file (tunnel/file.py), an absolute path."""

    name: str
    directory: str
    connect_timeout: float = 10.0


AnySite = SshSite | S3Site | TunnelSite


class SftpRoot(msgspec.Struct, frozen=True, tag="sftp"):
    """The folder that a namespace shows; "~" and relative paths start at the remote home."""

    path: str
    read_only: bool = False
    verify: bool = False
    """Compare a hash that the remote computes of what was uploaded, where it can."""


class S3Root(msgspec.Struct, frozen=True, tag="bucket"):
    """The part of a bucket that a namespace shows. `prefix` has no leading or trailing slash."""

    bucket: str
    prefix: str = ""
    read_only: bool = False
    verify: bool = False


AnyRoot = SftpRoot | S3Root


class SiteSpec(msgspec.Struct, frozen=True):
    """Everything that opening a site takes (remotes/open.py).

    `roots` are the folders to show, by the name under which `Site.remote` gives them. `uid` and
    `gid` are the local ids that stand for the remote user as owner of files. `state_dir` is a local
    directory of the caller's own that outlives this process: S3 notes there which renames of
    directories were begun, and spools what does not fit in memory. `download_limit` and
    `upload_limit` bound the rates of transfers, in bytes per second; 0 is no limit.
    """

    site: AnySite
    roots: dict[str, AnyRoot]
    state_dir: str
    uid: int
    gid: int
    download_limit: int = 0
    upload_limit: int = 0
