"""Which programs make every name that they ask for in vain."""

from __future__ import annotations

from hpcfs.filesystem.makers import MOST_WANTED, RUN, UNKNOWN_PROCESS, Makers
from tests.policy.test_listing_cache import folder

CP, OTHER = 100, 101


def made(makers: Makers, count: int, process: int = CP) -> None:
    directory = folder()
    for number in range(count):
        name = (directory, b"%d" % number)
        makers.missed(process, name)
        makers.made(process, name)


def test_a_program_that_makes_all_it_asks_for() -> None:
    makers = Makers()
    made(makers, RUN - 1)
    assert not makers.is_making(CP)
    made(makers, 1)
    assert makers.is_making(CP)
    assert not makers.is_making(OTHER)


def test_rsync_asks_for_two_names_and_makes_both() -> None:
    makers, directory = Makers(), folder()
    for number in range(RUN):
        name, temporary = (directory, b"%d" % number), (directory, b".%d" % number)
        makers.missed(CP, name)
        makers.missed(CP, temporary)
        makers.made(CP, temporary)
        makers.made(CP, name)
    assert makers.is_making(CP)


def test_who_asks_for_more_than_it_makes_is_none() -> None:
    makers, directory = Makers(), folder()
    made(makers, RUN)
    for number in range(MOST_WANTED + 1):
        makers.missed(CP, (directory, b"?%d" % number))
    assert not makers.is_making(CP)


def test_who_does_something_else_is_none_any_more() -> None:
    makers = Makers()
    made(makers, RUN)
    makers.does_else(CP)
    assert not makers.is_making(CP)


def test_nothing_is_known_of_processes_without_a_number() -> None:
    makers = Makers()
    made(makers, 2 * RUN, UNKNOWN_PROCESS)
    assert not makers.is_making(UNKNOWN_PROCESS)


def test_few_processes_are_remembered() -> None:
    makers = Makers()
    for process in range(1, 200):
        made(makers, RUN, process)
    assert not makers.is_making(1)
    assert makers.is_making(199)
    assert len(makers._processes) <= 100
