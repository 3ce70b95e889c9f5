"""The sample files: a small project's home directory on a cluster, a bucket, and a laptop's
folders.

They are the same bytes in every demo, and small enough to be written in a moment.
"""

from __future__ import annotations

import random
from pathlib import Path

MODEL_BYTES = 8 * 1024 * 1024
RUNS = 3
EPOCHS = 20
INPUTS = 3

_README = """\
This is the demo's cluster: an SFTP server on this machine, over a temporary directory.
Change what you like; all of it is gone when the demo ends.
"""

_LAPTOP = """\
This is the demo's laptop: a folder that a process shares through a reverse tunnel, as
'hpcfs tunnel' does. It logs in to the demo's cluster over SSH; nothing listens on the laptop.
"""

_MODEL = """\
def loss(prediction: float, truth: float) -> float:
    return (prediction - truth) ** 2
"""

_JOB = """\
#!/bin/bash
#SBATCH --job-name=train
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
srun python scripts/train.py --out results/
"""

_SCRIPT = """\
#!/usr/bin/env python3
print("training")
"""

_LABELS = "file,label\ncat-001.png,cat\ndog-001.png,dog\n"


def write_cluster(home: Path) -> None:
    """Fill the directory that the SFTP server shows as the user's home."""
    for name in ("jobs", "logs", "results", "scripts"):
        (home / name).mkdir(parents=True)
    (home / "README.txt").write_text(_README)
    (home / "jobs" / "train.slurm").write_text(_JOB)
    script = home / "scripts" / "train.py"
    script.write_text(_SCRIPT)
    script.chmod(0o755)
    source = random.Random(2025)  # noqa: S311 - sample data, no secret
    for run in range(1, RUNS + 1):
        (home / "logs" / f"run-{run}.log").write_text(f"run {run} finished\n")
        (home / "results" / f"run-{run}.csv").write_text(_metrics(source))
    (home / "logs" / "latest.log").symlink_to(f"run-{RUNS}.log")
    (home / "results" / "model.bin").write_bytes(source.randbytes(MODEL_BYTES))


def write_bucket(bucket: Path) -> None:
    """Fill the directory that the S3 server shows as a bucket."""
    images = bucket / "datasets" / "images"
    images.mkdir(parents=True)
    (images / "labels.csv").write_text(_LABELS)
    (bucket / "README.txt").write_text(_README.replace("cluster: an SFTP", "bucket: an S3"))


def write_laptop(home: Path) -> None:
    """Fill the directory whose folders the tunnel shares."""
    inputs, source = home / "data" / "inputs", home / "src"
    inputs.mkdir(parents=True)
    source.mkdir()
    (home / "data" / "README.txt").write_text(_LAPTOP)
    (source / "model.py").write_text(_MODEL)
    for number in range(1, INPUTS + 1):
        draws = random.Random(number)  # noqa: S311 - sample data, no secret
        (inputs / f"sample-{number}.csv").write_text(_metrics(draws))


def _metrics(source: random.Random) -> str:
    rows = [f"{epoch},{source.random() / epoch:.4f}" for epoch in range(1, EPOCHS + 1)]
    return "\n".join(["epoch,loss", *rows]) + "\n"
