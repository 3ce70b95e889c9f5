"""Looks at remotes that nobody waits long for, in virtual time."""

from __future__ import annotations

from typing import cast

import trio
import trio.testing

from hpcfs.filesystem.glances import AGAIN_SECONDS, Glances
from hpcfs.site.namespace import Namespace

SECONDS = 2.0


def test_who_does_not_answer_is_left_alone_for_a_while() -> None:
    silent, alive = cast("Namespace", "silent"), cast("Namespace", "alive")
    asked: list[Namespace] = []

    async def story() -> None:
        glances = Glances(SECONDS, trio.current_time)

        async def take(namespace: Namespace, answers_after: float) -> float:
            async def ask() -> None:
                asked.append(namespace)
                await trio.sleep(answers_after)

            began = trio.current_time()
            await glances.take(namespace, ask)
            return trio.current_time() - began

        assert await take(silent, 100) == SECONDS
        assert await take(silent, 100) == 0
        assert await take(alive, 1) == 1
        assert await take(alive, 1) == 1
        assert asked == [silent, alive, alive]
        await trio.sleep(AGAIN_SECONDS)
        assert await take(silent, 1) == 1
        assert await take(silent, 1) == 1

    trio.run(story, clock=trio.testing.MockClock(autojump_threshold=0))
