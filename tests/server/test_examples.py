"""The examples in `examples/operations` work: units, containers, dashboards, and the page that lists the metrics."""

import asyncio
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
import tomllib
from collections.abc import Iterator, Sequence
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from surfw.server import AdvancedWeightServer
from surfw.settings import SETTINGS
from tests import pages
from tests.cli.run import SURFW, environment
from tests.conftest import require
from tests.server.test_http import fetch
from tests.services import warm
from tests.services.processes import free_port
from tests.services.redis import redis_server, require_redis
from tests.stores import make_store

HERE = pages.ROOT / "examples" / "operations"
NAME = re.compile(r"\bsurfw_[a-z_]+\b")


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The names of all samples that a server with a Redis exports, with their labels."""
    store = tmp_path_factory.mktemp("store")
    make_store(store, sizes=[100])

    async def main() -> str:
        async with AdvancedWeightServer(store, f"redis://127.0.0.1:{free_port()}/0", port=0) as server:
            return (await asyncio.to_thread(fetch, server.port, "/metrics"))[2]

    samples = [one for family in text_string_to_metric_families(asyncio.run(main())) for one in family.samples]
    return {one.name: set(one.labels) for one in samples}


def queries() -> Iterator[str]:
    dashboard = json.loads((HERE / "grafana" / "surfw.json").read_text())
    for one in dashboard["templating"]["list"]:
        if one["type"] == "query":
            yield one["query"]["query"]
    for panel in dashboard["panels"]:
        assert panel["type"] == "row" or panel["targets"], panel["title"]
        yield from (target["expr"] for target in panel.get("targets", ()))


def test_every_query_of_the_dashboard_is_for_metrics_that_there_are(exposed: dict[str, set[str]]) -> None:
    asked = list(queries())
    assert len(asked) > 40
    for query in asked:
        names = set(NAME.findall(query))
        assert names
        assert names <= exposed.keys(), query
        assert [query.count(one) for one in "({["] == [query.count(one) for one in ")}]"], query
        labels = {one for name in names for one in exposed[name]} | {"instance"}
        grouped = {one.strip() for by in re.findall(r"\bby \(([^)]*)\)", query) for one in by.split(",")}
        matched = set(re.findall(r'[{,] ?([a-z_]+)[=!]~?"', query))
        assert grouped | matched <= labels, query
        for name in names:  # rates are computed only from counters, and counters are only shown as rates
            is_counter = name.endswith(("_total", "_sum", "_count"))
            assert is_counter == bool(re.search(rf"(rate|increase)\({name}\b", query)), query


def test_every_metric_is_in_the_dashboard_and_on_the_page(exposed: dict[str, set[str]]) -> None:
    page = pages.read("surfw/server/GUIDE.md").partition("## Metrics")[2]
    assert set(NAME.findall(page)) == exposed.keys()
    assert {name for query in queries() for name in NAME.findall(query)} == exposed.keys()
    for line in page.splitlines():
        named, *rest = line.strip("|").split("|")
        for name in NAME.findall(named):
            assert set(re.findall(r"`(\w+)`", rest[0])) == exposed[name], line


@contextmanager
def running(command: Sequence[str], home: Path, port: int, **variables: str) -> Iterator[warm.Process]:
    """Run a server from an example; yields when it is ready."""
    process = warm.start(
        [SURFW, *command], modules=warm.COMMANDS, env=environment(home, **variables | {"SURFW_PORT": str(port)}),
        cwd=home, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        while True:
            assert process.poll() is None, process.communicate()
            try:
                status, _, _ = fetch(port, "/readyz")
            except OSError:
                time.sleep(0.02)
                continue
            assert status == 200
            break
        yield process
    finally:
        process.kill()
        process.communicate()


def unit(path: Path) -> dict[str, str]:
    """The section `[Service]` of a unit; of repeated keys, the last value."""
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(path)
    return dict(parser["Service"])


def test_the_unit_starts_a_server_reloads_it_and_waits_for_its_end(tmp_path: Path) -> None:
    service = unit(HERE / "surfw.service")
    settings = tomllib.loads((HERE / "surfw.toml").read_text())["tool"]["surfw"]
    assert int(service["TimeoutStopSec"]) > settings["drain_seconds"]
    assert service["MemoryMax"].endswith("M")
    assert int(service["MemoryMax"][:-1]) >= settings["cache_mb"] + 300
    program, *command = shlex.split(service["ExecStart"].replace("/etc/surfw/surfw.toml", str(HERE / "surfw.toml")))
    assert program == "/opt/surfw/bin/surfw"
    make_store(tmp_path / "store", sizes=[100])
    assert service["Type"] == "notify"
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0surfw {tmp_path}"[:100])  # systemd may use this kind of address, too
        manager.settimeout(60)
        address = manager.getsockname().decode().replace("\0", "@", 1)
        with running(command, tmp_path, free_port(), NOTIFY_SOCKET=address) as process:
            assert manager.recv(100) == b"READY=1"
            process.send_signal(signal.SIGHUP)
            assert [manager.recv(100)[:11], manager.recv(100)] == [b"RELOADING=1", b"READY=1"]
            process.terminate()
            assert manager.recv(100) == b"STOPPING=1"
            assert process.wait(60) == 0


def test_systemd_understands_the_unit_and_finds_it_safe(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        require("systemd-analyze is not installed")
    made = tmp_path / "surfw.service"
    made.write_text((HERE / "surfw.service").read_text().replace("/opt/surfw/bin/surfw", SURFW))
    for words in (["verify", "--man=no"], ["security", "--no-pager", "--offline=true", "--threshold=20"]):
        done = subprocess.run(
            ["systemd-analyze", *words, str(made)], capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, "surfw.service" in done.stderr) == (0, False), done.stdout[-500:] + done.stderr


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile's stages, in order."""
    lines = re.sub(r"^#.*\n", "", (HERE / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines.splitlines() if line)]


def test_the_container_serves_says_that_it_does_and_stops(tmp_path: Path) -> None:
    """Runs its commands and the compose file's without a container, with this machine's Python and Redis."""
    require_redis()
    found = instructions()
    own = dict(found)
    for sources in (rest.split()[:-1] for word, rest in found if word == "COPY" and "--from" not in rest):
        assert all((pages.ROOT / source).exists() for source in sources)
    (torch,) = re.findall(r"torch==\S+", " ".join(rest for word, rest in found if word == "RUN"))
    assert f"\n{torch}\n" in (pages.ROOT / ".ci" / "tried.txt").read_text()
    compose = yaml.safe_load((HERE / "compose.yaml").read_text())["services"]
    variables = dict(one.split("=", 1) for one in shlex.split(own["ENV"])) | compose["server-1"]["environment"]
    home, port, redis_port = variables["SURFW_HOME"], free_port(), free_port()
    assert home == own["VOLUME"] == compose["server-1"]["volumes"][0].partition(":")[2]
    variables["SURFW_HOME"] = str(tmp_path)
    variables["SURFW_REDIS_URL"] = variables["SURFW_REDIS_URL"].replace("redis:6379", f"127.0.0.1:{redis_port}")
    del variables["PATH"]
    command = json.loads(own["ENTRYPOINT"]) + json.loads(own["CMD"])
    assert command[0] == "surfw"
    make_store(tmp_path / "store", sizes=[100])
    program, *options = compose["redis"]["command"]
    assert program == "redis-server"
    with redis_server(tmp_path, redis_port, *options), running(command[1:], tmp_path, port, **variables) as process:
        check = json.loads(own["HEALTHCHECK"].partition("CMD ")[2])
        assert check[0] == "python"
        tried = [shutil.which("python3") or "", *check[1:]]
        asked = {"SURFW_PORT": str(port)}
        assert subprocess.run(tried, env=asked, capture_output=True, check=False).returncode == 0
        assert subprocess.run(tried, env={"SURFW_PORT": "1"}, capture_output=True, check=False).returncode == 1
        assert fetch(port, "/metrics", Host="server-2:8765")[0] == 200, "as Prometheus calls it"
        assert "surfw_redis_bypassed 0.0" in fetch(port, "/metrics")[2]
        process.send_signal(signal.Signals[own["STOPSIGNAL"]])
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert [json.loads(line)["kind"] for line in err.splitlines()] == ["redis", "serving", "stopping"]


def test_the_files_of_the_compose_file_fit_together() -> None:
    compose = yaml.safe_load((HERE / "compose.yaml").read_text())
    services: dict[str, dict[str, Any]] = compose["services"]
    servers = [name for name, one in services.items() if one["image"] == "surfw"]
    known = {setting.variable for setting in SETTINGS.values()}
    for one in services.values():
        assert set(one.get("depends_on", ())) <= services.keys()
        for volume in one.get("volumes", ()):
            source = volume.partition(":")[0]
            assert (HERE / source).is_file() if source.startswith("./") else source in compose["volumes"]
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", ()))
        assert one["image"] == "surfw" or re.search(r":v?\d+\.\d+", one["image"]), "a release, not the latest one"
    for name in servers:
        own = services[name]
        assert own["environment"].keys() <= known
        assert (HERE / own["build"]["context"]).resolve() == pages.ROOT
        assert (pages.ROOT / own["build"]["dockerfile"]) == HERE / "Dockerfile"
        assert int(own["stop_grace_period"].rstrip("s")) > float(own["environment"]["SURFW_DRAIN_SECONDS"])
        assert own["environment"]["SURFW_ALLOWED_HOST"].split(",") == servers
    (job,) = yaml.safe_load((HERE / "prometheus.yaml").read_text())["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"{name}:8765" for name in servers]
    (source,) = yaml.safe_load((HERE / "grafana" / "datasource.yaml").read_text())["datasources"]
    assert source["url"].partition("//")[2].partition(":")[0] in services
    (provider,) = yaml.safe_load((HERE / "grafana" / "dashboards.yaml").read_text())["providers"]
    assert any(f":{provider['options']['path']}/surfw.json:" in one for one in services["grafana"]["volumes"])
