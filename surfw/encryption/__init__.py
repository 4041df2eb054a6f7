"""End-to-end encryption of weights: stored bytes are encrypted when a model is chunked and decrypted in the client.

Storages, servers and Redis see ciphertext, its digests and the manifest, but no key. `keys` implements keys and the
cipher, `source` decryption. `cryptography` (the extra `surfw[encryption]`) is imported when a key is first used.
"""

from surfw.encryption.keys import EncryptionKey, Sealer, read_key
from surfw.encryption.source import DecryptingSource

__all__ = ["DecryptingSource", "EncryptionKey", "Sealer", "read_key"]
