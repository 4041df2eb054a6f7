"""The key of a model, which encrypts (seals) and decrypts (opens) stored bytes in blocks of 1 MiB.

Stored bytes are encoded first, and then encrypted with AES-256-GCM, one block at a time. Ciphertext has the length of
its plaintext; each block's *seal* (`manifest.SEAL_BYTES`), kept separately, has the block's *mark* and GCM's tag.

    mark = BLAKE3(plaintext of the block), keyed with the key for marks       32 bytes
    key of the block = BLAKE3(mark), keyed with the key for blocks            32 bytes
    nonce = 0                                                                 12 bytes
    the keys for marks, blocks and ids = BLAKE3's key derivation from the 32 bytes of the key file

**A pair of key and nonce never encrypts two plaintexts.** Since the nonce is constant, this means: two blocks with the
same key have the same plaintext. A block's key is derived from its mark, and its mark from its plaintext alone; so
different plaintexts have different marks and keys, unless two 256-bit BLAKE3 values collide. This holds across chunks,
codecs, library versions and runs: only the encrypted bytes determine the key.

Equal blocks have equal ciphertext, so that models still share common blobs; anyone who sees a store can see which
blocks are equal. Without the key, a mark reveals nothing else: nobody can compute the mark of a guessed plaintext.
Chunk ids are keyed for the same reason.
"""

import base64
import binascii
import os
import shlex
import stat
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from surfw.config import BLOCK_BYTES, printable
from surfw.errors import ConfigurationError
from surfw.files import expand_home, open_regular
from surfw.manifest import SEAL_BYTES

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import Cipher

MAKE_ONE = "(umask 077; head -c 32 /dev/urandom | base64 > {})"
"""A command that makes a key file."""

_KEY_BYTES, _MARK_BYTES = 32, 32
_MOST_FILE_BYTES = 4096
_NONCE = bytes(12)
_CONTEXT = "surfw 2026 encryption of stored bytes: "
"""The prefix of the contexts for BLAKE3's key derivation; these must never change."""


class WrongSealError(Exception):
    """A block cannot be decrypted: it was encrypted with another key, or the seal belongs to another block."""


class EncryptionKey:
    """A secret of 32 bytes that encrypts and decrypts blocks. Thread-safe.

    Attributes:
        where: names the source of the key in errors.
    """

    def __init__(self, secret: bytes, *, where: str = "key") -> None:
        """Derive all keys from the secret.

        Raises:
            ConfigurationError: the secret is not 32 bytes long, or `cryptography` is not installed.
        """
        if len(secret) != _KEY_BYTES:
            raise ConfigurationError(f"the {where} has {len(secret)} bytes, expected {_KEY_BYTES}")
        self.where = where
        self._marks, self._blocks, self._ids = (_derive(secret, purpose) for purpose in ("marks", "blocks", "ids"))
        self.id = _derive(secret, "key id")[:16].hex()
        """Identifies the key without revealing anything about it: 32 hex digits."""
        self._cipher_parts  # noqa: B018 - fails here if cryptography is not installed

    def __repr__(self) -> str:
        """Return the key's id, never the key."""
        return f"<EncryptionKey {self.id} from {self.where}>"

    def hide(self, chunk_id: str) -> str:
        """Return the id of an encrypted chunk, given the BLAKE3 of its payload; both in hex."""
        return blake3(bytes.fromhex(chunk_id), key=self._ids).hexdigest()

    def seal(self, plain: bytes | memoryview, into: memoryview) -> bytes:
        """Encrypt a block.

        Args:
            plain: up to 1 MiB.
            into: memory of that length.

        Returns:
            The seal.
        """
        mark = blake3(plain, key=self._marks).digest()
        encryptor = self._cipher(mark).encryptor()
        encryptor.update_into(plain, into)
        encryptor.finalize()
        return mark + bytes(encryptor.tag)

    def open(self, block: memoryview, seal: bytes) -> None:
        """Decrypt a block in place.

        Raises:
            WrongSealError: block and seal do not match this key; the contents of `block` are then undefined.
        """
        from cryptography.exceptions import InvalidTag

        decryptor = self._cipher(seal[:_MARK_BYTES]).decryptor()
        decryptor.update_into(block, block)
        try:
            decryptor.finalize_with_tag(seal[_MARK_BYTES:])
        except InvalidTag as exc:
            raise WrongSealError from exc

    def _cipher(self, mark: bytes) -> "Cipher[Any]":
        cipher, aes, gcm = self._cipher_parts
        return cipher(aes(blake3(mark, key=self._blocks).digest()), gcm(_NONCE))  # type: ignore[no-any-return]

    @cached_property
    def _cipher_parts(self) -> tuple[Any, Any, Any]:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError as exc:
            raise ConfigurationError(
                "encrypted models need the package cryptography; install it: pip install 'surfw[encryption]'"
            ) from exc
        return Cipher, algorithms.AES, modes.GCM


class Sealer:
    """Encrypts the stored bytes of one form, given in order, in parts of any length."""

    def __init__(self, key: EncryptionKey) -> None:
        self._key = key
        self._seals = bytearray()
        self._plain, self._coded = memoryview(bytearray(BLOCK_BYTES)), memoryview(bytearray(BLOCK_BYTES))
        self._held = 0  # bytes of an incomplete block

    def update(self, part: bytes | memoryview) -> Iterator[memoryview]:
        """Encrypt the next bytes; yields each completed block, which is valid until the next is requested."""
        view = memoryview(part)
        while view:
            if not self._held and len(view) >= BLOCK_BYTES:
                yield self._seal(view[:BLOCK_BYTES])
                view = view[BLOCK_BYTES:]
                continue
            taken = view[: BLOCK_BYTES - self._held]
            self._plain[self._held : self._held + len(taken)] = taken
            self._held += len(taken)
            view = view[len(taken) :]
            if self._held == BLOCK_BYTES:
                yield from self.finish()

    def finish(self) -> Iterator[memoryview]:
        """Encrypt the last, incomplete block, if there is one."""
        if self._held:
            held, self._held = self._held, 0
            yield self._seal(self._plain[:held])

    @property
    def seals(self) -> bytes:
        """The seals of all blocks so far."""
        return bytes(self._seals)

    def _seal(self, block: memoryview) -> memoryview:
        coded = self._coded[: len(block)]
        self._seals += self._key.seal(block, coded)
        return coded


assert SEAL_BYTES == _MARK_BYTES + 16, "a mark, and GCM's tag"


def read_key(file: str | os.PathLike[str]) -> EncryptionKey:
    """Read a key from a file: 32 bytes as 64 hex digits or as base64. Only the owner may have access to the file.

    Raises:
        ConfigurationError: the file is missing, others have access to it, or it holds no key; or `cryptography` is not
            installed. The message shows nothing of the file's contents.
    """
    path = expand_home(file)
    where = f"key file {printable(str(path))}"
    try:
        with os.fdopen(open_regular(path), "rb") as opened:
            mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
            text = opened.read(_MOST_FILE_BYTES + 1).strip()
    except FileNotFoundError:
        raise ConfigurationError(
            f"{where} does not exist; make a key, and keep a copy where it cannot be lost, with "
            f"{MAKE_ONE.format(shlex.quote(printable(str(path))))}"
        ) from None
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or type(exc).__name__
        raise ConfigurationError(f"{where} cannot be read: {reason}; name a file that holds the key") from exc
    if mode & 0o077:
        raise ConfigurationError(
            f"{where} has mode {mode:03o}, so that others may read it; expected 600 or 400: chmod 600 it"
        )
    secret = _decode(text)
    if secret is None:
        raise ConfigurationError(
            f"{where} holds no key; expected 32 bytes as 64 hex digits or as base64, as made by "
            f"{MAKE_ONE.format('FILE')}"
        )
    return EncryptionKey(secret, where=where)


def _decode(text: bytes) -> bytes | None:
    """Decode 32 bytes from hex or base64; None if the text is neither."""
    try:
        if len(text) == 2 * _KEY_BYTES:
            return binascii.unhexlify(text)
        secret = base64.b64decode(text.translate(bytes.maketrans(b"-_", b"+/")), validate=True)
    except ValueError:
        return None
    return secret if len(secret) == _KEY_BYTES else None


def _derive(secret: bytes, purpose: str) -> bytes:
    return blake3(secret, derive_key_context=_CONTEXT + purpose).digest()
