"""The control socket of a mount, and the mount point.

Owns the messages between the command line and a mount's daemon (`control` is the client, `server`
the daemon's side), and how a mount point is checked and unmounted (`mountpoint`). Knows nothing of
the cache or the remotes: the daemon supplies status and work as functions.
Begin with `control`, which defines the messages.
"""
