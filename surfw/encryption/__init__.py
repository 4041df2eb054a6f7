"""Weights that only their reader sees: stored bytes are encrypted when a model is chunked, and decrypted in the client.

A storage, a server and a Redis have ciphertext, its digests and the manifest, and no key. `keys` has the cipher and the
key, `source` what decrypts. `cryptography` (the extra `surfw[encryption]`) is imported once a key is used.
"""

from surfw.encryption.keys import EncryptionKey, Sealer, read_key
from surfw.encryption.source import DecryptingSource

__all__ = ["DecryptingSource", "EncryptionKey", "Sealer", "read_key"]
