"""What another user may have written: configurations, and places for temporary files and copies."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcfs.config import config, rclone_conf
from hpcfs.daemon.write_commands import make_target
from hpcfs.model.errors import SetupError, WrongSettings
from hpcfs.model.sites import SshSite
from hpcfs.remotes.ssh import options
from hpcfs.system import ownership, paths, temporary
from tests.policy.test_other_users import OTHER, base, shared_tmp

__all__ = ["base", "shared_tmp"]


def _theirs(file: Path) -> None:
    os.chown(file, OTHER, OTHER)


def _for_all(file: Path) -> None:
    file.chmod(0o666)


def _for_a_group(file: Path) -> None:
    os.chown(file, -1, OTHER)
    file.chmod(0o664)


Open = Callable[[Path], None]
STRICT: dict[str, Open] = {"theirs": _theirs, "for all": _for_all, "for a group": _for_a_group}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "RCLONE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o644)
    return file


@pytest.mark.parametrize("open_it", STRICT.values(), ids=STRICT)
def test_a_configuration_that_others_may_write_is_refused(home: Path, open_it: Open) -> None:
    file = _write(paths.config_file(), '[namespaces.n]\ntype = "sftp"\nhost = "h"\n')
    assert config.load(None).namespaces
    open_it(file)
    with pytest.raises(SetupError, match="may be somebody else's word"):
        config.load(None)


def test_a_colleague_s_configuration_is_named_and_then_read(home: Path) -> None:
    file = _write(home / "shared.toml", '[namespaces.n]\ntype = "sftp"\nhost = "h"\n')
    _theirs(file)
    assert config.load(file).namespaces
    _for_all(file)
    with pytest.raises(SetupError, match="all users may write to it, mode 0666"):
        config.load(file)


def test_a_configuration_has_an_end(home: Path) -> None:
    with pytest.raises(SetupError, match="does not end"):
        config.load(Path("/dev/zero"))


def test_one_that_another_program_writes_is_read(home: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b'[namespaces.n]\ntype = "sftp"\nhost = "h"\n')
    os.close(writer)
    assert config.load(Path(f"/dev/fd/{reader}")).namespaces
    os.close(reader)


@pytest.mark.parametrize("open_it", STRICT.values(), ids=STRICT)
def test_an_rclone_conf_that_others_may_write_is_refused(home: Path, open_it: Open) -> None:
    file = _write(home / ".config" / "rclone" / "rclone.conf", "[r]\ntype = s3\n")
    assert rclone_conf.load()
    open_it(file)
    with pytest.raises(SetupError, match="may be somebody else's word"):
        rclone_conf.load()


@pytest.mark.slow
@pytest.mark.parametrize("has_ssh", [True, False], ids=["ssh", "no ssh"])
@pytest.mark.parametrize("open_it", STRICT.values(), ids=STRICT)
@pytest.mark.parametrize("way", ["named", "included", "default"])
def test_an_ssh_config_that_others_may_write_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, way: str, open_it: Open, has_ssh: bool
) -> None:
    """As ssh refuses ~/.ssh/config: each of its lines may be a command."""
    if not has_ssh:
        monkeypatch.setattr("shutil.which", lambda name: None)
    file = _write(home / ".ssh" / "config", "Host h\n  User u\n")
    site = SshSite("h", ssh_config=str(file) if way == "named" else None)
    if way == "included":
        file = _write(home / "more", "Host h\n  User v\n")
        _write(home / ".ssh" / "config", f"Include {file}\n")
    found = asyncio.run(options.read(site))
    assert found.one("user") == ("v" if way == "included" else "u")
    open_it(file)
    with pytest.raises(WrongSettings, match=r"somebody else's word|Bad owner or permissions"):
        asyncio.run(options.read(site))


# --- places ---------------------------------------------------------------------------------------


def _open(directory: Path, mode: int, owner: int = 0) -> Path:
    directory.mkdir()
    os.chown(directory, owner, owner)
    directory.chmod(mode)
    return directory


@pytest.mark.parametrize(("mode", "owner"), [(0o777, 0), (0o777, OTHER), (0o1777, OTHER)])
def test_temporary_directories_are_where_nobody_exchanges_them(
    shared_tmp: Path, base: Path, monkeypatch: pytest.MonkeyPatch, mode: int, owner: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(_open(base / "open", mode, owner)))
    with temporary.directory("hpcfs-test-") as made:
        assert made.parent == shared_tmp
    shared_tmp.chmod(0o777)
    with pytest.raises(SetupError, match="set TMPDIR to a directory of your own"):
        temporary.make("hpcfs-test-")


def test_a_sticky_tmpdir_of_the_administrator_is_used(
    shared_tmp: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(_open(base / "scratch", 0o1777)))
    with temporary.directory("hpcfs-test-") as made:
        assert made.parent == base / "scratch"


def test_copies_go_where_nobody_puts_a_link_in_their_place(base: Path) -> None:
    """Between its making and its writing, another user made the file a link to ~/.ssh/…"""
    target = _open(base / "open", 0o777)
    with pytest.raises(SetupError, match="not safe from others"):
        make_target(target, "ns", b"authorized_keys")
    _open(base / "sticky", 0o1777)
    _open(base / "sticky" / "to", 0o755, OTHER)
    with pytest.raises(SetupError, match="not safe from others"):
        make_target(base / "sticky" / "to", "ns", b"f")
    assert make_target(base / "sticky" / "mine", "ns", b"f").exists()


def test_a_sticky_directory_is_as_safe_as_its_owner(base: Path) -> None:
    assert ownership.unsafe_reason(_open(base / "root-s", 0o1777) / "mine") is None
    assert ownership.unsafe_reason(_open(base / "their-s", 0o1777, OTHER) / "mine")
