"""The vocabulary that all packages share: entries, errors, sites, uploads, paths.

Owns the types that travel between packages and processes, and pure rules about them. It imports
nothing of hpcfs, does no I/O, and knows no event loop, cache or process. Begin with entries.py
(what a remote shows), errors.py (the one tree of errors) and sites.py (what opening a remote
takes).
"""
