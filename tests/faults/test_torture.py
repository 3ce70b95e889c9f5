"""Half a minute of scripts/torture: programs at work while one fault after the other befalls them.

    scripts/torture --seconds 7200

runs it for hours. A failure tells its seed and what happened; timing is never the same twice, so
run it again with that seed and --faults that were near.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.torture import Torture

SECONDS = 20.0
SHORT = ("cut-5", "frozen-5", "server", "sessions", "worker", "daemon", "disk", "descriptors")
"""Each is over within ten seconds."""


@pytest.mark.timeout(600)
def test_nothing_is_lost_and_nothing_hangs(tmp_path: Path) -> None:
    torture = Torture(seed=7, seconds=SECONDS, faults=SHORT)
    torture.run(tmp_path)
    assert not torture.violations, torture.table()
    assert all(program.rounds["done"] for program in torture.programs), torture.table()
