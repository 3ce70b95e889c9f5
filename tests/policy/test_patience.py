"""How long a namespace may be silent (site/patience.py), on a clock of the test's own."""

from __future__ import annotations

import math

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcfs.site import patience
from hpcfs.site.patience import Patience, Reachability

SECONDS = 30.0


class Told:
    """A clock that shows what the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def answering(told: Told) -> Patience:
    policy = Patience(SECONDS, told, lambda: 0.0)
    policy.asked()
    policy.heard()
    policy.left()
    return policy


def test_silence_counts_from_the_last_answer_while_somebody_waits() -> None:
    told = Told()
    policy = answering(told)
    told.now += 500  # nobody asked: nothing is missed
    policy.asked()
    told.now += 20
    policy.asked()
    policy.heard()  # somebody else's answer
    policy.left()
    told.now += SECONDS - 0.1
    assert not policy.has_ended()
    told.now += 0.2
    assert policy.has_ended()
    assert policy.state is Reachability.AWAY
    assert policy.reason == "no answer within 30 s"


def test_who_gives_up_waiting_leaves_no_silence_behind() -> None:
    """Ctrl-C in one program is no reason to fail the next one's call at once."""
    told = Told()
    policy = answering(told)
    policy.asked()
    told.now += SECONDS - 1
    policy.left()
    told.now += 100
    policy.asked()
    assert not policy.has_ended()
    assert policy.deadline == told.now + SECONDS


def test_an_outage_counts_from_the_last_answer_whoever_waits() -> None:
    told = Told()
    policy = answering(told)
    policy.asked()
    told.now += 10
    policy.failed("connection lost")
    policy.left()
    assert policy.state is Reachability.FAILING
    told.now += 19
    assert not policy.has_ended()
    told.now += 1
    assert policy.has_ended()
    assert policy.reason == "connection lost"


def test_what_never_answered_is_away_at_once() -> None:
    policy = Patience(SECONDS, Told())
    policy.asked()
    policy.failed("no route to host")
    policy.left()
    assert policy.state is Reachability.AWAY


def test_looks_become_rarer_and_end_when_nobody_asks() -> None:
    told = Told()
    policy = answering(told)
    policy.asked()
    policy.failed("lost")
    policy.left()
    pauses = [policy.next_look() for _ in range(8)]
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5, 0.5, 0.5]
    told.now += SECONDS
    assert policy.has_ended()
    assert policy.next_look() == patience.LONGEST_AWAY_PAUSE / 2
    told.now += patience.LOOKING_SECONDS
    policy.wanted()
    assert policy.next_look() is not None
    told.now += patience.LOOKING_SECONDS + 1
    assert policy.next_look() is None
    assert policy.state is Reachability.ANSWERING, "the next call is patient again"


class Calls(RuleBasedStateMachine):
    """Whatever happens: away only after the patience, and never silent for longer than it while
    somebody waits and looks."""

    def __init__(self) -> None:
        super().__init__()
        self.told = Told()
        self.policy = answering(self.told)
        self.waiting = 0
        self.heard_at = self.told.now
        self.since = math.inf
        """When the silence began, by this test's own count."""

    def _is_missed(self) -> bool:
        return self.waiting > 0 or self.policy.state is not Reachability.ANSWERING

    @rule()
    def asked(self) -> None:
        if not self._is_missed():
            self.since = self.told.now
        self.policy.asked()
        self.waiting += 1

    @precondition(lambda self: self.waiting)
    @rule()
    def left(self) -> None:
        self.policy.left()
        self.waiting -= 1

    @rule()
    def heard(self) -> None:
        self.policy.heard()
        self.since = self.heard_at = self.told.now

    @precondition(lambda self: self.waiting)
    @rule()
    def failed(self) -> None:
        self.policy.failed("lost")

    @rule(seconds=st.floats(0.1, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.told.now += seconds
        self.policy.has_ended()

    @invariant()
    def is_away_in_time(self) -> None:
        silent = self.told.now - self.since
        if self.policy.state is Reachability.AWAY:
            assert silent >= SECONDS - 1e-6
        elif self._is_missed():
            assert silent < SECONDS + 1e-6


TestCalls = Calls.TestCase
TestCalls.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
