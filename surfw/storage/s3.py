"""Storage in a bucket of S3 or of a compatible server: a thin constructor over s3fs.

By default, botocore finds credentials, region and endpoint: in the environment, a profile or a role. Invariants: no
connection, credential or listing is shared with another backend; `url` and messages contain no secret. Ranges are read
in threads (see `s3_ranges`); other requests run on fsspec's event loop. An upload holds at most `_PARTS` parts in
memory, and is invisible until it is complete; a failed upload is aborted, so that no parts remain.
"""

import asyncio
import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import fsspec

from surfw.config import DEFAULT_SILENCE_SECONDS, MIB, display_url, expect
from surfw.errors import ConfigurationError
from surfw.storage.base import is_key
from surfw.storage.far_reads import CONNECTIONS, RangeReader
from surfw.storage.fsspec_backend import FsspecBackend
from surfw.storage.s3_errors import code_of, explain_botocore, explain_code
from surfw.storage_options import S3_WORDS

_CONNECT_SECONDS = 5
_ATTEMPTS, _ROUNDS = 2, 3
"""How often botocore tries a request, and how often s3fs calls botocore: a silent endpoint fails in half a minute."""

_PART_BYTES, _PARTS, _MOST_PARTS = 16 * MIB, 4, 10_000
"""The least size of an upload's parts, how many are in flight at a time, and how many S3 accepts per object."""

AddressingStyle = Literal["auto", "path", "virtual"]
Encryption = Literal["AES256", "aws:kms", "aws:kms:dsse"]

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}")

_KNOWN = (
    "region", "profile", "endpoint_url", "addressing_style", "sse", "sse_kms_key_id", "requester_pays", "anonymous",
    "max_concurrency", "silence_timeout", "aws_access_key_id", "aws_secret_access_key", "aws_session_token",
)  # fmt: skip
_NOT_GIVEN = {"self", "session", "asynchronous", "loop", "kwargs"}
"""Parameters of `S3FileSystem` that are not storage options."""

_TABLES = ("client_kwargs", "config_kwargs", "s3_additional_kwargs")


class S3Backend(FsspecBackend):
    """Objects in an S3 bucket, under a prefix."""

    def __init__(
        self,
        /,  # options may have any name
        bucket_name: str,
        prefix: str = "",
        *,
        region_name: str | None = None,
        endpoint_url: str | None = None,
        aws_access_key_id: str | None = None,
        aws_secret_access_key: str | None = None,
        aws_session_token: str | None = None,
        profile_name: str | None = None,
        addressing_style: AddressingStyle | None = None,
        sse: Encryption | None = None,
        sse_kms_key_id: str | None = None,
        requester_pays: bool = False,
        anonymous: bool = False,
        silence_timeout: float = DEFAULT_SILENCE_SECONDS,
        **options: Any,
    ) -> None:
        """Set the bucket; nothing is contacted yet.

        Args:
            bucket_name: the bucket, which must exist.
            prefix: the beginning of every key, such as `models/mine`.
            region_name: the bucket's region, such as `eu-central-1`.
            endpoint_url: the address of a server other than Amazon's, such as `http://127.0.0.1:9000`.
            aws_access_key_id: given together with the secret key, or not at all.
            aws_secret_access_key: the secret key.
            aws_session_token: for temporary credentials.
            profile_name: a profile in the shared credentials and configuration files.
            addressing_style: `path` puts the bucket into the path, which many compatible servers need; `virtual` into
                the host name. Default: botocore's choice.
            sse: server-side encryption of uploads: `AES256` (SSE-S3), `aws:kms` or `aws:kms:dsse` (SSE-KMS).
            sse_kms_key_id: the key for SSE-KMS; default: the account's own.
            requester_pays: agree to pay for requests to a requester-pays bucket.
            anonymous: send unsigned requests, for public buckets.
            silence_timeout: seconds without progress after which a read fails.
            **options: other arguments of `s3fs.S3FileSystem`, such as `config_kwargs`, and `max_concurrency`.

        Raises:
            ConfigurationError: an argument cannot be used, or s3fs is not installed.
        """
        expect("bucket_name", bucket_name, str, "a bucket's name")
        expect("prefix", prefix, str, "a text such as models/mine")
        _check_bucket(bucket_name, prefix)
        _check_texts(
            region_name=region_name,
            endpoint_url=endpoint_url,
            aws_access_key_id=aws_access_key_id,
            aws_secret_access_key=aws_secret_access_key,
            aws_session_token=aws_session_token,
            profile_name=profile_name,
            sse_kms_key_id=sse_kms_key_id,
        )
        if bool(aws_access_key_id) != bool(aws_secret_access_key) or (aws_session_token and not aws_access_key_id):
            raise ConfigurationError(
                f"the credentials for s3://{bucket_name} are incomplete; give aws_access_key_id and "
                "aws_secret_access_key together, or neither to have them found"
            )
        if anonymous and (aws_access_key_id or profile_name):
            raise ConfigurationError(f"s3://{bucket_name} is given credentials and anonymous; leave one of them out")
        if endpoint_url is not None:
            _check_endpoint(endpoint_url)
        _check_choice("addressing_style", addressing_style, get_args(AddressingStyle))
        _check_choice("sse", sse, get_args(Encryption))
        if sse_kms_key_id is not None and sse not in {"aws:kms", "aws:kms:dsse"}:
            raise ConfigurationError(f"sse_kms_key_id is for SSE-KMS, but sse is {sse!r}; give sse='aws:kms' with it")
        settings = {
            "ServerSideEncryption": sse,
            "SSEKMSKeyId": sse_kms_key_id,
            "RequestPayer": "requester" if requester_pays else None,  # s3fs before 2026.9 sends it only with reads
        }
        self._addressing_style = addressing_style
        self.bucket, self.endpoint_url = bucket_name, endpoint_url
        self.prefix = prefix.strip("/")
        if self.prefix and not is_key(self.prefix):
            shown = display_url(f"s3://{bucket_name}/{prefix}").removeprefix(f"s3://{bucket_name}/")
            raise ConfigurationError(
                f"s3://{bucket_name}: prefix {shown[:80]!r} is refused; write one such as models/mine"
            )
        url = f"s3://{bucket_name}/{self.prefix}".rstrip("/")
        _check_options(url, options)
        super().__init__(
            url,
            key=aws_access_key_id,
            secret=aws_secret_access_key,
            token=aws_session_token,
            endpoint_url=endpoint_url,
            client_kwargs=({"region_name": region_name} if region_name else {}) | options.pop("client_kwargs", {}),
            s3_additional_kwargs={name: value for name, value in settings.items() if value is not None}
            | options.pop("s3_additional_kwargs", {}),
            requester_pays=requester_pays,
            anon=anonymous,
            silence_timeout=silence_timeout,
            **({"profile": profile_name} if profile_name else {}),
            **options,
        )

    def _open(self, **options: Any) -> tuple[Any, str]:
        import s3fs

        given = options.pop("config_kwargs", {})
        config: dict[str, Any] = {
            "connect_timeout": min(_CONNECT_SECONDS, self.silence_timeout / 2),
            "read_timeout": self.silence_timeout / 2,
            "retries": {"mode": "standard", "total_max_attempts": _ATTEMPTS},
            "max_pool_connections": max(10, 2 * options.get("max_concurrency", CONNECTIONS)),
        } | given
        if self._addressing_style:
            config["s3"] = dict(config.get("s3") or {}) | {"addressing_style": self._addressing_style}
        fs = s3fs.S3FileSystem(
            skip_instance_cache=True,  # fsspec would share an instance between equal arguments
            use_listings_cache=False,
            config_kwargs=config,
            **options,
        )
        fs.retries = _ROUNDS
        return fs, f"{self.bucket}/{self.prefix}".rstrip("/")

    def _range_reader(self, connections: int) -> RangeReader:
        from surfw.storage.s3_ranges import S3Ranges

        return S3Ranges(self.fs, connections, self.silence_timeout)

    def _upload_options(self, size: int) -> Mapping[str, Any]:
        return {"chunksize": max(_PART_BYTES, -(-size // _MOST_PARTS)), "max_concurrency": _PARTS}

    @contextmanager
    def _translate(self, what: str) -> Iterator[None]:
        """Translate all errors, including those of S3 and botocore."""
        with super()._translate(what):
            try:
                yield
            except Exception as exc:
                error = explain_botocore(exc, self.url, self.endpoint_url)
                if error := error or explain_code(self._code(exc), self.url, self.bucket):
                    raise error from exc
                raise

    def _code(self, exc: BaseException) -> str:
        """S3's code for the error. A response to HEAD has no body with the code, so a listing is sent to get it."""
        code = code_of(exc)
        if code != "403":
            return code
        try:
            asked = {"Bucket": self.bucket, "Prefix": self.prefix, "MaxKeys": 1}
            listing = partial(self.fs._call_s3, "list_objects_v2", **asked)  # noqa: SLF001 - as its own systems do
            fsspec.asyn.sync(self.fs.loop, listing, timeout=self.silence_timeout)
        except OSError as why:
            return code_of(why) or code
        return code

    async def close(self) -> None:
        """Close the connections; a later use opens new ones."""
        if self._far is not None:
            self._far.reader.close()
        creator = getattr(self.fs, "_s3creator", None)  # s3fs has no public name for the argument of close_session
        if creator is not None:
            await asyncio.to_thread(self.fs.close_session, self.fs.loop, creator)


def _check_bucket(name: str, prefix: str) -> None:
    """Raise ConfigurationError for a name that no bucket can have."""
    if _BUCKET.fullmatch(name):
        return
    url = display_url(f"s3://{name}/{prefix}" if prefix else f"s3://{name}")
    shown = display_url(f"s3://{name}").removeprefix("s3://")
    where = "; credentials belong into the environment, a profile or storage options" if "@" in name else ""
    raise ConfigurationError(
        f"{url[:120]}: {shown[:80]!r} is not a bucket's name; expected the name alone, at least 3 letters, digits, "
        f"dots and dashes, as in s3://bucket/prefix{where}"
    )


def _check_texts(**given: object) -> None:
    """Raise ConfigurationError for a value that is neither a string nor None, without showing it."""
    for name, value in given.items():
        if not isinstance(value, str | None):
            raise ConfigurationError(f"{name} is of type {type(value).__name__}, expected a text")


def _check_options(url: str, options: Mapping[str, Any]) -> None:
    """Check that s3fs accepts the options that are not arguments of `S3Backend`.

    Raises:
        ConfigurationError: it does not, or s3fs is not installed.
    """
    try:
        import s3fs
    except ImportError as exc:
        raise ConfigurationError(f"{url}: S3 needs the package {exc.name}; run: pip install s3fs") from exc

    for name, value in options.items():
        if name in S3_WORDS:
            raise ConfigurationError(f"{url}: {name} is {S3_WORDS[name]} here; give it by that name")
        if name in _TABLES and not isinstance(value, Mapping):
            raise ConfigurationError(f"{url}: {name} is of type {type(value).__name__}, expected a table")
    of_s3fs = {*inspect.signature(s3fs.S3FileSystem.__init__).parameters} - _NOT_GIVEN - set(S3_WORDS)
    if unknown := sorted(set(options) - of_s3fs):
        near = difflib.get_close_matches(unknown[0], [*_KNOWN, *of_s3fs], n=1, cutoff=0.8)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigurationError(
            f"{url}: there is no option {unknown[0]}; {meant}surfw knows {', '.join(_KNOWN)}, and s3fs those of its "
            "S3FileSystem"
        )


def _check_choice(name: str, given: str | None, choices: tuple[str, ...]) -> None:
    """Raise ConfigurationError for a value that is not one of the choices."""
    if given is not None and given not in choices:
        raise ConfigurationError(f"{name} is {given!a:.80}; expected one of {', '.join(choices)}")


def _check_endpoint(url: str) -> None:
    """Raise ConfigurationError for an endpoint that is not a server's address, or contains credentials."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError("endpoint_url must not hold credentials; give them as arguments of their own")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigurationError(
            f"endpoint_url {url[:80]!r} is not understood; write one such as http://127.0.0.1:9000"
        )
