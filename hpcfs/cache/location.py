"""Chooses the directory of the cache: on a local disk, writable, and ours.

On a cluster's login node the home directory is often on NFS or Lustre. A cache there is as slow as
the remote that it caches, and SQLite's WAL needs shared memory, which network filesystems lack. A
default on such a filesystem is replaced by a node-local place, with a note; a place that the user
named is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcfs.model.errors import SetupError
from hpcfs.system import mountinfo, ownership, paths
from hpcfs.system.mountinfo import MountEntry

NETWORK_KINDS = frozenset(
    (
        *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "beegfs_nodev", "ceph", "panfs", "wekafs"),
        *("cifs", "smb3", "smbfs", "afs", "9p", "orangefs", "pvfs2", "glusterfs", "gfs2", "ocfs2"),
    )
)
SHARED_DISKS = (Path("/scratch"), Path("/var/tmp"))  # noqa: S108 - other users' places are skipped
LOCAL_FUSE_KINDS = frozenset(["fuse.fuse-overlayfs"])
"""The root of a rootless container, whose bytes are on this node."""


@dataclass(frozen=True, slots=True)
class Location:
    """The directory for the caches of all mounts; `note` tells the user of a choice made for
    them."""

    directory: Path
    note: str | None = None


def network_kind(directory: Path, mounts: Sequence[MountEntry]) -> str | None:
    """Return the type of the network filesystem that holds this resolved path; None if it is
    local."""
    found = mountinfo.containing(directory, mounts)
    if found is None or found.kind in LOCAL_FUSE_KINDS:
        return None
    is_fuse = found.kind == "fuse" or found.kind.startswith("fuse.")
    return found.kind if is_fuse or found.kind in NETWORK_KINDS else None


def choose(
    configured: Path | None,
    default: Path,
    local_places: Sequence[Path],
    mounts: Sequence[MountEntry],
) -> Location:
    """Choose among resolved paths; pure policy. `local_places` are tried in order.

    Raises SetupError where the user's choice, or every place, is on a network filesystem.
    """
    better = next((place for place in local_places if not network_kind(place, mounts)), None)
    wanted = configured or default
    kind = network_kind(wanted, mounts)
    if kind is None:
        return Location(wanted)
    if configured:
        advice = f", such as {better}" if better else ""
        raise SetupError(
            f"the cache directory {configured} is on a network filesystem ({kind}), where a cache "
            f"is slow and its index can't work: set cache_dir to a place on a local disk{advice}"
        )
    if better is None:
        raise SetupError(
            f"the cache directory {default} is on a network filesystem ({kind}) and no local disk "
            "was found: set cache_dir to a directory on one"
        )
    return Location(
        better,
        f"the cache is in {better}, because {default} is on a network filesystem ({kind}); "
        "set cache_dir to choose another local disk",
    )


def locate(configured: Path | None, environ: Mapping[str, str] = os.environ) -> Location:
    """Choose the location on this machine. Looks at the disk, but makes nothing. Raises
    SetupError."""
    if configured:
        _refuse_unsafe(configured)
    default = paths.default_cache_dir(environ)
    places = local_places(environ)
    mounts = mountinfo.read()
    if configured is None and (reason := ownership.unsafe_reason(default)):
        return _instead(default, reason, places, mounts)
    return choose(
        Path(os.path.realpath(configured)) if configured else None,
        Path(os.path.realpath(default)),
        places,
        mounts,
    )


def _refuse_unsafe(directory: Path) -> None:
    if reason := ownership.unsafe_reason(directory):
        raise SetupError(
            f"the cache directory {directory} is not safe from others ({reason}): "
            "set cache_dir to a place that only you can change"
        )


def _instead(
    default: Path, reason: str, places: Sequence[Path], mounts: Sequence[MountEntry]
) -> Location:
    better = next((place for place in places if not network_kind(place, mounts)), None)
    if better is None:
        _refuse_unsafe(default)
        raise AssertionError(reason)
    note = f"the cache is in {better}, because {default} is not safe from others ({reason})"
    return Location(better, note)


def local_places(environ: Mapping[str, str]) -> list[Path]:
    """Return writable places on a node's own disks, by the conventions of clusters.

    /tmp comes late: it is small or in memory on many nodes. All but $TMPDIR are shared by users, so
    a place that another user has taken, or could take, is skipped.
    """
    own = f"hpcfs-{os.getuid()}"
    candidates = [place / own for place in SHARED_DISKS]
    candidates.append(paths.shared_tmp_dir() / "cache")
    temporary = Path(environ.get("TMPDIR") or "")
    if temporary.is_absolute():
        candidates.insert(0, temporary / own)
    return [
        Path(os.path.realpath(place.parent)) / place.name
        for place in candidates
        if os.access(_nearest(place), os.W_OK | os.X_OK) and _is_ours(place)
    ]


def _is_ours(place: Path) -> bool:
    """Return whether the place is ours, or will be once it is made."""
    if ownership.unsafe_reason(place):
        return False
    return not os.path.lexists(place) or place.lstat().st_uid == os.getuid()


def check(directory: Path) -> None:
    """Raise SetupError where no cache can be made there. Makes nothing."""
    existing = _nearest(directory)
    if not existing.is_dir():
        raise SetupError(f"the cache directory {directory} can't be: {existing} is no directory")
    if existing == directory and existing.stat().st_uid != os.getuid():
        raise SetupError(
            f"the cache directory {directory} belongs to user {existing.stat().st_uid}: "
            "set cache_dir to a directory of your own"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SetupError(
            f"the cache directory {directory} can't be used: you may not write to {existing}; "
            "set cache_dir to a directory of your own"
        )
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise SetupError(
            f"the cache directory {directory} is on a filesystem mounted read-only: "
            "set cache_dir to a directory on another disk"
        )


def prepare(location: Location, mountpoint: Path) -> Path:
    """Make the directory of one mount's cache. Raises SetupError where it can't be made."""
    directory = location.directory
    check(directory)
    if directory.parent == paths.shared_tmp_dir():
        paths.make_private(directory.parent)
    if not directory.exists():  # the user chose the mode of an existing one
        paths.make_private(directory)
    return paths.make_private(directory / paths.mount_id(mountpoint))


def _nearest(path: Path) -> Path:
    """Return the path itself, or its closest parent that exists."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))
