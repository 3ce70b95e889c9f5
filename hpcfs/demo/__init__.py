"""The demo's remotes: an SFTP server and an S3 server on loopback, over sample files."""
