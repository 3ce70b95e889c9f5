"""Any asyncio program can open a remote and use it: nothing of the mount comes along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

from hpcfs.model.sites import AnySite
from hpcfs.remotes import open as opening
from tests.support.s3 import S3Server
from tests.support.sshd import SshServer

PROGRAM = """
import asyncio, json, sys

from hpcfs.model.entries import Attributes
from hpcfs.model.sites import S3Root, S3Site, Secret, SftpRoot, SiteSpec, SshSite
from hpcfs.model.uploads import UploadRequest
from hpcfs.remotes.base import no_report
from hpcfs.remotes.open import open_site

given = json.loads(sys.stdin.read())
CONTENT = b"x,y\\n1,2\\n"


class Content:
    size = len(CONTENT)
    name = "results.csv"

    def read(self, offset, length):
        return CONTENT[offset : offset + length]


async def use(site, root):
    opened = open_site(SiteSpec(site, {"ns": root}, given["state_dir"], 1000, 1000))
    try:
        remote = opened.remote("ns")
        await remote.connect()
        await remote.make_directory(b"run", 0o755)
        request = UploadRequest(
            b"run/results.csv", len(CONTENT), 0, [(0, len(CONTENT))], Attributes(), 0o644,
            base_version=b"", replace=True,
        )
        entry = await remote.upload(request, Content(), no_report)
        assert (await remote.stat(b"run/results.csv")).version == entry.version
        names = [entry.name async for page in remote.list(b"run") for entry in page]
        assert names == [b"results.csv"], names
        pieces = await remote.fetch(b"run/results.csv", entry.version, 0, entry.size, 0)
        assert b"".join(pieces) == CONTENT
    finally:
        await opened.close()


async def main():
    await use(SshSite(given["host"], ssh_config=given["ssh_config"]), SftpRoot(given["folder"]))
    keys = Secret(given["access_key"]), Secret(given["secret_key"])
    s3 = S3Site(given["endpoint_url"], "us-east-1", access_key=keys[0], secret_key=keys[1])
    await use(s3, S3Root(given["bucket"], "open"))


asyncio.run(main())
packages = {name.split(".")[1] for name in sys.modules if name.startswith("hpcfs.")}
print(json.dumps([sorted(packages), "trio" in sys.modules]))
"""


def test_a_plain_asyncio_program_uses_remotes(
    sshd: SshServer, moto: S3Server, tmp_path: Path
) -> None:
    folder = sshd.root / "plain-program"
    folder.mkdir()
    site = sshd.site()
    given = {
        "state_dir": os.fspath(tmp_path),
        "host": site.host,
        "ssh_config": site.ssh_config,
        "folder": os.fspath(folder),
        "endpoint_url": moto.endpoint_url,
        "bucket": moto.bucket,
        "access_key": moto.access_key,
        "secret_key": moto.secret_key,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(given),
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    packages, has_trio = json.loads(done.stdout)
    assert set(packages) <= {"model", "system", "tunnel", "remotes"}
    assert not has_trio


def test_every_kind_of_site_can_be_opened() -> None:
    assert opening._KINDS.keys() == set(get_args(AnySite))
