"""The cache's place: never on a network filesystem, never where we can't write."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hpcfs.cache import location
from hpcfs.cache.location import Location
from hpcfs.model.errors import SetupError
from hpcfs.system import mountinfo, paths

TABLE = rb"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:5 / /proc rw - proc proc rw
30 22 0:40 / /home rw,relatime - nfs4 filer:/home rw,vers=4.2
31 30 0:41 / /home/u/My\040Disk rw - xfs /dev/sdb1 rw
32 22 0:42 / /lustre rw - lustre mds@tcp:/work rw
33 22 0:43 / /scratch rw - xfs /dev/nvme0 rw
34 22 0:44 / /m rw - fuse.sshfs login3: rw,user_id=1000,group_id=1000
35 22 0:45 / /plain rw - fuse thing rw,user_id=7
36 22 0:46 / /over rw - nfs filer:/a rw
37 22 0:47 / /over rw - tmpfs tmpfs rw
38 22 0:48 / /auto rw - autofs auto rw
39 22 0:49 / /layers rw - fuse.fuse-overlayfs fuse-overlayfs rw,user_id=0
"""
MOUNTS = mountinfo.parse(TABLE)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/u/.cache", "nfs4"),
        ("/home", "nfs4"),
        ("/homestead/u", None),
        ("/home/u/My Disk/cache", None),
        ("/home/u/My", "nfs4"),
        ("/lustre/project", "lustre"),
        ("/scratch/u", None),
        ("/m/x", "fuse.sshfs"),
        ("/plain", "fuse"),
        ("/over/x", None),
        ("/layers/x", None),
        ("/", None),
    ],
)
def test_the_filesystem_is_that_of_the_deepest_and_last_mount(path: str, kind: str | None) -> None:
    assert location.network_kind(Path(path), MOUNTS) == kind


def test_a_mounts_owner_and_escaped_name_are_read() -> None:
    found = {str(one.mountpoint): one for one in MOUNTS}
    assert found["/m"].user_id == 1000
    assert found["/"].user_id is None
    assert "/home/u/My Disk" in found
    at = mountinfo.at(Path("/over"), MOUNTS)
    assert at is not None
    assert at.kind == "tmpfs"


def test_a_local_default_and_a_local_choice_stay() -> None:
    places = [Path("/scratch/u")]
    assert location.choose(None, Path("/var/c"), places, MOUNTS) == Location(Path("/var/c"))
    chosen = location.choose(Path("/scratch/c"), Path("/home/u/.cache"), places, MOUNTS)
    assert chosen == Location(Path("/scratch/c"))


def test_a_default_on_the_network_moves_to_the_first_local_place_and_says_so() -> None:
    places = [Path("/lustre/tmp"), Path("/scratch/u"), Path("/var/tmp/u")]
    found = location.choose(None, Path("/home/u/.cache/hpcfs"), places, MOUNTS)
    assert found.directory == Path("/scratch/u")
    assert found.note is not None
    assert "nfs4" in found.note
    assert "/home/u/.cache/hpcfs" in found.note


def test_a_choice_on_the_network_is_refused_with_a_better_place() -> None:
    with pytest.raises(SetupError, match=r"/lustre/c .*\(lustre\).*/scratch/u"):
        location.choose(Path("/lustre/c"), Path("/var/c"), [Path("/scratch/u")], MOUNTS)
    with pytest.raises(SetupError, match="no local disk"):
        location.choose(None, Path("/home/u/.cache"), [Path("/lustre/x")], MOUNTS)


def test_the_cache_of_each_mount_is_private_and_its_own(tmp_path: Path) -> None:
    where = Location(tmp_path / "cache")
    first = location.prepare(where, Path("/m/a"))
    assert first != location.prepare(where, Path("/m/b"))
    assert first == location.prepare(where, Path("/m/a"))
    for made in (first, first.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_directory_that_the_user_made_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    made = location.prepare(Location(tmp_path), Path("/m/a"))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="file is no directory"):
        location.check(tmp_path / "file" / "cache")


def test_a_foreign_or_unwritable_directory_is_refused(tmp_path: Path) -> None:
    if os.getuid() == 0:
        os.chown(tmp_path, 12345, 12345)
        foreign, unwritable = tmp_path, Path("/proc/sys")
    else:
        foreign, unwritable = Path("/usr"), Path("/usr")
    with pytest.raises(SetupError, match="belongs to user"):
        location.check(foreign)
    with pytest.raises(SetupError, match=r"can't be used|can't be made|read-only|cannot make"):
        location.prepare(Location(unwritable / "cache"), Path("/m/a"))


def test_places_of_this_machine_are_ours_and_tmpdir_comes_first(tmp_path: Path) -> None:
    places = location.local_places({"TMPDIR": str(tmp_path)})
    assert places[0] == tmp_path.resolve() / f"hpcfs-{os.getuid()}"
    assert all(str(os.getuid()) in str(place) for place in places)
    assert paths.shared_tmp_dir() / "cache" in places
    found = location.locate(None, {"XDG_CACHE_HOME": str(tmp_path)})
    assert found == Location(tmp_path.resolve() / "hpcfs")
