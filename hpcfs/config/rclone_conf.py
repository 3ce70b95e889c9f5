"""Reads remotes from rclone.conf, so that they can be mounted by their rclone names.

Only the types sftp and s3 are supported. rclone's passwords (obscured, not encrypted) are not used:
SSH logs in by key, agent or a prompt. The keys of an s3 remote are used, as rclone uses them.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcfs.model import ssh_syntax
from hpcfs.model.errors import SetupError
from hpcfs.model.sites import S3Root, S3Site, Secret, SftpRoot, SshSite
from hpcfs.system import ownership, paths

SUPPORTED = ("sftp", "s3")
ENCRYPTED_MARK = "RCLONE_ENCRYPT_V"


@dataclass(frozen=True, slots=True)
class RcloneRemote:
    """One section of the file. `options` may hold secrets, so its repr omits them."""

    name: str
    kind: str
    options: Mapping[str, str]
    file: Path

    def __repr__(self) -> str:
        return f"RcloneRemote({self.name!r}, {self.kind!r})"

    def site(self, connect_timeout: float) -> SshSite | S3Site:
        """Return the remote's site. Raises SetupError where hpcfs has no such kind of remote."""
        if self.kind == "sftp":
            return self._ssh_site(connect_timeout)
        if self.kind == "s3":
            return self._s3_site(connect_timeout)
        raise SetupError(
            f"{self.file}: the remote {self.name!r} is of type {self.kind!r}, "
            "which hpcfs can't mount: it mounts types sftp and s3"
        )

    def root(self, path: str, *, read_only: bool) -> SftpRoot | S3Root:
        """Return the folder that REMOTE:path names. Raises SetupError where an S3 path has no
        bucket."""
        if self.kind == "sftp":
            return SftpRoot(path or "~", read_only)
        bucket, _, prefix = path.strip("/").partition("/")
        if not bucket:
            raise SetupError(f"name a bucket of the remote: {self.name}:BUCKET/PREFIX")
        return S3Root(bucket, prefix.strip("/"), read_only)

    def notes(self) -> list[str]:
        """Return sentences about options of the remote that are ignored."""
        if self.kind == "sftp" and self.options.get("pass"):
            return [
                f"the password of the rclone remote {self.name!r} is not used: "
                "hpcfs logs in by key or agent, or asks"
            ]
        return []

    def _ssh_site(self, connect_timeout: float) -> SshSite:
        host = self.options.get("host")
        if not host:
            raise SetupError(f"{self.file}: the remote {self.name!r} has no host")
        if self.options.get("ssh"):
            raise SetupError(
                f"{self.file}: the remote {self.name!r} connects by an external ssh command, "
                "which hpcfs doesn't run: name the host instead, as HOST:PATH"
            )
        user = self.options.get("user") or None
        if not ssh_syntax.is_valid_host(host) or not (
            user is None or ssh_syntax.is_valid_user(user)
        ):
            raise SetupError(
                f"{self.file}: the remote {self.name!r} has a host or user with characters that "
                "ssh takes in none: correct it there"
            )
        key_file = self.options.get("key_file")
        return SshSite(
            host=host,
            user=user,
            port=self._port(),
            identity_file=os.path.expandvars(os.path.expanduser(key_file)) if key_file else None,
            connect_timeout=connect_timeout,
        )

    def _port(self) -> int | None:
        text = self.options.get("port")
        if not text:
            return None
        if not text.isdecimal() or not 0 < int(text) < 65536:
            raise SetupError(f"{self.file}: the remote {self.name!r} has an invalid port: {text}")
        return int(text)

    def _s3_site(self, connect_timeout: float) -> S3Site:
        if self.options.get("session_token"):
            raise SetupError(
                f"{self.file}: the remote {self.name!r} has a session_token, which expires: put "
                "these credentials into a profile of ~/.aws/credentials and mount s3://BUCKET"
            )
        access, secret = self.options.get("access_key_id"), self.options.get("secret_access_key")
        has_keys = bool(access and secret)
        endpoint = self.options.get("endpoint")
        if endpoint and "://" not in endpoint:
            endpoint = f"https://{endpoint}"  # as rclone does
        return S3Site(
            endpoint_url=endpoint,
            region=self.options.get("region"),
            profile=None if has_keys else self.options.get("profile"),
            access_key=Secret(access) if access and has_keys else None,
            secret_key=Secret(secret) if secret and has_keys else None,
            connect_timeout=connect_timeout,
            anonymous=not has_keys and not self._uses_environment(),
        )

    def _uses_environment(self) -> bool:
        """Return whether credentials come from the environment or a profile. Without these and
        without keys, rclone sends unsigned requests."""
        env_auth = self.options.get("env_auth", "").lower() in ("1", "t", "true")
        return env_auth or bool(self.options.get("profile"))


def default_file(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the file that rclone would read; None if there is none."""
    if given := environ.get("RCLONE_CONFIG"):
        return Path(os.path.expanduser(given))
    home = paths.home(environ)
    candidates = [home / ".config" / "rclone" / "rclone.conf", home / ".rclone.conf"]
    if xdg := environ.get("XDG_CONFIG_HOME"):
        candidates.insert(0, Path(xdg) / "rclone" / "rclone.conf")
    return next((file for file in candidates if file.is_file()), None)


def load(environ: Mapping[str, str] = os.environ) -> dict[str, RcloneRemote]:
    """Return all remotes by name; an empty dict without a file. Raises SetupError where it can't be
    read."""
    file = default_file(environ)
    if file is None or not file.exists():
        return {}
    try:
        text = ownership.read_trusted(file, chosen="RCLONE_CONFIG" in environ).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{file} can't be read: {error}") from error
    return parse(text, file)


def parse(text: str, file: Path) -> dict[str, RcloneRemote]:
    """Parse the file's text. Raises SetupError where it is encrypted or malformed."""
    first = next((line for line in text.splitlines() if line and line[0] not in "#;"), "")
    if first.startswith(ENCRYPTED_MARK):
        raise SetupError(
            f"{file} is encrypted, which hpcfs doesn't read: name the host or the bucket by a URL, "
            "or decrypt it with 'rclone config encryption remove'"
        )
    parser = configparser.ConfigParser(
        interpolation=None, strict=False, delimiters=("=",), default_section=""
    )
    try:
        parser.read_string(text)
    except configparser.Error as error:  # the message may quote a line with a secret
        line = getattr(error, "lineno", None)
        where = f"{file}:{line}" if line else str(file)
        raise SetupError(f"{where}: this is not the form of an rclone.conf") from None
    remotes = (
        RcloneRemote(n, parser[n].get("type", ""), dict(parser[n]), file) for n in parser if n
    )
    return {remote.name: remote for remote in remotes}
