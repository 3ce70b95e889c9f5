"""What mounts and tunnels leave on the disk, and show of their memory, is for their user alone."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.mount.conftest import Servers
from tests.support.mounts import KINDS, RealHome, make_real_home, mounted, until
from tests.support.seed import seed
from tests.support.tunnels import ALIAS, NAME

OPEN_UMASK = ("sh", "-c", 'umask 000; exec "$@"', "sh")
LESS_THAN_ROOT = ("setpriv", "--bounding-set", "-sys_ptrace", "--") if os.getuid() == 0 else ()
"""Root may read of all processes what their users may: not without this capability."""


def open_to_others(path: Path) -> Iterator[str]:
    """Files and directories that somebody else may change."""
    for place in path.rglob("*"):
        mode = place.lstat().st_mode
        if not stat.S_ISLNK(mode) and mode & 0o022:
            yield f"{place} {stat.filemode(mode)}"


def is_readable(pid: int) -> bool:
    """Whether another process of the user may look into this one, as a debugger does."""
    command = [*LESS_THAN_ROOT, "readlink", f"/proc/{pid}/exe"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def core_limit(pid: int) -> list[str]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line.split()[4:6] for line in lines if line.startswith("Max core file size"))


def test_the_umask_opens_nothing(servers: Servers, tmp_path: Path) -> None:
    home = make_real_home(tmp_path / "home")
    home.enter = OPEN_UMASK
    assert home.run("init", "--yes").returncode in (0, 1, 2)
    served = {kind: servers.serve(kind).but(write="back") for kind in KINDS}
    with mounted(home, served) as mount:
        for kind in KINDS:
            (mount.path / kind / "file").write_bytes(b"content" * 100_000)
            assert (mount.path / kind / "file").read_bytes()
        assert home.run("sync", mount.path).returncode == 0
        made = [home.path / ".local", home.path / ".cache", home.path / "run"]
        assert [found for top in made for found in open_to_others(top)] == []
        assert all(not top.lstat().st_mode & 0o022 for top in made)


def test_processes_dump_no_memory(servers: Servers, tmp_path: Path) -> None:
    home = make_real_home(tmp_path / "home")
    home.enter = LESS_THAN_ROOT
    with mounted(home, {kind: servers.serve(kind) for kind in KINDS}) as mount:
        found = mount.transfer_processes()
        assert len(found) == len(KINDS)
        with subprocess.Popen([*LESS_THAN_ROOT, "sleep", "100"]) as control:
            until(lambda: is_readable(control.pid), what="one that can be looked into")
            control.kill()
        assert not any(is_readable(pid) for pid in (mount.status.pid, *found))
        for pid in (mount.status.pid, *found):
            assert core_limit(pid) == ["0", "0"]
        assert mount.status.memory > 0, "sizes can still be told"


def test_a_tunnel(tmp_path: Path) -> None:
    with seed(tmp_path) as found:
        home = RealHome(found.laptop.path, {}, (*LESS_THAN_ROOT, *OPEN_UMASK))
        tunnel = home.start("tunnel", ALIAS, "--name", NAME, "--share", found.shared)
        try:
            until(lambda: found.place() or tunnel.poll() is not None, what="the tunnel is up")
            assert core_limit(tunnel.pid) == ["0", "0"]
            assert not is_readable(tunnel.pid)
            made = [top for top in (home.path / ".local", home.path / "run") if top.exists()]
            assert [one for top in made for one in open_to_others(top)] == []
            assert list(open_to_others(found.node.home / ".hpcfs")) == []
        finally:
            tunnel.terminate()
            told = tunnel.communicate(timeout=20)
        assert tunnel.returncode == 0, told
