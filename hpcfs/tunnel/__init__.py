"""The protocol that both ends of a tunnel share.

Owns the rendezvous file (`file`), the handshake and keys (`knock`, `proof`) and the resumable byte
stream (`stream`, with `pump` as its adapter to a socket). Opens no connection and no listener: the
mount's end is remotes/tunnel/, the laptop's end is laptop/. Imports nothing of hpcfs but model/.
Begin with `stream`, whose docstring specifies the bytes on the wire.
"""
