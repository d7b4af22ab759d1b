"""A cluster of three that is torn apart and healed: etcd, out of its Debian package.

A cluster may stop answering, but must never answer wrongly: whoever is cut off takes no writes, and
knows all that he has missed once he is back.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from pytest_vmsandbox import Machine, MachineFactory, Network, Template, TemplateBuilder

# etcd, and the C library that it needs: the guest has none.
PACKAGES = ("etcd-server", "libc6")
FILES = ("usr/bin/etcd", "**/libc.so.6", "**/ld-linux*.so.*")

START = """
cd /opt/etcd && exec ./ld-linux*.so.* --library-path . ./etcd \\
    --name {name} --data-dir /var/lib/etcd \\
    --initial-cluster {cluster} --initial-advertise-peer-urls http://{ip}:2380 \\
    --listen-peer-urls http://{ip}:2380 --listen-client-urls http://0.0.0.0:2379 \\
    --advertise-client-urls http://{ip}:2379 --heartbeat-interval 200 --election-timeout 2000 \\
    > /root/etcd.log 2>&1
"""


@pytest.fixture(scope="session")
def etcd_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, its library and its loader, fetched by the host's apt."""
    fetched, files = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("etcd")
    if shutil.which("apt-get") is None:
        pytest.skip("takes apt-get: etcd comes from a Debian package")
    got = subprocess.run(
        ["apt-get", "download", *PACKAGES], cwd=fetched, capture_output=True, text=True, check=False
    )
    if got.returncode:
        pytest.skip(f"apt-get can't fetch {' and '.join(PACKAGES)}: {got.stderr.strip()}")
    for package in fetched.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, fetched / "all"], check=True)
    for pattern in FILES:
        found = next(path for path in (fetched / "all").glob(pattern) if path.is_file())
        shutil.copy(found, files)
    return files


@pytest.fixture(scope="session")
def etcd(vm_templates: TemplateBuilder, etcd_files: Path) -> Template:
    """A machine that has etcd, and has read it from its disk once."""

    def setup(vm: Machine) -> None:
        vm.push(etcd_files, "/opt/etcd")
        vm.run("cd /opt/etcd && ./ld-linux*.so.* --library-path . ./etcd --version", check=True)

    return vm_templates.build(setup=setup, inputs=[etcd_files], network="lan", memory_mib=384)


class Node:
    """A machine with etcd as the test sees it: over its own connection, which nothing cuts."""

    def __init__(self, vm: Machine) -> None:
        self.vm = vm
        host, port = vm.forward(2379)
        self._url = f"http://{host}:{port}/v3"

    def write(self, key: str, value: str) -> None:
        """Have the cluster note it; HTTPError where it does not."""
        self._ask("kv/put", key=_text(key), value=_text(value))

    def read(self, key: str) -> str:
        """What this node itself knows, whether or not the others still agree."""
        answer = self._ask("kv/range", key=_text(key), serializable=True)
        return b64decode(answer["kvs"][0]["value"]).decode()

    @property
    def leads(self) -> bool:
        """Whether it takes itself for the one whom the others follow."""
        status = self._ask("maintenance/status")
        return bool(status["leader"] == status["header"]["member_id"])

    def _ask(self, what: str, **form: object) -> dict[str, Any]:
        with urlopen(f"{self._url}/{what}", json.dumps(form).encode(), timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


def _text(text: str) -> str:
    return b64encode(text.encode()).decode()


def wait_until_written(node: Node, key: str, value: str) -> None:
    """Write it as soon as there is a leader who takes it."""
    over = time.monotonic() + 60
    while True:
        try:
            return node.write(key, value)
        except OSError:  # which an HTTPError is
            if time.monotonic() > over:
                raise
            time.sleep(0.2)


def test_the_minority_refuses_writes_the_majority_goes_on_and_all_agree_after_healing(
    vm_factory: MachineFactory, vm_network: Network, etcd: Template
) -> None:
    machines = vm_factory(count=3, template=etcd, name="etcd")
    cluster = ",".join(f"{vm.name}=http://{vm.ip}:2380" for vm in machines)
    for vm in machines:
        vm.popen(START.format(name=vm.name, ip=vm.ip, cluster=cluster))
    nodes = [Node(vm) for vm in machines]
    wait_until_written(nodes[0], "color", "red")
    (leader,) = [node for node in nodes if node.leads]
    others = [node for node in nodes if node is not leader]

    # The leader is alone: the others choose one of themselves.
    vm_network.partition(leader.vm, [node.vm for node in others])
    wait_until_written(others[0], "color", "green")
    with pytest.raises(HTTPError):
        leader.write("color", "blue")
    assert leader.read("color") == "red"

    vm_network.heal()
    wait_until_written(leader, "healed", "yes")
    for node in nodes:
        over = time.monotonic() + 30
        while node.read("color") != "green":
            assert time.monotonic() < over
            time.sleep(0.1)
