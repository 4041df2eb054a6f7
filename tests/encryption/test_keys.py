"""Keys and sealed blocks: the valid contents of a key file, and no key and nonce is used for two plaintexts."""

import base64
import os
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from surfw.config import BLOCK_BYTES
from surfw.encryption import EncryptionKey, Sealer, read_key
from surfw.encryption.keys import WrongSealError
from surfw.errors import ConfigurationError
from surfw.manifest import SEAL_BYTES

SECRET = bytes(range(32))
KEY = EncryptionKey(SECRET)


def write(path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return path


def sealed(data: bytes, *cuts: int, key: EncryptionKey = KEY) -> tuple[bytes, bytes]:
    """The stored bytes and the seals of data that comes in parts."""
    sealer, stored = Sealer(key), bytearray()
    for start, stop in zip((0, *cuts), (*cuts, len(data)), strict=True):
        for block in sealer.update(data[start:stop]):
            stored += block
    for block in sealer.finish():
        stored += block
    return bytes(stored), sealer.seals


@pytest.mark.parametrize(
    "text",
    [
        SECRET.hex(),
        SECRET.hex().upper() + "\n",
        base64.b64encode(SECRET),
        b"  " + base64.b64encode(SECRET) + b"\n",
        base64.urlsafe_b64encode(b"\xff" * 32),
    ],
)
def test_a_key_is_hex_or_base64(tmp_path: Path, text: str | bytes) -> None:
    key = read_key(write(tmp_path / "key", text))
    secret = b"\xff" * 32 if key.id != KEY.id else SECRET
    assert key.id == EncryptionKey(secret).id
    assert str(tmp_path) in key.where
    assert SECRET.hex()[:8] not in repr(key)


@pytest.mark.parametrize("text", ["", "secret", "0" * 63, "g" * 64, base64.b64encode(bytes(31)), "0" * 5000])
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(
        ConfigurationError, match=r"holds no key; expected 32 bytes as 64 hex digits or as base64"
    ) as seen:
        read_key(write(tmp_path / "key", text))
    assert "secret" not in str(seen.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"mode {mode:o}, .*expected 600 or 400"):
        read_key(write(tmp_path / "key", SECRET.hex(), mode))


def test_a_missing_file_is_answered_with_how_to_make_one(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigurationError, match="does not exist; make a key") as seen:
        read_key(path)
    command = str(seen.value)[str(seen.value).index("(umask") :]
    assert os.system(command) == 0  # a shell is part of what is tested
    assert len(read_key(path).id) == 32


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "fifo", "no regular file")):
        with pytest.raises(ConfigurationError, match=why):
            read_key(path)


def test_without_the_package_it_is_named(tmp_path: Path) -> None:
    with (
        patch.dict("sys.modules", {"cryptography.hazmat.primitives.ciphers": None}),
        pytest.raises(ConfigurationError, match=r"pip install 'surfw\[encryption\]'"),
    ):
        read_key(write(tmp_path / "key", SECRET.hex()))


def test_the_format_is_what_its_page_says() -> None:
    """Computed independently from the text of FORMAT.md, with another interface of the library."""

    def derive(purpose: str) -> bytes:
        return blake3(SECRET, derive_key_context=f"surfw 2026 encryption of stored bytes: {purpose}").digest()

    data = os.urandom(BLOCK_BYTES + 77)
    stored, seals = b"", b""
    for start in (0, BLOCK_BYTES):
        plain = data[start : start + BLOCK_BYTES]
        mark = blake3(plain, key=derive("marks")).digest()
        coded = AESGCM(blake3(mark, key=derive("blocks")).digest()).encrypt(bytes(12), plain, None)
        stored, seals = stored + coded[:-16], seals + mark + coded[-16:]
    assert sealed(data) == (stored, seals)
    assert derive("key id")[:16].hex() == KEY.id
    assert KEY.hide("ab" * 32) == blake3(bytes.fromhex("ab" * 32), key=derive("ids")).hexdigest()


@given(data=st.binary(min_size=1, max_size=300), cuts=st.lists(st.integers(0, 300), max_size=4))
def test_parts_of_any_length_are_sealed_as_the_whole(data: bytes, cuts: list[int]) -> None:
    with patch("surfw.encryption.keys.BLOCK_BYTES", 64):
        stored, seals = sealed(data, *sorted(min(cut, len(data)) for cut in cuts))
        assert (stored, seals) == sealed(data)
        assert (len(stored), len(seals)) == (len(data), SEAL_BYTES * -(-len(data) // 64))
        opened = bytearray(stored)
        for index, start in enumerate(range(0, len(data), 64)):
            KEY.open(memoryview(opened)[start : start + 64], seals[SEAL_BYTES * index : SEAL_BYTES * (index + 1)])
        assert opened == data


@given(st.lists(st.binary(max_size=3), max_size=20))
def test_no_key_and_nonce_cover_two_plaintexts(blocks: list[bytes]) -> None:
    """With two keys, and blocks so short that some are equal or begin alike."""
    seen, made = defaultdict[tuple[bytes, bytes], set[bytes]](set), EncryptionKey._cipher
    other = EncryptionKey(bytes(32))
    for plain in blocks:
        for key in (KEY, other):

            def record(self: EncryptionKey, mark: bytes, plain: bytes = plain) -> object:
                cipher = made(self, mark)
                seen[cipher.algorithm.key, cipher.mode.initialization_vector].add(plain)
                return cipher

            with patch.object(EncryptionKey, "_cipher", record):
                key.seal(plain, memoryview(bytearray(len(plain))))
    assert all(len(plaintexts) == 1 for plaintexts in seen.values())
    assert len(seen) == 2 * len(set(blocks))


def test_a_wrong_key_a_flipped_bit_and_another_seal_do_not_open() -> None:
    data = os.urandom(1000)
    stored, seal = sealed(data)
    flipped = bytes([stored[0] ^ 1]) + stored[1:]
    _, another = sealed(os.urandom(1000))
    for block, its, key in ((stored, seal, EncryptionKey(bytes(32))), (flipped, seal, KEY), (stored, another, KEY)):
        with pytest.raises(WrongSealError):
            key.open(memoryview(bytearray(block)), its)
