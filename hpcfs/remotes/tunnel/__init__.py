"""The laptop as a site, seen from the cluster.

Owns finding a tunnel by its rendezvous file, connecting to one of its places, and streams that go
on after a break. What travels on them is ../sftp's. The laptop's side is hpcfs/laptop, what both
sides agree on hpcfs/tunnel. Begin with site.py, then session.py and line.py.
"""
