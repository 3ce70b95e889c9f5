"""Path algebra and back-off: pure."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from hpcfs.model import paths
from hpcfs.model.backoff import REFUSED, UNREACHED, Backoff, pause_after

names = st.binary(min_size=1, max_size=4).filter(lambda name: b"/" not in name)
some_paths = st.lists(names, max_size=5).map(b"/".join)


@given(some_paths, names)
def test_what_is_joined_comes_apart_again(directory: bytes, name: bytes) -> None:
    path = paths.join(directory, name)
    assert paths.split(path) == (directory, name)
    assert (paths.parent(path), paths.name(path)) == (directory, name)
    assert paths.names(path) == [*paths.names(directory), name]
    assert paths.beside(path, b"other") == paths.join(directory, b"other")


@given(some_paths)
def test_the_root_is_its_own_parent_and_has_no_name(path: bytes) -> None:
    assert paths.join(b"", path) == paths.join(path, b"") == path
    assert (paths.parent(b""), paths.name(b""), paths.names(b"")) == (b"", b"", [])


@pytest.mark.parametrize(
    ("path", "top", "is_below"),
    [
        (b"a/b", b"a", True),
        (b"a", b"a", True),
        (b"a", b"", True),
        (b"", b"", True),
        (b"ab", b"a", False),
        (b"a", b"a/b", False),
    ],
)
def test_a_name_that_only_begins_alike_is_not_below(
    path: bytes, top: bytes, is_below: bool
) -> None:
    assert paths.is_below(path, top) == is_below


def test_pauses_double_up_to_half_a_minute_for_however_many_failures() -> None:
    assert [pause_after(failures) for failures in (1, 2, 3, 4, 5, 6, 7)] == [1, 2, 4, 8, 16, 30, 30]
    assert pause_after(10**6) == 30


def test_a_pause_that_is_ended_early_is_still_followed_by_a_longer_one() -> None:
    now = 0.0
    backoff = Backoff(lambda: now, draw=lambda: 0.0)
    assert not backoff.is_waiting
    backoff.failed()
    assert backoff.is_waiting
    backoff.try_now()
    assert not backoff.is_waiting
    backoff.failed()
    assert backoff.retry_at == 2
    backoff.succeeded()
    backoff.failed()
    assert backoff.retry_at == 1


def test_where_nobody_answers_it_is_tried_again_soon_and_at_random() -> None:
    now, drawn = 0.0, 0.0
    backoff = Backoff(lambda: now, draw=lambda: drawn)
    longest = []
    for _ in range(5):
        backoff.failed(UNREACHED)
        longest.append(backoff.retry_at)
    assert longest == [0.5, 1, 2, 2, 2], "an outage ends for the user soon after it has ended"
    drawn = 0.999
    backoff.failed(UNREACHED)
    assert 1 <= backoff.retry_at < 1.01, "a drawn part is taken off"


def test_a_refused_login_is_repeated_after_a_minute_at_the_soonest() -> None:
    backoff = Backoff(lambda: 0.0, draw=lambda: 0.999)
    backoff.failed(UNREACHED)
    waits = []
    for _ in range(4):
        backoff.failed(REFUSED)
        waits.append(backoff.retry_at)
    assert waits == [60, 120, 240, 240]
    attempts = [0.0]
    while attempts[-1] < 600:
        attempts.append(attempts[-1] + waits[min(len(attempts) - 1, 3)])
    assert sum(at <= 600 for at in attempts) < 5, "fail2ban bans after five in ten minutes"


def test_a_failure_of_another_kind_begins_with_its_shortest_pause() -> None:
    backoff = Backoff(lambda: 0.0, draw=lambda: 0.0)
    for _ in range(4):
        backoff.failed(UNREACHED)
    backoff.failed()
    assert backoff.retry_at == 1
