"""A single-node Ceph object gateway of the tests' own: a real S3 server, with its data in memory.

The cluster is the least that serves S3: one monitor, one object store and one gateway, all in the foreground, on
loopback, as the user who runs the tests, with everything they write in one folder.
"""

import contextlib
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.services.processes import ServiceError, answers, environment, free_port, running, wait_until

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")

_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = {monitor}
mon initial members = a
public network = 127.0.0.0/8
ms bind ipv6 = false
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd objectstore = memstore
memstore device bytes = 2147483648
mon data avail crit = 1
run dir = {folder}
log file = {folder}/$name.log
admin socket =
crash dir = {folder}
keyring = {folder}/keyring
mon data = {folder}/mon
osd data = {folder}/osd
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {folder}
rgw thread pool size = 32
"""
_KEYS = {
    "mon.": ["mon", "allow *"],
    "client.admin": ["mon", "allow *", "osd", "allow *"],
    "client.rgw.a": ["mon", "allow rwx", "osd", "allow rwx"],
    "osd.0": ["mon", "allow profile osd", "osd", "allow *"],
}


@dataclass(frozen=True)
class Account:
    """A user of the gateway."""

    key: str
    secret: str


OWNER = Account("surfwkey", "surfwsecret")
STRANGER = Account("strangerkey", "strangersecret")


@contextlib.contextmanager
def ceph_gateway(folder: Path) -> Iterator[str]:
    """Run a cluster with its files in an empty folder; yields the S3 endpoint, which knows both accounts.

    Raises:
        ServiceError: it did not come up.
    """
    port, monitor = free_port(), f"v2:127.0.0.1:{free_port()}"
    fsid = str(uuid.uuid4())
    text = _CONFIGURATION.format(fsid=fsid, monitor=f"[{monitor}]", folder=folder, port=port)
    (folder / "ceph.conf").write_text(text)
    env = environment(CEPH_CONF=str(folder / "ceph.conf"))

    def call(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise ServiceError(f"{' '.join(command)} failed: {done.stderr[-1000:]}")
        return done.stdout

    with contextlib.ExitStack() as daemons:

        def start(*command: str, until: Callable[[], bool]) -> None:
            log = folder / f"{command[0]}.out"
            process = daemons.enter_context(running([*command, "-f"], log, env))
            wait_until(until, process, log)

        _make_keys(call)
        call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[{monitor}]", "monmap")
        call("ceph-mon", "-i", "a", "--mkfs", "--monmap", "monmap")
        start("ceph-mon", "-i", "a", until=lambda: "quorum" in call("ceph", "--connect-timeout", "60", "quorum_status"))
        call("ceph", "auth", "import", "-i", "keyring")
        osd = str(uuid.uuid4())
        call("ceph", "osd", "new", osd)
        (folder / "osd").mkdir()
        call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd, "--no-mon-config")
        call("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=localhost")
        start("ceph-osd", "-i", "0", until=lambda: '"num_up_osds":1' in call("ceph", "osd", "stat", "-f", "json"))
        start("radosgw", "-n", "client.rgw.a", until=lambda: answers(port, b"GET / HTTP/1.0\r\n\r\n", b"HTTP"))
        for name, account in (("owner", OWNER), ("stranger", STRANGER)):
            keys = [f"--access-key={account.key}", f"--secret-key={account.secret}"]
            call("radosgw-admin", "user", "create", f"--uid={name}", f"--display-name={name}", *keys)
        yield f"http://127.0.0.1:{port}"


def _make_keys(call: Callable[..., str]) -> None:
    create = ["--create-keyring"]
    for name, rights in _KEYS.items():
        caps = [word for kind, right in zip(rights[::2], rights[1::2], strict=True) for word in ("--cap", kind, right)]
        call("ceph-authtool", *create, "keyring", "--gen-key", "-n", name, *caps)
        create = []
