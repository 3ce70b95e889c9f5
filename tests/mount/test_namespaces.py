"""Several namespaces in one mount, mounts by URL, caches that have an owner, and killed daemons."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from hpcfs.system import paths
from tests.mount.conftest import Servers
from tests.support.link import link_to, ssh_config_through
from tests.support.mounts import (
    KINDS,
    Mount,
    RealHome,
    errno_of,
    kill,
    mounted,
    run,
    served_by_ssh,
    until,
)
from tests.support.sshd import LOOPBACK, SshServer, free_port

PROMPT = 1.5
"""Seconds in which something answers that waits for no remote; machines are noisy."""


def seconds_of(call: object, *arguments: object) -> float:
    started = time.monotonic()
    errno_of(call, *arguments)
    return time.monotonic() - started


# --- out of reach ---------------------------------------------------------------------------------


def test_a_namespace_out_of_reach_stops_no_other(servers: Servers, real_home: RealHome) -> None:
    away = servers.serve("s3-rclone").but(endpoint_url=f"http://{LOOPBACK}:{free_port()}")
    config = real_home.path / "away"
    config.write_text(f"Host cluster\n  HostName {LOOPBACK}\n  Port {free_port()}\n  User x\n")
    away_ssh = served_by_ssh(servers.sshd, ssh_config=config)
    namespaces = {"here": servers.serve("sftp"), "bucket": away, "cluster": away_ssh}
    with mounted(real_home, namespaces, expected=["nothing answers|be reached"]) as mount:
        assert "hpcfs: bucket: " in mount.told
        assert "hpcfs: cluster: " in mount.told
        assert sorted(os.listdir(mount.path)) == ["bucket", "cluster", "here"]
        (mount.path / "here" / "file").write_text("works")
        for name in ("bucket", "cluster"):
            assert (mount.path / name).is_dir()
            assert errno_of(os.listdir, mount.path / name) == errno.EHOSTUNREACH
            assert seconds_of(os.stat, mount.path / name / "file") < PROMPT
            found = mount.namespace(name)
            assert (found.state, bool(found.reason)) == ("failed", True)
            assert found.reason in real_home.run("status", mount.path).stdout
        assert mount.namespace("here").state == "connected"


@pytest.mark.parametrize(
    ("kind", "keys", "number", "words"),
    [
        ("s3-rclone", {"bucket": "no-such-bucket"}, errno.ENXIO, "bucket"),
        ("sftp", {"path": "/no/such/folder"}, errno.ENXIO, "/no/such/folder"),
        ("sftp", {"user": "nobody-of-this-name"}, errno.EACCES, "refused"),
    ],
)
def test_wrong_settings_are_told(
    kind: str,
    keys: dict[str, str],
    number: int,
    words: str,
    servers: Servers,
    real_home: RealHome,
) -> None:
    with mounted(real_home, {"ns": servers.serve(kind).but(**keys)}, expected=[words]) as mount:
        assert mount.told.startswith("hpcfs: ns: ")
        assert words in mount.told
        assert mount.told.count("\n") == 1
        assert errno_of(os.listdir, mount.path / "ns") == number
        assert words in mount.namespace("ns").reason


# --- connections ----------------------------------------------------------------------------------


def test_namespaces_of_one_site_share_a_connection(sshd: SshServer, real_home: RealHome) -> None:
    with link_to(sshd.port) as link:
        config = real_home.path / "ssh_config"
        config.write_text(ssh_config_through(link, sshd))
        folders = {name: served_by_ssh(sshd, ssh_config=config) for name in ("a", "b", "c")}
        with mounted(real_home, folders) as mount:
            for name in folders:
                for number in range(5):
                    (mount.path / name / f"f{number}").write_bytes(bytes(100_000))
            assert link.accepted == 1
            assert len(mount.transfer_processes()) == 1


def test_the_status_tells_what_is_open_to_each_site(servers: Servers, real_home: RealHome) -> None:
    cluster = servers.serve("sftp")
    served = {"a": cluster, "b": cluster.but(path="/"), "bucket": servers.serve("s3-rclone")}
    with mounted(real_home, served) as mount:
        for name in served:
            os.listdir(mount.path / name)
        told = json.loads(real_home.run("status", "--json", mount.path).stdout)[0]["sites"]
        ssh, s3 = sorted(told, key=lambda site: len(site["namespaces"]), reverse=True)
        assert (ssh["namespaces"], ssh["kind"]) == (["a", "b"], "sftp")
        assert (ssh["connections"], ssh["channels"]) == (1, 2)
        assert (s3["namespaces"], s3["kind"], s3["channels"]) == (["bucket"], "s3", 0)
        assert s3["connections"] >= 1
        stopped = mount.transfer_processes()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            assert seconds_of(lambda: mount.status) < PROMPT
            assert mount.status.sites == [], "a process that is too busy to tell is left out"
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        until(lambda: len(mount.status.sites) == 2)
        assert [site.requests for site in mount.status.sites] == [0, 0]


def test_a_namespace_through_the_users_own_ssh(sshd: SshServer, real_home: RealHome) -> None:
    """Its `ssh` ends with the transfer process, however that ends."""
    served = served_by_ssh(sshd).but(transport="openssh")
    data = random.Random(8).randbytes(20_000_000)
    served.inside.write("large", data)
    with mounted(real_home, {"ns": served}, expected=["transfer process"]) as mount:
        top = mount.path / "ns"
        assert (top / "large").read_bytes() == data
        (top / "new").write_bytes(data[:3_000_000])
        assert served.inside.read("new") == data[:3_000_000]
        os.symlink("new", top / "link")
        assert os.readlink(f"{served.keys['path']}/link") == "new"
        (transfer,) = mount.transfer_processes()
        (ssh,) = children_of(transfer)
        kill(transfer)
        until(lambda: not Path(f"/proc/{ssh}").exists())
        until(lambda: errno_of(os.mkdir, top / "folder") is None)
        (transfer,) = mount.transfer_processes()
        (ssh,) = children_of(transfer)
        mount.umount()
        until(lambda: not Path(f"/proc/{ssh}").exists())


def children_of(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


# --- by URL ---------------------------------------------------------------------------------------


def test_mounts_by_url(sshd: SshServer, real_home: RealHome) -> None:
    """~/.ssh/config has the alias, as for users."""
    (real_home.path / ".ssh").mkdir()
    (real_home.path / ".ssh" / "config").write_text(sshd.config_text())
    first, second = served_by_ssh(sshd), served_by_ssh(sshd)
    mount = Mount(real_home, {})
    mount.path.mkdir()
    url = f"cluster:{first.keys['path']}"
    done = real_home.run("mount", mount.path, f"home={url}", f"sftp=cluster:{second.keys['path']}")
    assert (done.returncode, done.stderr) == (0, "")
    (mount.path / "home" / "file").write_text("by name")
    assert first.inside.read("file") == b"by name"
    assert sorted(os.listdir(mount.path)) == ["home", "sftp"]
    assert errno_of(os.mkdir, mount.path / "new") == errno.EROFS
    mount.umount()

    done = real_home.run("mount", url, mount.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (mount.path / "file").read_text() == "by name"
    (mount.path / "d").mkdir()
    (mount.path / "d" / "other").write_text("in the root")
    assert first.inside.read("d/other") == b"in the root"
    assert os.stat(mount.path).st_uid == os.getuid()
    mount.umount()
    mount.check_log()


def test_a_root_out_of_reach_is_not_mounted(real_home: RealHome) -> None:
    mount = Mount(real_home, {})
    mount.path.mkdir()
    done = real_home.run("mount", f"sftp://{LOOPBACK}:{free_port()}/", mount.path)
    assert done.returncode == 1
    assert done.stderr.startswith("hpcfs: ")
    assert done.stderr.count("\n") == 1
    assert not mount.is_mounted


def test_read_only(servers: Servers, real_home: RealHome) -> None:
    namespaces = {kind: servers.serve(kind).but(read_only=True) for kind in KINDS}
    for served in namespaces.values():
        served.inside.write("file", b"content")
        served.inside.write("d/file", b"content")
    with mounted(real_home, namespaces) as mount:
        for kind in KINDS:
            top = mount.path / kind
            assert (top / "file").read_bytes() == b"content"
            assert errno_of(open, top / "file", "ab") == errno.EROFS
            assert errno_of(open, top / "new", "wb") == errno.EROFS
            assert errno_of(os.unlink, top / "file") == errno.EROFS
            assert errno_of(os.mkdir, top / "new") == errno.EROFS
            assert errno_of(os.rename, top / "file", top / "new") == errno.EROFS
            assert errno_of(os.chmod, top / "file", 0o600) == errno.EROFS
            assert errno_of(os.truncate, top / "file", 0) == errno.EROFS
            assert errno_of(os.symlink, "x", top / "new") == errno.EROFS
            assert not os.access(top / "file", os.W_OK)
            assert namespaces[kind].inside.read("file") == b"content"
        assert "read-only" in real_home.run("status", mount.path).stdout


# --- caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [True, False], ids=["answers", "can't be asked"])
def test_a_cache_in_use_says_who_holds_it(
    answers: bool, servers: Servers, real_home: RealHome
) -> None:
    """A daemon goes on after a lazy unmount, until its files are closed."""
    with mounted(real_home, {"ns": servers.serve("sftp")}) as mount:
        pid = mount.status.pid
        with (mount.path / "ns" / "file").open("wb") as file:
            run("fusermount3", "-u", "-z", mount.path)
            if not answers:
                paths.find_socket(mount.path, mount.environ).unlink()
            done = real_home.run("mount", mount.path)
            assert done.returncode == 1
            assert f"pid {pid}" in done.stderr
            assert "is in use by" in done.stderr or "still" in done.stderr, done.stderr
            assert not mount.is_mounted
            file.write(b"goes on")
        assert mount.namespaces["ns"].inside.read("file") == b"goes on"
        until(lambda: not Path(f"/proc/{pid}").exists())
        mount.mount()


def test_the_cache_is_kept_from_mount_to_mount(sshd: SshServer, real_home: RealHome) -> None:
    data = random.Random(1).randbytes(5_000_000)
    with link_to(sshd.port) as link:
        config = real_home.path / "ssh_config"
        config.write_text(ssh_config_through(link, sshd))
        served = served_by_ssh(sshd, ssh_config=config)
        served.inside.write("file", data)
        with mounted(real_home, {"ns": served}) as mount:
            assert (mount.path / "ns" / "file").read_bytes() == data
            mount.remount()
            link.fail_after(10**9)
            assert (mount.path / "ns" / "file").read_bytes() == data
            assert link.relayed < 100_000, "it was read from the remote again"


def test_the_cache_keeps_to_its_size(servers: Servers, real_home: RealHome) -> None:
    """A file larger than the cache, and then many small ones."""
    bound = 16 << 20
    served = servers.serve("sftp")
    large = random.Random(5).randbytes(3 * bound)
    small = {f"small-{n}": random.Random(n).randbytes(2_000_000) for n in range(16)}
    for name, data in {"large": large, **small}.items():
        served.inside.write(name, data)
    with mounted(real_home, {"ns": served}, "--cache-size", "16 MiB") as mount:
        for name, data in {"large": large, **small, "large again": large}.items():
            assert (mount.path / "ns" / name.removesuffix(" again")).read_bytes() == data
        until(lambda: mount.status.cache_used <= bound)
        on_disk = Path(mount.status.cache_dir) / "data"
        until(lambda: int(run("du", "-sB1", on_disk).split()[0]) < 1.5 * bound)


# --- killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_daemon_is_cleaned_up_after(
    kind: str, servers: Servers, real_home: RealHome
) -> None:
    data = random.Random(2).randbytes(4_000_000)
    with mounted(real_home, {"ns": servers.serve(kind)}) as mount:
        (mount.path / "ns" / "written").write_bytes(data)
        mount.namespaces["ns"].inside.write("theirs", data[::-1])
        assert (mount.path / "ns" / "theirs").read_bytes() == data[::-1]
        transfer = mount.transfer_processes()
        mount.kill_daemon()
        assert errno_of(os.listdir, mount.path) in (errno.ENOTCONN, errno.ECONNABORTED)
        assert "its daemon is gone" in real_home.run("status").stdout
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in transfer))
        assert "left behind" in mount.mount()
        assert (mount.path / "ns" / "written").read_bytes() == data
        assert (mount.path / "ns" / "theirs").read_bytes() == data[::-1]
        assert mount.kept == []


def test_what_a_killed_daemon_cached_is_verified(servers: Servers, real_home: RealHome) -> None:
    """A byte that changed on the local disk meanwhile is noticed by its checksum."""
    data = random.Random(3).randbytes(3_000_000)
    with mounted(real_home, {"ns": servers.serve("sftp")}) as mount:
        mount.namespaces["ns"].inside.write("file", data)
        assert (mount.path / "ns" / "file").read_bytes() == data
        cache = Path(mount.status.cache_dir)
        mount.remount()
        mount.kill_daemon()
        files = [path for path in (cache / "data").rglob("*") if path.is_file()]
        assert [path.stat().st_size for path in files] == [len(data)]
        with files[0].open("r+b") as file:
            file.seek(1_000_000)
            file.write(b"damage")
        mount.expected.append("damaged in the cache")
        mount.mount()
        assert (mount.path / "ns" / "file").read_bytes() == data
        assert "damaged in the cache" in mount.log


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_transfer_process_is_replaced(
    kind: str, servers: Servers, real_home: RealHome
) -> None:
    data = random.Random(4).randbytes(1_000_000)
    with mounted(real_home, {"ns": servers.serve(kind)}) as mount:
        (mount.path / "ns" / "file").write_bytes(data)
        for _ in range(2):
            (pid,) = mount.transfer_processes()
            with (mount.path / "ns" / "open").open("wb") as writing:
                writing.write(data)
                writing.flush()
                ended = f"the transfer process {pid} ended"
                mount.expected.append(ended)
                kill(pid)
                until(partial(_logs, mount, ended))
                until(lambda: errno_of(os.listdir, mount.path / "ns") is None, 5)
            assert mount.namespaces["ns"].inside.read("open") == data
            assert mount.namespace("ns").state == "connected"
        mount.expected.append("process of this site")


def _logs(mount: Mount, text: str) -> bool:
    return text in mount.log


def test_sigterm_unmounts_and_uploads(servers: Servers, real_home: RealHome) -> None:
    with mounted(real_home, {"ns": servers.serve("sftp")}) as mount:
        file = os.open(mount.path / "ns" / "file", os.O_CREAT | os.O_WRONLY)
        os.write(file, b"not yet closed")
        kill(mount.status.pid, signal.SIGTERM)
        assert errno_of(os.close, file) in (None, errno.ENOTCONN, errno.ECONNABORTED)
        assert mount.namespaces["ns"].inside.read("file") == b"not yet closed"
        assert not mount.is_mounted


# --- promises in seconds --------------------------------------------------------------------------


def best_of_three(call: object, *arguments: object) -> float:
    return min(seconds_of(call, *arguments) for _ in range(3))


def test_it_feels_light(servers: Servers, real_home: RealHome) -> None:
    namespaces = {kind: servers.serve(kind) for kind in KINDS}
    with mounted(real_home, namespaces) as mount:
        helped = best_of_three(real_home.run, "--help")
        told = best_of_three(real_home.run, "status", mount.path)
        times = []
        for _ in range(3):
            mount.umount()
            times.append(seconds_of(mount.mount))
        found = json.loads(real_home.run("status", "--json", mount.path).stdout)[0]
    print(f"--help {helped:.2f} s, status {told:.2f} s, mount {min(times):.2f} s")
    assert (helped < 0.4, told < 0.4, min(times) < 2) == (True, True, True), (helped, told, times)
    assert [one["state"] for one in found["namespaces"]] == ["connected"] * 3
