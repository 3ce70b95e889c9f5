"""Real S3 servers for tests: rclone's `serve s3` (files on disk) and moto's (full semantics).

Each runs as a child process on a loopback port of its own, and is gone when its block ends.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import botocore.session
from botocore.config import Config

ACCESS_KEY = "AKIAHPCFSTESTACCESS0"
SECRET_KEY = "hpcfs/test/secret/key/with/forty/chars/0"  # rclone refuses short ones
BUCKET = "hpcfs-test-bucket"
REGION = "us-east-1"
START_TIMEOUT = 30.0
PORT_ATTEMPTS = 5


@dataclass(frozen=True)
class S3Server:
    """Where a running server is, and the bucket that already exists on it."""

    endpoint_url: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    bucket: str = BUCKET
    region: str = REGION

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """A plain botocore client: what another program would see of the bucket."""
        session = botocore.session.Session()
        client = session.create_client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        try:
            yield client
        finally:
            client.close()


def rclone_binary() -> Path:
    """The rclone that pip installed beside this interpreter, else the one on PATH."""
    beside = Path(sys.executable).parent / "rclone"
    if beside.exists():
        return beside
    found = shutil.which("rclone")
    assert found is not None, "rclone is missing: pip install 'hpcfs[test]'"
    return Path(found)


@contextlib.contextmanager
def rclone_s3(directory: Path, *options: str) -> Iterator[S3Server]:
    """rclone's server; its buckets are the folders of `directory`."""
    (directory / BUCKET).mkdir(parents=True, exist_ok=True)

    def command(port: int) -> list[str]:
        return [
            *(str(rclone_binary()), "serve", "s3", "--addr", f"127.0.0.1:{port}"),
            *("--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--config", "/dev/null"),
            *("--vfs-cache-mode", "off", "--dir-cache-time", "1h", *options, str(directory)),
        ]

    with _serving(command) as port:
        yield S3Server(f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def moto_s3() -> Iterator[S3Server]:
    """moto's server, all in memory."""

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]

    with _serving(command) as port:
        server = S3Server(f"http://127.0.0.1:{port}")
        with server.client() as client:
            client.create_bucket(Bucket=server.bucket)
        yield server


READING = {
    "Version": "2012-10-17",
    "Statement": {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"},
}


def with_credentials_that_read(server: S3Server) -> S3Server:
    """The same, of moto's, for somebody who may only read. Nobody else gets in afterwards."""
    iam = botocore.session.Session().create_client(
        "iam",
        endpoint_url=server.endpoint_url,
        region_name=server.region,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )
    iam.create_user(UserName="reader")
    policy = {"PolicyName": "reading", "PolicyDocument": json.dumps(READING)}
    iam.put_user_policy(UserName="reader", **policy)
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    enforcing = urllib.request.Request(
        f"{server.endpoint_url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}
    )
    urllib.request.urlopen(enforcing).close()
    return replace(server, access_key=key["AccessKeyId"], secret_key=key["SecretAccessKey"])


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _serving(command: Callable[[int], list[str]]) -> Iterator[int]:
    """Run a server until the block ends; another port is tried where one was taken meanwhile."""
    with tempfile.TemporaryFile() as log:
        for _ in range(PORT_ATTEMPTS):
            port = free_port()
            process = subprocess.Popen(command(port), stdout=log, stderr=log)
            try:
                if _answers(process, port):
                    yield port
                    return
            finally:
                process.kill()
                process.wait()
        raise RuntimeError(f"the S3 server did not start: {_tail(log)}")


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the port accepts connections; false once the process has given up."""
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return process.poll() is None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)  # the poll interval, cut short when the process gives up
    return False


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read()[-2000:].decode(errors="replace")
