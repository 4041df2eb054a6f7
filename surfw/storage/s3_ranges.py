"""Ranges of S3 objects: streamed into place, and of one ETag.

They are requested with botocore's blocking client, in threads, with the arguments of s3fs' own client. This takes two
thirds of the processor time per byte of s3fs' event loop, which is the bottleneck on a fast link, and bytes can be
verified at once. botocore retries requests as configured; `FarReads` does the rest.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import botocore.session
import urllib3
from botocore import UNSIGNED
from botocore import exceptions as boto
from botocore.config import Config
from s3fs.errors import translate_boto_error

from surfw.config import PROGRESS_BYTES
from surfw.storage.far_reads import Destination, PinLostError, RangeReader, RangeResponse, TransientError
from surfw.storage.s3_errors import code_of
from surfw.threads import DaemonThreads, to_its_end

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_PASSED_ON = ("RequestPayer", "SSECustomerAlgorithm", "SSECustomerKey", "SSECustomerKeyMD5", "ExpectedBucketOwner")
"""Settings of the file system that are also arguments of GET."""

_OF_AIOBOTOCORE = ("connector_args", "http_session_cls")
"""Client settings that only s3fs' own client accepts."""

_STREAM_BYTES = 256 << 10
"""How much is read from a stream at a time: it is still in the processor's cache when it is copied into place."""

_SLOW_SECONDS = 1.0
"""After a piece that took longer, a stream is read in pieces of `PROGRESS_BYTES`, so that progress is visible."""

_TRANSIENT_CODES = {
    "SlowDown", "RequestTimeout", "RequestTimeoutException", "Throttling", "ThrottlingException", "429",
    "RequestLimitExceeded", "BandwidthLimitExceeded", "PriorRequestNotComplete", "TooManyRequestsException",
}  # fmt: skip
_LOST = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    urllib3.exceptions.HTTPError,
    TimeoutError,
)
_UNSAFE = (boto.SSLError, boto.ProxyConnectionError)


class S3Ranges(RangeReader):
    """Ranges of objects in one bucket; paths begin with the bucket's name."""

    def __init__(self, fs: Any, connections: int, silence_timeout: float) -> None:
        """Set the file system; nothing is contacted."""
        super().__init__(connections, silence_timeout)
        self._fs = fs
        self._threads = DaemonThreads(connections, "surfw-s3")
        self._client: Any = None
        self._connecting = threading.Lock()

    async def get(self, path: str, into: Destination) -> None:
        """Read the range into place, in the next free thread."""
        one = _Get(partial(self._ask, path, into), into)
        reading = self._threads.submit(one.run)
        with _classified(self._fs.endpoint_url):
            await to_its_end(reading, on_cancel=lambda: one.give_up() or reading.cancel())

    def _ask(self, path: str, into: Destination) -> Mapping[str, Any]:
        bucket, _, key = path.partition("/")
        settings = self._fs.s3_additional_kwargs | self._fs.req_kw
        asked = {name: settings[name] for name in _PASSED_ON if name in settings}
        if into.pin.revision is not None:
            asked["IfMatch"] = into.pin.revision
        with self._connecting:
            if self._client is None:
                self._client = _connect(self._fs)
            client = self._client
        wanted = f"bytes={into.start}-{into.stop - 1}"
        found: Mapping[str, Any] = client.get_object(Bucket=bucket, Key=key, Range=wanted, **asked)
        return found

    def close(self) -> None:
        """Stop the threads and close the connections; a later use opens new ones."""
        self._threads.close()
        with self._connecting:
            client, self._client = self._client, None
        if client is not None:
            client.close()


class _Get:
    """One GET request in a thread, read into its destination."""

    def __init__(self, ask: Callable[[], Mapping[str, Any]], into: Destination) -> None:
        self._ask = ask
        self._into = into
        self._lock = threading.Lock()
        self._given_up = False
        self._stream: urllib3.HTTPResponse | None = None

    def run(self) -> None:
        """Send the request and read the response, unless it is cancelled before."""
        into = self._into
        into.patience.begin()
        try:
            found = self._ask()
        except boto.ClientError as exc:
            if code_of(exc) not in {"InvalidRange", "416"}:
                raise
            into.accept(RangeResponse(None, into.start, 0, None if into.start else 0))  # empty, or too short
            return
        with found["Body"] as stream:
            with self._lock:
                if self._given_up:
                    return
                memory = into.accept(_response(found))
                self._stream = stream
            _read(stream, memory, into)

    def give_up(self) -> bool:
        """Cancel the request. Returns whether it must be awaited, because it may still write to its destination."""
        with self._lock:
            self._given_up = True
            if self._stream is None:
                return False
            with suppress(RuntimeError, ValueError, OSError):  # it has ended already
                self._stream.shutdown()
            return True


def _connect(fs: Any) -> Any:
    """A blocking client for the endpoint of s3fs, with the same credentials and timeouts."""
    given = {
        "aws_access_key_id": fs.key,
        "aws_secret_access_key": fs.secret,
        "aws_session_token": fs.token,
        "endpoint_url": fs.endpoint_url,
        "use_ssl": fs.use_ssl,
    }
    config = {"connect_timeout": fs.connect_timeout, "read_timeout": fs.read_timeout} | fs.config_kwargs
    for name in _OF_AIOBOTOCORE:
        config.pop(name, None)
    if fs.anon:
        config["signature_version"] = UNSIGNED
    options = {name: value for name, value in given.items() if value is not None} | fs.client_kwargs
    return botocore.session.Session(**fs.kwargs).create_client("s3", config=Config(**config), **options)


def _read(stream: urllib3.HTTPResponse, memory: memoryview, into: Destination) -> None:
    done, most = 0, PROGRESS_BYTES
    while done < len(memory):
        start = time.monotonic()
        count = stream.readinto(memory[done : done + most])
        if not count:
            raise boto.IncompleteReadError(actual_bytes=done, expected_bytes=len(memory))
        done += count
        most = _STREAM_BYTES if time.monotonic() - start < _SLOW_SECONDS else PROGRESS_BYTES
        into.patience.arrived(count)
        into.filled(done)
        into.check_first(done)


def _response(found: Mapping[str, Any]) -> RangeResponse:
    revision, length = found.get("ETag"), int(found["ContentLength"])
    if match := _CONTENT_RANGE.fullmatch(found.get("ContentRange", "")):
        return RangeResponse(revision, int(match[1]), length, int(match[3]))
    return RangeResponse(revision, 0, length, length)  # the server ignored the range


@contextmanager
def _classified(endpoint: str | None) -> Iterator[None]:
    """Raise transient failures as `TransientError`, and all others as s3fs translates them."""
    try:
        yield
    except boto.ClientError as exc:
        code, status = code_of(exc), int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in {"PreconditionFailed", "412"}:
            raise PinLostError from exc
        translated = translate_boto_error(exc)
        if code in _TRANSIENT_CODES or status >= 500:
            raise TransientError from translated
        raise translated from exc
    except _UNSAFE:
        raise
    except _LOST as exc:
        known = isinstance(exc, boto.BotoCoreError) and not isinstance(exc, boto.IncompleteReadError)
        lost = exc if known else boto.ConnectionClosedError(endpoint_url=endpoint or "S3", error=exc)
        raise TransientError from lost
