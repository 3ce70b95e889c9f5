"""Files with several names: one of them may be in a folder that is shared read-only.

What is written under a name in a writable share changes the file under all its names. Where the
others are is not to be seen without a look at every file. So where there is a read-only share too,
a file of several names is changed only if all of them but one were made through this tunnel, which
links nothing across shares. Names may be removed and replaced: that changes no other one.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from hpcfs.laptop.safe_paths import SafeEntry

MAX_FILES = 10_000
"""Whose links are remembered. A forgotten one is not changed any more."""


class HardLinks:
    def __init__(self, *, guarded: bool) -> None:
        self._guarded = guarded
        self._names: dict[tuple[int, int], int] = {}
        """How many names of a file are known not to be in another share, where more than one."""

    def check(self, found: os.stat_result) -> None:
        """Raises OSError where a change of this file may change a read-only share."""
        if not self._guarded or stat.S_ISDIR(found.st_mode):
            return
        if found.st_nlink > self._known(found):
            raise PermissionError(
                errno.EACCES, "it has other names (hard links), and one may be shared read-only"
            )

    def check_entry(self, entry: SafeEntry) -> None:
        """The same; what is missing has no other names."""
        with suppress(FileNotFoundError):
            self.check(entry.stat())

    def _known(self, found: os.stat_result) -> int:
        """Names that others removed since are known no more."""
        file = found.st_dev, found.st_ino
        known = self._names.get(file, 1)
        if found.st_nlink < known:
            self._names[file] = known = found.st_nlink
        return known

    def link(self, old: SafeEntry, new: SafeEntry) -> None:
        found = old.stat()
        os.link(
            old.name, new.name, src_dir_fd=old.parent, dst_dir_fd=new.parent, follow_symlinks=False
        )
        if self._guarded and found.st_nlink == self._known(found):
            self._names[found.st_dev, found.st_ino] = found.st_nlink + 1
            if len(self._names) > MAX_FILES:
                del self._names[next(iter(self._names))]

    def unlink(self, entry: SafeEntry) -> None:
        self.losing(entry)
        os.unlink(entry.name, dir_fd=entry.parent)

    def losing(self, entry: SafeEntry) -> None:
        """A name is about to be removed, or given to another file."""
        with suppress(FileNotFoundError):
            found = entry.stat()
            file = found.st_dev, found.st_ino
            if file in self._names:
                self._names[file] = self._known(found) - 1
