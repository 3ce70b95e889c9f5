"""The operations of the mount: names, attributes, open files, renames, links, xattrs.

Owns the meaning of each operation and the coherence of what a program sees with the remote. Knows
neither pyfuse3 nor the network: kernel/ calls it, a namespace's remote is behind site/, uploads
are writeback/'s, listings directories/'s. Runs and is tested with no mount.
Begin with `filesystem`; `lookup` has the rules of coherence as a table.
"""
