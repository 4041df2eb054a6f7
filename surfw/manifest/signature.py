"""What a signature states about a model: its identity, and the digests that verify its forms."""

from collections.abc import Mapping
from dataclasses import dataclass

STATEMENT = "surfw signature 1"
"""The first line of the signed text, so that no other text signed with the key passes as a model's."""

SIGNATURE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Signature:
    """An Ed25519 signature of a model.

    Attributes:
        key_id: the id of the signing key: 32 hex digits.
        forms: for each codec, the digest of its forms when the model was signed; see `Manifest.form_digests`.
        value: the signature of `state(identity, forms)`.
    """

    key_id: str
    forms: Mapping[str, str]
    value: bytes


def state(identity: str, forms: Mapping[str, str]) -> bytes:
    """Return the text that is signed.

    Args:
        identity: see `Manifest.identity`.
        forms: see `Signature`.
    """
    lines = [STATEMENT, f"identity b3:{identity}", *(f"form {codec} b3:{forms[codec]}" for codec in sorted(forms))]
    return "".join(f"{line}\n" for line in lines).encode()
