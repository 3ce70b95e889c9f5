"""`hpcfs login`: a login that was refused, and somebody at a terminal for the next one."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.command import Terminal
from tests.support.mounts import (
    Mount,
    RealHome,
    errno_of,
    mounted,
    served_by_s3,
    served_by_ssh,
    until,
)
from tests.support.s3 import S3Server
from tests.support.sshd import SshServer, ssh_server, write_key

PASSPHRASE = "open sesame"
REFUSED = ("asks for a password", "refused the login", "host key of")


def locked(server: SshServer, transport: str = "asyncssh") -> None:
    """Only a key under a passphrase leads in: each transport reads a format of its own."""
    if transport == "openssh":
        server.key.unlink()
        line = ["ssh-keygen", "-q", "-t", "ed25519", "-N", PASSPHRASE, "-f", str(server.key)]
        subprocess.run(line, check=True, timeout=30)
    else:
        write_key(server.key, PASSPHRASE)
    server.authorized_keys.write_text(Path(f"{server.key}.pub").read_text())


def logged_in(mount: Mount, names: Sequence[str], *dialogue: tuple[str, str]) -> tuple[int, str]:
    """The exit code, and what the terminal showed. `dialogue`: a question's end and its answer."""
    terminal = Terminal(mount.home, "login", mount.path, *names)
    for question, answer in dialogue:
        terminal.wait_for(question)
        terminal.write(f"{answer}\n")
    code = terminal.exit_code()
    return code, terminal.shown


@pytest.mark.parametrize("transport", ["asyncssh", "openssh"])
def test_a_mount_without_a_terminal_is_logged_in_later(
    transport: str, real_home: RealHome, sshd: SshServer, tmp_path: Path
) -> None:
    with ssh_server(tmp_path / "s", "LogLevel VERBOSE") as server:
        locked(server, transport)
        far = served_by_ssh(server).but(transport=transport)
        far.inside.write("file", b"bytes")
        served = {"far": far, "near": served_by_ssh(sshd)}
        with mounted(real_home, served, expected=REFUSED) as mount:
            assert mount.namespace("far").needs_login
            assert not mount.namespace("near").needs_login
            assert "needs login ('hpcfs login far')" in real_home.run("status", mount.path).stdout
            assert errno_of(lambda: os.listdir(mount.path / "far")) == errno.EACCES
            tries = server.log.count("Connection from")
            assert errno_of(lambda: os.listdir(mount.path / "far")) == errno.EACCES
            assert server.log.count("Connection from") == tries, "not by itself"

            without = real_home.run("login", mount.path)
            assert (without.returncode, "terminal" in without.stderr) == (1, True)
            code, shown = logged_in(mount, [], ("assphrase", PASSPHRASE))
            assert (code, f"{mount.path / 'far'}: logged in" in shown) == (0, True), shown
            assert PASSPHRASE not in shown
            assert os.listdir(mount.path / "far") == ["file"]
            assert (mount.path / "far" / "file").read_bytes() == b"bytes"
            assert mount.namespace("far").state == "connected"
            assert not mount.namespace("far").needs_login
            assert PASSPHRASE not in mount.log

            again = real_home.run("login", mount.path)
            assert (again.returncode, again.stdout) == (0, "nothing needs a login\n")
            named = real_home.run("login", mount.path, "near")
            assert (named.returncode, named.stdout) == (0, f"{mount.path / 'near'}: logged in\n")
            wrong = real_home.run("login", mount.path, "nowhere")
            assert (wrong.returncode, "nowhere" in wrong.stderr) == (1, True)


def test_whoever_types_in_vain_is_told_and_nothing_is_tried_again(
    real_home: RealHome, sshd: SshServer, tmp_path: Path
) -> None:
    with ssh_server(tmp_path / "s", "LogLevel VERBOSE") as server:
        locked(server)
        served = {"far": served_by_ssh(server), "near": served_by_ssh(sshd)}
        with mounted(real_home, served, expected=REFUSED) as mount:
            code, shown = logged_in(mount, ["far"], ("assphrase", ""))
            assert (code, "refused the login" in shown) == (1, True), shown
            tries = server.log.count("Connection from")
            for _ in range(3):
                assert errno_of(lambda: os.listdir(mount.path / "far")) == errno.EACCES
            assert mount.namespace("far").needs_login
            assert server.log.count("Connection from") == tries


def test_an_unknown_host_is_decided_about(
    real_home: RealHome, sshd: SshServer, tmp_path: Path
) -> None:
    with ssh_server(tmp_path / "s") as server:
        server.known_hosts.write_text("")
        served = {"far": served_by_ssh(server), "near": served_by_ssh(sshd)}
        with mounted(real_home, served, expected=REFUSED) as mount:
            assert mount.namespace("far").needs_login
            code, shown = logged_in(mount, [], ("yes/no", "yes"))
            assert (code, "logged in" in shown) == (0, True), shown
            assert os.listdir(mount.path / "far") == []


@pytest.mark.parametrize("how", ["by itself", "hpcfs login"])
def test_s3_credentials_that_are_mended(
    how: str, real_home: RealHome, sshd: SshServer, rclone: S3Server
) -> None:
    far = served_by_s3("s3-rclone", rclone)
    far.inside.write("file", b"bytes")
    good = far.credentials
    assert good is not None
    wrong = dataclasses.replace(far, credentials=(good[0], "wrong"))
    served = {"far": wrong, "near": served_by_ssh(sshd)}
    with mounted(real_home, served, expected=("S3 refused", "refused")) as mount:
        assert mount.namespace("far").needs_login
        assert errno_of(lambda: os.listdir(mount.path / "far")) == errno.EACCES
        mount.namespaces["far"] = far
        mount.write_config()
        if how == "hpcfs login":
            assert real_home.run("login", mount.path).stdout == f"{mount.path / 'far'}: logged in\n"
        until(lambda: errno_of(lambda: os.listdir(mount.path / "far")) is None)
        assert os.listdir(mount.path / "far") == ["file"]
        assert not mount.namespace("far").needs_login


def test_a_key_that_is_mended_is_used_by_itself(
    real_home: RealHome, sshd: SshServer, tmp_path: Path
) -> None:
    with ssh_server(tmp_path / "s") as server:
        halves = server.key, Path(f"{server.key}.pub")
        good = [half.read_text() for half in halves]
        write_key(server.key)
        served = {"far": served_by_ssh(server), "near": served_by_ssh(sshd)}
        with mounted(real_home, served, expected=REFUSED) as mount:
            assert mount.namespace("far").needs_login
            for half, text in zip(halves, good, strict=True):
                half.write_text(text)
            until(lambda: errno_of(lambda: os.listdir(mount.path / "far")) is None)
            assert not mount.namespace("far").needs_login
