"""The machine: paths, ownership of files, mount table, disks, signals, logs.

Owns small wrappers around the operating system that any process may use, each module on its own.
Refuses event loops and everything of hpcfs but model/: it knows no mount, no cache and no remote.
Begin with `ownership` (which files can be trusted) and `paths` (where hpcfs keeps its files).
"""
