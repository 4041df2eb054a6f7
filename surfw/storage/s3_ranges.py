"""Ranges of S3's objects, with s3fs' own client: streamed into place, of one ETag; what may pass is told from the rest.

botocore tries a request again as its configuration says; s3fs' own rounds are left out, as `Transfer` has its own.
"""

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import aiohttp
from botocore import exceptions as boto
from s3fs.errors import translate_boto_error

from surfw.config import MIB
from surfw.storage.transfer import Answer, PinLostError, Place, RangeReader, TransientError

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_PASSED_ON = ("RequestPayer", "SSECustomerAlgorithm", "SSECustomerKey", "SSECustomerKeyMD5", "ExpectedBucketOwner")
"""Settings of the file system that a GET takes."""

_STREAM_BYTES = MIB
"""What is taken of a stream at a time; it then buffers at most twice as much, and hardly ever makes its sender wait."""

_TRANSIENT_CODES = {
    "SlowDown", "RequestTimeout", "RequestTimeoutException", "Throttling", "ThrottlingException", "429",
    "RequestLimitExceeded", "BandwidthLimitExceeded", "PriorRequestNotComplete", "TooManyRequestsException",
}  # fmt: skip
_LOST = (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, aiohttp.ClientError, TimeoutError)
_UNSAFE = (boto.SSLError, boto.ProxyConnectionError)


class S3Ranges(RangeReader):
    """Ranges of objects in one bucket; paths begin with the bucket's name."""

    def __init__(self, fs: Any) -> None:
        """Name the file system; nothing is contacted."""
        self._fs = fs

    async def get(self, path: str, start: int, stop: int, place: Place, pinned: str | None) -> None:
        """Read into place."""
        bucket, _, key = path.partition("/")
        settings = self._fs.s3_additional_kwargs | self._fs.req_kw
        asked = {name: settings[name] for name in _PASSED_ON if name in settings}
        if pinned is not None:
            asked["IfMatch"] = pinned
        with _told_apart(self._fs.endpoint_url):
            client = await self._fs.set_session()
            try:
                found = await client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **asked)
            except boto.ClientError as exc:
                if _code(exc) not in {"InvalidRange", "416"}:
                    raise
                place(Answer(None, start, 0, None if start else 0))  # an empty object, or one that ends before
                return
            with closing(found["Body"]) as body:
                destination = place(_answer(found))
                done = 0
                while done < len(destination):
                    count = await body.readinto(destination[done : done + _STREAM_BYTES])
                    if not count:
                        raise boto.IncompleteReadError(actual_bytes=done, expected_bytes=len(destination))
                    done += count


def _answer(found: dict[str, Any]) -> Answer:
    revision, length = found.get("ETag"), int(found["ContentLength"])
    if match := _CONTENT_RANGE.fullmatch(found.get("ContentRange", "")):
        return Answer(revision, int(match[1]), length, int(match[3]))
    return Answer(revision, 0, length, length)  # the server took no notice of the range


@contextmanager
def _told_apart(endpoint: str | None) -> Iterator[None]:
    """What may pass as `TransientError`, the rest as s3fs tells it."""
    try:
        yield
    except boto.ClientError as exc:
        code, status = _code(exc), int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in {"PreconditionFailed", "412"}:
            raise PinLostError from exc
        told = translate_boto_error(exc)
        if code in _TRANSIENT_CODES or status >= 500:
            raise TransientError from told
        raise told from exc
    except _UNSAFE:
        raise
    except _LOST as exc:
        known = isinstance(exc, boto.BotoCoreError) and not isinstance(exc, boto.IncompleteReadError)
        lost = exc if known else boto.ConnectionClosedError(endpoint_url=endpoint or "S3", error=exc)
        raise TransientError from lost


def _code(exc: boto.ClientError) -> str:
    return str(exc.response.get("Error", {}).get("Code", ""))
