"""The mount daemon: one process that assembles a mount, serves it, and ends it in order.

Owns the life cycle, the assembly of all parts, the status, and the answers to the commands of the
control socket. Nothing imports it but cli/. It opens no network connection: transfer processes do.
Begin with `main` (life cycle) and `assembly` (which part gets which).
"""
