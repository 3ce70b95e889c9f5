"""The laptop as a folder of a mount: `hpcfs tunnel` here, `hpcfs mount` there, as typed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mount.test_programs import git
from tests.mount.test_trees import WAYS, copy, rsync_finds_to_do
from tests.support.acl import set_default_acl
from tests.support.mounts import (
    WRITE_MODES,
    Mount,
    OnDisk,
    RealHome,
    Served,
    errno_of,
    mounted,
    run,
    until,
)
from tests.support.seed import EXPECTED, Seed, seed
from tests.support.sshd import ALIAS, LOOPBACK, SshServer, ssh_server
from tests.support.trees import SMALL_SIZES, Recipe, differences, facts_of, make_tree

TREE = Recipe(60, sizes=SMALL_SIZES, large=(5_000_000,), directories=15)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
AWAY = errno.EHOSTUNREACH
RETURN_SECONDS = 3.0
"""From the tunnel's return to the first read on a mount."""


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Seed]:
    """For what ends the tunnel."""
    with seed(tmp_path) as found:
        found.start()
        yield found


@contextmanager
def mount_of(found: Seed, **keys: str | bool | float) -> Iterator[Mount]:
    with mounted(found.home, {"laptop": found.served(**keys)}, expected=EXPECTED) as mount:
        yield mount


# --- as it is typed -------------------------------------------------------------------------------


def test_the_seed_case(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "train.py").write_text("print('train')\n")
    with seed(tmp_path) as found:
        (found.shared / "from the laptop").write_text("hello")
        found.start("--share", f"code={source}:ro")
        mount = Mount(found.home, {}, name="cluster")
        mount.path.mkdir()
        done = found.home.run("mount", mount.path, "laptop=tunnel:lap")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        folder = mount.path / "laptop"
        assert run("ls", folder) == "code\ndata\n"
        assert run("cat", folder / "data" / "from the laptop") == "hello"
        assert run("sh", "-c", f"python3 {folder}/code/train.py") == "train\n"
        run("cp", folder / "code" / "train.py", folder / "data" / "copy.py")
        assert (found.shared / "copy.py").read_text() == "print('train')\n"
        shown = found.home.run("status", mount.path).stdout
        assert "laptop  tunnel:lap  connected" in shown
        told = json.loads(found.laptop.run("tunnel", "--status", "--json").stdout)
        assert [len(one["mounts"]) for one in told] == [1]
        mount.umount()
        mount.check_log()
        found.end(signal.SIGINT)
        assert found.node.left() == []


# --- work -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Seed, Mount]]:
    """One mount for all tests of ordinary work, in both ways of writing."""
    with seed(tmp_path_factory.mktemp("tunnel")) as found:
        found.start()
        # Some links of the trees that are copied lead out.
        names = {mode: found.served(write=mode, symlinks="follow") for mode in WRITE_MODES}
        with mounted(found.home, names) as mount:
            yield found, mount


@dataclass
class Work:
    """An empty folder of the laptop, and the same on the mount."""

    mount: Mount
    shared: Path
    path: Path


@pytest.fixture(params=WRITE_MODES)
def work(
    request: pytest.FixtureRequest, working: tuple[Seed, Mount], tmp_path: Path
) -> Iterator[Work]:
    found, mount = working
    name = tmp_path.name
    made = Work(mount, found.shared / name, mount.path / request.param / "data" / name)
    made.path.mkdir()
    yield made
    mount.check_log()


def sync(mount: Mount) -> None:
    done = mount.home.run("sync", mount.path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_trees_in_both_directions(way: str, work: Work, tmp_path: Path) -> None:
    """With all that a name may have in it, modes and times."""
    tree, copied = tmp_path / "tree", tmp_path / "copied"
    make_tree(tree, TREE)
    shutil.copytree(tree, work.shared / "out", symlinks=True)
    copy(way, tree, work.path / "in")
    sync(work.mount)
    assert differences(facts_of(tree), facts_of(work.shared / "in")) == []
    assert rsync_finds_to_do(tree, work.path / "in") == ""
    until((work.path / "out").exists)  # what is known of a folder may be a second old
    copy(way, work.path / "out", copied)
    assert differences(facts_of(tree), facts_of(copied)) == []


def test_git(work: Work, tmp_path: Path) -> None:
    """A repository of the laptop is cloned, and what was committed in the clone pushed to it."""
    git(work.shared, "init", "-q", "--bare", "-b", "main", "origin")
    git(work.path, "clone", "-q", "origin", "clone")
    for number in range(3):
        (work.path / "clone" / "file").write_text(f"line {number}\n" * 1000)
        git(work.path / "clone", "add", "-A")
        git(work.path / "clone", "commit", "-q", "-m", f"change {number}")
    git(work.path / "clone", "push", "-q", "origin", "HEAD:main")
    sync(work.mount)
    git(work.shared, "clone", "-q", "origin", "there")
    assert (work.shared / "there" / "file").read_text() == "line 2\n" * 1000
    git(work.shared / "origin", "fsck", "--strict", "--full")
    assert git(work.shared / "clone", "status", "--porcelain") == ""


def test_editors(work: Work) -> None:
    (work.path / "text").write_text("one\ntwo\n")
    run("sed", "-i", "s/two/TWO/", "text", cwd=work.path)
    vim = ("vim", "-e", "-s", "-u", "NONE", "-i", "NONE", "-c", "set backup")
    run(*vim, "-c", "%s/one/ONE/", "-c", "wq", "text", cwd=work.path)
    with (work.path / "text").open("a") as file:
        file.write("three\n")
    sync(work.mount)
    assert (work.shared / "text").read_text() == "ONE\nTWO\nthree\n"


def test_access_lists_of_the_laptop_decide(work: Work) -> None:
    set_default_acl(work.shared, 7, 5, 0)
    (work.path / "file").write_bytes(b"content")
    (work.path / "d").mkdir()
    (work.path / "private").touch(mode=0o600)
    sync(work.mount)
    assert modes_in(work.shared) == {"file": 0o640, "d": 0o750, "private": 0o600}
    until(lambda: modes_in(work.path) == modes_in(work.shared), 5)


def modes_in(directory: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


@pytest.mark.parametrize("mode", WRITE_MODES)
def test_a_share_that_is_read_only(mode: str, tmp_path: Path) -> None:
    """The laptop refuses, with `write = "back"` when it gets it, and has what it had."""
    fixed = tmp_path / "fixed"
    (fixed / "folder").mkdir(parents=True)
    (fixed / "file").write_text("fixed")
    before = facts_of(fixed)
    with seed(tmp_path) as found:
        found.start("--share", f"{fixed}:ro")
        served = {"laptop": found.served(write=mode)}
        with mounted(found.home, served, expected=["read-only|may not|not uploaded"]) as mount:
            top = mount.path / "laptop"
            for attempt in changes_of_the_top(top):
                assert errno_of(*attempt) in REFUSED, attempt
            for attempt in changes(top / "fixed"):
                assert errno_of(*attempt) == errno.EROFS, attempt
            refused = errno_of((top / "fixed" / "file").write_bytes, b"changed")
            assert refused == (None if mode == "back" else errno.EROFS)
            assert mount.home.run("sync", mount.path).returncode == 1
            assert "fixed/file" in mount.home.run("status", mount.path).stdout
            assert facts_of(fixed) == before
            assert sorted(os.listdir(top)) == ["data", "fixed"]


def changes_of_the_top(top: Path) -> list[tuple[object, ...]]:
    return [
        (os.rename, top / "data", top / "other"),
        (os.mkdir, top / "new"),
        (os.symlink, "data", top / "new"),
    ]


def changes(fixed: Path) -> list[tuple[object, ...]]:
    return [
        (os.unlink, fixed / "file"),
        (os.rename, fixed / "file", fixed / "other"),
        (os.mkdir, fixed / "new"),
        (os.rmdir, fixed / "folder"),
        (os.symlink, "file", fixed / "new"),
        (os.chmod, fixed / "file", 0o600),
        (os.utime, fixed / "file", (1, 1)),
    ]


def test_an_unmount_waits_for_what_is_to_be_written(away: Seed) -> None:
    data = os.urandom(20_000_000)
    with mount_of(away, write="back") as mount:
        (mount.path / "laptop" / "data" / "file").write_bytes(data)
        mount.umount()
    assert (away.shared / "file").read_bytes() == data


# --- away -----------------------------------------------------------------------------------------


def test_a_tunnel_that_ends_and_comes_back(away: Seed) -> None:
    """An error at once, and a sentence. What is cached can be read, and what is open goes on."""
    (away.shared / "cached").write_bytes(b"cached")
    (away.shared / "long").write_bytes(bytes(30_000_000))
    with mount_of(away) as mount:
        folder = mount.path / "laptop" / "data"
        assert (folder / "cached").read_bytes() == b"cached"
        with (folder / "long").open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 10, 0) == bytes(10)
            away.end()
            until(lambda: mount.namespace("laptop").state == "failed", RETURN_SECONDS)
            began = time.monotonic()
            assert errno_of(os.pread, file.fileno(), 10, 25_000_000) == AWAY
            assert errno_of((folder / "new").write_bytes, b"") == AWAY
            assert (folder / "cached").read_bytes() == b"cached"
            assert time.monotonic() - began < 1.0
            reason = mount.namespace("laptop").reason
            assert "no tunnel named lap is up" in reason
            assert reason in away.home.run("status", mount.path).stdout
            away.start()
            until(lambda: mount.namespace("laptop").state == "connected", RETURN_SECONDS)
            assert os.pread(file.fileno(), 10, 25_000_000) == bytes(10)
        (folder / "new").write_bytes(b"new")
        assert (away.shared / "new").read_bytes() == b"new"


def test_what_is_written_while_the_laptop_is_away(away: Seed) -> None:
    (away.shared / "before").write_bytes(b"before")
    with mount_of(away, write="back") as mount:
        folder = mount.path / "laptop" / "data"
        assert os.listdir(folder) == ["before"]
        away.end()
        until(lambda: mount.namespace("laptop").state == "failed", RETURN_SECONDS)
        (folder / "before").write_bytes(b"after")
        (folder / "new").write_bytes(b"new")
        assert (folder / "new").read_bytes() == b"new"
        assert len(mount.status.pending) == 2
        assert (away.shared / "before").read_bytes() == b"before"
        away.start()
        until(lambda: not mount.status.pending)
        assert (away.shared / "new").read_bytes() == b"new"
        assert (away.shared / "before").read_bytes() == b"after"


def test_a_tunnel_that_was_killed_and_another_of_its_name(away: Seed) -> None:
    """Its file is still there. The mount waits a while whether it comes back, then says so."""
    (away.shared / "cached").write_bytes(b"cached")
    (away.shared / "file").write_bytes(b"content")
    with mount_of(away) as mount:
        folder = mount.path / "laptop" / "data"
        assert (folder / "cached").read_bytes() == b"cached"
        away.end(signal.SIGKILL)
        until(lambda: "is not up any more" in mount.namespace("laptop").reason)
        assert errno_of((folder / "file").read_bytes) == AWAY
        assert (folder / "cached").read_bytes() == b"cached"
        away.start()
        until(lambda: errno_of((folder / "file").read_bytes) is None, RETURN_SECONDS)
        assert (folder / "file").read_bytes() == b"content"


# --- with an SSH server on the laptop -------------------------------------------------------------


@contextmanager
def reverse_forward(login: SshServer, laptop: SshServer) -> Iterator[int]:
    """`ssh -R 0:...` on the laptop; the port on the login node that sshd chose."""
    forward = f"0:{LOOPBACK}:{laptop.port}"
    command = ["ssh", "-F", login.ssh_config, "-N", "-R", forward, ALIAS]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = process.stderr.readline()
        allocated = re.match(r"Allocated port (\d+) for remote forward", told)
        assert allocated, told
        try:
            yield int(allocated[1])
        finally:
            process.terminate()


def test_plain_ssh_with_a_reverse_forward(tmp_path: Path, real_home: RealHome) -> None:
    """As docs/tunnel.md has it for those who have an SSH server on the laptop."""
    with (
        ssh_server(tmp_path / "login") as login,
        ssh_server(tmp_path / "laptop") as laptop,
        reverse_forward(login, laptop) as port,
    ):
        known = laptop.known_hosts_line(laptop.host_key).replace(f":{laptop.port} ", f":{port} ")
        laptop.known_hosts.write_text(known)
        config = laptop.config_text("*").replace(f"Port {laptop.port}", "")
        laptop.ssh_config.write_text(config)
        keys = {"type": "sftp", "host": f"{laptop.user}@{LOOPBACK}", "port": port}
        keys |= {"path": str(laptop.root), "ssh_config": str(laptop.ssh_config)}
        served = Served("sftp", keys, OnDisk(laptop.root))
        data = os.urandom(5_000_000)
        (laptop.root / "file").write_bytes(data)
        with mounted(real_home, {"laptop": served}) as mount:
            assert (mount.path / "laptop" / "file").read_bytes() == data
            (mount.path / "laptop" / "copy").write_bytes(data)
            assert (laptop.root / "copy").read_bytes() == data
