"""Which programs make every name that they ask for in vain."""

from __future__ import annotations

from hpcfs.filesystem.create_predictor import MOST_WANTED, RUN, UNKNOWN_PROCESS, CreatePredictor
from tests.policy.test_listing_cache import folder

CP, OTHER = 100, 101


def create(predictor: CreatePredictor, count: int, process: int = CP) -> None:
    directory = folder()
    for number in range(count):
        name = (directory, b"%d" % number)
        predictor.missed(process, name)
        predictor.created(process, name)


def test_a_program_that_makes_all_it_asks_for() -> None:
    predictor = CreatePredictor()
    create(predictor, RUN - 1)
    assert not predictor.is_creating(CP)
    create(predictor, 1)
    assert predictor.is_creating(CP)
    assert not predictor.is_creating(OTHER)


def test_rsync_asks_for_two_names_and_makes_both() -> None:
    predictor, directory = CreatePredictor(), folder()
    for number in range(RUN):
        name, temporary = (directory, b"%d" % number), (directory, b".%d" % number)
        predictor.missed(CP, name)
        predictor.missed(CP, temporary)
        predictor.created(CP, temporary)
        predictor.created(CP, name)
    assert predictor.is_creating(CP)


def test_who_asks_for_more_than_it_makes_is_none() -> None:
    predictor, directory = CreatePredictor(), folder()
    create(predictor, RUN)
    for number in range(MOST_WANTED + 1):
        predictor.missed(CP, (directory, b"?%d" % number))
    assert not predictor.is_creating(CP)


def test_who_does_something_else_is_none_any_more() -> None:
    predictor = CreatePredictor()
    create(predictor, RUN)
    predictor.does_else(CP)
    assert not predictor.is_creating(CP)


def test_nothing_is_known_of_processes_without_a_number() -> None:
    predictor = CreatePredictor()
    create(predictor, 2 * RUN, UNKNOWN_PROCESS)
    assert not predictor.is_creating(UNKNOWN_PROCESS)


def test_few_processes_are_remembered() -> None:
    predictor = CreatePredictor()
    for process in range(1, 200):
        create(predictor, RUN, process)
    assert not predictor.is_creating(1)
    assert predictor.is_creating(199)
    assert len(predictor._processes) <= 100
