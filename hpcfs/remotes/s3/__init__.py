"""The Remote over S3 and what speaks like it.

Owns keys, metadata, markers of directories, uploads in parts, and what the many servers differ in.
Knows nothing of SSH. Begin with remote.py (the operations) and bucket.py (single requests); those
that move most go through direct.py and http.py, all others through botocore (login.py).
translate.py makes RemoteErrors of its exceptions.
"""
