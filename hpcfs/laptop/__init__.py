"""The laptop's end of a tunnel: `hpcfs tunnel`, which shares folders with mounts on a cluster.

Owns the login with its reverse forwards, the rendezvous file on the cluster, the admission of
mounts and the SFTP server that answers them. Knows neither the mount daemon nor the cache; what
both ends share is in tunnel/, the login itself in remotes/ssh/. Runs on asyncio.
Begin with `tunnel` (the life cycle), then `connected_mounts` and `sftp_server`.
"""
