"""The Remote over SFTP 3 with OpenSSH's extensions.

Owns requests and answers on SFTP channels, and what each operation is made of. How a connection
comes about is the business of ../ssh and ../tunnel, which hand over a login. Begin with remote.py
(the operations); session.py is what a connection's namespaces share, requests.py a channel,
read.py and uploads.py move bytes, explain.py and translate.py make errors of refusals.
"""
