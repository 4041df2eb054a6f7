"""Signatures of models: made when a model is chunked, and checked before any of it is used.

A signature (Ed25519) is part of the manifest, so it is preserved in stores, servers, copies and disk caches. It covers
the model's content (`Manifest.identity`, as pins do) and the digests of its forms, but not its location or name.
`cryptography` (the extra `surfw[encryption]`) is imported when a key is first used.
"""

import os
import re
import shlex
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from surfw.config import printable
from surfw.errors import ConfigurationError, IntegrityError
from surfw.files import expand_home, open_regular
from surfw.manifest import Manifest, Signature, payload_digest, state
from surfw.source import ChunkSource, SourceInFront
from surfw.threads import in_thread

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MAKE_PRIVATE = "(umask 077; openssl genpkey -algorithm ed25519 -out {})"
MAKE_PUBLIC = "openssl pkey -in {} -pubout -out PUBLIC.pem"
_MOST_FILE_BYTES = 64 * 1024
_PUBLIC = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)
_PRIVATE = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")


class SigningKey:
    """A private key for signing models.

    Attributes:
        id: the id of the key pair, 32 hex digits.
    """

    def __init__(self, private: "Ed25519PrivateKey") -> None:
        self._private = private
        self.id = _key_id(private.public_key())

    def __repr__(self) -> str:
        """Show the key's id, never the key."""
        return f"<SigningKey {self.id}>"

    def sign(self, manifest: Manifest) -> Manifest:
        """Return the manifest with this key's signature, which replaces any existing one.

        Raises:
            ConfigurationError: digests of its weights are unknown, so that a signature could not cover them.
        """
        if not manifest.is_known:
            raise ConfigurationError(
                f"{manifest.name} is served in place, without digests of its weights, so that it cannot be signed; "
                "chunk it without --in-place"
            )
        forms = manifest.form_digests
        value = self._private.sign(state(manifest.identity, forms))
        return replace(manifest, signature=Signature(self.id, forms, value))


class VerifyKeys:
    """One or more public keys; a model signed with any of them is accepted.

    Attributes:
        where: names the file of the keys in errors.
    """

    def __init__(self, public: "list[Ed25519PublicKey]", *, where: str) -> None:
        self.where = where
        self._public = {_key_id(one): one for one in public}

    def check(self, manifest: Manifest, *, where: str) -> None:
        """Check that a model was signed with one of the keys, and was not changed since.

        Args:
            manifest: the model.
            where: names its source in errors.

        Raises:
            IntegrityError: the signature is missing, invalid, of another key, or does not cover all forms; or digests
                of the weights are unknown.
        """
        from cryptography.exceptions import InvalidSignature

        name, expected = f"{manifest.name} in {where}", f"key {' or '.join(self._public)} of the {self.where}"
        if not manifest.is_known:
            raise IntegrityError(
                f"{name} is served in place, without digests of its weights, so that it cannot be signed; chunk it "
                "with --sign, or leave out the key (verify_key, --verify-key)"
            )
        signature = manifest.signature
        if signature is None:
            raise IntegrityError(
                f"{name} is not signed, expected a signature of {expected}; take another source, or have it signed "
                "where it is chunked (surfw chunk --sign)"
            )
        public = self._public.get(signature.key_id)
        if public is None:
            raise IntegrityError(
                f"{name} is signed with key {signature.key_id}, expected {expected}; take another source, or the key "
                "of who made it (verify_key, --verify-key)"
            )
        try:
            public.verify(signature.value, state(manifest.identity, signature.forms))
        except InvalidSignature as exc:
            raise IntegrityError(
                f"{name} is not what was signed with key {signature.key_id}: its identity is b3:{manifest.identity}, "
                "and its signature is of something else; take another source"
            ) from exc
        if not manifest.is_covered:
            others = [codec for codec, one in manifest.form_digests.items() if signature.forms.get(codec) != one]
            raise IntegrityError(
                f"{name} has {' and '.join(others)} of its weights as they were not signed with key "
                f"{signature.key_id}; take another source, or have it signed as it is now (surfw chunk --sign)"
            )


class VerifyingSource(SourceInFront):
    """A source that refuses models without a valid signature: it never returns an unsigned manifest."""

    def __init__(self, source: ChunkSource, keys: VerifyKeys) -> None:
        """Wrap a source, which is closed with this one."""
        super().__init__(source)
        self._keys = keys

    @property
    def url(self) -> str:  # type: ignore[override]
        """Where the bytes come from, for display and error messages."""
        return self._source.url

    async def manifest(self, model: str) -> Manifest:
        """Return the manifest of a signed model.

        Raises:
            IntegrityError: the model has no valid signature; see `VerifyKeys.check`.
        """
        manifest = await self._source.manifest(model)
        await in_thread(lambda: self._keys.check(manifest, where=self.url))
        return manifest


def read_signing_key(file: str | os.PathLike[str]) -> SigningKey:
    """Read a private key from a PEM file, which must be accessible to its owner only.

    Raises:
        ConfigurationError: the file is missing, others have access to it, or it holds no Ed25519 private key; or
            `cryptography` is not installed. The message never contains any of the file's contents.
    """
    serialization, ed25519 = _import_keys()
    where, data, mode = _read(file, "signing key", MAKE_PRIVATE)
    if mode & 0o077:
        raise ConfigurationError(
            f"{where} has mode {mode:03o}, so that others may read it; expected 600 or 400: chmod 600 it"
        )
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except TypeError:
        raise ConfigurationError(
            f"{where} is protected by a passphrase, expected one that is not; write one with "
            f"(umask 077; openssl pkey -in {_quoted(file)} -out OTHER.pem)"
        ) from None
    except Exception:  # noqa: BLE001 - ValueError, or one of cryptography's own
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        seen = "a public key" if _PUBLIC.search(data) else "another kind of key" if key else "no private key in PEM"
        raise ConfigurationError(
            f"{where} holds {seen}, expected a private one of Ed25519, as made by {MAKE_PRIVATE.format('KEY.pem')}"
        )
    return SigningKey(key)


def read_verify_keys(file: str | os.PathLike[str]) -> VerifyKeys:
    """Read one or more public keys from a PEM file.

    Raises:
        ConfigurationError: the file is missing, or holds anything but Ed25519 public keys; or `cryptography` is not
            installed. The message never contains any of the file's contents.
    """
    serialization, ed25519 = _import_keys()
    where, data, _ = _read(file, "verify key", MAKE_PUBLIC.replace("{}", "KEY.pem").replace("PUBLIC.pem", "{}"))
    found = []
    for block in _PUBLIC.findall(data):
        try:
            found.append(serialization.load_pem_public_key(block))
        except Exception:  # noqa: BLE001 - ValueError, or one of cryptography's own
            found.append(None)
    if not found or _PRIVATE.search(data) or not all(isinstance(one, ed25519.Ed25519PublicKey) for one in found):
        seen = "a private key" if _PRIVATE.search(data) else "another kind of key" if found else "no public key in PEM"
        private = _quoted(file) if _PRIVATE.search(data) else "KEY.pem"
        raise ConfigurationError(
            f"{where} holds {seen}, expected public ones of Ed25519, as made by {MAKE_PUBLIC.format(private)}"
        )
    return VerifyKeys(found, where=where)


def _read(file: str | os.PathLike[str], kind: str, make: str) -> tuple[str, bytes, int]:
    """Read a key file; returns its description for errors, its contents, and its mode."""
    path = expand_home(file)
    where = f"{kind} {printable(str(path))}"
    try:
        with os.fdopen(open_regular(path), "rb") as opened:
            return where, opened.read(_MOST_FILE_BYTES), stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
    except FileNotFoundError:
        raise ConfigurationError(f"{where} does not exist; make one with {make.format(_quoted(file))}") from None
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or type(exc).__name__
        raise ConfigurationError(f"{where} cannot be read: {reason}; name a file that holds the key") from exc


def _quoted(file: str | os.PathLike[str]) -> str:
    return shlex.quote(printable(os.fspath(file)))


def _key_id(public: "Ed25519PublicKey") -> str:
    return payload_digest(public.public_bytes_raw())[:32]


def _import_keys() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as exc:
        raise ConfigurationError(
            "signatures need the package cryptography; install it: pip install 'surfw[encryption]'"
        ) from exc
    return serialization, ed25519
