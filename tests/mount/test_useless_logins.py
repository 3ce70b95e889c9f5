"""What ends every attempt in the same way: told by `hpcfs mount` and by `hpcfs status`."""

from __future__ import annotations

import errno
import http.server
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.conftest import Servers
from tests.support.mounts import Mount, RealHome, Served, errno_of, mounted, served_by_ssh
from tests.support.sshd import LOOPBACK, SshServer, sftp_server_binary, ssh_server

NOISY = f"echo Welcome; exec {sftp_server_binary()}"
ENDS = "exit 1"
WORDS = {NOISY: "bashrc", ENDS: "exit code 1"}


@pytest.fixture(params=[NOISY, ENDS], ids=["noisy", "ends"])
def useless(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SshServer]:
    script = tmp_path / "subsystem"
    script.write_text(f"#!/bin/sh\n{request.param}\n")
    script.chmod(0o755)
    with ssh_server(tmp_path / "s", "LogLevel INFO", subsystem=str(script)) as server:
        yield server


def words_of(server: SshServer) -> str:
    script = (server.directory.parent / "subsystem").read_text()
    return next(words for line, words in WORDS.items() if line in script)


@pytest.mark.parametrize("more", [(), ("--foreground",)], ids=["", "foreground"])
def test_a_single_one_is_not_mounted(
    useless: SshServer, real_home: RealHome, more: tuple[str, ...]
) -> None:
    (real_home.path / ".ssh").mkdir()
    (real_home.path / ".ssh" / "config").write_text(useless.config_text())
    mount = Mount(real_home, {})
    mount.path.mkdir()
    done = real_home.run("mount", f"cluster:{useless.root}", mount.path, *more)
    assert (done.returncode, done.stdout) == (1, "")
    assert words_of(useless) in done.stderr
    assert more or done.stderr.count("\n") == 1
    assert not mount.is_mounted


@pytest.mark.parametrize("transport", ["asyncssh", "openssh"])
def test_one_of_several_is_named_and_the_others_work(
    useless: SshServer, transport: str, servers: Servers, real_home: RealHome
) -> None:
    words = words_of(useless)
    served = {
        "good": servers.serve("sftp"),
        "bad": served_by_ssh(useless).but(transport=transport),
    }
    with mounted(real_home, served, expected=[words]) as mount:
        assert mount.told.startswith("hpcfs: bad: ")
        assert mount.told.count("\n") == 1
        assert words in mount.told
        (mount.path / "good" / "file").write_text("works")
        for _ in range(3):
            assert errno_of(os.listdir, mount.path / "bad") == errno.ENXIO
        found = mount.namespace("bad")
        assert (found.state, words in found.reason) == ("failed", True)
        assert mount.namespace("good").state == "connected"
        (line,) = [
            line
            for line in real_home.run("status", mount.path).stdout.splitlines()
            if line.startswith("  bad ")
        ]
        assert words in line
    assert useless.log.count("Accepted ") == 1


# --- servers that are something else --------------------------------------------------------------


@contextmanager
def web(status: int, body: bytes) -> Iterator[str]:
    class Answers(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = answer  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer((LOOPBACK, 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://{LOOPBACK}:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "body"), [(418, b"teapot"), (500, b""), (404, b"")])
def test_an_endpoint_that_is_no_s3_server(
    status: int, body: bytes, servers: Servers, real_home: RealHome
) -> None:
    with web(status, body) as endpoint:
        served: dict[str, Served] = {"b": servers.serve("s3-rclone").but(endpoint_url=endpoint)}
        with mounted(real_home, served, expected=["namespace b:"]) as mount:
            found = mount.namespace("b")
            assert found.state == "failed"
            assert found.reason
            assert f"hpcfs: b: {found.reason}\n" == mount.told
