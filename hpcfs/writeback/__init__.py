"""The way of written data to the remote, and its safety until the remote has confirmed it.

Owns the journal, the queue of uploads with its schedule, conflicts, what an earlier mount left, and
what the user is told of all that. Must not import filesystem/: it knows contents and inodes, but no
handles and no kernel requests.
Begin with `close`, then `queue` (`back` mode) and `uploader` (one upload); `journal` has the rows.
"""
