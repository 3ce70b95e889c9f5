"""Which threads wait for an answer to be able to end, as /proc tells."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from hpcfs.kernel.callers import Callers, has_signal, is_killed


def mask(*signals: signal.Signals) -> str:
    return f"{sum(1 << (number - 1) for number in signals):016x}"


def status(
    state: str = "D (disk sleep)", own: str = "0", shared: str = "0", blocked: str = "0",
    ignored: str = "0",
) -> str:  # fmt: skip
    return (
        f"Name:\tcat\nUmask:\t0022\nState:\t{state}\nGroups:\t \nSigQ:\t1/96365\nSigPnd:\t{own}\n"
        f"ShdPnd:\t{shared}\nSigBlk:\t{blocked}\nSigIgn:\t{ignored}\nSigCgt:\t0\n"
    )


def stat(flags: int, exit_code: int) -> str:
    after_name = ["S", *["0"] * 5, str(flags), *["0"] * 42, str(exit_code)]
    return f"12 (a) (b c) {' '.join(after_name)}\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGKILL"])
@pytest.mark.parametrize("where", ["own", "shared"])
def test_a_signal_that_waits_to_be_taken(name: str, where: str) -> None:
    assert has_signal(status(**{where: mask(signal.Signals[name])}))


def test_what_does_not_interrupt() -> None:
    interrupt = mask(signal.SIGINT)
    assert not has_signal(status())
    assert not has_signal(status(shared=interrupt, blocked=interrupt))
    assert not has_signal(status(shared=interrupt, ignored=interrupt))
    assert not has_signal(status("T (stopped)", shared=interrupt))
    assert not has_signal(status("S (sleeping)", shared=interrupt))
    assert not has_signal(status(shared=mask(signal.SIGCHLD, signal.SIGALRM, signal.SIGUSR1)))


def test_a_thread_that_a_signal_ends() -> None:
    exiting, core_dumped = 0x40040C, 0x80
    assert is_killed(stat(exiting, signal.SIGKILL))
    assert is_killed(stat(exiting, signal.SIGQUIT | core_dumped))
    assert not is_killed(stat(exiting, 1 << 8)), "exit(1) waits for its files like close(2)"
    assert not is_killed(stat(0x400000, signal.SIGKILL)), "it is not ending yet"


def make_thread(proc: Path, process: int, thread: int, text: str, started: str = "") -> None:
    text = text.replace("\nState:", f"\nTgid:\t{process}\nState:")
    for place in (proc / f"{process}/task/{thread}", proc / str(thread)):
        place.mkdir(parents=True, exist_ok=True)
        (place / "status").write_text(text)
        (place / "stat").write_text(stat(0, 0))
        (place / "children").write_text(started)


def test_whoever_may_use_an_open_file(tmp_path: Path) -> None:
    """The one that opened it, another thread, and what inherited it; nobody else."""
    idle, interrupted = status("S (sleeping)"), status(own=mask(signal.SIGINT))
    make_thread(tmp_path, 10, 10, idle, "20 ")
    make_thread(tmp_path, 10, 11, idle)
    make_thread(tmp_path, 20, 20, idle, "30 31 ")
    make_thread(tmp_path, 30, 30, idle)
    make_thread(tmp_path, 40, 40, interrupted)
    callers = Callers(tmp_path)

    def is_any_interrupted(opener: int) -> bool:
        return any(map(callers.is_interrupted, callers.users_of(opener)))

    assert not is_any_interrupted(10)
    for process, thread in [(10, 10), (10, 11), (20, 20), (30, 30)]:
        kept = (tmp_path / f"{thread}/status").read_text()
        (tmp_path / f"{thread}/status").write_text(interrupted)
        assert is_any_interrupted(10), (process, thread)
        assert not is_any_interrupted(99), "nothing is known of who is gone"
        (tmp_path / f"{thread}/status").write_text(kept)
    assert callers.is_interrupted(40)
    assert [callers.process_of(thread) for thread in (10, 11, 40, 99)] == [10, 10, 40, 99]
    assert not callers.is_interrupted(0), "of another namespace of process ids"
