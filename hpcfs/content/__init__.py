"""One open file: its states, its bytes in the cache, and their way from and to the remote.

Owns what a file is towards the remote, the journal and its name (state.py), and is the only place
that changes it; what others report they report to a Content by calling its methods. Knows neither
the tree of inodes (a Place stands for the node) nor the journal's database, and talks to remotes
through site/namespace.py only. Begin with the diagram in state.py, then content.py.
"""
