"""The configuration: a TOML file, URLs of the command line, rclone.conf and SSH aliases.

Owns which keys exist, how their values are read, and the sentence that each mistake gets. Returns
frozen values and connects to nothing. Refuses credentials: SSH and the AWS chain have better
places for them. Knows remotes only as the settings of model/sites.py.
Begin with `config.load`; `urls` parses the names of remotes.
"""
