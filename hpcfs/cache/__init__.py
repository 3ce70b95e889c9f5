"""The cache on the local disk: blocks of remote files, their checksums, and the index of them.

Owns the cache directory with its lock and index, sparse cache files, eviction and pins. Knows
remote files only as (origin, key, version): it opens no remote, fetches nothing, and knows neither
inodes nor uploads. Dirty blocks and pinned files are never evicted.
Begin with `store`, which describes the directory; `file` and `blocks` hold one file's state.
"""
