"""The messages between the mount daemon and a worker process.

Owns the requests and frames on the socket between the two, beside the model's types: what they add
(cache files, log level, call numbers) is known here only. It does no I/O and imports the model and
nothing else. Everything is in messages.py.
"""
