"""The kernel's side of the mount: requests of FUSE in, errno out.

Owns the conversion between pyfuse3's types and ours, the one table of errnos, the limits that the
kernel is told, and who waits for which request. The only importer of pyfuse3; decides nothing: what
an operation means is filesystem/'s.
Begin with `operations`; `errno` is the table, `requests` ends those whose callers are interrupted.
"""
