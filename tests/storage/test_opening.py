"""The backend for an address, its options, and a clear line for addresses that cannot be opened."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from surfw.chunking import prepare_model
from surfw.config import is_server_url
from surfw.errors import ConfigurationError, NotAStoreError, StorageError
from surfw.storage import FilesystemBackend, FsspecBackend, S3Backend, open_backend
from surfw.storage.origins import PlacedOptions, is_local_url
from surfw.storage.store import is_checkpoint
from surfw.storage_options import parse_options, shown_options
from tests.services.processes import free_port
from tests.storage.backend_of_others import Found

HERE = "tests.storage.backend_of_others"


def refusal(url: str | Path, options: dict[str, Any] | None = None) -> str:
    """The one line that says why a storage cannot be opened."""
    with pytest.raises(ConfigurationError) as caught:
        open_backend(url, options)
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with entry points."""
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[surfw.storage]\nothers = {HERE}:Found\nbroken = {HERE}:Missing\nnumber = {HERE}:NOT_CALLABLE\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("offered")
def test_an_entry_point_gives_the_backend_of_its_scheme() -> None:
    backend = open_backend("others://place/x", {"key": "s3cret"})
    assert isinstance(backend, Found)
    assert (backend.url, backend.options) == ("others://place/x", {"key": "s3cret"})


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("broken://x", f"the entry point broken = {HERE}:Missing fails with AttributeError: .*; install its package"),
        ("number://x", "its scheme names int object, expected a class or a function that takes the URL"),
        (
            f"{HERE}.Missing://me:s3cret@x",
            rf"{HERE}.Missing cannot be imported \(AttributeError: .*; install its package",
        ),
        (
            "no_such.package.Backend://x",
            r"no_such.package.Backend cannot be imported \(ModuleNotFoundError: .*'no_such'",
        ),
        (f"{HERE}.fail://x", "its backend fails with ValueError: no such place"),
        (f"{HERE}.nothing://x", "its scheme gives str object, expected a StorageBackend; name a class that is one, or"),
        (
            f"{HERE}.Placeless://x",
            r".* fails with TypeError: .*; it is called with the URL and the .* options, as in Placeless\(url, \*\*opt",
        ),
        ("nope://x", "Protocol not known: nope; name a folder, or a URL such as s3://bucket/prefix"),
    ],
)
def test_what_cannot_be_opened_is_one_line(url: str, said: str) -> None:
    line = refusal(url)
    assert line.startswith("storage ")
    with pytest.raises(ConfigurationError, match=rf"cannot be opened: {said}"):
        open_backend(url)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("s3:/bucket/x", "if a URL is meant, write s3://bucket/x"),
        ("s3:bucket/x", "if a URL is meant, write s3://bucket/x"),
        ("S3:bucket", "if a URL is meant, write s3://bucket"),
        (Path("s3://bucket/x"), "if a URL is meant, write s3://bucket/x"),
        ("https:/host/x", "if a URL is meant, write https://host/x"),
        ("gs:/bucket", "if a URL is meant, write gs://bucket"),
        ("localhost:8765", "if a server is meant, write ws://localhost:8765"),
        ("[::1]:8765", "if a server is meant, write ws://[::1]:8765"),
        ("ws:127.0.0.1:8765", "if a server is meant, write ws://127.0.0.1:8765"),
    ],
)
def test_a_mistyped_url_is_no_folder(
    text: str | Path, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(text) == f"{text} is no folder here; {meant}; for a folder write ./{text}"
    below = open_backend(f"./{text}")
    assert isinstance(below, FilesystemBackend)
    below.base.mkdir(parents=True)
    assert open_backend(text).url == below.url == str(tmp_path / text)


def test_a_mistyped_url_is_no_checkpoint_either() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^s3:bucket/x is no folder here; if a URL is meant, write s3://bucket/x;"
    ):
        prepare_model("s3:bucket/x")


def test_a_mistyped_url_with_a_password_is_not_repeated() -> None:
    said = "the address is that of no folder here; if a URL is meant, write s3://***@bucket"
    assert refusal("s3:me:s3cret@bucket") == said


def test_a_folder_may_have_a_colon_in_its_name() -> None:
    for name in ("run:one", "a/b:8765", "12:30 o'clock", "models@v1:x"):
        assert isinstance(open_backend(name), FilesystemBackend)


@pytest.mark.parametrize("url", ["ws://host:8765", "WSS://me:s3cret@host:8765/x"])
def test_a_server_is_no_storage(url: str) -> None:
    assert "is the address of a server, and not a storage; give it to surfw infer --source, or" in refusal(url)


def test_schemes_are_read_in_any_case(tmp_path: Path) -> None:
    assert open_backend("S3://bucket/Models").url == "s3://bucket/Models"
    assert open_backend(f"FILE://{tmp_path}").url == str(tmp_path)
    assert is_server_url("WS://host")
    options = {"region": "x"}
    assert (
        PlacedOptions("S3://a", options).for_url("s3://b") == PlacedOptions("/a", options).for_url("S3://b") == options
    )
    assert PlacedOptions("https://host/a", options).for_url("HTTPS://host/b") == options
    assert [is_local_url(url) for url in ("FILE:///a", "S3://b")] == [True, False]


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub = f"http://127.0.0.1:{free_port()}"
    backend = open_backend("hf://org/name", {"endpoint": hub})
    said = (
        rf"^hf://org/name: the hub at {hub} cannot be reached \(.*\); check the network, or name another hub in HF_END"
    )
    with pytest.raises(StorageError, match=said):
        asyncio.run(backend.exists("config.json"))


def test_a_backend_shows_its_class_and_place_without_secrets() -> None:
    given = {"key": "one", "secret": "s3cret"}
    assert repr(open_backend("s3://bucket/x", given)) == "<S3Backend s3://bucket/x>"
    assert repr(open_backend("/data")) == "<FilesystemBackend /data>"
    assert repr(open_backend("https://me:s3cret@host/x")) == "<FsspecBackend https://***@host/x>"
    assert repr(open_backend(f"{HERE}.Found://me:s3cret@x")) == f"<Found {HERE}.Found://***@x>"


def test_a_dotted_path_gives_the_backend() -> None:
    backend = open_backend(f"{HERE}.Found://place", {"size": 3})
    assert isinstance(backend, Found)
    assert backend.options == {"size": 3}


def test_a_missing_package_is_named() -> None:
    script = (
        "import sys\n"
        "for name in ('gcsfs', 's3fs'): sys.modules[name] = None\n"
        "from surfw.storage import open_backend\n"
        "from surfw.errors import ConfigurationError\n"
        "for url in ('gs://bucket/x', 's3://bucket/x'):\n"
        "    try: open_backend(url)\n"
        "    except ConfigurationError as exc: print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    google, amazon = done.stdout.splitlines()
    assert google.startswith("storage gs://bucket/x needs a package that is not installed")
    assert google.endswith("; run: pip install gcsfs")
    assert amazon == "s3://bucket/x: S3 needs the package s3fs; run: pip install s3fs"


def test_options_of_s3_in_surfws_words() -> None:
    backend = open_backend(
        "s3://bucket/a/b",
        {
            "endpoint_url": "http://localhost:9", "region": "eu-central-1", "profile": "mine", "sse": "aws:kms",
            "sse_kms_key_id": "k", "requester_pays": True, "addressing_style": "virtual", "max_concurrency": "3",
        },
    )  # fmt: skip
    assert isinstance(backend, S3Backend)
    fs = backend.fs
    assert (backend.endpoint_url, fs.client_kwargs, fs.max_concurrency) == (
        "http://localhost:9", {"region_name": "eu-central-1"}, 3,
    )  # fmt: skip
    assert fs.s3_additional_kwargs == {
        "ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "k", "RequestPayer": "requester",
    }  # fmt: skip
    assert fs.req_kw == {"RequestPayer": "requester"}
    assert fs.config_kwargs["s3"] == {"addressing_style": "virtual"}
    assert fs.kwargs["profile"] == "mine"
    assert isinstance(open_backend("folder", {"region": "x"}), FilesystemBackend), "a folder ignores them"


@pytest.mark.parametrize(
    "names",
    [("aws_access_key_id", "aws_secret_access_key", "aws_session_token"), ("key", "secret", "token"),
     ("username", "password", "token")],
)  # fmt: skip
def test_credentials_of_s3_by_all_their_names(names: tuple[str, ...]) -> None:
    backend = open_backend("s3://bucket", dict(zip(names, ("one", "two", "three"), strict=True)))
    assert isinstance(backend, S3Backend)
    assert (backend.fs.key, backend.fs.secret, backend.fs.token) == ("one", "two", "three")
    assert open_backend("s3://bucket", {"anon": True}).fs.anon  # type: ignore[attr-defined]


def test_an_argument_of_s3fs_that_has_another_name_is_told() -> None:
    with pytest.raises(ConfigurationError, match="s3://bucket: secret is aws_secret_access_key here; give it by that"):
        S3Backend("bucket", secret="s3cret")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "s3://: '' is not a bucket's name; expected the name alone"),
        ("s3:///x", "s3:///x: '' is not a bucket's name"),
        ("s3://me:s3cret@bucket/x", r"s3://***@bucket/x: '***@bucket' is not a bucket's name"),
        ("s3://bucket/x?token=s3cret", "s3://bucket: prefix 'x?token=***' is refused; write one such as models/mine"),
    ],
)
def test_an_address_of_s3_that_cannot_be_one_is_named_without_secrets(url: str, said: str) -> None:
    assert refusal(url).startswith(said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"regoin": "x"}, "s3://bucket: there is no option regoin; did you mean region? surfw knows region, profile"),
        ({"max_concurency": 8}, "s3://bucket: there is no option max_concurency; did you mean max_concurrency?"),
        ({"loop": "s3cret"}, "s3://bucket: there is no option loop; surfw knows region, profile, endpoint_url"),
        ({"self": "s3cret"}, "s3://bucket: there is no option self; surfw knows region, profile, endpoint_url"),
        ({"region": "x", "region_name": "y"}, "storage options region and region_name say the same"),
        ({"key": "x", "aws_access_key_id": "y"}, "storage options key and aws_access_key_id say the same"),
        ({"username": "x"}, "the credentials for s3://bucket are incomplete"),
        ({"anon": "maybe"}, "storage option anonymous is 'maybe', expected true or false"),
        ({"url": "s3cret"}, "storage option url is part of the URL"),
        ({"config_kwargs": "s3cret"}, "s3://bucket: config_kwargs is of type str, expected a table"),
        ({"secret": ["s3cret"]}, "aws_secret_access_key is of type list, expected a text"),
        ({"endpoint_url": 9000}, "endpoint_url is of type int, expected a text"),
        ({"max_concurrency": "0"}, "storage option max_concurrency is '0', expected a number from 1 to 256"),
        ({"anonymous": "maybe"}, "storage option anonymous is 'maybe', expected true or false"),
        ({"addressing_style": "odd"}, "addressing_style is 'odd'; expected one of auto, path, virtual"),
        ({"sse": "rot13"}, "sse is 'rot13'; expected one of AES256, aws:kms, aws:kms:dsse"),
        ({"sse_kms_key_id": "x"}, "sse_kms_key_id is for SSE-KMS, but sse is None; give sse='aws:kms' with it"),
        ({"anonymous": True, "profile": "x"}, "s3://bucket is given credentials and anonymous"),
        ({"aws_secret_access_key": "s3cret"}, "the credentials for s3://bucket are incomplete"),
    ],
)
def test_options_of_s3_that_cannot_be_used(options: dict[str, Any], said: str) -> None:
    assert refusal("s3://bucket", options).startswith(said)


@pytest.mark.parametrize("value", [0, -1, 257, 2.5, None, "", True])
@pytest.mark.parametrize("make", [partial(S3Backend, "bucket"), partial(FsspecBackend, "http://host/x")])
def test_a_number_of_connections_that_is_none(make: Callable[..., object], value: object) -> None:
    with pytest.raises(
        ConfigurationError, match=r"^storage option max_concurrency is .*, expected a number from 1 to "
    ):
        make(max_concurrency=value)


def test_options_from_the_command_line() -> None:
    given = ["region=eu-central-1", "anonymous=true", "requester_pays=False", "endpoint_url=http://x?a=b", "empty="]
    assert parse_options(given) == {
        "region": "eu-central-1", "anonymous": True, "requester_pays": False, "endpoint_url": "http://x?a=b",
        "empty": "",
    }  # fmt: skip
    with pytest.raises(ConfigurationError, match="storage option 'region' is not understood; write KEY=VALUE"):
        parse_options(["region"])


@pytest.mark.parametrize(
    "name",
    ["aws_secret_access_key", "secret", "password", "token", "aws_session_token", "account_key", "key", "SAS_token"],
)
def test_a_secret_on_the_command_line_is_refused_without_repeating_it(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"storage option {name} is a secret, which does not") as caught:
        parse_options([f"{name}=s3cret"])
    assert "s3cret" not in str(caught.value)


def test_only_what_is_known_to_be_harmless_is_shown() -> None:
    options = {
        "region": "x",
        "endpoint_url": "http://me:s3cret@host",
        "odd": "s3cret",
        "client_kwargs": {"a": "s3cret"},
    }
    assert shown_options(options) == {
        "region": "x", "endpoint_url": "http://***@host", "odd": "***", "client_kwargs": "***",
    }  # fmt: skip


def test_what_lies_in_the_place_of_a_store_s_files_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "surfw.json")
    with pytest.raises(NotAStoreError, match=f"{tmp_path}/surfw.json is no regular file, expected one; put"):
        asyncio.run(is_checkpoint(FilesystemBackend(tmp_path)))
