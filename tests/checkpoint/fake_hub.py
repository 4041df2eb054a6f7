"""A local server that answers the few requests with which the hub library lists and downloads a model."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "org/tiny"


class FakeHub(ThreadingHTTPServer):
    """Has one model, `org/tiny` at revision `main`; `served` lists the files that were downloaded."""

    def __init__(self, files: Mapping[str, bytes], *, gated: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.gated = gated
        self.served: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = f"/api/models/{MODEL}"
        if path in {api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"}:
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json({"id": MODEL, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0})
        elif path in {f"{api}/tree/main", f"{api}/tree/{COMMIT}"}:
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in self.server.files.items()
                ]
            )
        elif path.startswith((f"{api}/tree/main/", f"{api}/tree/{COMMIT}/")):  # there are no folders
            self._refuse(404, "EntryNotFound")
        elif path.startswith(f"{api}/revision/"):
            self._refuse(404, "RevisionNotFound")
        elif re.match(f"/{MODEL}/resolve/(main|{COMMIT})/", path):
            self._file(path.split("/", 5)[5])
        else:
            self._refuse(404, "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def _file(self, name: str) -> None:
        if self.server.gated:
            return self._refuse(403, "GatedRepo")
        if self.command == "GET":
            self.server.served.append(name)
        data, asked = self.server.files[name], re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        headers = {"ETag": hashlib.sha1(data).hexdigest()}
        if asked is None:
            return self._reply(200, data, headers)
        start, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
        return self._reply(206, data[start : last + 1], headers)

    def _json(self, document: object) -> None:
        self._reply(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._reply(status, b"", {"X-Error-Code": code})

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@contextmanager
def serve(files: Mapping[str, bytes], *, gated: bool = False) -> Iterator[FakeHub]:
    """Run the server."""
    with FakeHub(files, gated=gated) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
