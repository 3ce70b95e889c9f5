"""The daemon's side of a site: its transfer process, the calls to it, and what its link carries.

Owns the process's life, every deadline, and the namespaces as typed calls. Knows the messages of
protocol/, but no remote's protocol, no inodes and no cache.
Begin with `namespace` (what others call), then `client` (calls) and `worker_process`.
"""
