"""`hpcfs cache` on real mounts, and on the caches that they leave."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from hpcfs.system import paths
from tests.mount.conftest import Servers
from tests.support.command import Terminal
from tests.support.link import link_to, ssh_config_through
from tests.support.mounts import Mount, RealHome, mounted, served_by_ssh, until
from tests.support.sshd import SshServer

MIB = 1 << 20
CONTENTS = {f"d/sub/f{n}": random.Random(n).randbytes(300_000 + n) for n in range(12)}
CONTENTS["d/large"] = random.Random(99).randbytes(9 * MIB + 5)
CONTENTS["other"] = random.Random(98).randbytes(2 * MIB)
BELOW_D = sum(len(data) for path, data in CONTENTS.items() if path.startswith("d/"))


def fill(mount: Mount, kind: str = "ns") -> None:
    for path, data in CONTENTS.items():
        mount.namespaces[kind].inside.write(path, data)


def cache(mount: Mount, *arguments: str | Path, code: int = 0) -> str:
    done = mount.home.run("cache", *arguments)
    assert done.returncode == code, done.stdout + done.stderr + mount.log
    return done.stdout + done.stderr


def shown(mount: Mount) -> dict[str, int]:
    """What `show --json` says of the mount's cache: its folders' numbers together."""
    (one,) = json.loads(cache(mount, "show", "--json", mount.path))
    numbers = dict.fromkeys(("files", "bytes", "pinned_files", "pinned_bytes"), 0)
    for folder in one["folders"]:
        for key in numbers:
            numbers[key] += folder[key]
    return numbers


def data_files(mount: Mount) -> list[Path]:
    directory = paths.default_cache_dir(mount.environ) / paths.mount_id(mount.path)
    return [path for path in (directory / "data").glob("*/*") if path.stat().st_size]


@pytest.mark.parametrize("kind", ["sftp", "s3-rclone"])
def test_warm_fetches_all_that_is_missing(kind: str, servers: Servers, real_home: RealHome) -> None:
    with mounted(real_home, {"ns": servers.serve(kind)}) as mount:
        fill(mount)
        os.makedirs(mount.path / "ns" / "d" / "empty")
        told = cache(mount, "warm", mount.path / "ns" / "d")
        assert "9.0 MiB" not in told
        assert "13 files are in the cache" in told
        found = shown(mount)
        assert found["bytes"] == BELOW_D
        assert cache(mount, "warm", mount.path / "ns" / "d").startswith(told)
        assert shown(mount) == found
        for path, data in CONTENTS.items():
            assert (mount.path / "ns" / path).read_bytes() == data


def test_warm_tells_what_fails_and_goes_on(servers: Servers, real_home: RealHome) -> None:
    with mounted(real_home, {"ns": servers.serve("sftp")}, cache_size="16 MiB") as mount:
        fill(mount)
        mount.namespaces["ns"].inside.write("huge", bytes(17 * MIB))
        os.symlink("other", mount.path / "ns" / "link")
        root = mount.path / "ns"
        told = cache(mount, "warm", root / "huge", root / "absent", root / "d" / "sub", code=1)
        assert f"{root}/huge: it does not fit into the cache" in told
        assert f"{root}/absent: No such file or directory" in told
        assert "0 B of 0 files" in told
        told = cache(mount, "warm", root / "absent", root / "d" / "sub", root / "link", code=1)
        assert "13 files are in the cache" in told
        assert shown(mount)["bytes"] == BELOW_D - len(CONTENTS["d/large"]) + 2 * MIB


def test_ctrl_c_ends_warm_and_what_it_asked_for(sshd: SshServer, real_home: RealHome) -> None:
    with link_to(sshd.port) as link:
        config = real_home.path / "ssh_config"
        config.write_text(ssh_config_through(link, sshd))
        served = served_by_ssh(sshd, ssh_config=config)
        with mounted(real_home, {"ns": served}, expected=["no answer|timed out|broke"]) as mount:
            served.inside.write("file", bytes(30 * MIB))
            link.fail_after(4 * MIB, then="frozen")
            terminal = Terminal(mount.home, "cache", "warm", str(mount.path / "ns" / "file"))
            until(lambda: link.is_down and mount.status.open_files == 1)
            terminal.wait_for("fetching")
            terminal.write("\x03")
            assert terminal.exit_code() == 130
            until(lambda: mount.status.open_files == 0)
            link.cut()
            link.mend()
            assert (mount.path / "ns" / "file").read_bytes() == bytes(30 * MIB)


def test_pinned_files_outlive_others_and_a_remount(servers: Servers, real_home: RealHome) -> None:
    with mounted(real_home, {"ns": servers.serve("sftp")}, cache_size="24 MiB") as mount:
        fill(mount)
        root = mount.path / "ns"
        cache(mount, "warm", "--pin", root / "d")
        mount.remount()
        assert shown(mount)["pinned_bytes"] == BELOW_D
        assert "pinned: ns/d\n" in cache(mount, "show", mount.path)
        for number in range(3):
            mount.namespaces["ns"].inside.write(f"flood{number}", bytes(9 * MIB))
            assert (root / f"flood{number}").read_bytes() == bytes(9 * MIB)
        until(lambda: mount.status.cache_used <= 25 * MIB)
        assert shown(mount)["pinned_bytes"] == BELOW_D
        assert "it stays pinned, because" in cache(mount, "unpin", root / "d" / "sub", code=1)
        cache(mount, "pin", root / "other")
        told = cache(mount, "warm", "--pin", root / "flood0", root / "flood1", code=1)
        assert "the cache has no room" in told
        assert "unpin some of it, or raise cache_size" in told
        cache(mount, "unpin", mount.path)
        assert shown(mount)["pinned_files"] == 0
        assert "was not pinned" in cache(mount, "unpin", root / "d", code=1)


def test_clear_drops_what_is_clean(servers: Servers, real_home: RealHome) -> None:
    namespaces = {"ns": servers.serve("sftp"), "s3": servers.serve("s3-rclone")}
    with mounted(real_home, namespaces) as mount:
        for kind in namespaces:
            fill(mount, kind)
            cache(mount, "warm", mount.path / kind)
        root = mount.path / "ns"
        cache(mount, "pin", root / "other")
        with (root / "new").open("wb") as written, (root / "d" / "large").open("rb") as reader:
            assert reader.read(MIB) == CONTENTS["d/large"][:MIB]
            written.write(b"not uploaded yet" * 10_000)
            written.flush()
            cache(mount, "clear", root / "d")
            assert reader.read() == CONTENTS["d/large"][MIB:]
            everything = sum(map(len, CONTENTS.values()))
            found = shown(mount)["bytes"]
            assert everything + 2 * MIB <= found <= 2 * everything - BELOW_D + 10 * MIB
            cache(mount, "clear", mount.path)
            assert shown(mount)["pinned_bytes"] == 2 * MIB
        assert (root / "new").read_bytes() == b"not uploaded yet" * 10_000
        cache(mount, "clear", "--pinned", mount.path)
        assert shown(mount)["bytes"] == 0
        for path, data in CONTENTS.items():
            assert (root / path).read_bytes() == data


def test_verify_finds_damage_and_what_is_damaged_is_fetched_anew(
    servers: Servers, real_home: RealHome
) -> None:
    with mounted(real_home, {"ns": servers.serve("sftp")}, expected=["damaged"]) as mount:
        fill(mount)
        cache(mount, "warm", mount.path)
        assert "14 files: all as it was stored" in cache(mount, "verify", mount.path)
        large = max(data_files(mount), key=lambda path: path.stat().st_size)
        for is_mounted in (True, False):
            if not is_mounted:
                mount.umount()
            with large.open("r+b") as file:
                file.seek(5 * MIB)
                file.write(b"damage")
            told = cache(mount, "verify", mount.path, code=1)
            assert "64.0 KiB in 1 file did not match and were dropped" in told
            assert "all as it was stored" in cache(mount, "verify", mount.path)
            if is_mounted:
                assert (mount.path / "ns" / "d" / "large").read_bytes() == CONTENTS["d/large"]
        mount.mount()
        for path, data in CONTENTS.items():
            assert (mount.path / "ns" / path).read_bytes() == data


def test_caches_of_mounts_that_are_gone(servers: Servers, real_home: RealHome) -> None:
    with mounted(real_home, {"ns": servers.serve("sftp")}) as mount:
        fill(mount)
        cache(mount, "warm", mount.path)
        mount.umount()
        for _ in range(2):
            told = real_home.run("cache").stdout  # the machine may have mounts of others
            assert f"{mount.path}  (not mounted)" in told
            assert f"{len(CONTENTS)} files" in told
        assert shown(mount)["bytes"] == sum(map(len, CONTENTS.values()))
        assert "is not mounted now" in cache(mount, "warm", mount.path, code=1)
        cache(mount, "clear", mount.path)
        assert shown(mount)["bytes"] == 0
        assert not data_files(mount)
        mount.mount()
        assert (mount.path / "ns" / "other").read_bytes() == CONTENTS["other"]


def test_clearing_after_a_kill_keeps_what_was_not_uploaded(
    servers: Servers, real_home: RealHome
) -> None:
    served = servers.serve("sftp")
    with mounted(real_home, {"ns": served}) as mount:
        fill(mount)
        assert (mount.path / "ns" / "other").read_bytes() == CONTENTS["other"]
        file = os.open(mount.path / "ns" / "other", os.O_RDWR)
        os.pwrite(file, b"written", MIB)
        mount.kill_daemon()
        with pytest.raises(OSError, match=r"not connected|aborted"):
            os.close(file)
        real_home.run("umount", mount.path)
        cache(mount, "clear", "--pinned", mount.path)
        mount.mount()
        expected = CONTENTS["other"][:MIB] + b"written" + CONTENTS["other"][MIB + 7 :]
        assert (mount.path / "ns" / "other").read_bytes() == expected
        real_home.run("sync", mount.path)
        assert mount.status.pending == []
        assert served.inside.read("other") == expected


def test_a_place_without_a_cache_is_told(real_home: RealHome) -> None:
    for command in ("show", "clear", "verify", "warm", "pin", "unpin"):
        done = real_home.run("cache", command, real_home.path / "nowhere")
        assert (done.returncode, done.stdout) == (1, "")
        assert "is in no mount" in done.stderr
        assert done.stderr.count("\n") == 1
