"""The demo's guided tour: a few ordinary commands on the mounted tree, shown and run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from hpcfs.cli.output import complain
from hpcfs.system.text import printable

COMMAND_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class TourStep:
    """A command of the tour. `silence` is printed if the command prints nothing."""

    explanation: str
    command: tuple[str, ...]
    silence: str = ""


def steps(target: Path) -> list[TourStep]:
    """Return the commands, for the tools that this machine has."""
    found = [
        TourStep(
            "Three remotes in one tree: a cluster over SSH, a bucket over S3, and a laptop that "
            "shares two folders through its login to the cluster.",
            ("ls", "-l", ".", "cluster", "bucket", "laptop", "cluster/results"),
        ),
        TourStep(
            "From the laptop to the cluster: no SSH server and no open port on the laptop.",
            ("cp", "-rv", "laptop/data/inputs", "cluster/"),
        ),
        TourStep(
            "From the cluster to the bucket with plain cp: it returns when the bucket has it all.",
            ("cp", "-v", "cluster/results/model.bin", "bucket/"),
        ),
        TourStep(
            "A directory by rsync, with modes and times ...",
            ("rsync", "-ai", "cluster/results", "bucket/"),
        ),
        TourStep(
            "... and again: nothing left to do.",
            ("rsync", "-ai", "cluster/results", "bucket/"),
            "(nothing was transferred)",
        ),
        TourStep(
            "Both copies are the same.",
            ("diff", "-r", "cluster/results", "bucket/results"),
            "(no difference)",
        ),
        TourStep("What is mounted, and how it is doing.", ("hpcfs", "status", str(target))),
    ]
    if shutil.which("rsync"):
        return found
    complain("rsync is not installed: the tour copies with 'cp -a' instead")
    copying = TourStep(
        "A directory, with modes and times.", ("cp", "-a", "cluster/results", "bucket/")
    )
    return [*found[:3], copying, *found[5:]]


def run(target: Path) -> bool:
    """Run the tour; return whether all commands succeeded. The first failure ends it."""
    return all(_run_step(step, target) for step in steps(target))


def _run_step(step: TourStep, target: Path) -> bool:
    click.secho(f"\n# {step.explanation}", dim=True)
    click.secho(f"$ {shlex.join(step.command)}", bold=True)
    own_commands = Path(sys.argv[0]).resolve().parent
    result = subprocess.run(
        step.command,
        cwd=target,
        env={**os.environ, "PATH": f"{own_commands}:{os.environ.get('PATH', os.defpath)}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=COMMAND_SECONDS,
        check=False,
    )
    for line in result.stdout.splitlines() or [step.silence]:
        click.echo(printable(line))
    if result.returncode != 0:
        complain(f"'{shlex.join(step.command)}' failed with exit code {result.returncode}")
    return result.returncode == 0
