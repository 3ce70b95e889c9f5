"""The worker process: carries out the daemon's requests at one site.

Owns the process's life, its side of the socket, and the bytes' way between a remote and the cache
files. It runs on asyncio, holds no state that can't be rebuilt, and imports nothing of the daemon's
but protocol/. Begin with main.py; cache_io.py reads and writes the cache files.
"""
