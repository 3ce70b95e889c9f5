"""The remotes of `hpcfs demo`: SSH and S3 servers on loopback, and a laptop, over sample files.

Owns the processes of the demo and the files in them. Refuses everything of the user's: keys,
configuration, cache and agents stay untouched. The mount itself is the command line's.
Begin with `running`, which starts `servers` and `laptop` as processes.
"""
