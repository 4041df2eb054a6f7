"""What a signature says of a model: its identity, and how the bytes of its forms are proven."""

from collections.abc import Mapping
from dataclasses import dataclass

STATEMENT = "surfw signature 1"
"""The first line of what is signed: a key that signs other things too has not signed a model."""

SIGNATURE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Signature:
    """An Ed25519 signature of a model.

    Attributes:
        key_id: names the key that made it: 32 hex digits.
        forms: of each codec, the BLAKE3 of what a manifest says of its forms, as it was signed; see
            `Manifest.form_digests`.
        value: the signature of `state(identity, forms)`.
    """

    key_id: str
    forms: Mapping[str, str]
    value: bytes


def state(identity: str, forms: Mapping[str, str]) -> bytes:
    """The text that is signed.

    Args:
        identity: see `Manifest.identity`.
        forms: as of `Signature`.
    """
    lines = [STATEMENT, f"identity b3:{identity}", *(f"form {codec} b3:{forms[codec]}" for codec in sorted(forms))]
    return "".join(f"{line}\n" for line in lines).encode()
