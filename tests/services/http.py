"""A web server for files in a separate process: ranges, ETags, conditions, and listings of its folders.

`python -m tests.services.http FOLDER PORT`
"""

import contextlib
import html
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.services.processes import answers, free_port, running, wait_until


@contextlib.contextmanager
def http_server(folder: Path, log: Path) -> Iterator[str]:
    """Serve a folder; yields its URL."""
    port = free_port()
    command = [sys.executable, "-m", "tests.services.http", str(folder), str(port)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    with running(command, log, env) as process:
        wait_until(lambda: answers(port, b"GET / HTTP/1.0\r\n\r\n", b"HTTP"), process, log)
        yield f"http://127.0.0.1:{port}"


def main() -> None:
    from aiohttp import web

    folder = Path(sys.argv[1])

    async def answer(request: web.Request) -> web.StreamResponse:
        path = folder / request.match_info["path"]
        if path.is_file():
            return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})
        if not path.is_dir():
            raise web.HTTPNotFound
        if not request.path.endswith("/"):
            raise web.HTTPMovedPermanently(f"{request.path}/")
        names = sorted(f"{one.name}/" if one.is_dir() else one.name for one in path.iterdir())
        links = "\n".join(f'<a href="{html.escape(name)}">{html.escape(name)}</a>' for name in names)
        return web.Response(text=f"<html><a href='?C=N'>Name</a>\n{links}</html>", content_type="text/html")

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[2]), print=None)


if __name__ == "__main__":
    main()
