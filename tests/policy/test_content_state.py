"""The states of an open file, walked alone: no sequence of calls leads to what can't be."""

from __future__ import annotations

import stat
from contextlib import suppress

import msgspec
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hpcfs.content.record import Unconfirmed, flags_of
from hpcfs.content.state import (
    Changes,
    Durability,
    ImpossibleTransition,
    Name,
    RemoteSide,
    State,
    Unsent,
)
from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import Attributes, Entry

CAPABILITIES = Capabilities(
    partial_writes=True, creates_on_upload=False, handles=True, mtime_resolution_ns=10**9
)
ENTRY = Entry(b"f", stat.S_IFREG | 0o644, 0, 0, 0, 1000, 1000)
written = st.sampled_from([Changes.APPENDED, Changes.ANY, Changes.RESIZED])
attribute = st.sampled_from([Attributes(mode=0o600), Attributes(mtime_ns=5)])


def row_of(state: State, base_size: int = 0) -> Unconfirmed:
    """As the journal has it, over the bytes on the disk."""
    row = Unconfirmed(
        "name",
        "ns",
        "origin",
        b"f",
        0,
        base_size,
        [(0, 1)] if state.unconfirmed.changes in (Changes.APPENDED, Changes.ANY) else [],
        "data",
        b"",
        ENTRY,
        CAPABILITIES,
        **flags_of(state, base_size),
    )
    return msgspec.msgpack.decode(msgspec.msgpack.encode(row), type=Unconfirmed)


def resumed(remote: RemoteSide, unsent: Unsent) -> State:
    """As the mount makes it that finds such a row."""
    state = State()
    state.resume(remote, unsent)
    return state


class Walk(RuleBasedStateMachine):
    """Calls in any order, those that the states refuse included; beside them, what must be so."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State()
        self.has_ever_been_there = True
        self.unsent = Unsent()
        """What programs changed that the remote did not confirm, as the machine counts it."""
        self.renaming = False

    @initialize(how=st.sampled_from(["opened", "created", "absent"]))
    def begin(self, how: str) -> None:
        if how == "created":
            self.state.note_created()
        elif how == "absent":
            self.state.note_absent()
            self.has_ever_been_there = False

    # --- programs -------------------------------------------------------------------------------

    @precondition(lambda self: not self.state.is_superseded and self.in_use)
    @rule(changes=written)
    def write(self, changes: Changes) -> None:
        self.state.note_changed(changes)
        self.unsent = self.unsent.then(Unsent(changes))

    @precondition(lambda self: self.in_use)
    @rule(attributes=attribute)
    def set_attributes(self, attributes: Attributes) -> None:
        self.state.set_with_upload(attributes)
        self.unsent = self.unsent.then(Unsent(attributes=attributes))

    @rule(over_another=st.booleans())
    def rename_here(self, over_another: bool) -> None:
        was = self.state.remote
        try:
            self.state.note_renamed_here(over_another=over_another)
        except ImpossibleTransition:
            assert was is not RemoteSide.ABSENT
        else:
            assert was is RemoteSide.ABSENT
            assert (self.state.remote is RemoteSide.REPLACES) == over_another
            assert not self.state.is_persisted

    # --- the remote -----------------------------------------------------------------------------

    @rule()
    def begin_upload(self) -> None:
        was_in_motion, changes = self.state.motion is not None, self.state.changes
        try:
            taken = self.state.begin_upload()
        except ImpossibleTransition:
            assert was_in_motion
        else:
            assert not was_in_motion
            assert taken.changes >= changes
            assert self.state.changes is Changes.NONE

    @precondition(lambda self: self.state.motion is None or self.state.taken is not None)
    @rule()
    def progress(self) -> None:
        """Of an upload, or of a piece that is sent ahead of it."""
        was = self.state.remote
        self.state.note_begun()
        assert self.state.remote is (
            RemoteSide.REPLACES if was is RemoteSide.REPLACES else RemoteSide.PARTIAL
        )
        self.has_ever_been_there = True

    @rule()
    def confirm_upload(self) -> None:
        taken = self.state.taken
        try:
            self.state.confirm_upload()
        except ImpossibleTransition:
            assert taken is None
        else:
            assert taken is not None
            assert self.state.remote is RemoteSide.PRESENT
            self.has_ever_been_there = True
            self.unsent = Unsent(self.state.changes, self.state.attributes)

    @rule(begun=st.booleans())
    def fail_upload(self, begun: bool) -> None:
        taken, was = self.state.taken, self.state.remote
        try:
            self.state.fail_upload(begun=begun)
        except ImpossibleTransition:
            assert taken is None
        else:
            assert taken is not None
            expected = RemoteSide.PARTIAL if begun else was
            assert self.state.remote is (was if was is RemoteSide.REPLACES else expected)
            self.has_ever_been_there |= begun

    @rule()
    def rename_there(self) -> None:
        was_in_motion = self.state.motion is not None
        try:
            self.state.begin_motion()
        except ImpossibleTransition:
            assert was_in_motion
        else:
            self.renaming = True

    @rule()
    def rename_there_ends(self) -> None:
        try:
            self.state.end_motion()
        except ImpossibleTransition:
            assert not self.renaming
        else:
            assert self.renaming
            self.renaming = False

    @rule()
    def be_made_again(self) -> None:
        """Only what was just opened can turn out to be new."""
        was_fresh = self.state.remote is RemoteSide.PRESENT and not self.state.is_dirty
        for make in (self.state.note_created, self.state.note_absent):
            if not was_fresh:
                with pytest.raises(ImpossibleTransition):
                    make()

    # --- the journal ----------------------------------------------------------------------------

    @rule(writing=st.booleans())
    def note_row(self, writing: bool) -> None:
        was_persisted = self.state.is_persisted
        self.state.note_row(writing=writing)
        assert self.state.is_persisted == (was_persisted and not writing)

    @rule()
    def note_no_row(self) -> None:
        self.state.note_no_row()

    @rule(fails=st.booleans())
    def persist(self, fails: bool) -> None:
        needs_row, had_row = self.state.needs_row, self.state.has_row
        try:
            self.state.begin_to_persist()
        except ImpossibleTransition:
            assert not needs_row
            return
        if fails:
            self.state.note_not_persisted(had_row=had_row)
            assert self.state.has_row == had_row
        else:
            self.state.note_persisted()
            assert self.state.is_persisted

    @precondition(lambda self: not self.state.is_superseded and self.in_use)
    @rule(changes=written)
    def write_while_persisting(self, changes: Changes) -> None:
        if self.state.needs_row:
            self.state.begin_to_persist()
            self.write(changes)
            self.state.note_persisted()
            assert self.state.durability is Durability.JOURNALED

    @rule(fails=st.booleans())
    def strand(self, fails: bool) -> None:
        was, had_row = self.state.durability, self.state.has_row
        try:
            self.state.strand()
        except ImpossibleTransition:
            assert was is Durability.STRANDED
            return
        if fails:
            self.state.note_not_stranded(had_row=had_row)
        assert self.state.has_row == (fails and had_row)

    # --- the name -------------------------------------------------------------------------------

    @rule(what=st.sampled_from(["unlink", "supersede", "discard", "retire"]))
    def lose_name(self, what: str) -> None:
        was = self.state.name
        try:
            getattr(self.state, what)()
        except ImpossibleTransition:
            assert was is Name.RETIRED
        else:
            assert was is not Name.RETIRED
            allowed = {
                Name.LINKED: {Name.UNLINKED, Name.SUPERSEDED, Name.DISCARDED, Name.RETIRED},
                Name.UNLINKED: {Name.UNLINKED, Name.DISCARDED, Name.RETIRED},
                Name.SUPERSEDED: {Name.SUPERSEDED, Name.DISCARDED, Name.RETIRED},
                Name.DISCARDED: {Name.DISCARDED, Name.RETIRED},
            }
            assert self.state.name in allowed[was]

    # --- always ---------------------------------------------------------------------------------

    @property
    def in_use(self) -> bool:
        return self.state.name is not Name.RETIRED

    @property
    def counts(self) -> bool:
        return self.state.name in (Name.LINKED, Name.SUPERSEDED)

    @invariant()
    def what_was_changed_is_dirty_until_it_is_confirmed(self) -> None:
        assert self.state.is_dirty or not (self.counts and self.unsent)

    @invariant()
    def nothing_is_lost(self) -> None:
        """Of two kinds of change the larger may take the place of the other."""
        if self.counts:
            assert self.state.unconfirmed.changes >= self.unsent.changes
            assert self.state.unconfirmed.attributes == self.unsent.attributes

    @invariant()
    def what_has_no_name_goes_nowhere(self) -> None:
        if not self.counts:
            assert not self.state.is_dirty
            assert not self.state.needs_row
            assert not self.state.wants_row
        assert self.state.is_gone or not (self.state.is_unlinked or self.state.is_superseded)

    @invariant()
    def an_upload_is_a_motion(self) -> None:
        assert self.state.taken is None or self.state.motion is not None
        assert (self.state.motion is not None) == (self.renaming or self.state.taken is not None)

    @invariant()
    def the_remote_is_absent_only_if_nothing_ever_reached_it(self) -> None:
        absent = self.state.remote in (RemoteSide.ABSENT, RemoteSide.REPLACES)
        if self.state.remote is RemoteSide.ABSENT:
            assert not self.has_ever_been_there
        assert self.state.may_be_missing == (absent or self.state.remote is RemoteSide.PARTIAL)
        assert self.state.is_dirty or not (self.counts and self.state.may_be_missing)

    @invariant()
    def what_is_appended_was_there(self) -> None:
        if self.state.goes_to_the_end:
            assert self.state.remote in (RemoteSide.PRESENT, RemoteSide.PARTIAL)
            assert self.state.changes is Changes.APPENDED

    @invariant()
    def the_next_mount_takes_up_the_same(self) -> None:
        """From a row noted now: the states are the same, or such that more is brought. A file that
        the remote is only renaming brings nothing."""
        state = self.state
        waits = state.unconfirmed or state.taken is not None
        if not self.counts or not (waits or state.remote is not RemoteSide.PRESENT):
            return
        row = row_of(self.state)
        again = resumed(row.remote_side, row.unsent)
        assert again.is_dirty
        assert again.is_persisted
        assert again.changes >= self.state.unconfirmed.changes
        assert again.attributes == self.state.unconfirmed.attributes
        is_sure = self.state.remote is RemoteSide.ABSENT and self.state.taken is None
        assert (again.remote is RemoteSide.ABSENT) == is_sure
        if self.state.remote is RemoteSide.REPLACES:
            assert again.remote is RemoteSide.REPLACES
        elif self.state.remote is not RemoteSide.PRESENT and not is_sure:
            assert again.remote is RemoteSide.PARTIAL
        assert row_of(again) == row_of(resumed(row.remote_side, row.unsent))


TestWalk = Walk.TestCase
TestWalk.settings = settings(
    deadline=None, derandomize=True, database=None, max_examples=150, stateful_step_count=40
)


@pytest.mark.parametrize("remote", RemoteSide)
@pytest.mark.parametrize("base_size", [0, 100])
def test_a_row_keeps_each_side(remote: RemoteSide, base_size: int) -> None:
    state = resumed(remote, Unsent(Changes.ANY))
    row = row_of(state, base_size)
    kept = RemoteSide.PARTIAL if remote is RemoteSide.CREATED else remote
    assert row.remote_side is kept
    assert row_of(resumed(kept, row.unsent), base_size).remote_side is kept


def test_a_motion_that_ends_wakes_who_waits() -> None:
    state = State()
    state.begin_upload()
    motion = state.motion
    assert motion is not None
    with suppress(ImpossibleTransition):
        state.end_motion()
    assert not motion.is_set()
    state.fail_upload(begun=False)
    assert motion.is_set()


def test_what_replaces_another_file_does_so_after_an_upload_that_broke_off() -> None:
    state = State()
    state.note_absent()
    state.note_renamed_here(over_another=True)
    state.begin_upload()
    state.note_begun()
    state.fail_upload(begun=True)
    assert state.remote is RemoteSide.REPLACES


def test_a_row_with_an_old_name_is_not_everything() -> None:
    state = State()
    state.note_absent()
    state.begin_to_persist()
    state.note_persisted()
    state.note_renamed_here(over_another=False)
    assert state.durability is Durability.JOURNALED
