"""Tokens: the format of their file, what each may read, and that changes take effect at once."""

import asyncio
import contextlib
import json
import logging
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw.client import open_wire_source, read_stats
from surfw.config import WireLimits
from surfw.errors import ConfigurationError, RefusedError, UnknownModelError
from surfw.manifest import payload_digest
from surfw.server import WeightServer, reloading
from surfw.server.access import Access, Grant, parse_tokens
from surfw.server.journal import Journal
from surfw.wire import bearer
from tests.peers import serving, until, whole
from tests.stores import make_store

CI = """
[ci]
token = "s3cret-ci"
models = ["org/*", "demo"]
expires = 2999-01-31

[everything]
token = "s3cret-all"

["monitor 1"]
token = "s3cret-monitor"
models = []
expires = 2999-01-31T18:00:00+01:00
"""


def grants(text: str) -> dict[str, Grant]:
    return {grant.name: grant for grant in parse_tokens(text.encode(), "token_file f")}


def test_a_file_of_tokens() -> None:
    found = grants(CI)
    ci, everything, monitor = found["ci"], found["everything"], found["monitor 1"]
    names = ["org/a", "org/a/b", "other", "demo", "demo2", "Demo", ""]
    assert ci.choose(names) == ["org/a", "org/a/b", "demo"]
    assert everything.choose(names) == names
    assert monitor.choose(names) == []
    assert (everything.expires, monitor.expires) == (None, ci.expires + 17 * 3600 if ci.expires else None)
    assert ci.expires == 32474736000  # date -d '2999-01-31 00:00 UTC' +%s
    assert not any(grant.has_expired for grant in found.values())
    assert "s3cret" not in repr(found)


@pytest.mark.parametrize("text", ["s3cret", "  s3cret\n", 'key="value"'])
def test_one_word_is_one_token_for_all_models(text: str) -> None:
    access = Access(None, None, Journal())
    access.is_open = False
    access._replace(parse_tokens(text.encode(), "f"))
    found = access.find(list(bearer(text.strip()).values()))
    assert found is not None
    assert (found.name, found.may_read("any/model"), found.has_expired) == ("", True, False)
    assert access.find(list(bearer(text.strip() + "x").values())) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty, expected one token alone, or a table for each, such as [ci] with a line token"),
        ("s3cret two", "is not TOML at line 1, column 8, expected one token alone"),
        ("[ci]\ntoken = s3cret", "is not TOML at line 2, column 9"),
        ("[ci]\ntoken = 's3cret", "is not TOML at end of document"),
        ("s3cret = 'ci'\n[ci]\ntoken = 'x'", "has lines that belong to no table"),
        ("# nothing\n# at all", "has lines that belong to no table"),
        ("[ci]\nmodels = []", 'f: [ci] has no token, expected a line such as token = "…"'),
        ("[ci]\n", "[ci] has no token"),
        ("[ci]\ntoken = 7", "[ci] has no token"),
        ("[ci]\ntoken = 's3cret two'", "[ci]: the token, of 10 characters, cannot be used"),
        ("[ci]\ntoken = 's3cret'\nmodel = []", "none of token, models, expires; is models meant?"),
        ("[ci]\ntoken = 's3cret'\ns3cret = 1", "[ci] has an entry that is none of token, models, expires"),
        ("[ci]\ntoken = 's3cret'\nmodels = 'org/*'", 'no list of patterns, expected such as ["org/*", "demo"]'),
        ("[ci]\ntoken = 's3cret'\nmodels = ['']", "no list of patterns"),
        (
            "[ci]\ntoken = 's3cret'\nexpires = '2027-01-31'",
            "expected a date such as 2027-01-31, or a time with",
        ),
        ("[ci]\ntoken = 's3cret'\nexpires = 2027-01-31T10:00:00", "[ci] has a time in expires that cannot be used"),
        ("[ci]\ntoken = 's3cret'\nexpires = 7", "[ci] has a time in expires that cannot be used"),
        ("[a]\ntoken = 's3cret'\n[b]\ntoken = 's3cret'", "f: a and b have the same token; give each its own"),
        ('["\\u001b[2J"]\ntoken = "s3cret"', "[?[2J] is no name for a token, expected up to 64 printable characters"),
    ],
)
def test_a_file_that_cannot_be_used(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        grants(text)
    assert said in str(caught.value)
    assert str(caught.value).startswith("token_file f")
    assert "s3cret" not in str(caught.value)


@given(st.binary(max_size=60) | st.text("[]ab=\"'\n# 2027-1,", max_size=60).map(str.encode))
def test_any_file_has_tokens_or_is_refused(contents: bytes) -> None:
    with contextlib.suppress(ConfigurationError):
        found = parse_tokens(contents, "f")
        assert len({grant.digest for grant in found}) == len(found) > 0


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    make_store(tmp_path / "store", "org/a", [1000])
    make_store(tmp_path / "store", "other", [2000])
    return tmp_path / "store"


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reloading, "POLL_SECONDS", 0.01)


def test_a_token_sees_only_its_models(store: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "tokens", CI)

    async def main() -> None:
        async with (
            serving(store, token_file=file) as server,
            await open_wire_source(server.url, token="s3cret-all") as everything,
            await open_wire_source(server.url, token="s3cret-ci") as source,
        ):
            other = await everything.manifest("other")
            await everything.fetch(other, [whole(other.chunks[0])[0]])
            assert await everything.models() == ["org/a", "other"]
            assert await source.models() == ["org/a"]
            manifest = await source.manifest(await source.resolve(None))
            read, memory = whole(manifest.chunks[0])
            await source.fetch(manifest, [read])
            assert payload_digest(bytes(memory)) == manifest.chunks[0].id

            said = f"{server.url}: token 'ci' may not read model 'other'"
            for refused in (source.manifest("other"), source.fetch(other, [whole(other.chunks[0])[0]]),
                            source.file(other, "vocab.txt")):  # fmt: skip
                with pytest.raises(RefusedError) as caught:
                    await refused
                assert (str(caught.value), caught.value.code) == (said, "not-allowed")
            with pytest.raises(RefusedError) as caught:
                await source.resolve("other")
            assert str(caught.value) == f"{said}; it may read org/a"
            with pytest.raises(UnknownModelError, match="has no model 'org/b'; it has: org/a"):
                await source.resolve("org/b")
            assert "joined with token 'ci'" in json.dumps(server.stats())

            await check_reports(server)

    asyncio.run(main())


async def check_reports(server: WeightServer) -> None:
    """Check what `/stats` and `/metrics` show each token while clients read both models."""
    full = await asyncio.to_thread(read_stats, server.url, token="s3cret-all")
    assert full["models"] == ["org/a", "other"]
    assert {one["model"] for one in full["connections"]} == {"org/a", "other"}
    limited = await asyncio.to_thread(read_stats, server.url, token="s3cret-ci")
    assert limited["models"] == ["org/a"]
    assert [one["model"] for one in limited["connections"]] == ["org/a"]
    assert "other" not in json.dumps(limited)
    monitor = await asyncio.to_thread(read_stats, server.url, token="s3cret-monitor")
    assert (monitor["models"], monitor["connections"], monitor["events"]) == ([], [], [])
    assert monitor["bytes_sent"] == full["bytes_sent"] > 3000

    def scrape() -> str:
        request = urllib.request.Request(server.url.replace("ws", "http", 1) + "/metrics", headers=bearer("s3cret-ci"))
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())

    assert "surfw_models 1.0" in (await asyncio.to_thread(scrape)).splitlines()


def test_a_shortage_of_another_model_is_not_told() -> None:
    shortage = {"model": "other", "pass_bytes": 1, "cache_mb": 1}
    stats: Any = {"models": ["other"], "cache_shortage": shortage}
    assert grants(CI)["ci"].limit(stats) == {"models": [], "connections": [], "events": [], "heat": []}
    assert grants(CI)["everything"].limit(stats)["cache_shortage"] == shortage


def test_a_token_that_expires_loses_new_requests(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "tokens", CI)

    async def main() -> None:
        async with (
            serving(store, token_file=file) as server,
            await open_wire_source(server.url, token="s3cret-ci") as source,
        ):
            assert await source.models() == ["org/a"]
            monkeypatch.setattr(time, "time", lambda: 32474736000.0)
            with pytest.raises(RefusedError, match="token 'ci' has expired; connect with another"):
                await source.models()
            for refused in (open_wire_source(server.url, token="s3cret-ci"),
                            asyncio.to_thread(read_stats, server.url, token="s3cret-ci")):  # fmt: skip
                with pytest.raises(RefusedError) as caught:
                    await refused
                assert str(caught.value) == (
                    f"the server at {server.url} refuses the token, which has expired; give one that is valid "
                    "(token_file, --token-file, SURFW_TOKEN)"
                )
                assert caught.value.code == "expired-token"
            assert "token 'ci' has expired" in json.dumps(server.stats())

    asyncio.run(main())


@pytest.mark.usefixtures("often")
def test_a_file_that_changes_is_read_again(store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "tokens", CI)

    async def main() -> None:
        async with (
            serving(store, token_file=file) as server,
            await open_wire_source(server.url, token="s3cret-ci") as source,
        ):

            def told(text: str) -> bool:
                return text in caplog.text

            manifest = await source.manifest("org/a")
            write(tmp_path / "new", CI.replace('"org/*"', '"other"')).replace(file)
            await until(lambda: told("the token file was read again: 3 tokens"))
            assert await source.models() == ["other"]
            with pytest.raises(RefusedError, match="token 'ci' may not read model 'org/a'"):
                await source.fetch(manifest, [whole(manifest.chunks[0])[0]])

            write(tmp_path / "new", "[ci]\ntoken = s3cret-ci").replace(file)
            await until(lambda: told("stays in force"))
            await asyncio.sleep(0.05)  # time for some more checks of the file
            assert caplog.text.count("stays in force") == 1, "it is said once"
            assert await source.models() == ["other"]
            assert not await server.reload()
            assert caplog.text.count("stays in force") == 2, "and again to whoever asks for it"

            file.unlink()
            await until(lambda: told("cannot be read: No such file"))
            assert await source.models() == ["other"]
            write(file, "s3cret-new")
            await until(lambda: told("read again: 1 token\n"))
            with pytest.raises(RefusedError, match="token 'ci' was withdrawn; connect with another"):
                await source.models()
            async with await open_wire_source(server.url, token="s3cret-new") as new:
                assert await new.models() == ["org/a", "other"]
            assert await server.reload()

    with caplog.at_level(logging.INFO, "surfw.server"):
        asyncio.run(main())
    assert "s3cret" not in caplog.text


@pytest.mark.usefixtures("often")
def test_a_look_that_fails_is_not_the_last_one(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "tokens", "s3cret-old")
    failures = [RuntimeError("can't start new thread")]
    plain = reloading.FromFiles.look

    def look(self: reloading.FromFiles, *, anyway: bool) -> Any:
        if failures and not anyway:
            raise failures.pop()
        return plain(self, anyway=anyway)

    monkeypatch.setattr(reloading.FromFiles, "look", look)

    async def main() -> None:
        async with serving(store, token_file=file) as server:
            await until(lambda: not failures)
            write(tmp_path / "new", "s3cret-new").replace(file)
            await until(lambda: "the token file was read again: 1 token" in caplog.text)
            with pytest.raises(RefusedError):
                await open_wire_source(server.url, token="s3cret-old")

    with caplog.at_level(logging.INFO, "surfw.server"):
        asyncio.run(main())
    assert "can't start new thread" in caplog.text


def test_a_schedule_for_another_model_is_ignored(store: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "tokens", CI)

    async def main() -> None:
        async with (
            serving(store, token_file=file) as server,
            await open_wire_source(server.url, token="s3cret-all") as everything,
            await open_wire_source(server.url, token="s3cret-ci") as source,
        ):
            other = await everything.manifest("other")
            await source.announce(other, other.chunks, [])
            assert await source.models() == ["org/a"]
            (connection,) = (one for one in server._connections if one._websocket.grant.name == "ci")
            assert connection._futures == {}
            await everything.announce(other, other.chunks, [])
            await everything.models()
            assert [list(one._futures) for one in server._connections if one is not connection] == [["other"]]

    asyncio.run(main())


def test_a_file_that_others_may_read_is_warned_of(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "tokens", "s3cret")

    async def main() -> None:
        for mode in (0o600, 0o640):
            file.chmod(mode)
            async with serving(store, token_file=file) as server:
                assert await server.reload()
                told = [one["text"] for one in server.stats()["events"] if "may read or change" in one["text"]]
                assert len(told) == (mode != 0o600)

    asyncio.run(main())
    assert f"{file} has mode 0640; chmod 600 leaves it to you alone" in caplog.text


def test_a_server_does_not_start_without_its_tokens(store: Path, tmp_path: Path) -> None:
    async def main(**options: Any) -> None:
        async with serving(store, **options):
            raise AssertionError("it started")

    with pytest.raises(ConfigurationError, match=r"absent cannot be read: No such file or directory; name a file"):
        asyncio.run(main(token_file=tmp_path / "absent"))
    with pytest.raises(ConfigurationError, match="it is no regular file"):
        asyncio.run(main(token_file="/dev/zero"))
    with pytest.raises(ConfigurationError, match="is empty"):
        asyncio.run(main(token_file=write(tmp_path / "empty", "\n")))
    with pytest.raises(ConfigurationError, match="token and token_file exclude each other"):
        asyncio.run(main(token_file=tmp_path / "tokens", token="s3cret"))
    with pytest.raises(ConfigurationError, match="token_file is 7, expected the path of a file"):
        asyncio.run(main(token_file=7))
    with pytest.raises(ConfigurationError, match="listen on"):
        asyncio.run(main(token_file=write(tmp_path / "tokens", CI), host="0.0.0.0"))


def test_health_needs_no_token(store: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "tokens", CI)

    async def main() -> None:
        async with serving(store, token_file=file) as server:
            for path, status in {"/livez": 200, "/readyz": 200, "/stats": 401, "/metrics": 401}.items():
                url = server.url.replace("ws", "http", 1) + path
                try:
                    with await asyncio.to_thread(urllib.request.urlopen, url, timeout=10) as answer:
                        found = answer.status
                except urllib.error.HTTPError as exc:
                    found = exc.code
                    exc.close()
                assert (path, found) == (path, status)

    asyncio.run(main())


def test_a_name_that_no_model_can_have_is_not_asked_for(store: Path) -> None:
    async def main() -> None:
        async with serving(store) as server, await open_wire_source(server.url, limits=WireLimits()) as source:
            for name in ("x" * 300, "\ud800", "a\x1bb"):
                with pytest.raises(UnknownModelError):
                    await source.resolve(name)
            assert server.stats()["requests"]["total"] == 3

    asyncio.run(main())
