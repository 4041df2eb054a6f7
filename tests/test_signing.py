"""Signatures: a model equals what the key's owner signed, or it is refused before it is used."""

import asyncio
import json
import logging
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from surfw import ModelChunker, RetryPolicy
from surfw.checkpoint import demo_checkpoint
from surfw.chunking import copy_model
from surfw.config import MIB
from surfw.encryption import EncryptionKey
from surfw.errors import ConfigurationError, ConnectionFailedError, IntegrityError, ManifestError
from surfw.manifest import Manifest, digest_blocks, encode_stored_manifest, parse_stored_manifest
from surfw.models.client import WeightClient
from surfw.signing import SigningKey, VerifyKeys, read_signing_key, read_verify_keys
from surfw.source import ChunkSource
from surfw.storage import FilesystemBackend, Store, open_backend
from surfw.storage.store_source import open_storage_source
from tests.cli.run import complaint, surfw
from tests.servers import serve
from tests.sources.counted import read_all
from tests.stores import make_store, payload

PAIR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
KEY = SigningKey(PAIR)
KEYS = VerifyKeys([OTHER.public_key(), PAIR.public_key()], where="verify key here")


def private_pem(path: Path, key: Any = PAIR, *, passphrase: bytes = b"") -> str:
    hidden = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden))
    path.chmod(0o600)
    return str(path)


def public_pem(path: Path, *keys: Ed25519PrivateKey) -> str:
    kind = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    path.write_bytes(b"".join(key.public_key().public_bytes(*kind) for key in keys or (PAIR,)))
    return str(path)


@pytest.fixture
def made(tmp_path: Path) -> Manifest:
    """A signed model in the store `store`."""
    manifest = KEY.sign(make_store(tmp_path / "store", sizes=[2 * MIB + 5, 20]))
    asyncio.run(Store(FilesystemBackend(tmp_path / "store")).publish(manifest))
    return manifest


def with_form(manifest: Manifest, **changes: Any) -> Manifest:
    """Return the model with a changed form of its first chunk."""
    first, *others = manifest.chunks
    return replace(manifest, chunks=(replace(first, forms=(replace(first.forms[0], **changes),)), *others))


def test_what_is_signed_is_accepted_whatever_it_is_called_and_wherever_it_lies(made: Manifest) -> None:
    first, *others = made.chunks
    coded = replace(first, forms=(*first.forms, replace(first.forms[0], codec="lossless", digest="0" * 64)))
    for same in (
        made,
        made.public(),
        replace(made, name="other/name"),
        replace(made, chunks=(coded, *others)),  # it decodes to the signed identity, or not at all
        parse_stored_manifest(encode_stored_manifest(made), where="a store"),
    ):
        KEYS.check(same, where="here")
        assert same.identity == replace(made, signature=None).identity
    assert made.version == replace(made, signature=None).version


def test_whatever_else_is_there_is_refused(made: Manifest) -> None:
    first, *others = made.chunks
    forged = digest_blocks([bytes(first.payload_bytes)]).blocks
    packed = replace(first.forms[0], codec="int8", kinds=("int8",))
    for other, said in (
        (replace(made, config={**made.config, "vocab_size": 10}), "is not what was signed with key"),
        (replace(made, chunks=(replace(first, id="0" * 64), *others)), "is not what was signed with key"),
        (replace(made, files=made.files[1:]), "is not what was signed with key"),
        (replace(made, signature=replace(made.signature, value=bytes(64))), "is not what was signed with key"),  # type: ignore[type-var]
        (with_form(made, blocks=forged), "has none of its weights as they were not signed"),
        (replace(made, chunks=(replace(first, forms=(*first.forms, packed)), *others)), "has int8 of its weights"),
        (replace(made, signature=None), f"here is not signed, expected a signature of key .* or {KEY.id} of the"),
        (with_form(made, digest="", blocks=b""), "served in place, without digests .* cannot be signed"),
        (SigningKey(Ed25519PrivateKey.generate()).sign(made), r"is signed with key \w+, expected key"),
    ):
        with pytest.raises(IntegrityError, match=said):
            KEYS.check(other, where="here")
    with pytest.raises(ConfigurationError, match="cannot be signed; chunk it without --in-place"):
        KEY.sign(with_form(made, digest="", blocks=b""))


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "x"},
        {"key": None},
        {"value": "00"},
        {"value": 1},
        {"forms": {"none": "0"}},
        {"forms": {"\x1b": "0" * 64}},
        {"forms": {f"form{number}": "0" * 64 for number in range(17)}},
    ],
)
def test_a_malformed_signature_is_no_manifest(made: Manifest, changes: dict[str, Any]) -> None:
    document = json.loads(made.encode())
    document["signature"] |= changes
    with pytest.raises(ManifestError, match=r"signature|malformed"):
        parse_stored_manifest(json.dumps(document).encode(), where="a store")


def test_it_comes_along_over_servers_disk_caches_and_copies(
    tmp_path: Path, made: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    key, folder = public_pem(tmp_path / "maker.pub"), str(tmp_path / "cache")
    expected = {chunk.name: payload(tmp_path / "store", chunk) for chunk in made.chunks}

    async def read(source: ChunkSource) -> dict[str, bytes]:
        return await read_all(source, await source.manifest(made.name))

    async def copy(source: ChunkSource) -> list[Manifest]:
        target, manifest = open_backend(tmp_path / "copy"), await source.manifest(made.name)
        kept = await copy_model(source, manifest, target, codecs=("none",))
        again = await copy_model(source, replace(manifest, signature=None), target, codecs=("none",))
        encrypted = await copy_model(source, manifest, target, codecs=("none",), key=EncryptionKey(bytes(32)))
        signed = await copy_model(source, made.name, target, key=EncryptionKey(bytes(32)), signer=KEY)
        return [kept, again, encrypted, signed]

    with serve(tmp_path / "store") as server:
        for options in ({}, {"disk_cache": "1GB", "offline": False}):
            with WeightClient(server.url, verify_key=key, cache_dir=folder, **options) as client:
                assert client.run(read) == expected
        with WeightClient(server.url, verify_key=key) as client:
            kept, again, encrypted, signed = client.run(copy)
    with WeightClient(server.url, verify_key=key, cache_dir=folder, disk_cache="1GB", offline=True) as client:
        assert client.run(read) == expected
    other = public_pem(tmp_path / "other.pub", OTHER)
    with (
        WeightClient(server.url, verify_key=other, cache_dir=folder, disk_cache="1GB", offline=True) as client,
        pytest.raises(IntegrityError, match=f"is signed with key {KEY.id}"),
    ):
        client.run(read)
    assert kept.signature == again.signature == made.signature
    assert encrypted.signature is None
    assert [one.getMessage()[:40] for one in caplog.records if "signed" in one.getMessage()] == [
        f"{made.name} was signed with key {KEY.id}"[:40], f"{made.name} is signed with key {KEY.id}"[:40]
    ]  # fmt: skip
    KEYS.check(signed, where="here")
    assert signed.form_digests.keys() >= {"none"}


def test_a_second_source_cannot_bring_digests_of_its_own(tmp_path: Path, made: Manifest) -> None:
    """The second source claims the same payloads, but has other bytes and their digests."""
    evil = tmp_path / "evil"
    first = make_store(evil, sizes=[2 * MIB + 5, 20]).chunks[0]
    place = first.forms[0].locations[0]
    with (evil / place.object).open("r+b") as blob:
        blob.seek(place.start)
        blob.write(bytes(MIB))
    forged = with_form(made, blocks=digest_blocks([bytes(MIB), payload(evil, first)[MIB:]]).blocks)
    asyncio.run(Store(FilesystemBackend(evil)).publish(forged))

    async def main(source: ChunkSource) -> None:
        manifest = await source.manifest(made.name)
        (tmp_path / "store" / place.object).unlink()
        await read_all(source, manifest)

    with (
        WeightClient(
            [str(tmp_path / "store"), str(evil)], verify_key=public_pem(tmp_path / "key"), retry=RetryPolicy(attempts=1)
        ) as client,
        pytest.raises(ConnectionFailedError, match=r"could not be had: .*evil: .* is damaged: block 0"),
    ):
        client.run(main)


def test_keys_come_from_openssl_and_mistakes_with_them_are_named(tmp_path: Path) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    for command in (f"genpkey -algorithm ed25519 -out {private}", f"pkey -in {private} -pubout -out {public}"):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True, umask=0o077)
    signed = read_signing_key(private).sign(make_store(tmp_path / "store"))
    read_verify_keys(public).check(signed, where="here")
    rsa, passphrase = tmp_path / "rsa.pem", private_pem(tmp_path / "locked.pem", passphrase=b"secret")
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "x25519", "-out", str(rsa)], check=True, capture_output=True, umask=0o077
    )
    empty, shared = tmp_path / "empty", tmp_path / "shared"
    for path, mode in ((empty, 0o600), (shared, 0o644)):
        path.touch(mode)
        path.chmod(mode)
    for file, said in (
        (
            tmp_path / "none",
            r"does not exist; make one with \(umask 077; openssl genpkey -algorithm ed25519 -out \S",
        ),
        (public, "holds a public key, expected a private one of Ed25519"),
        (rsa, "holds another kind of key, expected a private one"),
        (empty, "holds no private key in PEM, expected"),
        (shared, "has mode 644, so that others may read it; expected 600"),
        (passphrase, "is protected by a passphrase"),
        (tmp_path, "cannot be read: Is a directory"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            read_signing_key(file)
    for file, said in (
        (tmp_path / "none", "does not exist; make one with openssl pkey -in KEY.pem -pubout -out .*none"),
        (private, r"holds a private key, expected public ones .* openssl pkey -in \S*key.pem -pubout"),
        (empty, "holds no public key in PEM"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            read_verify_keys(file)


def test_a_model_that_was_signed_stays_so_until_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, store = private_pem(tmp_path / "key.pem"), str(tmp_path / "store")
    said = []
    for options in ({"signing_key_file": key}, {}, {"codecs": ("none", "int8")}):
        caplog.clear()
        ModelChunker(demo_checkpoint(), store, name="toy", **options).chunk_model_sync()  # type: ignore[arg-type]
        said.append([one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING])

    async def signature() -> object:
        async with await open_storage_source(open_backend(store)) as source:
            return (await source.manifest("toy")).signature

    assert said[:2] == [[], []]
    assert f"toy was signed with key {KEY.id} in {store}, and is not any more" in said[2][-1]
    assert asyncio.run(signature()) is None


def test_commands_sign_and_run_only_what_is_signed(tmp_path: Path) -> None:
    private, public = private_pem(tmp_path / "key.pem"), public_pem(tmp_path / "key.pub")
    chunk = ("chunk", str(demo_checkpoint()), "--name", "toy")
    assert (
        "--sign: does not go with --in-place, which stores no weights"
        in surfw(tmp_path, *chunk, "--sign", private, "--in-place").stderr
    )
    plain = surfw(tmp_path, *chunk, "-q")
    assert plain.returncode == 0
    infer = ("infer", "toy", "--prompt-ids", "1,2", "--max-new-tokens", "1", "-q")
    assert "is not signed, expected a signature of key" in complaint(surfw(tmp_path, *infer, "--verify-key", public))
    assert f"signed with key {KEY.id}" in surfw(tmp_path, *chunk, "--sign", private).stdout
    assert json.loads(surfw(tmp_path, "show", "toy", "--json").stdout)["signed_by"] == KEY.id
    assert surfw(tmp_path, "verify", "toy", "--verify-key", public).returncode == 0
    config = tmp_path / "surfw.toml"
    config.write_text(f'[tool.surfw]\nverify_key = "{public}"\n')
    done = surfw(tmp_path, *infer, "--config", str(config))
    assert (done.returncode, done.stderr) == (0, "")
    other = public_pem(tmp_path / "other.pub", OTHER)
    for command in (("verify", "toy"), ("chunk", "toy", "--from", str(tmp_path / "store"), "--name", "copy")):
        said = complaint(surfw(tmp_path, *command, SURFW_VERIFY_KEY=other))
        assert f"is signed with key {KEY.id}, expected key " in said
        assert said.endswith("or the key of who made it (--verify-key)")
