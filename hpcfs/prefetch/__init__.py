"""Fetching before programs read: further on in a file, and the next files of a directory.

Owns the recognition of access patterns (`readahead`, `file_predictor`: pure policies without I/O,
clock or awaits) and the files that are fetched ahead (`file_prefetcher`). How bytes are fetched is
content/'s, what the link carries site/'s; it must not know handles or uploads.
Begin with `readahead`.
"""
