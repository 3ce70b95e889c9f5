"""What an open file is towards the remote, towards the journal and towards its name.

Towards the remote: what is there under the file's name (RemoteSide).

      open(2)        create(2), SFTP        create(2), S3 or `back`
         |              (through)                     |
         v                 v                          v    renamed over what is there
    +> PRESENT          CREATED                    ABSENT ------------------------+
    |    |                 |                          |                           v
    |    +-----------------+-- an upload may have ----+                       REPLACES <-+
    |                      |   begun to write         |                           |   |  | the same
    |                      +-------> PARTIAL <--------+                           |   +--+
    |                                   |                                         |
    +---- the remote confirmed ---------+-----------------------------------------+

Towards the journal: whether a row survives the daemon, and all of the file with it (Durability).

         +----------------------------+
         |                            v
    UNJOURNALED --> JOURNALED --> PERSISTING --> PERSISTED        refused: STRANDED, for good
         ^              ^              |             |
         |              +- written, renamed, failed -+
         +----------------- confirmed, or removed ---+

Towards its name (Name).

                   +-> UNLINKED ----+
    LINKED --------+                +--> DISCARDED --+--> RETIRED, from anywhere
                   +-> SUPERSEDED --+

Beside these there is what programs changed since the last upload took it (`changes` and
`attributes`), and the same of the upload under way, which becomes the former again if the upload
fails. So "written again while it is uploaded" is no state of its own: both are not empty.

Transitions are methods; what can't happen raises ImpossibleTransition. Nothing here awaits or does
I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum, auto

import trio
from msgspec.structs import replace

from hpcfs.model.entries import NO_ATTRIBUTES, Attributes, merge_attributes


class ImpossibleTransition(AssertionError):
    """A caller claims what can't have happened: a bug in the caller."""


class RemoteSide(Enum):
    """What the remote has under the file's name."""

    PRESENT = auto()
    """The version that the content stands on. If it has another one, others changed the file."""
    CREATED = auto()
    """The empty file that this mount made a moment ago; its version is not known."""
    ABSENT = auto()
    """Nothing, for certain."""
    PARTIAL = auto()
    """Anything that an upload of ours leaves: the old file, a part of the new one, all of it, or
    nothing. Whatever is there is ours to overwrite, and to remove."""
    REPLACES = auto()
    """Another file, over which this one was renamed here: the upload replaces it in one step."""


class Durability(Enum):
    """What the journal has of a file that is dirty."""

    UNJOURNALED = auto()
    """No row: nothing is dirty, or nothing of it needs to survive."""
    JOURNALED = auto()
    """A row; what was written or renamed since it was noted may be missing in it."""
    PERSISTING = auto()
    """A row with everything is being written to the disk."""
    PERSISTED = auto()
    """A row with everything, which outlives a loss of power."""
    STRANDED = auto()
    """The bytes were moved to kept/, where the row of the same name is not the content's any more:
    the remote refused them."""


class Name(Enum):
    """Whether the file has its name."""

    LINKED = auto()
    """Yes, as far as is known."""
    UNLINKED = auto()
    """Removed here, or replaced by a rename: what is written goes nowhere."""
    SUPERSEDED = auto()
    """Others removed or replaced it on the remote: no more is written to it, and what was goes
    beside the other file."""
    DISCARDED = auto()
    """No more is written to it, and nothing of it is uploaded any more."""
    RETIRED = auto()
    """Closed for good."""


class Changes(IntEnum):
    """What programs did to a file's bytes since an upload took them last. Of two, the larger holds
    for both."""

    NONE = 0
    APPENDED = 1
    """All of it was written at the end, through O_APPEND: it belongs to the end that the file has
    on the remote, wherever that is by then."""
    ANY = 2
    """It belongs where it was written, in the version that it was written to."""
    RESIZED = 3
    """The same; and a program set the size, perhaps to what it was."""


@dataclass(frozen=True)
class Unsent:
    """What an upload brings beside bytes: the kind of change, and attributes that were set."""

    changes: Changes = Changes.NONE
    attributes: Attributes = NO_ATTRIBUTES

    def __bool__(self) -> bool:
        return self.changes is not Changes.NONE or self.attributes != NO_ATTRIBUTES

    def then(self, later: Unsent) -> Unsent:
        """Both together."""
        attributes = merge_attributes(self.attributes, later.attributes)
        return Unsent(max(self.changes, later.changes), attributes)


_EXISTS = (RemoteSide.PRESENT, RemoteSide.PARTIAL)
_COUNTS = (Name.LINKED, Name.SUPERSEDED)


class State:
    """The states of one file. Readable by everybody, changed by the content that has it."""

    __slots__ = (
        *("attributes", "changes", "durability", "motion", "name", "remote", "rows_removed"),
        "taken",
    )

    def __init__(self) -> None:
        self.remote = RemoteSide.PRESENT
        self.durability = Durability.UNJOURNALED
        self.rows_removed = 0
        """How often the journal was told to remove the row: what it was told to note before is
        gone with it."""
        self.name = Name.LINKED
        self.changes = Changes.NONE
        self.attributes = NO_ATTRIBUTES
        """To be set by the next upload."""
        self.taken: Unsent | None = None
        """By the upload that is under way."""
        self.motion: trio.Event | None = None
        """Set once the upload, or the rename, that is under way on the remote has ended."""

    # --- what it is -------------------------------------------------------------------------------

    @property
    def is_dirty(self) -> bool:
        """Whether the remote lacks something of the file, or is just being changed."""
        if self.name not in _COUNTS:
            return False
        return self.remote is not RemoteSide.PRESENT or not self.is_untouched

    @property
    def is_ahead(self) -> bool:
        """Whether the remote's answers must not overwrite what is here: dirty, or removed here."""
        return self.is_dirty or self.is_unlinked

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was changed here since the last upload, and nothing is in motion."""
        has_changed = self.changes or self.attributes != NO_ATTRIBUTES
        return not has_changed and self.motion is None

    @property
    def is_unlinked(self) -> bool:
        """Whether nothing that is written from now on will be uploaded."""
        return self.name not in _COUNTS

    @property
    def is_superseded(self) -> bool:
        """Whether writing would mix the file with another one."""
        return self.name is Name.SUPERSEDED or self.name is Name.DISCARDED

    @property
    def is_gone(self) -> bool:
        """Whether another file has its name now, or none."""
        return self.name is not Name.LINKED

    @property
    def needs_row(self) -> bool:
        """Whether what is dirty must survive the daemon."""
        return self.name in _COUNTS and self.durability is not Durability.STRANDED

    @property
    def wants_row(self) -> bool:
        """Whether a row that says so is due before more is written."""
        return self.needs_row and self.durability is not Durability.JOURNALED

    @property
    def has_row(self) -> bool:
        """Whether the journal has a row of the content's, or is being given one."""
        return self.durability not in (Durability.UNJOURNALED, Durability.STRANDED)

    @property
    def is_persisted(self) -> bool:
        """Whether the journal has everything."""
        return self.durability is Durability.PERSISTED

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing was written since the row with everything was made, or begun."""
        return self.durability in (Durability.PERSISTING, Durability.PERSISTED)

    @property
    def may_be_missing(self) -> bool:
        """Whether the remote may have nothing of this name that is the file's."""
        return self.remote not in (RemoteSide.PRESENT, RemoteSide.CREATED)

    @property
    def goes_to_the_end(self) -> bool:
        """Whether what an upload would bring was appended to what the remote has."""
        return self.changes is Changes.APPENDED and self.remote in _EXISTS

    @property
    def unconfirmed(self) -> Unsent:
        """What the remote has not confirmed, on its way or not."""
        unsent = Unsent(self.changes, self.attributes)
        return unsent if self.taken is None else self.taken.then(unsent)

    # --- towards the remote -----------------------------------------------------------------------

    def note_created(self) -> None:
        """The remote made the file, empty, for this mount."""
        self._begin_as(RemoteSide.CREATED)

    def note_absent(self) -> None:
        """The file was made here, and the remote has not heard of it."""
        self._begin_as(RemoteSide.ABSENT)

    def resume(self, remote: RemoteSide, unsent: Unsent) -> None:
        """An earlier mount left this in its journal."""
        self._begin_as(remote)
        self.durability = Durability.PERSISTED
        self.changes, self.attributes = unsent.changes, unsent.attributes

    def _begin_as(self, remote: RemoteSide) -> None:
        self._check(self.remote is RemoteSide.PRESENT and not self.is_dirty, f"become {remote}")
        self.remote = remote

    def note_renamed_here(self, *, over_another: bool) -> None:
        """The file, of which the remote knows nothing, has another name now. `over_another`: the
        remote has something of that name."""
        self._check(self.remote is RemoteSide.ABSENT, "be renamed without the remote")
        if over_another:
            self.remote = RemoteSide.REPLACES
        self._outdate_row()

    def note_begun(self) -> None:
        """An upload may have begun to write. What was appended to a file that was not there before
        belongs where it was written."""
        if self.remote is RemoteSide.REPLACES:
            return
        if self.remote not in _EXISTS and self.taken is None:
            self.changes = max(self.changes, Changes.ANY)
        self.remote = RemoteSide.PARTIAL

    # --- what programs change ---------------------------------------------------------------------

    def note_changed(self, changes: Changes) -> None:
        """The file's bytes, or its size, were changed here."""
        if changes > self.changes:
            self.changes = changes
        self._outdate_row()

    def set_with_upload(self, attributes: Attributes) -> None:
        """The next upload sets these."""
        self.attributes = merge_attributes(self.attributes, attributes)
        self._outdate_row()

    def note_stamped(self, mode: int | None) -> None:
        """The file was written to now: a time that was set before does not count any more, and the
        mode is this one if not None."""
        attributes = replace(self.attributes, mtime_ns=None)
        self.attributes = merge_attributes(attributes, Attributes(mode=mode))

    # --- uploads and renames on the remote --------------------------------------------------------

    def begin_motion(self) -> None:
        """The remote's version or name is about to change; nothing else may change it meanwhile."""
        self._check(self.motion is None, "be uploaded or renamed twice at once")
        self.motion = trio.Event()

    def end_motion(self) -> None:
        """What was under way on the remote has ended."""
        motion = self.motion
        self._check(motion is not None and self.taken is None, "have moved")
        self.motion = None
        if motion is not None:
            motion.set()

    def begin_upload(self) -> Unsent:
        """What was changed is on its way; what is changed from now on is changed anew."""
        self.begin_motion()
        changes = self.changes
        if changes and self.remote not in _EXISTS:
            changes = max(changes, Changes.ANY)
        self.taken = Unsent(changes, self.attributes)
        self.changes, self.attributes = Changes.NONE, NO_ATTRIBUTES
        return self.taken

    def confirm_upload(self) -> None:
        """The remote has what the upload took."""
        self._check(self.taken is not None, "be confirmed")
        self.taken = None
        self.remote = RemoteSide.PRESENT
        self.end_motion()

    def fail_upload(self, *, begun: bool) -> None:
        """It broke off: what it took is to be brought again. `begun`: the remote may have begun to
        write."""
        self._check(self.taken is not None, "have failed")
        if begun:
            self.note_begun()
        unsent = self.unconfirmed
        self.changes, self.attributes = unsent.changes, unsent.attributes
        self.taken = None
        self.end_motion()

    # --- towards the journal ----------------------------------------------------------------------

    def note_row(self, *, writing: bool = False) -> None:
        """The journal has a row. `writing`: one that says that more will be written."""
        if writing:
            self._outdate_row()
        if self.durability is Durability.UNJOURNALED:
            self.durability = Durability.JOURNALED

    def note_no_row(self) -> None:
        """The journal has no row of the content's any more, once it has done what it was told."""
        self.rows_removed += 1
        if self.durability is not Durability.STRANDED:
            self.durability = Durability.UNJOURNALED

    def _outdate_row(self) -> None:
        if self.durability in (Durability.PERSISTING, Durability.PERSISTED):
            self.durability = Durability.JOURNALED

    def begin_to_persist(self) -> None:
        """A row with everything is about to be written to the disk."""
        self._check(self.needs_row, "be persisted")
        self.durability = Durability.PERSISTING

    def note_persisted(self) -> None:
        """That row is on the disk. It does not have what was written meanwhile; and where the file
        was removed meanwhile, the row goes as well."""
        if self.durability is Durability.PERSISTING:
            self.durability = Durability.PERSISTED

    def note_not_persisted(self, *, had_row: bool) -> None:
        """The disk failed. `had_row`: there was a row before, which is still there."""
        if self.durability is Durability.PERSISTING:
            self.durability = Durability.JOURNALED if had_row else Durability.UNJOURNALED

    def strand(self) -> None:
        """The bytes are where the user finds them; the mount brings them nowhere."""
        self._check(self.durability is not Durability.STRANDED, "be stranded twice")
        self.durability = Durability.STRANDED

    def note_not_stranded(self, *, had_row: bool) -> None:
        """The disk failed: they are where they were."""
        self.durability = Durability.JOURNALED if had_row else Durability.UNJOURNALED

    # --- towards its name -------------------------------------------------------------------------

    def unlink(self) -> None:
        """Its last name was removed here."""
        self._check_in_use("be removed")
        self.name = Name.DISCARDED if self.is_superseded else Name.UNLINKED

    def supersede(self) -> None:
        """Others removed or replaced it. What was removed here before stays so."""
        self._check_in_use("be superseded")
        if self.name is Name.LINKED:
            self.name = Name.SUPERSEDED

    def discard(self) -> None:
        """Nothing of it is to be uploaded any more, and no more is to be written to it."""
        self._check_in_use("be discarded")
        self.name = Name.DISCARDED
        self.changes, self.attributes = Changes.NONE, NO_ATTRIBUTES

    def retire(self) -> None:
        """It is closed for good."""
        self._check_in_use("be retired")
        self.name = Name.RETIRED

    # --- refusing ---------------------------------------------------------------------------------

    def _check_in_use(self, what: str) -> None:
        self._check(self.name is not Name.RETIRED, what)

    def _check(self, is_possible: bool, what: str) -> None:
        if not is_possible:
            raise ImpossibleTransition(
                f"a file that is {self.remote.name}, {self.durability.name}, {self.name.name}"
                f" can't {what}"
            )
