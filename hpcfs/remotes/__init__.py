"""The remotes: SFTP, S3 and the laptop behind one protocol, usable in any asyncio program.

Owns connections, logins and what every server's answers mean. It refuses to know of a daemon, a
cache, another process or FUSE: it imports model, system and tunnel only. Begin with base.py (what
can be asked of a remote) and open.py (how one is opened); a new kind is a folder here, a struct in
model/sites.py and a row in open.py. admission.py is shared by the kinds.
"""
