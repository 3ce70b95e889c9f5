"""The kernel's side of the mount: requests of FUSE in, errno out.

Owns the conversion between pyfuse3's types and ours, and the one table of errnos. The only importer
of pyfuse3; decides nothing: what an operation means is filesystem/'s.
Begin with `operations`; `errno` is the table.
"""
