"""Half a minute of scripts/torture: programs at work while one fault after the other befalls them.

    scripts/torture --seconds 7200

runs it for hours. A failure tells its seed and what happened; timing is never the same twice, so
run it again with that seed and --faults that were near.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.torture import Torture

SECONDS = 15.0
SHORT = ("cut-5", "frozen-5", "server", "sessions", "worker", "daemon", "disk", "descriptors")
"""Each is over within ten seconds."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["sftp", "s3"])
def test_nothing_is_lost_and_nothing_hangs(tmp_path: Path, kind: str) -> None:
    torture = Torture(seed=len(kind), seconds=SECONDS, kinds=(kind,), faults=SHORT)
    torture.run(tmp_path)
    assert not torture.violations, torture.table()
    for program in torture.programs:
        assert program.rounds["done"], torture.table()
