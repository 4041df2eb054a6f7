"""Translate errors of S3 and botocore. Messages contain no possible secret."""

from typing import Any
from urllib.parse import urlsplit

from surfw.errors import ConfigurationError, StorageError, SurfwError

_WRONG_CREDENTIALS = {
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "InvalidToken": "the session token is not valid",
    "ExpiredToken": "the session token has expired",
}


def explain_botocore(exc: BaseException, url: str, endpoint_url: str | None) -> SurfwError | None:
    """Return the error for an exception that botocore raised without a response from S3; None for any other.

    Args:
        exc: the exception.
        url: the URL of the storage.
        endpoint_url: its server, if given.
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
    """The server that botocore tried to reach."""
    parts = urlsplit(str(getattr(exc, "kwargs", {}).get("endpoint_url", "")))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else "its endpoint"


def _tls_advice(said: str, where: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in said or "certificate verify failed" in said:
        return "its certificate is not trusted; name the file of its authority in AWS_CA_BUNDLE"
    return f"SSLError: it does not speak TLS as it should; try http://{urlsplit(where).netloc}, if it has none"


def explain_code(code: str, url: str, bucket: str) -> SurfwError | None:
    """Return the error for a code in S3's response; None for errors common to all storages."""
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
    """Return S3's error code from the exception or its causes; empty if there was no response."""
    while exc is not None:
        response = getattr(exc, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        exc = exc.__cause__
    return ""
