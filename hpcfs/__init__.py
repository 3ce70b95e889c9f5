"""hpcfs: SSH clusters, S3 buckets and your laptop as one directory tree."""

__version__ = "0.1.0"
