"""The contenders: how each is mounted, plain and with the options that its manual recommends.

Each mount is fresh: a home directory, a cache and a mount point of its own, credentials of this
run only, nothing of the user's. Programs stay in the foreground, so that their processes are known.
Reasons for the options:

- sshfs(1), mount.fuse3(8): several connections (`max_conns`), the kernel's cache kept over opens
  (`auto_cache`), attributes and names remembered for longer, no compression, the cipher that
  processors have instructions for.
- rclone's page of `mount`: `--vfs-cache-mode full` with a large `--vfs-read-ahead`,
  `--vfs-fast-fingerprint`, a long `--dir-cache-time`; over SFTP `chunk_size` 255k, the advice for
  OpenSSH servers, no checksums by shell commands; over S3 `--use-server-modtime`, else every
  attribute is a request of its own. "Streams" is its advice for fast object stores: 16 chunks of
  4 MiB in parallel. Over SFTP that was measured four times as slow, with 5 GB of memory.
- rclone's page of `mount` on writing: `--vfs-cache-mode` at least `writes`, without which most
  programs can't write; it uploads after close, five seconds later unless `--vfs-write-back` says
  otherwise. Either may be better: a file that is renamed at once is uploaded once if it waits.
  `--transfers` for many files at a time; over S3 larger parts, more of them at a time, and no
  checks whether the bucket and the object exist.
- s3fs(1): more parallel requests, a larger cache of attributes, remembered absence, a disk
  cache. It does not take part in writing trees: for a directory it makes an object with a slash at
  its end, of which `rclone serve s3` makes a file, and then nothing can be created in there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import hpcfs
from hpcfs.system import mountinfo
from scripts.benchmarks import measure, tunnels
from scripts.benchmarks.results import HPCFS, HPCFS_BACK, READ, WRITE
from scripts.benchmarks.servers import REPOSITORY, Place
from tests.support.s3 import ACCESS_KEY, BUCKET, REGION, SECRET_KEY, rclone_binary
from tests.support.sshd import ALIAS, LOOPBACK

MOUNT_SECONDS = 60.0
END_SECONDS = 20.0
REMEMBER = "3600"
"""Seconds for options that set how long attributes are valid."""


@dataclass(frozen=True)
class Private:
    """The directories of one mount."""

    top: Path

    @property
    def home(self) -> Path:
        return self.top / "home"

    @property
    def cache(self) -> Path:
        return self.top / "cache"

    @property
    def mountpoint(self) -> Path:
        return self.top / "mnt"


Command = Callable[[Place, Private], list[str]]


@dataclass(frozen=True)
class Contender:
    """A program with its options. `command` mounts and stays in the foreground; the files appear in
    `inside` of the mount point. `kinds` are the workloads for which it is meant."""

    name: str
    program: str
    remotes: tuple[str, ...]
    command: Command
    inside: str = "."
    kinds: tuple[str, ...] = (READ, WRITE)
    needs: str = ""
    """An option that this `hpcfs mount` may lack."""
    makes_directories: bool = True
    """Whether it can make directories on the servers used here."""

    def why_not(self) -> str:
        """Return why it can't take part, or an empty string."""
        if self.needs and self.needs not in _help_of_hpcfs_mount():
            return f"not available: this hpcfs mount has no {self.needs}"
        if self.program not in ("hpcfs", "rclone") and shutil.which(self.program) is None:
            return "not installed"
        return ""

    def version(self) -> str:
        if self.program == "hpcfs":
            return f"{hpcfs.__version__}, this checkout"
        program = str(rclone_binary()) if self.program == "rclone" else self.program
        option = "version" if self.program == "rclone" else "--version"
        told = subprocess.run([program, option], capture_output=True, text=True, check=False)
        lines = (told.stdout + told.stderr).splitlines()
        named = [line for line in lines if re.match(rf"{self.program}|.*Version V", line, re.I)]
        return (named or lines)[0]


THIS_HPCFS = (sys.executable, "-P", "-c", "from hpcfs.cli.main import main; main()")
"""This checkout's hpcfs, whatever is installed: PYTHONPATH leads to it."""

# --- hpcfs ----------------------------------------------------------------------------------------


def _help_of_hpcfs_mount() -> str:
    command = [*THIS_HPCFS, "mount", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return told.stdout


def _hpcfs(*options: str) -> Command:
    def command(place: Place, private: Private) -> list[str]:
        config = _hpcfs_config(place, private)
        mount = ("mount", "--foreground", "--config", str(config), *options)
        return [*THIS_HPCFS, *mount, str(private.mountpoint)]

    return command


def _hpcfs_config(place: Place, private: Private) -> Path:
    if place.remote == "sftp":
        keys = {"type": "sftp", "host": ALIAS, "path": place.files, "ssh_config": place.ssh_config}
    elif place.remote == "tunnel":
        keys = {"type": "tunnel", "tunnel": tunnels.NAME, "path": f"/{tunnels.SHARE}"}
        keys["directory"] = str(place.rendezvous)
    else:
        keys = {"type": "s3", "bucket": BUCKET, "region": REGION}
        keys["endpoint_url"] = place.endpoint_url
    lines = [f'{key} = "{value}"' for key, value in keys.items()]
    config = private.home / "config.toml"
    config.write_text("\n".join([f'cache_dir = "{private.cache}"', "[namespaces.files]", *lines]))
    return config


# --- sshfs ----------------------------------------------------------------------------------------


def _sshfs(*options: str) -> Command:
    def command(place: Place, private: Private) -> list[str]:
        joined = [word for option in options for word in ("-o", option)]
        source = f"{ALIAS}:{place.files}"
        return [
            "sshfs",
            "-f",
            "-F",
            str(place.ssh_config),
            source,
            str(private.mountpoint),
            *joined,
        ]

    return command


SSHFS_TUNED = (
    "max_conns=8",
    "auto_cache",
    "dir_cache=yes",
    f"dcache_timeout={REMEMBER}",
    f"attr_timeout={REMEMBER}",
    f"entry_timeout={REMEMBER}",
    "compression=no",
    "Ciphers=aes128-gcm@openssh.com",
)

# --- rclone ---------------------------------------------------------------------------------------


def _rclone(remotes: dict[str, dict[str, str]], flags: dict[str, tuple[str, ...]]) -> Command:
    def command(place: Place, private: Private) -> list[str]:
        keys = {**_rclone_remote(place), **remotes[place.remote]}
        config = private.home / "rclone.conf"
        config.write_text("[remote]\n" + "".join(f"{key} = {keys[key]}\n" for key in keys))
        source = f"remote:{place.files}" if place.remote == "sftp" else f"remote:{BUCKET}"
        return [
            *(str(rclone_binary()), "mount", "--config", str(config)),
            *("--cache-dir", str(private.cache)),
            *(*flags[place.remote], source, str(private.mountpoint)),
        ]

    return command


def _rclone_remote(place: Place) -> dict[str, str]:
    if place.remote == "sftp":
        where = {"host": LOOPBACK, "port": str(place.port), "user": place.user}
        keys = {"key_file": str(place.key), "known_hosts_file": str(place.known_hosts)}
        return {"type": "sftp", **where, **keys}
    service = {"provider": "Rclone", "endpoint": place.endpoint_url, "region": REGION}
    return {"type": "s3", "env_auth": "true", **service}


RCLONE_PLAIN: dict[str, dict[str, str]] = {"sftp": {}, "s3": {}}
RCLONE_PLAIN_FLAGS: dict[str, tuple[str, ...]] = {"sftp": (), "s3": ()}
RCLONE_FLAGS = (
    *("--vfs-cache-mode", "full", "--vfs-fast-fingerprint", "--vfs-read-ahead", "128M"),
    *("--dir-cache-time", "1h", "--attr-timeout", "1h", "--max-read-ahead", "1M"),
)
RCLONE_TUNED = {
    "sftp": {"chunk_size": "255k", "concurrency": "64", "disable_hashcheck": "true"}
    | {"ciphers": "aes128-gcm@openssh.com"},
    "s3": {},
}
RCLONE_TUNED_FLAGS = {"sftp": RCLONE_FLAGS, "s3": (*RCLONE_FLAGS, "--use-server-modtime")}
STREAMS = ("--vfs-read-chunk-streams", "16", "--vfs-read-chunk-size", "4M")
RCLONE_STREAMS_FLAGS = {"s3": (*RCLONE_TUNED_FLAGS["s3"], *STREAMS)}
RCLONE_WRITES_FLAGS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("sftp", "s3"), ("--vfs-cache-mode", "writes")
)
RCLONE_S3_WRITES = (
    *("--s3-upload-concurrency", "16", "--s3-chunk-size", "16M"),
    *("--s3-no-check-bucket", "--s3-no-head"),
)


def _rclone_writing(seconds: int) -> Command:
    """Return rclone's best options for writing, with uploads `seconds` after close."""
    more = ("--transfers", "32", "--vfs-write-back", f"{seconds}s")
    s3 = (*RCLONE_TUNED_FLAGS["s3"], *more, *RCLONE_S3_WRITES)
    return _rclone(RCLONE_TUNED, {"sftp": (*RCLONE_FLAGS, *more), "s3": s3})


# --- s3fs -----------------------------------------------------------------------------------------


def _s3fs(*options: str, disk_cache: bool = False) -> Command:
    def command(place: Place, private: Private) -> list[str]:
        needed = [f"url={place.endpoint_url}", "use_path_request_style", f"endpoint={REGION}"]
        needed += [
            "umask=0022",
            *options,
        ]  # otherwise directories that are no objects are inaccessible
        if disk_cache:
            needed.append(f"use_cache={private.cache}")
        joined = [word for option in needed for word in ("-o", option)]
        return ["s3fs", BUCKET, str(private.mountpoint), "-f", *joined]

    return command


S3FS_TUNED = (
    "parallel_count=32",
    "multipart_size=8",
    "multireq_max=64",
    "max_stat_cache_size=200000",
    f"stat_cache_expire={REMEMBER}",
    "enable_noobj_cache",
    "kernel_cache",
)

SFTP_AND_S3 = ("sftp", "s3")
EVERYWHERE = ("sftp", "s3", "tunnel")
SSH = ("sftp", "tunnel")
READS, WRITES = (READ,), (WRITE,)
RCLONE_PLAIN_COMMAND = _rclone(RCLONE_PLAIN, RCLONE_PLAIN_FLAGS)
RCLONE_WRITES_COMMAND = _rclone(RCLONE_PLAIN, RCLONE_WRITES_FLAGS)
RCLONE_TUNED_COMMAND = _rclone(RCLONE_TUNED, RCLONE_TUNED_FLAGS)
RCLONE_STREAMS_COMMAND = _rclone(RCLONE_TUNED, RCLONE_STREAMS_FLAGS)

CONTENDERS = (
    Contender(HPCFS, "hpcfs", EVERYWHERE, _hpcfs(), inside="files"),
    Contender(
        HPCFS_BACK,
        "hpcfs",
        EVERYWHERE,
        _hpcfs("--write", "back"),
        inside="files",
        kinds=WRITES,
        needs="--write",
    ),
    Contender("sshfs", "sshfs", SSH, _sshfs()),
    Contender("sshfs tuned", "sshfs", SSH, _sshfs(*SSHFS_TUNED)),
    Contender("rclone", "rclone", SFTP_AND_S3, RCLONE_PLAIN_COMMAND, kinds=READS),
    Contender("rclone tuned", "rclone", SFTP_AND_S3, RCLONE_TUNED_COMMAND, kinds=READS),
    Contender("rclone streams", "rclone", ("s3",), RCLONE_STREAMS_COMMAND, kinds=READS),
    Contender("rclone writes", "rclone", SFTP_AND_S3, RCLONE_WRITES_COMMAND, kinds=WRITES),
    Contender("rclone at once", "rclone", SFTP_AND_S3, _rclone_writing(0), kinds=WRITES),
    Contender("rclone after 5 s", "rclone", SFTP_AND_S3, _rclone_writing(5), kinds=WRITES),
    Contender("s3fs", "s3fs", ("s3",), _s3fs(), makes_directories=False),
    Contender(
        "s3fs tuned",
        "s3fs",
        ("s3",),
        _s3fs(*S3FS_TUNED, disk_cache=True),
        makes_directories=False,
    ),
)


# --- mounts ---------------------------------------------------------------------------------------


class MountFailed(Exception):
    """A mount failed; the message is the last lines that the program printed."""


class Mount:
    """A running mount of a contender."""

    def __init__(self, contender: Contender, place: Place, top: Path) -> None:
        self.private = Private(top)
        for directory in (self.private.home, self.private.cache, self.private.mountpoint):
            directory.mkdir(parents=True, mode=0o700)
        self.files = self.private.mountpoint / contender.inside
        self._log = top / "log"
        self.usage = measure.Usage(str(top))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                contender.command(place, self.private),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(self.private),
                start_new_session=True,
            )

    @property
    def pids(self) -> list[int]:
        return self.usage.look()

    def wait(self) -> None:
        """Wait until it is mounted, and has listed the top: a program that mounts first and logs in
        later has logged in then. A `stat` of the top is no proof, since hpcfs answers it without
        the server."""
        deadline = time.monotonic() + MOUNT_SECONDS
        while not self._is_mounted():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise MountFailed(self.log)
            time.sleep(0.02)
        try:
            measure.Programs(deadline, self.kill).run("ls", self.files)
        except (measure.TimedOut, measure.WrongResult) as error:
            raise MountFailed(f"{error} {self.log}") from error

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace").strip()[-800:]

    def _is_mounted(self) -> bool:
        return mountinfo.at(self.private.mountpoint, mountinfo.read()) is not None

    def stop(self) -> None:
        """Unmount in good order within a time limit, then by force."""
        if self._process.poll() is None and self._is_mounted():
            _unmount(self.private.mountpoint)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
        self.kill()
        shutil.rmtree(self.private.top)

    def kill(self) -> None:
        """Kill the mount's processes; the kernel then answers every program that waits for the
        mount."""
        measure.end(self.pids)
        self._process.wait()
        if self._is_mounted():
            _unmount(self.private.mountpoint, lazy=True)
        if self._is_mounted():  # the removal below would delete the files on the server
            raise RuntimeError(
                f"{self.private.mountpoint} can't be unmounted: please do it by hand"
            )


def _environment(private: Private) -> dict[str, str]:
    """Return an environment without the user's agent, credentials and proxies."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return kept | {
        measure.MARK: str(private.top),
        "PYTHONPATH": str(REPOSITORY),
        "HOME": str(private.home),
        "XDG_RUNTIME_DIR": str(private.home),
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), str(mountpoint)]
    subprocess.run(command, stderr=subprocess.DEVNULL, check=False, timeout=END_SECONDS)


@contextmanager
def mounted(contender: Contender, place: Place, top: Path) -> Iterator[Mount]:
    """Run a fresh mount with empty caches, and remove everything of it afterwards."""
    mount = Mount(contender, place, top)
    try:
        mount.wait()
        yield mount
    finally:
        mount.stop()
