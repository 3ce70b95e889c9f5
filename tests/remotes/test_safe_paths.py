"""Names in a shared folder: none leads out of it, whatever is moved and linked meanwhile."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from hpcfs.laptop.safe_paths import MAX_LINKS, SharedFolder

SECRET = b"what nobody may see"
GOOD = b"what everybody may see"
RACES = 3000


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A folder with a file, in a directory with a secret."""
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(SECRET)
    found = tmp_path / "top"
    (found / "dir" / "sub").mkdir(parents=True)
    (found / "file").write_bytes(GOOD)
    (found / "dir" / "file").write_bytes(GOOD)
    return found


@pytest.fixture
def folder(top: Path) -> Iterator[SharedFolder]:
    found = SharedFolder(top)
    yield found
    found.close()


def read(folder: SharedFolder, path: str | bytes) -> bytes:
    with folder.entry(os.fsencode(path).split(b"/"), follow=True) as entry:
        descriptor = entry.open(os.O_RDONLY)
        try:
            return os.read(descriptor, 100)
        finally:
            os.close(descriptor)


def refusal(folder: SharedFolder, path: str | bytes) -> int | None:
    with pytest.raises(OSError, match=r".") as refused:
        read(folder, path)
    return refused.value.errno


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "path",
    ["file", "./file", "dir/../file", "dir//file", "dir/sub/../../file", "dir/./sub/../file"],
)
def test_names_within(folder: SharedFolder, path: str) -> None:
    assert read(folder, path) == GOOD


@pytest.mark.parametrize(
    "path", ["../secret", "..", "dir/../../secret", "dir/../../top/file", "dir/sub/../../../secret"]
)
def test_dots_do_not_lead_out(folder: SharedFolder, path: str) -> None:
    assert refusal(folder, path) == errno.EACCES


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("file", GOOD),
        ("dir/file", GOOD),
        ("dir/../file", GOOD),
        (".//dir/./file", GOOD),
        ("../secret", errno.EACCES),
        ("/etc/passwd", errno.EACCES),
        ("//etc/passwd", errno.EACCES),
        ("dir/../../secret", errno.EACCES),
        ("../top/file", errno.EACCES),
        ("missing", errno.ENOENT),
        ("file/", errno.ENOTDIR),
        ("file/x", errno.ENOTDIR),
        ("dir", errno.EISDIR),
        ("link", errno.ELOOP),
    ],
)
def test_where_a_link_leads(folder: SharedFolder, top: Path, target: str, expected: object) -> None:
    (top / "link").symlink_to(target)
    (top / "dir" / "link").symlink_to(f"../{target}" if not target.startswith("/") else target)
    for link in ("link", "dir/link", "dir/../link"):
        if isinstance(expected, bytes):
            assert read(folder, link) == expected
        else:
            assert refusal(folder, link) == expected


def test_the_top_by_an_absolute_link_is_outside_too(folder: SharedFolder, top: Path) -> None:
    (top / "link").symlink_to(top / "file")
    assert refusal(folder, "link") == errno.EACCES


def test_links_in_the_middle(folder: SharedFolder, top: Path) -> None:
    (top / "in").symlink_to("dir")
    (top / "dir" / "back").symlink_to("..")
    (top / "out").symlink_to("../outside")
    (top / "far").symlink_to("dir/back/dir/back/out")
    assert read(folder, "in/file") == GOOD
    assert read(folder, "in/back/in/back/file") == GOOD
    assert read(folder, "in/../file") == GOOD
    for path in ("out/file", "far/file", "in/back/out/file", "in/back/../secret"):
        assert refusal(folder, path) == errno.EACCES


def test_as_many_links_as_linux_follows(folder: SharedFolder, top: Path) -> None:
    (top / "l0").symlink_to("file")
    for number in range(1, MAX_LINKS + 1):
        (top / f"l{number}").symlink_to(f"l{number - 1}")
    assert read(folder, f"l{MAX_LINKS - 1}") == (top / f"l{MAX_LINKS - 1}").read_bytes() == GOOD
    assert refusal(folder, f"l{MAX_LINKS}") == errno.ELOOP
    with pytest.raises(OSError, match="Too many"):
        (top / f"l{MAX_LINKS}").read_bytes()


def test_links_that_grow_end(folder: SharedFolder, top: Path) -> None:
    (top / "grow").symlink_to("grow/grow")
    assert refusal(folder, "grow") == errno.ELOOP


def test_names_of_proc_lead_nowhere(tmp_path: Path) -> None:
    """The links there lead where no text says."""
    folder = SharedFolder(Path("/proc/self"))
    try:
        for path in ("root/etc/passwd", "cwd/x", "exe", "fd/0"):
            assert refusal(folder, path) in (errno.EACCES, errno.ENOENT, errno.ENOTDIR)
    finally:
        folder.close()


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_is_no_file_is_not_opened(folder: SharedFolder, top: Path, kind: str) -> None:
    place = top / "special"
    listening = socket.socket(socket.AF_UNIX)
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "socket":
        listening.bind(os.fspath(place))
    else:
        os.mknod(place, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    with listening:
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT, os.O_RDONLY | os.O_TRUNC):
            with (
                folder.entry([b"special"], follow=True) as entry,
                pytest.raises(OSError, match="denied"),
            ):
                entry.open(flags)


def test_who_waits_at_a_fifo_goes_on_waiting(folder: SharedFolder, top: Path) -> None:
    """Opening it without waiting would let a writer in, and then kill it with SIGPIPE."""
    os.mkfifo(top / "fifo")
    opened: list[int] = []
    writer = threading.Thread(target=lambda: opened.append(os.open(top / "fifo", os.O_WRONLY)))
    writer.start()
    for _ in range(1000):
        assert refusal(folder, "fifo") == errno.EACCES
    assert not opened
    reader = os.open(top / "fifo", os.O_RDONLY)
    writer.join()
    os.close(reader)
    os.close(opened[0])


def test_the_folder_stays_itself(folder: SharedFolder, top: Path, tmp_path: Path) -> None:
    """Renamed it is still what was shared; what takes its name was not."""
    top.rename(tmp_path / "renamed")
    top.symlink_to("outside")
    assert read(folder, "file") == GOOD
    top.unlink()
    (tmp_path / "renamed" / "file").unlink()
    assert refusal(folder, "file") == errno.ENOENT


def test_a_hard_link_is_a_file_of_the_folder(folder: SharedFolder, top: Path) -> None:
    os.link(top / "dir" / "file", top / "same")
    assert read(folder, "same") == GOOD


NAMES = st.sampled_from(
    ["..", ".", "", "dir", "sub", "file", "in", "out", "up", "abs", "loop", "missing", "\udcff"]
)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(NAMES, max_size=12))
def test_whatever_the_path(folder: SharedFolder, top: Path, parts: list[str]) -> None:
    """What is read is what the kernel reads there, and never from outside; nothing stays open."""
    if not os.path.lexists(top / "in"):
        (top / "in").symlink_to("dir/sub/..")
        (top / "out").symlink_to("../outside")
        (top / "up").symlink_to("..")
        (top / "abs").symlink_to("/")
        (top / "loop").symlink_to("loop")
        (top / "dir" / "up").symlink_to("..")
    before = open_descriptors()
    path = "/".join(parts)
    try:
        found = read(folder, path)
    except OSError:
        pass
    else:
        assert found == GOOD == (top / path.lstrip("/")).read_bytes()
    assert open_descriptors() == before


@contextmanager
def may_fail(*codes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise


@contextmanager
def swapping(change: Callable[[], None], back: Callable[[], None]) -> Iterator[threading.Event]:
    """Somebody who does the one and then the other, again and again."""
    ending = threading.Event()
    failed: list[BaseException] = []

    def swap() -> None:
        try:
            while not ending.is_set():
                change()
                back()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield ending
    finally:
        ending.set()
        thread.join()
    assert not failed


def test_a_directory_that_becomes_a_link_while_it_is_gone_through(
    folder: SharedFolder, top: Path, tmp_path: Path
) -> None:
    there, away = top / "dir", top / "away"

    def change() -> None:
        there.rename(away)
        there.symlink_to(tmp_path / "outside")

    def back() -> None:
        there.unlink()
        away.rename(there)

    seen: dict[object, int] = {}
    with swapping(change, back):
        for number in itertools.count():
            path = ("dir/file", "dir/sub/../file", "dir/../dir/file")[number % 3]
            try:
                found: object = read(folder, path)
            except OSError as error:
                found = error.errno
            assert found in (GOOD, errno.EACCES, errno.ENOENT)
            seen[found] = seen.get(found, 0) + 1
            if number >= RACES and {GOOD, errno.EACCES} <= seen.keys():
                break


def test_a_file_that_becomes_a_link_while_it_is_opened(
    folder: SharedFolder, top: Path, tmp_path: Path
) -> None:
    (top / "other").symlink_to(tmp_path / "secret")
    names = [top / "file", top / "other", top / "third"]

    def turn() -> None:
        names[0].rename(names[2])
        names[1].rename(names[0])
        names[2].rename(names[1])

    with swapping(turn, turn):
        for _ in range(RACES):
            for name in ("file", "other"):
                with may_fail(errno.EACCES, errno.ELOOP, errno.ENOENT):
                    assert read(folder, name) == GOOD


def test_changes_hit_no_target_of_a_link(folder: SharedFolder, top: Path, tmp_path: Path) -> None:
    """While a name is now a file and now a link to a secret: its mode, length, owner and times."""
    secret = tmp_path / "secret"
    secret.chmod(0o600)
    os.utime(secret, (1, 1))
    (top / "other").symlink_to(secret)
    names = [top / "file", top / "other", top / "third"]

    def turn() -> None:
        names[0].rename(names[2])
        names[1].rename(names[0])
        names[2].rename(names[1])

    with swapping(turn, turn):
        for _ in range(RACES):
            for name in (b"file", b"other"):
                with (
                    may_fail(errno.ELOOP, errno.ENOENT, errno.EOPNOTSUPP),
                    folder.entry([name]) as entry,
                ):
                    entry.chmod(0o666)
                    os.utime(entry.name, (5, 5), dir_fd=entry.parent, follow_symlinks=False)
                    os.close(entry.open(os.O_WRONLY | os.O_TRUNC))
    found = secret.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_mtime, found.st_size) == (0o600, 1, len(SECRET))


def test_a_maze_of_links_is_left_soon(
    folder: SharedFolder, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 links, each of which leads up and down 580 times before it comes to the next: 55,000 steps
    for a request of some bytes."""
    for number in range(40):
        (top / f"link{number}").symlink_to("dir/../" * 580 + f"link{number + 1}")
    (top / "link40").touch()
    (top / "dir").mkdir(exist_ok=True)
    opened = 0
    open_it = os.open

    def counted(*arguments: Any, **options: Any) -> int:
        nonlocal opened
        opened += 1
        return open_it(*arguments, **options)

    monkeypatch.setattr(os, "open", counted)
    with pytest.raises(OSError, match="File name too long"), folder.entry([b"link0"], follow=True):
        pytest.fail("it was walked to the end")
    assert 500 < opened < 3000
    with folder.entry([b"link40"], follow=True) as entry:
        entry.stat()


def test_a_deep_path_opens_few_directories_at_once(folder: SharedFolder, top: Path) -> None:
    names = [b"d"] * 600
    inner = os.open(top, os.O_RDONLY)
    for name in names:
        os.mkdir(name, dir_fd=inner)
        outer, inner = inner, os.open(name, os.O_RDONLY, dir_fd=inner)
        os.close(outer)
    os.close(inner)
    try:
        with pytest.raises(OSError, match="File name too long"), folder.entry(names):
            pytest.fail("it was walked to the end")
        with folder.entry(names[:200]) as entry:
            entry.stat()
    finally:
        subprocess.run(["rm", "-r", top / "d"], check=True)
