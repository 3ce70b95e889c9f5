"""hpcfs: SSH clusters, S3 buckets and your laptop as one directory tree.

Each package says in its docstring what it owns and where to begin reading. `cli` is what users run,
`daemon` what mounts, `worker` the process that speaks to one site, and `remotes` what any asyncio
program can open; tests/policy/test_imports.py has the order in which packages may import others.
"""

__version__ = "0.1.0"
