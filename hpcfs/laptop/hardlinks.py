"""Protects files with several names, one of which may be in a folder that is shared read-only.

A write under a name in a writable share changes the file under all its names, and where the other
names are can't be found out without a look at every file. So where there is a read-only share too,
a file with several names may be changed only if all of them but one were made through this tunnel,
which links nothing across shares. Names may be removed and replaced: that changes no other name.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from hpcfs.laptop.safe_paths import SafeEntry

MAX_FILES = 10_000
"""Files whose links are remembered. A forgotten one may no longer be changed."""


class HardLinks:
    """Counts the names made through this tunnel. Without `guarded` (no read-only share) nothing is
    refused."""

    def __init__(self, *, guarded: bool) -> None:
        self._guarded = guarded
        self._names: dict[tuple[int, int], int] = {}
        """The number of names of a file, where more than one, that are known not to be in another
        share."""

    def check(self, found: os.stat_result) -> None:
        """Raise OSError where a change of this file may change a read-only share."""
        if not self._guarded or stat.S_ISDIR(found.st_mode):
            return
        if found.st_nlink > self._known(found):
            raise PermissionError(
                errno.EACCES, "it has other names (hard links), and one may be shared read-only"
            )

    def check_entry(self, entry: SafeEntry) -> None:
        """Check the file at that entry; a missing one has no other names."""
        with suppress(FileNotFoundError):
            self.check(entry.stat())

    def _known(self, found: os.stat_result) -> int:
        """Return how many names are known; names that were removed by others are no longer
        counted."""
        file = found.st_dev, found.st_ino
        known = self._names.get(file, 1)
        if found.st_nlink < known:
            self._names[file] = known = found.st_nlink
        return known

    def link(self, old: SafeEntry, new: SafeEntry) -> None:
        """Make a hard link, and count it. Raises OSError."""
        found = old.stat()
        os.link(
            old.name, new.name, src_dir_fd=old.parent, dst_dir_fd=new.parent, follow_symlinks=False
        )
        if self._guarded and found.st_nlink == self._known(found):
            self._names[found.st_dev, found.st_ino] = found.st_nlink + 1
            if len(self._names) > MAX_FILES:
                del self._names[next(iter(self._names))]

    def unlink(self, entry: SafeEntry) -> None:
        """Remove a name. Raises OSError."""
        self.losing(entry)
        os.unlink(entry.name, dir_fd=entry.parent)

    def losing(self, entry: SafeEntry) -> None:
        """Note that a name is about to be removed, or given to another file."""
        with suppress(FileNotFoundError):
            found = entry.stat()
            file = found.st_dev, found.st_ino
            if file in self._names:
                self._names[file] = self._known(found) - 1
