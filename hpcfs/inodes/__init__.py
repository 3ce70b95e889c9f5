"""Inode numbers, names and attributes as the kernel was told them, and what mode bits forbid.

Owns the tree of nodes and the rule which of two answers about a node is newer. Does no I/O, and
asks the remote about permissions only; knows neither listings, handles nor uploads.
Begin with `tree`.
"""
