"""Where files go, and that nobody else's place is trusted."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hpcfs.model.errors import SetupError
from hpcfs.system import paths


def test_xdg_variables_are_followed_and_relative_ones_ignored() -> None:
    assert paths.config_file({"XDG_CONFIG_HOME": "/x/c"}) == Path("/x/c/hpcfs/config.toml")
    environ = {"HOME": "/home/u", "XDG_CONFIG_HOME": "relative", "XDG_STATE_HOME": ""}
    assert paths.config_file(environ) == Path("/home/u/.config/hpcfs/config.toml")
    assert paths.state_dir(environ) == Path("/home/u/.local/state/hpcfs")
    assert paths.default_cache_dir(environ) == Path("/home/u/.cache/hpcfs")


def test_mount_ids_are_readable_unique_and_safe_as_file_names() -> None:
    first = paths.mount_id(Path("/home/u/cluster"))
    assert first.startswith("cluster-")
    assert first != paths.mount_id(Path("/home/v/cluster"))
    assert first == paths.mount_id(Path("/home/u/cluster"))
    for odd in ("/a/ü b\n", "/", "/a/..x", "/" + "y" * 255):
        assert "/" not in paths.mount_id(Path(odd))
        assert paths.mount_id(Path(odd)).isascii()
        assert len(paths.mount_id(Path(odd))) < 60
    assert paths.mount_id(Path("/a/.x"))[0] != "."


def test_a_socket_path_always_fits(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    for runtime in (tmp_path, deep):
        found = paths.socket_path(Path("/m/" + "n" * 200), {"XDG_RUNTIME_DIR": str(runtime)})
        assert len(os.fsencode(found)) <= paths.MAX_SOCKET_PATH_BYTES
    assert found.parent == paths.shared_tmp_dir()
    assert paths.find_socket(Path("/m/" + "n" * 200), {"XDG_RUNTIME_DIR": str(deep)}) == found


def test_a_runtime_directory_that_is_not_ours_is_left_aside(tmp_path: Path) -> None:
    assert paths.runtime_dirs({"XDG_RUNTIME_DIR": str(tmp_path)})[0] == tmp_path / "hpcfs"
    without = paths.runtime_dirs({})
    assert paths.runtime_dirs({"XDG_RUNTIME_DIR": str(tmp_path / "gone")}) == without
    foreign = "/proc/1" if os.getuid() else _given_away(tmp_path / "foreign")
    assert paths.runtime_dirs({"XDG_RUNTIME_DIR": foreign}) == without
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    assert paths.runtime_dirs({"XDG_RUNTIME_DIR": str(open_to_all)}) == without


def test_the_runtime_directory_is_found_without_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "RUN_USER", tmp_path)
    own = tmp_path / str(os.getuid())
    own.mkdir(mode=0o700)
    assert paths.runtime_dirs({})[0] == own / "hpcfs"
    assert paths.runtime_dirs({"XDG_RUNTIME_DIR": str(own)})[0] == own / "hpcfs"


def _given_away(directory: Path) -> str:
    directory.mkdir()
    os.chown(directory, 12345, 12345)
    return str(directory)


def test_the_socket_is_found_where_it_is(tmp_path: Path) -> None:
    mountpoint = Path("/m/cluster")
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert paths.find_socket(mountpoint, environ) == paths.socket_path(mountpoint, environ)


def test_private_directories_are_made_and_tightened(tmp_path: Path) -> None:
    made = paths.make_private(tmp_path / "a" / "b")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    made.chmod(0o755)
    paths.make_private(made)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_links_files_and_foreign_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(SetupError, match="symbolic link"):
        paths.make_private(tmp_path / "link")
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="in the way"):
        paths.make_private(tmp_path / "file")
    foreign = Path("/usr") if os.getuid() else Path(_given_away(tmp_path / "foreign"))
    with pytest.raises(SetupError, match="belongs to user"):
        paths.make_private(foreign)


def test_the_mount_point_itself_is_never_followed(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "parent").symlink_to(real)
    (real / "mnt").symlink_to("/nowhere")
    assert paths.absolute_mountpoint(tmp_path / "parent" / "mnt") == real / "mnt"
    assert paths.absolute_mountpoint("~/x") == Path(os.path.realpath(Path.home())) / "x"
