"""Extended attributes through the kernel: setfattr, getfattr, cp and rsync."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.mount.conftest import Servers, WorkTree
from tests.support.mounts import RealHome, errno_of, in_write_mode, mounted, run

NAMES = {"user.colour": b"red", "user.bytes": bytes(range(256)), "user.empty": b""}


def set_all(path: Path) -> None:
    for name, value in NAMES.items():
        run("setfattr", "-n", name, "-v", f"0x{value.hex()}", path)


def all_of(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path)}


def test_setfattr_and_getfattr(s3_tree: WorkTree) -> None:
    file, folder = s3_tree.path / "file", s3_tree.path / "folder"
    file.write_bytes(b"content")
    folder.mkdir()
    for path in (file, folder):
        set_all(path)
        assert all_of(path) == NAMES
        shown = run("getfattr", "--absolute-names", "-d", path)
        assert 'user.colour="red"' in shown
        run("setfattr", "-x", "user.empty", path)
        assert set(os.listxattr(path)) == NAMES.keys() - {"user.empty"}
    file.chmod(0o600)
    file.write_bytes(b"other content")
    os.rename(file, s3_tree.path / "renamed")
    assert os.getxattr(s3_tree.path / "renamed", "user.colour") == b"red"
    assert (s3_tree.path / "renamed").read_bytes() == b"other content"


def test_names_without_a_namespace_are_kept_as_s3fs_keeps_them(s3_tree: WorkTree) -> None:
    file = s3_tree.path / "file"
    file.write_bytes(b"content")
    run("setfattr", "-n", "key", "-v", "value", file)
    run("setfattr", "-n", "another", "-v", "value", file)
    run("setfattr", "-x", "another", file)
    assert all_of(file) == {"key": b"value"}


def test_the_errors_that_programs_expect(s3_tree: WorkTree) -> None:
    file = s3_tree.path / "file"
    file.touch()
    create, replace = os.XATTR_CREATE, os.XATTR_REPLACE
    assert errno_of(os.getxattr, file, "user.a") == errno.ENODATA
    assert errno_of(os.removexattr, file, "user.a") == errno.ENODATA
    assert errno_of(os.setxattr, file, "user.a", b"1", replace) == errno.ENODATA
    assert errno_of(os.setxattr, file, "user.a", b"1", create) is None
    assert errno_of(os.setxattr, file, "user.a", b"2", create) == errno.EEXIST
    assert errno_of(os.setxattr, file, "user.a", b"3", replace) is None
    assert os.getxattr(file, "user.a") == b"3"
    assert errno_of(os.setxattr, file, "user.b", bytes(4000)) == errno.ENOSPC
    assert errno_of(os.setxattr, file, "user.b", bytes(70_000)) == errno.E2BIG
    assert errno_of(os.setxattr, file, "user." + "n" * 251, b"") == errno.ERANGE
    assert errno_of(os.setxattr, file, "user.", b"") == errno.EINVAL
    for name in ("security.other", "trusted.other", "system.other"):
        assert errno_of(os.getxattr, file, name) == errno.ENOTSUP
        assert errno_of(os.setxattr, file, name, b"1") == errno.ENOTSUP
    assert os.listxattr(file) == ["user.a"]


def test_sftp_has_none_and_cp_does_not_mind(sftp_tree: WorkTree, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("content")
    os.setxattr(source, "user.colour", b"red")
    run("cp", "-a", source, sftp_tree.path / "copy")
    assert (sftp_tree.path / "copy").read_text() == "content"
    assert errno_of(os.listxattr, sftp_tree.path / "copy") == errno.ENOTSUP
    assert errno_of(os.setxattr, sftp_tree.path / "copy", "user.a", b"1") == errno.ENOTSUP


@pytest.mark.parametrize("mode", ["through", "back"])
@pytest.mark.parametrize("way", ["cp -a", "rsync -aX"])
def test_copies_bring_them_and_a_new_mount_has_them(
    way: str, mode: str, servers: Servers, real_home: RealHome, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    (source / "folder").mkdir(parents=True)
    for path in (source / "file", source / "folder" / "large"):
        path.write_bytes(os.urandom(100_000))
    for path in (source / "file", source / "folder", source / "folder" / "large"):
        set_all(path)
    served = in_write_mode(servers.serve("s3-moto"), mode)
    with mounted(real_home, {"ns": served}) as mount:
        target = mount.path / "ns" / "tree"
        run(*way.split(), f"{source}/", target)
        for path in ("file", "folder", "folder/large"):
            assert all_of(target / path) == NAMES
        mount.remount()
        for path in ("file", "folder", "folder/large"):
            assert all_of(target / path) == NAMES
        assert run("rsync", "-aiX", f"{source}/", target) == ""
        back = tmp_path / "back"
        run("cp", "-a", target, back)
        assert all_of(back / "folder" / "large") == NAMES
        assert (back / "folder" / "large").read_bytes() == (source / "folder/large").read_bytes()
