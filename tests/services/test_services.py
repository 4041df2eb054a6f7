"""The services that other tests use are the real ones."""

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import botocore.exceptions
import psutil
import pytest

from tests.services import warm
from tests.services.processes import ServiceError, running, wait_until
from tests.services.s3 import S3Service


def ask_redis(url: str, *words: str) -> bytes:
    """Send one command to a Redis server; return the first bytes of its answer."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    with socket.create_connection((parts.hostname, parts.port or 0), timeout=10) as connection:
        connection.sendall(" ".join(words).encode() + b"\r\n")
        return connection.recv(4096)


def test_redis_keeps_values_in_memory_only(redis_url: str) -> None:
    assert ask_redis(redis_url, "SET", "surfw", "kept") == b"+OK\r\n"
    assert ask_redis(redis_url, "GET", "surfw") == b"$4\r\nkept\r\n"
    assert b"allkeys-lfu" in ask_redis(redis_url, "CONFIG", "GET", "maxmemory-policy")
    assert ask_redis(redis_url, "CONFIG", "GET", "save").endswith(b"$4\r\nsave\r\n$0\r\n\r\n")


def test_s3_is_a_ceph_gateway_that_knows_its_accounts(s3: S3Service) -> None:
    bucket = s3.bucket()
    s3.client.put_object(Bucket=bucket, Key="a/b", Body=b"payload")
    answer = s3.client.get_object(Bucket=bucket, Key="a/b", Range="bytes=1-3")
    assert answer["Body"].read() == b"ayl"
    outsider = S3Service(s3.endpoint, s3.stranger.key, s3.stranger.secret)
    with pytest.raises(botocore.exceptions.ClientError, match="AccessDenied"):
        outsider.client.get_object(Bucket=bucket, Key="a/b")


def test_a_service_is_gone_after_its_use(tmp_path: Path) -> None:
    with running(["sleep", "1000"], tmp_path / "sleep.log") as process:
        assert psutil.pid_exists(process.pid)
    assert not psutil.pid_exists(process.pid)


def test_a_service_is_gone_when_the_tests_are_killed(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from tests.services.processes import running, wait_until\n"
        "log = pathlib.Path(sys.argv[1])\n"
        "with running(['sh', '-c', 'echo up; exec sleep 1000'], log) as process:\n"
        "    wait_until(lambda: 'up' in log.read_text(), process, log)\n"
        "    print(process.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "sleep.log")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tests:
        assert tests.stdout is not None
        service = os.pidfd_open(int(tests.stdout.readline()))
        try:
            assert select.select([service], [], [], 0)[0] == []
            os.kill(tests.pid, signal.SIGKILL)
            assert select.select([service], [], [], 30)[0] == [service]  # readable once the process has ended
        finally:
            os.close(service)


def test_a_service_that_ends_is_an_error_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "ls.log"
    with (
        running(["ls", "/nowhere"], log) as process,
        pytest.raises(ServiceError, match=r"ls ended with exit code 2; its log ends: .*nowhere"),
    ):
        wait_until(lambda: False, process, log)


def test_a_warm_process_is_one_of_its_own_and_ends_as_python_does(tmp_path: Path) -> None:
    code = (
        "import atexit, os, sys\n"
        "atexit.register(print, 'at the end')\n"
        "assert 'surfw.server' in sys.modules and 'torch' not in sys.modules\n"
        "print(sys.argv[1:], sys.stdin.read(), os.environ['MINE'], os.getcwd(), os.getsid(0) == os.getpid())\n"
        "print('to stderr', file=sys.stderr)\n"
        "sys.exit(7)\n"
    )
    env = {"PATH": "", "MINE": "mine"}
    command = [sys.executable, "-c", code, "a", "b"]
    done = warm.run(command, modules=warm.COMMANDS, input="read", env=env, cwd=tmp_path)
    assert done.stdout == f"['a', 'b'] read mine {tmp_path} True\nat the end\n"
    assert (done.stderr, done.returncode) == ("to stderr\n", 7)
    assert "MINE" not in warm.run([sys.executable, "-c", "import os; print(os.environ)"], modules=warm.COMMANDS).stdout
    failed = warm.run([sys.executable, "-c", "1 / 0"], modules=warm.COMMANDS)
    assert (failed.returncode, failed.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")


def test_a_warm_process_is_ended_by_signals() -> None:
    waiting = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(1000)"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = warm.start(waiting, modules=warm.COMMANDS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.01)
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
        assert process.returncode == -number
        assert ("KeyboardInterrupt" in said) == (number == signal.SIGINT)


def test_warm_processes_are_gone_when_the_tests_are_killed() -> None:
    script = (
        "import sys\n"
        "from tests.services import warm\n"
        "waiting = [sys.executable, '-c', 'import time; time.sleep(1000)']\n"
        "print(warm.start(waiting, modules=('os',)).pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as tests:
        assert tests.stdout is not None
        process = os.pidfd_open(int(tests.stdout.readline()))
        try:
            assert select.select([process], [], [], 0)[0] == []
            os.kill(tests.pid, signal.SIGKILL)
            assert select.select([process], [], [], 30)[0] == [process]
        finally:
            os.close(process)
