"""Names of remotes on the command line: parses URLs, and shows a namespace as a URL.

    [user@]host:path            as scp; a relative or empty path starts at the remote home
    sftp://[user@]host[:port]/path   as curl and rclone: /path is absolute, /~/path below the home
    s3://bucket/prefix?endpoint_url=...&region=...&profile=...
    tunnel:NAME/path            the laptop at the other end of that tunnel
    REMOTE:path                 a remote of rclone.conf

sftp://, s3:// and tunnel: also take ?symlinks=MODE (values.symlink_mode).

A URL with a password is refused, and not repeated in the refusal: it would end up in the shell's
history, in `ps` and in logs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote

from hpcfs.config.rclone_conf import RcloneRemote
from hpcfs.model import ssh_syntax
from hpcfs.model.errors import SetupError
from hpcfs.model.sites import AnyRoot, AnySite, S3Root, S3Site, SftpRoot, SshSite, TunnelSite
from hpcfs.system import paths
from hpcfs.tunnel import file as rendezvous

NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")
FORMS = (
    "[user@]host:path, sftp://host/path, s3://bucket/prefix, tunnel:NAME or an rclone REMOTE:path"
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_SCP = re.compile(
    r"(?:(?P<user>[^@:/\s]+)@)?(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^@:/\s\[\]]+):(?P<path>.*)",
    re.DOTALL,
)
_AUTHORITY = re.compile(
    r"(?:(?P<user>[^@:]+)@)?(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^@:\s\[\]]+)(?::(?P<port>\d{1,5}))?"
)
_BUCKET = re.compile(r"(?!arn:)([^/:\s]*:)?[^/:\s]+")
_ACCESS_POINT = re.compile(
    r"(arn:[^:/\s]+:s3:[^:/\s]+:[0-9]*:accesspoint)[:/]([^:/\s]+)(|/.*)\Z", re.DOTALL
)
"""See docs.aws.amazon.com/AmazonS3/latest/userguide/access-points-naming.html"""
_S3_OPTIONS = ("endpoint_url", "region", "profile", "anonymous", "read_only", "symlinks")
_SFTP_OPTIONS = ("symlinks",)
_SECRET_WORD = re.compile(r"passw|secret|access_?key|token|credential", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ParsedUrl:
    """The remote that a URL names. `notes` are sentences for the user."""

    site: AnySite
    root: AnyRoot
    notes: list[str] = field(default_factory=list)
    symlinks: str | None = None
    """The option's text; it is read where the configuration's value is."""


@dataclass(frozen=True, slots=True)
class UrlContext:
    """The context that gives a meaning to the name before the colon. `remotes` is called only if
    needed, since rclone.conf may be unreadable."""

    ssh_aliases: Collection[str] = ()
    remotes: Callable[[], Mapping[str, RcloneRemote]] = dict
    connect_timeout: float = 10.0


def looks_like_url(text: str) -> bool:
    """Return whether the text names a remote. As for scp, a colon before any slash makes it one."""
    return ":" in text.partition("/")[0]


def is_valid_name(name: str) -> bool:
    """Return whether a namespace may have this name: a directory name that needs no quoting
    anywhere."""
    return bool(NAME.fullmatch(name)) and name not in (".", "..")


def parse(text: str, context: UrlContext, *, read_only: bool = False) -> ParsedUrl:
    """Parse the name of a remote. Raises SetupError where it can't be mounted."""
    _refuse_password(text)
    if match := _SCHEME.fullmatch(text):
        scheme, rest = match[1].lower(), match[2]
        if scheme == "sftp":
            return _parse_sftp(rest, context, read_only=read_only)
        if scheme == "s3":
            return _parse_s3(rest, context, read_only=read_only)
        raise SetupError(f"hpcfs can't mount {scheme}:// URLs: use {FORMS}")
    if text.startswith("tunnel:"):
        return _parse_tunnel(text.removeprefix("tunnel:"), context, read_only=read_only)
    return _parse_scp(text, context, read_only=read_only)


def home_path(path: str) -> str:
    """Convert an SFTP path to the form that `SftpRoot` wants: "~", a path relative to the home, or
    an absolute one. Raises SetupError for another user's home."""
    if path in ("", ".", "~", "~/"):
        return "~"
    if path.startswith("~/"):
        below = path[2:].lstrip("/")
        return f"./{below}" if below.startswith("~") else below or "~"
    if path.startswith("~"):
        user = path.partition("/")[0]
        raise SetupError(f"{user} is another user's home: name its absolute path instead")
    return path


def show(site: AnySite, root: AnyRoot) -> str:
    """Return the namespace as a URL without secrets, which `parse` can read back."""
    if isinstance(site, SshSite):
        assert isinstance(root, SftpRoot)
        host = f"[{site.host}]" if ":" in site.host else site.host
        user = f"{quote(site.user)}@" if site.user else ""
        port = f":{site.port}" if site.port else ""
        return f"sftp://{user}{host}{port}{_show_path(root.path)}"
    if isinstance(site, TunnelSite):
        assert isinstance(root, SftpRoot)
        return f"tunnel:{site.name}{root.path}".rstrip("/")
    assert isinstance(root, S3Root)
    options = {"endpoint_url": site.endpoint_url, "region": site.region, "profile": site.profile}
    options["anonymous"] = "true" if site.anonymous else None
    query = "&".join(f"{key}={quote(v, safe=':/')}" for key, v in options.items() if v)
    return f"s3://{root.bucket}/{root.prefix}" + (f"?{query}" if query else "")


def _show_path(path: str) -> str:
    if path == "~":
        return "/~"
    escaped = re.sub(r"[\s%?#\x00-\x1f\x7f]", lambda found: quote(found[0]), path)
    if not path.startswith("/"):
        return f"/~/{escaped}"
    return f"/%7E{escaped[2:]}" if escaped.startswith("/~") else escaped


def _parse_scp(text: str, context: UrlContext, *, read_only: bool) -> ParsedUrl:
    name, colon, path = text.partition(":")
    if colon and "/" not in name and name not in context.ssh_aliases:
        remote = context.remotes().get(name)
        if remote is not None:
            site = remote.site(context.connect_timeout)
            shown_path = home_path(path) if remote.kind == "sftp" else path
            return ParsedUrl(site, remote.root(shown_path, read_only=read_only), remote.notes())
    match = _SCP.fullmatch(text)
    if match is None:
        raise SetupError(f"{_without_secrets(text)!r} is no URL that hpcfs knows: use {FORMS}")
    site = SshSite(
        host=match["host"].strip("[]"), user=match["user"], connect_timeout=context.connect_timeout
    )
    _check_login(site)
    return ParsedUrl(site, SftpRoot(home_path(match["path"]), read_only))


def _parse_sftp(rest: str, context: UrlContext, *, read_only: bool) -> ParsedUrl:
    rest, options = _options(rest, "an sftp://", _SFTP_OPTIONS)
    authority, slash, path = rest.partition("/")
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise SetupError(
            f"sftp://{_without_secrets(rest)} names no host: the form is "
            "sftp://[user@]host[:port]/path"
        )
    port = int(match["port"]) if match["port"] else None
    if port is not None and not 0 < port < 65536:
        raise SetupError(f"{port} is no port: ports are 1 to 65535")
    site = SshSite(
        host=match["host"].strip("[]"),
        user=unquote(match["user"]) if match["user"] else None,
        port=port,
        connect_timeout=context.connect_timeout,
    )
    _check_login(site)
    in_home = path == "~" or path.startswith("~/") or not slash  # before %7E becomes a ~
    shown = home_path(unquote(path)) if in_home else "/" + unquote(path)
    return ParsedUrl(site, SftpRoot(shown, read_only), symlinks=options.get("symlinks"))


def split_bucket(place: str) -> tuple[str, str]:
    """Split the text into bucket and prefix. Raises SetupError.

    A bucket may be another tenant's (Ceph's TENANT:BUCKET), or an access point's ARN, whose last
    part may follow a slash or a colon; the result has a colon.
    """
    if found := _ACCESS_POINT.match(place):
        return f"{found[1]}:{found[2]}", found[3].strip("/")
    bucket, _, prefix = place.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise SetupError("name a bucket: s3://BUCKET/PREFIX")
    return bucket, prefix.strip("/")


def _is_true(text: str) -> bool:
    return text.lower() in ("1", "true", "yes")


def _parse_s3(rest: str, context: UrlContext, *, read_only: bool) -> ParsedUrl:
    place, options = _options(rest, "an s3://", _S3_OPTIONS)
    bucket, prefix = split_bucket(place)
    endpoint = options.get("endpoint_url") or None
    if endpoint:
        check_endpoint(endpoint)
    site = S3Site(
        endpoint_url=endpoint,
        region=options.get("region") or None,
        profile=options.get("profile") or None,
        connect_timeout=context.connect_timeout,
        anonymous=_is_true(options.get("anonymous", "")),
    )
    if site.anonymous and site.profile:
        raise SetupError("profile names credentials, and anonymous=true uses none: leave one out")
    is_read_only = read_only or _is_true(options.get("read_only", ""))
    root = S3Root(bucket, prefix.strip("/"), is_read_only)
    return ParsedUrl(site, root, symlinks=options.get("symlinks"))


def _options(rest: str, kind: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Split a URL into the part before the query, and the query's options. Raises SetupError for an
    option that is not `known`."""
    place, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key in options:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
            raise SetupError(f"{kind} URL has no option {key!r}: {hint}")
    return place, options


def _parse_tunnel(rest: str, context: UrlContext, *, read_only: bool) -> ParsedUrl:
    rest, options = _options(rest, "a tunnel:", _SFTP_OPTIONS)
    name, _, path = rest.partition("/")
    if not rendezvous.is_valid_name(name):
        raise SetupError(
            f"tunnel:{_without_secrets(rest)} names no tunnel: the form is tunnel:NAME/SHARE, "
            "with the name that 'hpcfs tunnel' was given"
        )
    site = tunnel_site(name, context.connect_timeout)
    root = SftpRoot("/" + path.strip("/"), read_only)
    return ParsedUrl(site, root, symlinks=options.get("symlinks"))


def tunnel_site(name: str, connect_timeout: float, directory: Path | None = None) -> TunnelSite:
    """Return the site of a tunnel. Without `directory` its file is in the home directory, which
    most clusters' nodes share, whatever XDG variables say."""
    return TunnelSite(name, str(directory or tunnel_directory()), connect_timeout)


def tunnel_directory() -> Path:
    """Return the directory where tunnels leave their files."""
    return paths.home() / rendezvous.DIRECTORY


def check_endpoint(url: str) -> None:
    """Raise SetupError unless it is an http or https URL without a password."""
    _refuse_password(url)
    if not re.fullmatch(r"https?://[^/\s?#]+/?[^\s?#]*", url):
        raise SetupError(f"endpoint_url must be like https://storage.example.org, not {url!r}")


def _check_login(site: SshSite) -> None:
    """Refuse names that a ProxyCommand's shell would read as more than a name. Raises
    SetupError."""
    if not ssh_syntax.is_valid_host(site.host):
        raise SetupError(f"{site.host!r} is no host name: ssh takes no such characters either")
    if site.user is not None and not ssh_syntax.is_valid_user(site.user):
        raise SetupError(f"{site.user!r} is no user name: ssh takes no such characters either")


def _refuse_password(text: str) -> None:
    """Raise SetupError for a URL with a password, without repeating any of it."""
    scheme = _SCHEME.fullmatch(text)
    if scheme:
        place, _, query = scheme[2].partition("?")
        user_info = place.partition("/")[0].rpartition("@")[0]
        has_secret = ":" in user_info or (scheme[1].lower() == "s3" and bool(user_info))
        keys = (key for key, _ in parse_qsl(query, keep_blank_values=True))
        has_secret = has_secret or any(_SECRET_WORD.search(key) for key in keys)
    else:
        has_secret = bool(re.match(r"[^/:@\[\]]+:[^/@]*@[^/:@]+:", text))
    if has_secret:
        raise SetupError(
            "this URL holds a password or a key, which does not belong there: SSH logs in by key, "
            "agent or a prompt; S3 credentials come from the AWS chain (environment, ~/.aws)"
        )


def _without_secrets(text: str) -> str:
    """Return the part of an invalid URL that may be repeated: anything before an @ may be a
    password."""
    return re.sub(r"^.*@", "…@", text, flags=re.DOTALL)
