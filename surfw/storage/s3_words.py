"""What cannot be a bucket's address or an option of S3, and what S3 and botocore say, in surfw's words.

No value that may be a secret is in a message. Nothing is contacted here.
"""

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from surfw.config import display_url
from surfw.errors import ConfigurationError, StorageError, SurfwError
from surfw.storage_options import S3_WORDS

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}")

_KNOWN = (
    "region", "profile", "endpoint_url", "addressing_style", "sse", "sse_kms_key_id", "requester_pays", "anonymous",
    "max_concurrency", "silence_timeout", "aws_access_key_id", "aws_secret_access_key", "aws_session_token",
)  # fmt: skip
_NOT_GIVEN = {"self", "session", "asynchronous", "loop", "kwargs"}
"""Parameters of s3fs that are no options."""

_TABLES = ("client_kwargs", "config_kwargs", "s3_additional_kwargs")

_WRONG_CREDENTIALS = {
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "InvalidToken": "the session token is not valid",
    "ExpiredToken": "the session token has expired",
}


def check_bucket(name: str, prefix: str) -> None:
    """Raises: ConfigurationError, for what cannot be a bucket's name."""
    if _BUCKET.fullmatch(name):
        return
    url = display_url(f"s3://{name}/{prefix}" if prefix else f"s3://{name}")
    shown = display_url(f"s3://{name}").removeprefix("s3://")
    where = "; credentials belong into the environment, a profile or storage options" if "@" in name else ""
    raise ConfigurationError(
        f"{url[:120]}: {shown[:80]!r} is not a bucket's name; expected the name alone, at least 3 letters, digits, "
        f"dots and dashes, as in s3://bucket/prefix{where}"
    )


def check_texts(**given: object) -> None:
    """Raises: ConfigurationError, for what is neither a text nor None; its value may be a secret."""
    for name, value in given.items():
        if not isinstance(value, str | None):
            raise ConfigurationError(f"{name} is of type {type(value).__name__}, expected a text")


def check_options(url: str, options: Mapping[str, Any]) -> None:
    """Make sure that s3fs can take what is given beside the arguments of `S3Backend`.

    Raises:
        ConfigurationError: it cannot, or s3fs is not installed.
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


def check_choice(name: str, given: str | None, choices: tuple[str, ...]) -> None:
    """Raises: ConfigurationError, for what is none of the choices."""
    if given is not None and given not in choices:
        raise ConfigurationError(f"{name} is {given!a:.80}; expected one of {', '.join(choices)}")


def check_endpoint(url: str) -> None:
    """Raises: ConfigurationError, for what is no address of a server, or holds a password."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError("endpoint_url must not hold credentials; give them as arguments of their own")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigurationError(
            f"endpoint_url {url[:80]!r} is not understood; write one such as http://127.0.0.1:9000"
        )


def explain_botocore(exc: BaseException, url: str, endpoint_url: str | None) -> SurfwError | None:
    """What botocore raises before there is an answer, or because there is none; None for anything else.

    Args:
        exc: the exception.
        url: the storage.
        endpoint_url: its server, if it was given.
    """
    from botocore import exceptions as boto

    if isinstance(exc, boto.ProfileNotFound):
        return ConfigurationError(f"{url}: {exc}; name one of those in ~/.aws/config, or give credentials")
    if isinstance(exc, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return ConfigurationError(
            f"{url}: no usable credentials were found; give them as arguments, in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or as a profile"
        )
    if not isinstance(exc, boto.ConnectionError | boto.HTTPClientError):
        return None
    where = endpoint_url or _endpoint_of(exc)
    if isinstance(exc, boto.SSLError):
        return StorageError(f"{url}: there is no safe connection to {where} ({_tls_advice(str(exc), where)})")
    others = "" if endpoint_url else "; a server that is not Amazon's is named by endpoint_url or AWS_ENDPOINT_URL"
    return StorageError(
        f"{url}: {where} cannot be reached ({type(exc).__name__}); check the address and the network{others}"
    )


def _endpoint_of(exc: Any) -> str:
    """The server that was tried."""
    parts = urlsplit(str(getattr(exc, "kwargs", {}).get("endpoint_url", "")))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else "its endpoint"


def _tls_advice(said: str, where: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in said or "certificate verify failed" in said:
        return "its certificate is not trusted; name the file of its authority in AWS_CA_BUNDLE"
    return f"SSLError: it does not speak TLS as it should; try http://{urlsplit(where).netloc}, if it has none"


def explain_code(code: str, url: str, bucket: str) -> SurfwError | None:
    """What S3's code in an answer means, or None for what all storages have in common."""
    if code == "NoSuchBucket":
        return StorageError(f"{url}: there is no bucket {bucket}; make it, or name another")
    if code == "InvalidBucketName":
        return ConfigurationError(f"{url}: {bucket} is not a name for a bucket there; name another")
    if code in {"AccessDenied", "403"}:
        return StorageError(f"{url}: permission denied; these credentials may not do this in bucket {bucket}")
    if code == "RequestTimeTooSkewed":
        return StorageError(
            f"{url}: this machine's clock differs from the server's by too much for a signature; set the clock"
        )
    if code in _WRONG_CREDENTIALS:
        return StorageError(f"{url}: wrong credentials: {_WRONG_CREDENTIALS[code]}; give others")
    return None


def code_of(exc: BaseException | None) -> str:
    """The code in S3's answer, which s3fs has as the cause of its exception; empty if there was no answer."""
    while exc is not None:
        response = getattr(exc, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        exc = exc.__cause__
    return ""
