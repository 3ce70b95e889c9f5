"""The demo's remotes: an SSH and an S3 server on loopback, and a laptop, over sample files."""
