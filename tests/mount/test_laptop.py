"""A laptop's shares in a real mount."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hpcfs.laptop.shares import Share
from tests.support.laptop import NAME, laptop
from tests.support.mounts import OnDisk, Served, errno_of, make_real_home, mounted, run


@pytest.mark.parametrize("write", ["through", "back"])
def test_mv_between_shares_copies(tmp_path: Path, write: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    deep = tmp_path / "one" / "tree" / "deep"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(bytes(300_000))
    os.utime(deep / "file", (1_000_000_000, 1_000_000_000))
    (deep / "link").symlink_to("file")
    home = make_real_home(tmp_path / "home")
    shares = (Share("one", tmp_path / "one"), Share("two", tmp_path / "two"))
    keys: dict[str, str | bool | float] = {"type": "tunnel", "tunnel": NAME, "write": write}
    served = Served("tunnel", keys, OnDisk(tmp_path))
    with laptop(home.path, *shares), mounted(home, {"lap": served}) as mount:
        one, two = mount.path / "lap" / "one", mount.path / "lap" / "two"
        assert errno_of(os.rename, one / "tree", two / "tree") == errno.EXDEV
        assert errno_of(os.link, one / "tree" / "deep" / "file", two / "file") == errno.EXDEV
        (one / "tree" / "new").write_bytes(b"written a moment ago")
        run("mv", one / "tree", two)
        assert os.listdir(one) == []
        assert (two / "tree" / "deep" / "file").read_bytes() == bytes(300_000)
    moved = tmp_path / "two" / "tree"
    assert os.listdir(tmp_path / "one") == []
    assert (moved / "new").read_bytes() == b"written a moment ago"
    assert (moved / "deep" / "file").read_bytes() == bytes(300_000)
    assert (moved / "deep" / "file").stat().st_mtime == 1_000_000_000
    assert os.readlink(moved / "deep" / "link") == "file"
