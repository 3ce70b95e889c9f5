"""What programs ask of files, over every kind of remote and through the kernel.

Each result is compared with what the server itself has.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mount.conftest import WorkTree
from tests.support.mounts import errno_of, run, until

KIB, MIB = 1 << 10, 1 << 20


# --- reading --------------------------------------------------------------------------------------


def test_random_reads_match_the_original(tree: WorkTree) -> None:
    rnd = random.Random(1)
    data = rnd.randbytes(6 * MIB + 12345)
    tree.write_on_server("data", data)
    with (tree.path / "data").open("rb", buffering=0) as file:
        for _ in range(300):
            offset, length = rnd.randrange(len(data) + 1000), rnd.randrange(1, 400_000)
            assert os.pread(file.fileno(), length, offset) == data[offset : offset + length]
    assert (tree.path / "data").read_bytes() == data


def test_mmap_reads(tree: WorkTree) -> None:
    data = random.Random(2).randbytes(MIB + 777)
    tree.write_on_server("data", data)
    with (
        (tree.path / "data").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
    ):
        assert view[300_000:300_100] == data[300_000:300_100]
        assert view[:] == data


def test_what_others_wrote_is_seen_at_the_next_open(tree: WorkTree) -> None:
    tree.write_on_server("file", b"first")
    assert (tree.path / "file").read_bytes() == b"first"
    tree.write_on_server("file", b"the second")
    until(lambda: (tree.path / "file").read_bytes() == b"the second", 5)


def test_what_others_removed_goes(tree: WorkTree) -> None:
    tree.write_on_server("file", b"")
    assert (tree.path / "file").exists()
    tree.remove_on_server("file")
    until(lambda: not (tree.path / "file").exists(), 5)
    assert os.listdir(tree.path) == []


# --- writing --------------------------------------------------------------------------------------


def test_close_returns_when_the_server_has_the_bytes(tree: WorkTree) -> None:
    data = random.Random(3).randbytes(3 * MIB + 1)
    (tree.path / "file").write_bytes(data)
    assert tree.on_server("file") == data
    (tree.path / "empty").touch()
    assert tree.on_server("empty") == b""


def test_fsync_returns_when_the_server_has_the_bytes(tree: WorkTree) -> None:
    with (tree.path / "file").open("wb", buffering=0) as file:
        file.write(b"one")
        os.fsync(file.fileno())
        assert tree.on_server("file") == b"one"
        file.write(b" two")
        assert (tree.path / "file").read_bytes() == b"one two"
    assert tree.on_server("file") == b"one two"


def test_overwrite_in_the_middle(tree: WorkTree) -> None:
    data = bytearray(random.Random(4).randbytes(2 * MIB))
    tree.write_on_server("file", data)
    with (tree.path / "file").open("r+b", buffering=0) as file:
        for offset in (0, 262_140, 1_000_000, 2 * MIB - 3):
            file.seek(offset)
            file.write(b"changed")
            data[offset : offset + 7] = b"changed"
    assert tree.on_server("file") == data
    assert (tree.path / "file").read_bytes() == data


def test_random_writes_and_truncations_match_a_local_file(tree: WorkTree, tmp_path: Path) -> None:
    rnd = random.Random(5)
    paths = [tree.path / "file", tmp_path / "model"]
    for path in paths:
        path.write_bytes(b"")
    for _ in range(8):
        steps = [
            (rnd.random(), rnd.randrange(900_000), rnd.randrange(1, 300_000)) for _ in range(5)
        ]
        for path in paths:
            _apply(path, steps)
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert tree.on_server("file") == paths[1].read_bytes()


def _apply(path: Path, steps: list[tuple[float, int, int]]) -> None:
    with path.open("r+b", buffering=0) as file:
        for choice, offset, length in steps:
            if choice < 0.3:
                file.truncate(offset)
            else:
                os.pwrite(file.fileno(), random.Random(offset).randbytes(length), offset)


@pytest.mark.parametrize("size", [0, 1, 262_144, 700_000, 3_000_000])
def test_truncate(tree: WorkTree, size: int) -> None:
    data = random.Random(6).randbytes(MIB)
    tree.write_on_server("file", data)
    os.truncate(tree.path / "file", size)
    wanted = data[:size].ljust(size, b"\0")
    assert tree.on_server("file") == wanted
    assert (tree.path / "file").read_bytes() == wanted


def test_a_hole_reads_as_zeros(tree: WorkTree) -> None:
    with (tree.path / "file").open("wb") as file:
        file.seek(MIB)
        file.write(b"end")
    assert (tree.path / "file").read_bytes() == bytes(MIB) + b"end"
    assert tree.on_server("file") == bytes(MIB) + b"end"


def test_two_processes_append_in_turn(tree: WorkTree) -> None:
    for number in range(6):
        shell = f"echo line {number} >> log"
        run("sh", "-c", shell, cwd=tree.path)
    wanted = "".join(f"line {number}\n" for number in range(6))
    assert (tree.path / "log").read_text() == wanted
    assert tree.on_server("log").decode() == wanted


def test_two_handles_append_in_turn(tree: WorkTree) -> None:
    with (tree.path / "log").open("ab", 0) as one, (tree.path / "log").open("ab", 0) as other:
        for number in range(4):
            (one if number % 2 else other).write(b"%d\n" % number)
    assert tree.on_server("log") == b"0\n1\n2\n3\n"


def test_shared_mmap_writes(tree: WorkTree) -> None:
    data = bytearray(random.Random(7).randbytes(MIB))
    tree.write_on_server("file", data)
    with (tree.path / "file").open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[500_000:500_005] = b"mmap!"
        data[500_000:500_005] = b"mmap!"
        view.flush()
    assert (tree.path / "file").read_bytes() == data
    assert tree.on_server("file") == data


# --- names ----------------------------------------------------------------------------------------


def test_exclusive_creation(tree: WorkTree) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    os.close(os.open(tree.path / "lock", flags))
    assert errno_of(os.open, tree.path / "lock", flags) == errno.EEXIST
    tree.write_on_server("theirs", b"x")
    assert errno_of(os.open, tree.path / "theirs", flags) == errno.EEXIST
    assert tree.on_server("theirs") == b"x"


def test_nothing_comes_back_after_a_truncation_by_name(tree: WorkTree) -> None:
    """Within one second a file over SFTP can have a version that it had before."""
    path = tree.path / "file"
    data = random.Random(3).randbytes(200_000)
    for _ in range(3):
        path.write_bytes(data)
        assert path.read_bytes() == data
        os.truncate(path, 1000)
        os.truncate(path, 200_000)
        assert path.read_bytes() == data[:1000] + bytes(199_000)


def test_rename_replaces_a_file(tree: WorkTree) -> None:
    (tree.path / "old").write_bytes(b"old")
    (tree.path / "new").write_bytes(b"new")
    with (tree.path / "old").open("rb") as reader:
        os.rename(tree.path / "new", tree.path / "old")
        assert reader.read() == b"old"
    assert os.listdir(tree.path) == ["old"]
    assert (tree.path / "old").read_bytes() == tree.on_server("old") == b"new"


def test_rename_of_a_directory_with_all_in_it(tree: WorkTree) -> None:
    os.makedirs(tree.path / "a" / "deep" / "er")
    (tree.path / "a" / "deep" / "file").write_bytes(b"content")
    (tree.path / "b").mkdir()
    with (tree.path / "a" / "deep" / "file").open("r+b") as file:
        os.rename(tree.path / "a" / "deep", tree.path / "b" / "moved")
        file.write(b"CON")
    assert tree.on_server("b/moved/file") == b"CONtent"
    assert (tree.path / "b" / "moved" / "er").is_dir()
    assert os.listdir(tree.path / "a") == []
    assert errno_of(os.rename, tree.path / "a", tree.path / "b") == errno.ENOTEMPTY
    assert errno_of(os.rename, tree.path / "a", tree.path / "a" / "in") == errno.EINVAL


def test_directories_come_and_go(tree: WorkTree) -> None:
    (tree.path / "d").mkdir()
    assert errno_of(os.mkdir, tree.path / "d") == errno.EEXIST
    (tree.path / "d" / "f").touch()
    assert errno_of(os.rmdir, tree.path / "d") == errno.ENOTEMPTY
    assert errno_of(os.unlink, tree.path / "d") in (errno.EISDIR, errno.EPERM)
    assert errno_of(os.rmdir, tree.path / "d" / "f") == errno.ENOTDIR
    os.unlink(tree.path / "d" / "f")
    assert os.listdir(tree.path / "d") == []
    os.rmdir(tree.path / "d")
    assert errno_of(os.stat, tree.path / "d") == errno.ENOENT


def test_symbolic_links(tree: WorkTree) -> None:
    (tree.path / "file").write_bytes(b"content")
    (tree.path / "link").symlink_to("file")
    (tree.path / "dangling").symlink_to("/no/where ü")
    assert (tree.path / "link").read_bytes() == b"content"
    assert os.readlink(tree.path / "dangling") == "/no/where ü"
    assert errno_of(os.stat, tree.path / "dangling") == errno.ENOENT
    os.unlink(tree.path / "link")
    assert (tree.path / "file").read_bytes() == b"content"


@pytest.mark.parametrize(
    "name",
    [b"-rf", b"%2F%", b"a\\b", b"tab\t", b" ", "ü\u0301😀".encode(), b"#?&=+", b"x" * 255, b"..."],
    ids=repr,
)
def test_odd_names(tree: WorkTree, name: bytes) -> None:
    path = os.fsencode(tree.path) + b"/" + name
    with open(path, "wb") as file:
        file.write(b"content")
    assert os.listdir(os.fsencode(tree.path)) == [name]
    assert tree.on_server(name.decode()) == b"content"
    os.rename(path, os.fsencode(tree.path / "plain"))
    os.rename(tree.path / "plain", path)
    with open(path, "rb") as file:
        assert file.read() == b"content"


def test_a_name_of_256_bytes_is_refused(tree: WorkTree) -> None:
    assert errno_of((tree.path / ("x" * 256)).touch) == errno.ENAMETOOLONG


def test_latin_1_names_on_the_cluster(sftp_tree: WorkTree) -> None:
    top = os.fsencode(sftp_tree.path)
    served = os.fsencode(sftp_tree.mount.namespaces["sftp"].keys["path"])  # type: ignore[arg-type]
    name = "Grüße".encode("latin-1")
    on_disk = served + b"/" + os.fsencode(sftp_tree.name) + b"/" + name
    with open(on_disk, "wb") as file:
        file.write(b"theirs")
    until(lambda: os.listdir(top) == [name], 5)
    with open(top + b"/" + name, "r+b") as file:
        assert file.read() == b"theirs"
        file.write(b" and ours")
    with open(on_disk, "rb") as file:
        assert file.read() == b"theirs and ours"


def test_latin_1_names_are_refused_by_s3(s3_tree: WorkTree) -> None:
    path = os.fsencode(s3_tree.path) + "/Grüße".encode("latin-1")
    s3_tree.mount.expected.append("UTF-8")
    assert errno_of(open, path, "wb") == errno.EILSEQ


# --- attributes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o755, 0o444, 0o640])
def test_modes_are_kept(tree: WorkTree, mode: int) -> None:
    (tree.path / "file").write_bytes(b"content")
    (tree.path / "file").chmod(mode)
    assert stat.S_IMODE((tree.path / "file").stat().st_mode) == mode
    (tree.path / "d").mkdir()
    (tree.path / "d").chmod(mode | 0o700)
    assert stat.S_IMODE((tree.path / "d").stat().st_mode) == mode | 0o700


def test_the_umask_and_the_mode_of_creation_count(tree: WorkTree) -> None:
    before = os.umask(0o027)
    try:
        os.close(os.open(tree.path / "file", os.O_CREAT | os.O_WRONLY, 0o777))
        os.mkdir(tree.path / "d", 0o777)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tree.path / "file").stat().st_mode) == 0o750
    assert stat.S_IMODE((tree.path / "d").stat().st_mode) == 0o750


def test_times_are_kept(tree: WorkTree) -> None:
    (tree.path / "file").write_bytes(b"content")
    time_ns = 1_234_567_890_123_456_789
    os.utime(tree.path / "file", ns=(time_ns, time_ns))
    shown = (tree.path / "file").stat().st_mtime_ns
    assert shown == (time_ns if tree.is_s3 else time_ns // 10**9 * 10**9)
    assert tree.on_server("file") == b"content"
    os.utime(tree.path / "file")
    assert (tree.path / "file").stat().st_mtime_ns > time_ns


def test_times_set_while_the_file_is_open_are_kept(tree: WorkTree) -> None:
    with (tree.path / "file").open("wb") as file:
        file.write(b"content")
        file.flush()
        os.utime(file.fileno(), (1e9, 1e9))
        os.fchmod(file.fileno(), 0o640)
    found = (tree.path / "file").stat()
    assert (found.st_mtime, stat.S_IMODE(found.st_mode)) == (1e9, 0o640)


def test_what_is_ours_is_shown_as_ours(tree: WorkTree) -> None:
    (tree.path / "file").touch()
    tree.write_on_server("theirs", b"")
    for name in (".", "file", "theirs"):
        found = (tree.path / name).stat()
        assert (found.st_uid, found.st_gid) == (os.getuid(), os.getgid())


# --- what one kind can't do -----------------------------------------------------------------------


def test_hard_links_on_the_cluster(sftp_tree: WorkTree) -> None:
    (sftp_tree.path / "one").write_bytes(b"content")
    os.link(sftp_tree.path / "one", sftp_tree.path / "two")
    assert sftp_tree.on_server("two") == b"content"
    with (sftp_tree.path / "two").open("ab") as file:
        file.write(b" more")
    until(lambda: (sftp_tree.path / "one").read_bytes() == b"content more", 5)


def test_hard_links_on_s3(s3_tree: WorkTree) -> None:
    (s3_tree.path / "one").touch()
    assert errno_of(os.link, s3_tree.path / "one", s3_tree.path / "two") == errno.EPERM
    assert os.listdir(s3_tree.path) == ["one"]


def test_nothing_but_files_directories_and_links(tree: WorkTree) -> None:
    assert errno_of(os.mkfifo, tree.path / "fifo") == errno.EPERM
    assert os.listdir(tree.path) == []


# --- files without a name -------------------------------------------------------------------------


def test_an_unlinked_open_file_lives_on(tree: WorkTree) -> None:
    with (tree.path / "file").open("w+b") as file:
        os.unlink(tree.path / "file")
        file.write(b"x" * 300_000)
        file.flush()
        file.seek(0)
        assert file.read() == b"x" * 300_000
        assert os.fstat(file.fileno()).st_size == 300_000
        assert os.listdir(tree.path) == []
    assert not tree.inside.exists(f"{tree.name}/file")


def test_pythons_temporary_files(tree: WorkTree) -> None:
    with tempfile.TemporaryFile(dir=tree.path) as file:
        file.write(b"content")
        file.seek(0)
        assert file.read() == b"content"
    with tempfile.NamedTemporaryFile(dir=tree.path) as named:
        named.write(b"content")
        named.flush()
        assert Path(named.name).read_bytes() == b"content"
    with tempfile.TemporaryDirectory(dir=tree.path) as directory:
        (Path(directory) / "file").touch()
    assert os.listdir(tree.path) == []


def test_many_files_open_at_once(tree: WorkTree) -> None:
    files = [(tree.path / f"f{number}").open("w+b") for number in range(40)]
    for number, file in enumerate(files):
        file.write(b"%d" % number)
    for file in files:
        file.close()
    found = {path.name: path.read_bytes() for path in tree.path.iterdir()}
    assert found == {f"f{number}": b"%d" % number for number in range(40)}


def test_eight_at_once_write_read_rename_and_remove(tree: WorkTree) -> None:
    def work(worker: int) -> None:
        rnd = random.Random(worker)
        for number in range(4):
            path = tree.path / f"w{worker}-{number}"
            data = rnd.randbytes(rnd.randrange(400_000))
            path.write_bytes(data)
            path = path.rename(tree.path / f"renamed-{worker}-{number}")
            assert path.read_bytes() == data
            if number % 2:
                path.unlink()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert sorted(os.listdir(tree.path)) == sorted(
        f"renamed-{worker}-{number}" for worker in range(8) for number in (0, 2)
    )


def test_another_process_sees_it_at_once(tree: WorkTree) -> None:
    (tree.path / "file").write_bytes(b"content")
    code = f"import pathlib; print(pathlib.Path({str(tree.path / 'file')!r}).read_text())"
    assert run(sys.executable, "-c", code) == "content\n"
