"""/proc of a server, whose files tell no size."""

from __future__ import annotations

from pathlib import Path

from tests.mount.conftest import Servers
from tests.support.mounts import OnDisk, RealHome, Served, mounted, run


def test_files_of_proc_have_their_content(
    servers: Servers, real_home: RealHome, tmp_path: Path
) -> None:
    keys: dict[str, str | bool | float] = {
        "type": "sftp",
        "host": "cluster",
        "path": "/proc",
        "ssh_config": str(servers.sshd.ssh_config),
        "read_only": True,
    }
    with mounted(real_home, {"ns": Served("sftp", keys, OnDisk(Path("/proc")))}) as mount:
        place = mount.path / "ns"
        for name in ("version", "cpuinfo", "filesystems", "sys/kernel/ostype"):
            assert (place / name).read_bytes() == (Path("/proc") / name).read_bytes() != b""
            assert run("cat", place / name).encode() == (Path("/proc") / name).read_bytes()
        run("cp", place / "version", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == Path("/proc/version").read_bytes()
        assert int(run("grep", "-c", "^processor", place / "cpuinfo")) >= 1


def test_an_empty_file_that_grows_is_followed(servers: Servers, real_home: RealHome) -> None:
    served = servers.serve("sftp")
    served.inside.write("log", b"")
    with (
        mounted(real_home, {"ns": served}) as mount,
        (mount.path / "ns" / "log").open("rb", buffering=0) as reader,
    ):
        assert reader.read() == b""
        served.inside.write("log", b"first line\n")
        assert reader.read() == b"first line\n"
