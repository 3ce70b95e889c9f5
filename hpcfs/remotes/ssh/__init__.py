"""SSH logins: by asyncssh, or by the user's own ssh as a child process.

Owns ssh_config, host keys, keys, jump hosts, proxies and second factors, and one shared connection
per site. Knows nothing of SFTP or namespaces: it hands over a connection. Begin with login.py
(asyncssh) and openssh.py (a child ssh); options.py asks `ssh -G` what the configuration says, and
shared_session.py decides when to connect.
"""
