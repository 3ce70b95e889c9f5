"""The configuration: reads a TOML file, or URLs of the command line, into frozen values.

Owns which keys exist and what they mean (docs/configuration.md lists them). Every mistake is an
error that names file, line and the nearest valid key: a key that is silently ignored would let a
user believe in a setting that isn't there. Credentials are refused: they have better places.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, TypeVar, overload

import msgspec

from hpcfs.config import rclone_conf, ssh_config, urls, values
from hpcfs.config.toml_lines import KeyPath, find_lines
from hpcfs.config.values import SymlinkMode, WriteMode
from hpcfs.model.errors import SetupError
from hpcfs.model.sites import AnyRoot, AnySite, S3Root, S3Site, SftpRoot, SshSite, TunnelSite
from hpcfs.system import ownership, paths
from hpcfs.system.disk import DEFAULT_MIN_FREE, MinFree

DEFAULT_CACHE_SIZE = 20 * 1024**3
DEFAULT_JOURNAL_SIZE = 10 * 1024**3
DEFAULT_WRITE: WriteMode = "through"
DEFAULT_SYMLINKS: SymlinkMode = "contain"
DEFAULT_CONNECT_TIMEOUT = 10.0
DEFAULT_IDLE_TIMEOUT = 600.0
DEFAULT_CONNECTIONS = 96
DEFAULT_REQUESTS = 5000
"""Per second. S3 permits 5500 that read, for each prefix."""

TOP_KEYS = (
    "mountpoint", "cache_dir", "cache_size", "cache_min_free", "journal_size", "log_level",
    "namespaces", "tunnel",
)  # fmt: skip
DEFAULT_PATIENCE = 30.0
UNATTENDED_PATIENCE = 15 * 60.0
"""Of commands that nobody watches, such as those of a batch job."""

COMMON_KEYS = (
    "type", "read_only", "write", "verify", "connect_timeout", "symlinks", "patience",
    "bandwidth_limit",
)  # fmt: skip
SFTP_KEYS = (
    *COMMON_KEYS, "host", "path", "user", "port", "identity_file", "ssh_config", "transport",
    "idle_timeout",
)  # fmt: skip
TUNNEL_KEYS = (*COMMON_KEYS, "tunnel", "path", "directory")
S3_KEYS = (
    *COMMON_KEYS,
    "bucket",
    "prefix",
    "endpoint_url",
    "region",
    "profile",
    "connections",
    "requests",
    "anonymous",
    "xattrs",
)
CREDENTIAL_KEYS = re.compile(
    r"pass(word|phrase|wd)?|pwd|(.*_)?secret(_.*)?|(.*_)?access_key(_.*)?|(.*_)?token|credentials?|key",
    re.IGNORECASE,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NamespaceConfig:
    """One top-level directory of the mount.

    `url` is for display and holds no secret. `write` names what close(2) waits for: the remote, or
    the local journal. `xattrs` says whether extended attributes are wanted, `symlinks` where
    symbolic links may lead. `patience_set` is for how many seconds an outage is only a pause, if
    the user said so. `bandwidth_limit` counts for all namespaces of its site together.
    """

    name: str
    site: AnySite
    root: AnyRoot
    url: str
    write: WriteMode = DEFAULT_WRITE
    xattrs: bool = True
    symlinks: SymlinkMode = DEFAULT_SYMLINKS
    patience_set: float | None = None
    bandwidth_limit: values.BandwidthLimit = values.UNLIMITED

    @property
    def patience(self) -> float:
        """For how many seconds an outage is only a pause."""
        return DEFAULT_PATIENCE if self.patience_set is None else self.patience_set

    @property
    def read_only(self) -> bool:
        """Whether nothing may be changed on the remote."""
        return self.root.read_only

    @property
    def keeps_xattrs(self) -> bool:
        """Whether extended attributes are kept. SFTP has none, and a read-only namespace is shown
        as listings describe it."""
        return isinstance(self.site, S3Site) and self.xattrs and not self.read_only


@dataclass(frozen=True, slots=True)
class Config:
    """The user's configuration. `notes` are sentences to tell the user once."""

    namespaces: dict[str, NamespaceConfig]
    root_namespace: str | None = None
    mountpoint: Path | None = None
    cache_dir: Path | None = None
    cache_size: int = DEFAULT_CACHE_SIZE
    cache_min_free: MinFree = DEFAULT_MIN_FREE
    journal_size: int = DEFAULT_JOURNAL_SIZE
    log_level: str = "INFO"
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one daemon.

    `cache_dir` is this mount's own directory. `root_namespace`, if set, is the remote that is the
    root of the mount itself, as with sshfs. `journal_size` is the number of bytes that may wait to
    be uploaded.
    """

    mountpoint: Path
    cache_dir: Path
    cache_size: int
    namespaces: dict[str, NamespaceConfig]
    root_namespace: str | None
    log_file: Path
    socket: Path
    log_level: str = "INFO"
    cache_min_free: MinFree = DEFAULT_MIN_FREE
    journal_size: int = DEFAULT_JOURNAL_SIZE


def settings(config: Config, mountpoint: Path, cache_dir: Path) -> Settings:
    """Combine the configuration with this mount's own paths."""
    return Settings(
        mountpoint=mountpoint,
        cache_dir=cache_dir,
        cache_size=config.cache_size,
        namespaces=config.namespaces,
        root_namespace=config.root_namespace,
        log_file=paths.log_file(mountpoint),
        socket=paths.socket_path(mountpoint),
        log_level=config.log_level,
        cache_min_free=config.cache_min_free,
        journal_size=config.journal_size,
    )


def load(file: Path | None, named_urls: Sequence[tuple[str | None, str]] = ()) -> Config:
    """Load the configuration from that file, or from the default one.

    If there are URLs, their namespaces replace the file's. Raises SetupError for any mistake, and
    where nothing says what to mount.
    """
    chosen = file or paths.config_file()
    if file is None and not chosen.exists():
        if not named_urls:
            raise SetupError(
                f"nothing says what to mount: write {chosen} with 'hpcfs init', "
                "or name a remote, as in 'hpcfs mount login3:data ~/mnt'"
            )
        base = Config({})
    else:
        base = parse(read(chosen), chosen, needs_namespaces=not named_urls)
    return with_urls(base, named_urls) if named_urls else base


def read(file: Path) -> str:
    """Read the file as text. Raises SetupError, also where another user may have written it: it
    names hosts that get passwords, and files whose lines are commands."""
    try:
        raw = ownership.read_trusted(file, chosen=file != paths.config_file())
    except FileNotFoundError:
        raise SetupError(f"there is no configuration file {file}") from None
    except OSError as error:
        raise SetupError(f"{file} can't be read: {error.strerror}") from error
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise SetupError(f"{file}:{line}: this is not UTF-8, as TOML must be") from None


def with_urls(base: Config, named_urls: Sequence[tuple[str | None, str]]) -> Config:
    """Return the configuration with the URLs' namespaces instead. Raises SetupError for a URL that
    can't be mounted, and for two remotes with one name."""
    is_root = [name is None for name, _ in named_urls]
    if any(is_root) and len(named_urls) > 1:
        raise SetupError("with several remotes each needs a name: NAME=URL NAME=URL")
    context = urls.UrlContext(ssh_config.aliases(), rclone_conf.load, DEFAULT_CONNECT_TIMEOUT)
    found: dict[str, NamespaceConfig] = {}
    notes: list[str] = []
    for name, url in named_urls:
        target = urls.parse(url, context)
        key = name or _name_of(target.site, target.root)
        if key in found:
            raise SetupError(f"two remotes are named {key!r}: give each its own name")
        shown = urls.show(target.site, target.root)
        found[key] = NamespaceConfig(
            key, target.site, target.root, shown, symlinks=_symlinks_of(target)
        )
        notes += target.notes
    return replace(
        base,
        namespaces=found,
        root_namespace=next(iter(found)) if any(is_root) else None,
        notes=(*base.notes, *notes),
    )


def _symlinks_of(target: urls.ParsedUrl) -> SymlinkMode:
    if target.symlinks is None:
        return DEFAULT_SYMLINKS
    try:
        return values.symlink_mode(target.symlinks)
    except values.BadValue as error:
        raise SetupError(f"symlinks in a URL {error}") from None


def with_symlinks(config: Config, mode: SymlinkMode) -> Config:
    """Return the configuration with this mode in every namespace."""
    namespaces = {name: replace(one, symlinks=mode) for name, one in config.namespaces.items()}
    return replace(config, namespaces=namespaces)


def read_only(config: Config) -> Config:
    """Return the configuration with every namespace read-only."""
    return replace(
        config,
        namespaces={
            name: replace(found, root=msgspec.structs.replace(found.root, read_only=True))
            for name, found in config.namespaces.items()
        },
    )


def writing(config: Config, mode: WriteMode) -> Config:
    """Return the configuration with this write mode in every namespace."""
    return replace(
        config,
        namespaces={name: replace(found, write=mode) for name, found in config.namespaces.items()},
    )


def with_patience(config: Config, seconds: float) -> Config:
    """Return the configuration with this patience in every namespace."""
    namespaces = {
        name: replace(one, patience_set=seconds) for name, one in config.namespaces.items()
    }
    return replace(config, namespaces=namespaces)


def unattended(config: Config) -> Config:
    """Return the configuration with the patience of a command that nobody watches, in every
    namespace for which the user set none."""
    namespaces = {
        name: replace(one, patience_set=UNATTENDED_PATIENCE) if one.patience_set is None else one
        for name, one in config.namespaces.items()
    }
    return replace(config, namespaces=namespaces)


def parse(text: str, file: Path, *, needs_namespaces: bool = True) -> Config:
    """Parse a configuration. Raises SetupError with file and line of the first mistake."""
    top = _top_table(text, file)
    top.refuse_unknown(TOP_KEYS)
    namespaces = top.get("namespaces", values.table, None) or {}
    if needs_namespaces and not namespaces:
        raise SetupError(
            f"{file}: no namespace says what to mount: "
            "add a [namespaces.NAME] table, or take the '#' from one"
        )
    return Config(
        namespaces={name: _namespace(top.below("namespaces", name)) for name in namespaces},
        mountpoint=top.get("mountpoint", values.local_path, None),
        cache_dir=top.get("cache_dir", values.local_path, None),
        cache_size=top.get("cache_size", values.disk_size, DEFAULT_CACHE_SIZE),
        cache_min_free=top.get("cache_min_free", values.min_free, DEFAULT_MIN_FREE),
        journal_size=top.get("journal_size", values.disk_size, DEFAULT_JOURNAL_SIZE),
        log_level=top.get("log_level", values.log_level, "INFO"),
    )


# --- tables -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Table:
    """One table of the document, which knows its place in the file."""

    entries: dict[str, object]
    path: KeyPath
    file: Path
    lines: dict[KeyPath, int]

    @overload
    def get(self, key: str, reader: Callable[[object], T], default: None) -> T | None: ...

    @overload
    def get(self, key: str, reader: Callable[[object], T], default: T) -> T: ...

    def get(self, key: str, reader: Callable[[object], T], default: T | None) -> T | None:
        """Return the value as `reader` reads it, or the default. A BadValue becomes the user's
        error."""
        if key not in self.entries:
            return default
        return self._read(key, reader)

    def require(self, key: str, reader: Callable[[object], T], example: str) -> T:
        """Return the value. Raises SetupError with an example where the key is missing."""
        if key not in self.entries:
            self.fail(None, f"{key} is missing: add a line such as {key} = {example}")
        return self._read(key, reader)

    def below(self, table: str, name: str) -> _Table:
        """Return the table named `name` inside of `table`. Raises SetupError for an invalid
        name."""
        inner = self.entries[table]
        assert isinstance(inner, dict)
        path = (*self.path, table, name)
        place = f"{self.file}:{self.lines[path]}"
        if not urls.is_valid_name(name):
            raise SetupError(
                f"{place}: {name!r} can't name a namespace: use letters, digits, '.', '_' and '-'"
            )
        if not isinstance(inner[name], dict):
            raise SetupError(f"{place}: {name} must be a table, as in [namespaces.{name}]")
        return _Table(inner[name], path, self.file, self.lines)

    def _read(self, key: str, reader: Callable[[object], T]) -> T:
        try:
            return reader(self.entries[key])
        except values.BadValue as error:
            self.fail(key, f"{key} {error}")

    def refuse_unknown(self, known: Collection[str]) -> None:
        """Raise SetupError for a key that is not `known`, with the nearest one that is."""
        for key in self.entries:
            if key in known:
                continue
            if CREDENTIAL_KEYS.fullmatch(key):
                self.fail(
                    key,
                    f"{key} does not belong here: SSH logs in by key, agent or a prompt, and S3 "
                    "credentials come from the AWS chain (environment, ~/.aws, SSO, instance)",
                )
            nearest = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"the keys are {', '.join(known)}"
            self.fail(key, f"unknown key {key!r}: {hint}")

    def fail(self, key: str | None, text: str) -> NoReturn:
        """Raise SetupError with file, line and table of the key."""
        path = self.path if key is None else (*self.path, key)
        where = f"[{'.'.join(str(part) for part in self.path)}] " if self.path else ""
        raise SetupError(f"{self.file}:{self.lines.get(path, 1)}: {where}{text}")


def _top_table(text: str, file: Path) -> _Table:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SetupError(_syntax_error(str(error), text, file)) from None
    return _Table(document, (), file, find_lines(text))


def tunnel_table(text: str, file: Path) -> _Table | None:
    """Return the [tunnel] table for config/tunnel.py, which knows its keys; None where there is
    none."""
    top = _top_table(text, file)
    entries = top.get("tunnel", values.table, None)
    return None if entries is None else _Table(entries, ("tunnel",), file, top.lines)


def _namespace(table: _Table) -> NamespaceConfig:
    kind = table.require("type", values.kind, '"sftp"')
    keys, read = _KINDS[kind]
    table.refuse_unknown(keys)
    site, root = read(table)
    root = msgspec.structs.replace(
        root,
        read_only=table.get("read_only", values.boolean, False),
        verify=table.get("verify", values.boolean, False),
    )
    write = table.get("write", values.write_mode, DEFAULT_WRITE)
    xattrs = kind == "s3" and table.get("xattrs", values.boolean, True)
    symlinks = table.get("symlinks", values.symlink_mode, DEFAULT_SYMLINKS)
    patience = table.get("patience", values.duration, None)
    limit = table.get("bandwidth_limit", values.rates, values.UNLIMITED)
    name, url = str(table.path[-1]), urls.show(site, root)
    return NamespaceConfig(name, site, root, url, write, xattrs, symlinks, patience, limit)


def _sftp(table: _Table) -> tuple[AnySite, AnyRoot]:
    return _ssh_site(table), SftpRoot(table.get("path", values.sftp_path, "~"))


def _ssh_site(table: _Table) -> SshSite:
    user, _, host = table.require("host", values.host, '"login3"').rpartition("@")
    if user and "user" in table.entries:
        table.fail("user", "user is given twice: as this key and in host")
    if not host:
        table.fail("host", "host names no host")
    return SshSite(
        host=host.strip("[]"),
        user=user or table.get("user", values.user, None),
        port=table.get("port", values.port, None),
        ssh_config=table.get("ssh_config", values.file_text, None),
        identity_file=table.get("identity_file", values.file_text, None),
        connect_timeout=table.get("connect_timeout", values.seconds, DEFAULT_CONNECT_TIMEOUT),
        transport=table.get("transport", values.transport, "asyncssh"),
        idle_timeout=table.get("idle_timeout", values.seconds, DEFAULT_IDLE_TIMEOUT),
    )


def _s3(table: _Table) -> tuple[AnySite, AnyRoot]:
    bucket = table.require("bucket", values.bucket, '"training-data"')
    site = S3Site(
        endpoint_url=table.get("endpoint_url", values.endpoint, None),
        region=table.get("region", values.text, None),
        profile=table.get("profile", values.text, None),
        connect_timeout=table.get("connect_timeout", values.seconds, DEFAULT_CONNECT_TIMEOUT),
        anonymous=table.get("anonymous", values.boolean, False),
        connections=table.get("connections", values.count, DEFAULT_CONNECTIONS),
        requests=table.get("requests", values.count, DEFAULT_REQUESTS),
    )
    if site.anonymous and site.profile:
        table.fail("profile", "profile names credentials, and anonymous = true uses none")
    return site, S3Root(bucket, table.get("prefix", values.prefix, ""))


def _tunnel(table: _Table) -> tuple[AnySite, AnyRoot]:
    """Read a namespace of type tunnel. By default the tunnel has the namespace's name, and all its
    shares are shown."""
    name = table.get("tunnel", values.tunnel, str(table.path[-1]))
    seconds = table.get("connect_timeout", values.seconds, DEFAULT_CONNECT_TIMEOUT)
    site = urls.tunnel_site(name, seconds, table.get("directory", values.local_path, None))
    return site, SftpRoot(table.get("path", values.share_path, "/"))


_KINDS: dict[str, tuple[Collection[str], Callable[[_Table], tuple[AnySite, AnyRoot]]]] = {
    "sftp": (SFTP_KEYS, _sftp),
    "s3": (S3_KEYS, _s3),
    "tunnel": (TUNNEL_KEYS, _tunnel),
}


def _name_of(site: AnySite, root: AnyRoot) -> str:
    """Return a name for a remote to which the user gave none; only the status shows it."""
    if isinstance(site, TunnelSite):
        return site.name
    text = site.host if isinstance(site, SshSite) else getattr(root, "bucket", "")
    return re.sub(r"[^A-Za-z0-9._-]", "_", text) or "remote"


def _syntax_error(message: str, text: str, file: Path) -> str:
    """Build the error's sentence. tomllib ends its message with "(at line 3, column 5)" or "(at end
    of document)"."""
    sentence, _, place = message.partition(" (at ")
    line = re.search(r"line (\d+)", place)
    number = int(line[1]) if line else text.count("\n") + 1
    return f"{file}:{number}: this is not valid TOML: {sentence}"
