"""hpcfs: SSH clusters and S3 buckets as one directory tree."""

__version__ = "0.1.0"
