"""Signals that a batch system sends to every process of a job."""

from __future__ import annotations

import signal

OF_A_JOB = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
"""Slurm warns a job before its limit with one of these (`sbatch --signal`) and sends SIGTERM at the
limit, to all processes of a step and not only to the user's program."""


def outlive_job() -> None:
    """Ignore these signals in this process and in those that it starts. The process is told by
    other means when to end, and until then the job's program may have data to save."""
    for number in OF_A_JOB:
        signal.signal(number, signal.SIG_IGN)
