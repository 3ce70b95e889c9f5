"""The command line: one file for each command; the only package that prints.

Owns arguments, messages, progress bars and exit codes. The work is done elsewhere: by the mount's
daemon, which is asked over control/, and by laptop/ for tunnels. Refuses slow imports at the top of
a module: `hpcfs --help` must not wait for trio, asyncssh or rich.
Begin with `main`, whose table names the commands.
"""
