"""TLS as QEMU configures it: credentials and authorization objects, and the certificates they need.

    credentials.py   ``tls-creds-x509``, ``tls-creds-psk``: a folder of PEM files or a key file becomes an `ssl.SSLContext`
    x509.py          whether a certificate is any good, in QEMU's words, before a client finds out
    priority.py      GnuTLS priority strings, as far as OpenSSL can be told the same
    authz.py         ``authz-simple``, ``authz-list``, ``authz-list-file``: who may come in, by the certificate's name
    certificates.py  makes an authority and certificates: what ``livedisk tls init`` does

The protocol itself is in ``nbd/tls.py``.
"""
