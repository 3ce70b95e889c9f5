"""What a server says reaches no log and no terminal as it is, and memory no file."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hpcfs.cli import output
from hpcfs.model.errors import SetupError
from hpcfs.site import worker_process
from hpcfs.system import dumps, logs
from hpcfs.worker import main

EVIL = "a\x1b]0;title\x07\r\nb\x9b2J\u202ec\udcff"
ESCAPED = r"a\x1b]0;title\x07\r\nb\x9b2J\u202ec\udcff"


@pytest.fixture
def restored() -> object:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers[:], root.level = before[0], before[1]


def test_a_log_has_one_printable_line_for_each_message(tmp_path: Path, restored: object) -> None:
    file = tmp_path / "log"
    logs.set_up(file, "INFO", "mount", to_stderr=False)
    logging.getLogger("hpcfs").warning("the server says %s", EVIL)
    (line,) = file.read_text().splitlines()
    assert line.endswith(f"WARNING the server says {ESCAPED}")
    assert line.isprintable()


def test_who_says_a_lot_fills_no_disk(tmp_path: Path, restored: object) -> None:
    file = tmp_path / "log"
    logs.set_up(file, "INFO", "mount", to_stderr=False)
    logging.getLogger("hpcfs").warning("the server says %s", "x" * 1_000_000)
    assert file.read_text().endswith("x… (cut)\n")
    assert file.stat().st_size < logs.MAX_LINE + 100


@pytest.mark.parametrize("kind", ["link", "hard link", "theirs", "fifo"])
def test_a_log_is_no_other_file(tmp_path: Path, restored: object, kind: str) -> None:
    """Whoever may rename in a directory above could put one there."""
    other, file = tmp_path / ".bashrc", tmp_path / "log"
    other.write_text("")
    if kind == "link":
        file.symlink_to(other)
    elif kind == "hard link":
        file.hardlink_to(other)
    elif kind == "theirs":
        file.touch()
        os.chown(file, 12345, -1)
    else:
        os.mkfifo(file)
    with pytest.raises(SetupError, match="log can't be written"):
        logs.set_up(file, "INFO", "mount", to_stderr=False)
    with worker_process._log(file) as stream:
        stream.write(b"what the server says")
    assert other.read_text() == ""
    assert kind == "fifo" or file.stat().st_size == 0


def test_so_has_a_traceback(tmp_path: Path, restored: object) -> None:
    file = tmp_path / "log"
    logs.set_up(file, "INFO", "mount", to_stderr=False)
    try:
        _fail()
    except ValueError:
        logging.getLogger("hpcfs").exception("it failed")
    assert all(line.isprintable() for line in file.read_text().splitlines())
    assert r"\x1b]0;title" in file.read_text()


def _fail() -> None:
    raise ValueError(EVIL)


def test_so_has_the_transfer_process(restored: object) -> None:
    logging.getLogger().handlers.clear()
    main.set_up_logging("INFO")
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler.formatter, logs.Formatter)


def test_json_for_programs_is_safe_on_a_terminal() -> None:
    shown = output.json_line({"reason": EVIL.replace("\udcff", "ü")})
    assert shown.isprintable()
    assert json.loads(shown) == {"reason": EVIL.replace("\udcff", "ü")}


def test_a_traceback_for_the_user_is_safe(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_traceback(ValueError(EVIL))
    shown = capsys.readouterr().err
    assert "ValueError: a\N{REPLACEMENT CHARACTER}]0;title" in shown
    assert all(line.isprintable() for line in shown.splitlines())


@pytest.mark.slow
def test_dumps_are_forbidden() -> None:
    """In a child, since it is for ever; PR_GET_DUMPABLE is 3."""
    program = (
        "import ctypes, resource; from hpcfs.system import dumps; dumps.forbid();"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), *resource.getrlimit(resource.RLIMIT_CORE))"
    )
    told = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["0", "0", "0"]


@pytest.mark.slow
def test_a_process_that_does_not_dump_still_reads_of_itself_in_proc(tmp_path: Path) -> None:
    """As an ordinary user: root may all. The tunnel opens its files by /proc/self/fd."""
    file = tmp_path / "file"
    file.write_text("content")
    place = os.open(file, os.O_PATH)
    reader, writer = os.pipe()
    worker_process = os.fork()
    if worker_process == 0:
        outcome = b"failed"
        try:
            if os.getuid() == 0:
                os.chmod(file, 0o644)
                os.setuid(12345)
            dumps.forbid()
            fd = os.open(f"/proc/self/fd/{place}", os.O_RDONLY)
            name = os.readlink(f"/proc/self/fd/{fd}")
            outcome = os.read(fd, 100) if name == str(file) else name.encode()
            Path("/proc/thread-self/schedstat").read_bytes()
            Path("/proc/self/mountinfo").read_bytes()
        finally:
            os.write(writer, outcome)
            os._exit(0)
    os.waitpid(worker_process, 0)
    told = os.read(reader, 1000)
    for fd in (reader, writer, place):
        os.close(fd)
    assert told == b"content"
    assert resource.getrlimit(resource.RLIMIT_CORE) is not None
