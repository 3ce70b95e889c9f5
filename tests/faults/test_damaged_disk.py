"""Files of the cache directory are damaged, under a mount and between two: what users see of it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.faults.conftest import Linked
from tests.support.damage import damage
from tests.support.mounts import Mount, RealHome, errno_of, mounted, run, until

Starts = Callable[[str], Linked]
MIB = 1 << 20
FILES = 60


def _errors(mount: Mount, contents: dict[str, bytes]) -> int:
    """How many files can't be read; those that can have the right bytes."""
    errors = 0
    for name, data in contents.items():
        path = mount.path / "ns" / name
        if errno_of(path.read_bytes) is not None:
            errors += 1
        else:
            assert path.read_bytes() == data
    return errors


def test_sixty_files_and_a_damaged_index(linked: Starts, real_home: RealHome) -> None:
    far = linked("sftp")
    contents = {f"f{n}": random.Random(n).randbytes(100_000 + n) for n in range(FILES)}
    for name, data in contents.items():
        far.served.inside.write(name, data)
    with mounted(real_home, {"ns": far.served}, expected=["index was unusable"]) as mount:
        cache = Path(mount.status.cache_dir)
        assert _errors(mount, contents) == 0
        until(lambda: (cache / "index.db-wal").stat().st_size > 32 * 1024)
        for one in ("index.db", "index.db-wal"):
            for how in (("zero", 0.1, 0.0), ("garbage", 0.6, 0.0), ("cut", 0.7, 0.0)):
                damage(cache / one, how)
        for name in contents:
            far.served.inside.write(name, contents[name])  # so the daemon has to look again
        assert _errors(mount, contents) == 0
        mount.umount()
        (cache / "index.db").write_bytes(b"no database" * 1000)
        mount.mount()
        assert _errors(mount, contents) == 0
        assert (cache / "index.db.damaged").exists()
        assert mount.log.count("index was unusable") <= 2
        assert any("index was unusable" in one for one in mount.status.troubles)
        assert "trouble: the cache's index" in real_home.run("status", mount.path).stdout


def test_damaged_bytes_and_a_damaged_journal(linked: Starts, real_home: RealHome) -> None:
    """Eight files were closed; none vanishes without a word, and none is uploaded wrong."""
    far = linked("sftp")
    contents = {f"f{n}": random.Random(n).randbytes(200_000 + n) for n in range(8)}
    options = ("--write", "back", "--patience", "2")
    with mounted(real_home, {"ns": far.served}, *options, expected=["."]) as mount:
        assert os.listdir(mount.path / "ns") == []
        far.link.cut()
        for name, data in contents.items():
            (mount.path / "ns" / name).write_bytes(data)
        cache = Path(mount.status.cache_dir)
        mount.kill_daemon()
        far.link.mend()
        saved = mount.home.path / "saved"
        run("cp", "-a", cache, saved)
        (first,) = (p for p in (cache / "pending").iterdir() if p.read_bytes() == contents["f3"])
        damage(first, ("flip", 0.5, 0.5))
        mount.mount(*options)
        done = real_home.run("sync", mount.path)
        assert done.returncode == 1
        assert "f3 is not uploaded: 1 of its blocks were damaged" in done.stderr
        inside = far.served.inside
        assert {n for n in contents if errno_of(inside.read, n) is None} == contents.keys() - {"f3"}
        for name in contents.keys() - {"f3"}:
            assert inside.read(name) == contents[name]
            inside.remove(name)
        mount.umount()
        shutil.rmtree(cache)
        saved.rename(cache)
        for one in cache.glob("journal.db*"):
            one.write_bytes(bytes(5000))
        mount.mount(*options)
        kept = {one.path: Path(one.data).read_bytes() for one in mount.kept}
        assert kept == contents
        assert real_home.run("sync", mount.path).returncode == 1
        assert real_home.run("retry", mount.path).returncode == 0
        assert real_home.run("sync", mount.path).returncode == 0
        assert {name: inside.read(name) for name in contents} == contents
