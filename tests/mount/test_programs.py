"""Ordinary programs at work in the mount: git, sqlite3, editors, tail, tar, find, df."""

from __future__ import annotations

import errno
import os
import re
import select
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.mount.conftest import WorkTree
from tests.support.mounts import errno_of, run, until

GIT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org",
}


def git(cwd: Path, *arguments: str | Path) -> str:
    return run("git", *arguments, cwd=cwd, **GIT)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small local one, with history, a branch, a link and an executable."""
    made = tmp_path / "repository"
    made.mkdir()
    git(made, "init", "-q", "-b", "main")
    for number in range(3):
        for name in ("README", "src/a.py", "src/deep/b.py"):
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_text(f"{name} {number}\n" * 50)
        (made / "src" / "run").write_text("#!/bin/sh\n")
        (made / "src" / "run").chmod(0o755)
        if not number:
            (made / "link").symlink_to("README")
        git(made, "add", "-A")
        git(made, "commit", "-q", "-m", f"change {number}")
    git(made, "branch", "other", "HEAD~1")
    return made


def test_git(tree: WorkTree, repository: Path) -> None:
    clone = tree.path / "clone"
    git(tree.path, "clone", "-q", repository, clone)
    assert git(clone, "status", "--porcelain") == ""
    (clone / "src" / "a.py").write_text("changed\n")
    (clone / "new").write_text("new\n")
    git(clone, "mv", "README", "READ.ME")
    git(clone, "add", "-A")
    git(clone, "commit", "-q", "-m", "from the mount")
    assert git(clone, "status", "--porcelain") == ""
    git(clone, "fsck", "--strict", "--full")
    git(clone, "checkout", "-q", "-b", "other", "origin/other")
    assert (clone / "README").read_text() == "README 1\n" * 50
    git(clone, "push", "-q", "origin", "main:from-the-mount")
    assert git(repository, "log", "-1", "--format=%s", "from-the-mount") == "from the mount\n"


def test_git_repacks_and_a_clone_of_the_clone_is_whole(
    sftp_tree: WorkTree, repository: Path, tmp_path: Path
) -> None:
    git(sftp_tree.path, "clone", "-q", repository, "clone")
    git(sftp_tree.path / "clone", "gc", "-q")
    git(tmp_path, "clone", "-q", sftp_tree.path / "clone", "back")
    git(tmp_path / "back", "fsck", "--strict", "--full")
    assert run("diff", "-r", "-x", ".git", repository, tmp_path / "back") == ""


# --- databases ------------------------------------------------------------------------------------


def test_sqlite_transactions(tree: WorkTree) -> None:
    with closing(sqlite3.connect(tree.path / "data.db", isolation_level=None)) as db:
        db.execute("CREATE TABLE t (number INTEGER PRIMARY KEY, text TEXT)")
        db.execute("BEGIN")
        db.executemany("INSERT INTO t VALUES (?, ?)", [(n, f"text {n}") for n in range(300)])
        db.execute("COMMIT")
        db.execute("BEGIN")
        db.execute("DELETE FROM t")
        db.execute("ROLLBACK")
    assert run("sqlite3", tree.path / "data.db", "SELECT count(*), max(text) FROM t") == (
        "300|text 99\n"
    )
    assert run("sqlite3", tree.path / "data.db", "PRAGMA integrity_check") == "ok\n"
    assert os.listdir(tree.path) == ["data.db"]


def test_the_servers_copy_of_a_database_is_whole(tree: WorkTree, tmp_path: Path) -> None:
    statements = "CREATE TABLE t (n); INSERT INTO t VALUES (1), (2); UPDATE t SET n = n * 10;"
    run("sqlite3", tree.path / "data.db", statements)
    (tmp_path / "copy.db").write_bytes(tree.on_server("data.db"))
    assert run("sqlite3", tmp_path / "copy.db", "SELECT sum(n) FROM t") == "30\n"


# --- editors --------------------------------------------------------------------------------------


def test_an_editor_writes_anew_and_renames_over(tree: WorkTree) -> None:
    (tree.path / "text").write_text("before\n")
    (tree.path / "text").chmod(0o640)
    (tree.path / ".text.swp").write_text("after\n")
    (tree.path / ".text.swp").chmod(0o640)
    os.rename(tree.path / ".text.swp", tree.path / "text")
    assert tree.on_server("text") == b"after\n"
    assert (tree.path / "text").stat().st_mode & 0o777 == 0o640
    assert os.listdir(tree.path) == ["text"]


def test_an_editor_renames_away_and_writes_anew(tree: WorkTree) -> None:
    (tree.path / "text").write_text("before\n")
    os.rename(tree.path / "text", tree.path / "text~")
    with (tree.path / "text").open("x") as file:
        file.write("after\n")
        file.flush()
        os.fsync(file.fileno())
    os.unlink(tree.path / "text~")
    assert tree.on_server("text") == b"after\n"
    assert os.listdir(tree.path) == ["text"]


@pytest.mark.parametrize("backup", ["backupcopy=yes", "backupcopy=no", "nobackup", "backup"])
def test_a_line_editor_saves(tree: WorkTree, backup: str) -> None:
    """`sed -i` renames over; vim, where it is installed, is asked for each of its ways."""
    (tree.path / "text").write_text("one\ntwo\n")
    run(*_edit_command(backup), "text", cwd=tree.path)
    assert tree.on_server("text") == b"one\nTWO\n"
    assert (tree.path / "text").read_text() == "one\nTWO\n"


def _edit_command(backup: str) -> list[str]:
    version = subprocess.run(["ex", "--version"], capture_output=True, check=False).stdout
    if b"IMproved" not in version:
        return ["sed", "-i", "s/two/TWO/"]
    return ["ex", "-sN", "-u", "NONE", "-c", f"set {backup}", "-c", "%s/two/TWO/", "-c", "x"]


# --- logs -----------------------------------------------------------------------------------------


@contextmanager
def tail(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`tail -f` of all of the file, polling often."""
    command = ["tail", "-n", "+1", "-s", "0.1", "-f", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[bytes], end: bytes) -> bytes:
    assert process.stdout
    found = b""
    while not found.endswith(end):
        ready, _, _ = select.select([process.stdout], [], [], 20)
        assert ready, f"tail shows no more than {found[-200:]!r}"
        chunk = process.stdout.read(65536)
        assert chunk, f"tail has ended after {found[-200:]!r}"
        found += chunk
    return found


def test_tail_follows_a_log_that_grows_on_the_cluster(sftp_tree: WorkTree) -> None:
    sftp_tree.write_on_server("log", b"line 0\n")
    wanted = b"line 0\n"
    on_disk = Path(str(sftp_tree.mount.namespaces["sftp"].keys["path"]), sftp_tree.name, "log")
    with tail(sftp_tree.path / "log") as process, on_disk.open("ab", buffering=0) as log:
        found = read_until(process, b"line 0\n")
        for number in range(1, 4):
            more = b"".join(b"line %d.%d\n" % (number, part) for part in range(20_000))
            log.write(more)
            wanted += more
            found += read_until(process, more[-12:])
    assert found == wanted


def test_tail_follows_a_log_that_is_empty_at_first(sftp_tree: WorkTree) -> None:
    sftp_tree.write_on_server("log", b"")
    on_disk = Path(str(sftp_tree.mount.namespaces["sftp"].keys["path"]), sftp_tree.name, "log")
    with tail(sftp_tree.path / "log") as process:
        until(lambda: sftp_tree.mount.status.open_files, what="tail has the file open")
        with on_disk.open("ab", buffering=0) as log:
            for number in range(3):
                log.write(b"line %d\n" % number)
                assert read_until(process, b"\n") == b"line %d\n" % number


def test_tail_follows_a_log_that_never_rests(sftp_tree: WorkTree) -> None:
    """A writer on the cluster appends all the time: what is shown has no gap and nothing twice."""
    on_disk = Path(str(sftp_tree.mount.namespaces["sftp"].keys["path"]), sftp_tree.name, "log")
    writer = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; echo end"
    on_disk.touch()
    with (
        subprocess.Popen(["sh", "-c", f"({writer}) >> {on_disk}"]) as writing,
        tail(sftp_tree.path / "log") as process,
    ):
        found = read_until(process, b"end\n")
    assert writing.returncode == 0
    assert found == b"".join(b"line %d\n" % number for number in range(20_000)) + b"end\n"


def test_a_log_written_here_is_on_the_cluster_at_each_close(sftp_tree: WorkTree) -> None:
    for number in range(20):
        run("sh", "-c", f"echo line {number} >> log", cwd=sftp_tree.path)
        assert sftp_tree.on_server("log").count(b"\n") == number + 1


# --- looking around -------------------------------------------------------------------------------


def fill(tree: WorkTree) -> None:
    for number in range(3):
        (tree.path / f"d{number}" / "deep").mkdir(parents=True)
        for size in (0, 1000, 300_000):
            (tree.path / f"d{number}" / "deep" / f"f{size}").write_bytes(bytes(size))
    (tree.path / "link").symlink_to("d0")


def test_ls_find_and_du(tree: WorkTree) -> None:
    fill(tree)
    listed = run("ls", "-la", tree.path)
    assert re.search(r"^drwx\S+ +1 root +root .* d0$", listed, re.MULTILINE), listed
    assert re.search(r"^lrwx\S+ .* link -> d0$", listed, re.MULTILINE), listed
    found = run("find", ".", "-type", "f", "-size", "+1", cwd=tree.path).split()
    assert sorted(found) == sorted(
        f"./d{n}/deep/f{size}" for n in range(3) for size in (1000, 300_000)
    )
    total = run("du", "-sb", "--exclude=link", tree.path).split()[0]
    sizes = sum(path.lstat().st_size for path in [tree.path, *tree.path.rglob("*")])
    assert abs(int(total) - sizes) <= 4
    assert int(run("du", "-sk", tree.path).split()[0]) >= 880


def test_tar_there_and_back(tree: WorkTree, tmp_path: Path) -> None:
    fill(tree)
    run("tar", "-cf", tmp_path / "all.tar", "-C", tree.path, ".")
    (tree.path / "back").mkdir()
    run("tar", "-xf", tmp_path / "all.tar", "-C", tree.path / "back")
    shown = run("diff", "-r", "--no-dereference", "-x", "back", tree.path, tree.path / "back")
    assert shown == ""
    archive = tree.path / "inside.tar"
    run("tar", "-czf", archive, "-C", tree.path, "d0", "link")
    assert run("tar", "-tzf", archive).splitlines().count("d0/deep/f1000") == 1


def test_rsync_deletes_and_updates(tree: WorkTree, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("keep", "change", "delete"):
        (source / name).write_text(name)
    run("rsync", "-a", f"{source}/", tree.path)
    (source / "delete").unlink()
    (source / "change").write_text("changed")
    done = run("rsync", "-ai", "--delete", f"{source}/", tree.path)
    assert [line.split()[-1] for line in done.splitlines() if "./" not in line] == [
        "delete",
        "change",
    ]
    assert tree.on_server("change") == b"changed"


def test_rm_removes_a_whole_tree(tree: WorkTree) -> None:
    fill(tree)
    run("rm", "-r", *tree.path.iterdir())
    assert os.listdir(tree.path) == []
    assert not tree.inside.exists(f"{tree.name}/d0")


def test_df(tree: WorkTree) -> None:
    found = os.statvfs(tree.path)
    assert found.f_blocks >= found.f_bfree >= found.f_bavail > 0
    assert found.f_namemax == 255
    assert "hpcfs" in run("df", "-h", tree.path)


# --- between namespaces ---------------------------------------------------------------------------


def test_mv_between_namespaces_copies(tree: WorkTree) -> None:
    """rename(2) is refused, so mv copies and removes; nothing is lost on the way."""
    fill(tree)
    other = tree.mount.path / ("s3-moto" if tree.kind == "sftp" else "sftp") / tree.name
    assert errno_of(os.rename, tree.path / "d0", other) == errno.EXDEV
    before = (tree.path / "d0" / "deep" / "f0").stat()
    run("mv", tree.path / "d0", other)
    assert sorted(path.name for path in (other / "deep").iterdir()) == ["f0", "f1000", "f300000"]
    assert (other / "deep" / "f300000").read_bytes() == bytes(300_000)
    assert not (tree.path / "d0").exists()
    assert int((other / "deep" / "f0").stat().st_mtime) == int(before.st_mtime)
    assert errno_of(os.link, other / "deep" / "f0", tree.path / "link2") == errno.EXDEV
