"""The benchmark of networks: what it compares, and that nothing of it is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from benchmarks.own_namespace import open_own_namespace
from pytest_vmsandbox import HostFacts

ROOT = Path(__file__).parents[2]
CACHE = os.environ.get("VMSANDBOX_CACHE_DIR") or user_cache_path("vmsandbox")

# The same with less of everything: what is measured is judged by nobody here.
QUICK = (
    "import sys; from benchmarks import network, network_start;"
    "network.SECONDS = 1; network.TRIPS = 20; network_start.LIVES = 1;"
    "import benchmarks.__main__ as command; sys.exit(command.main())"
)


@pytest.fixture
def place() -> Iterator[Path]:
    """Where it makes what is temporary; in it are sockets, whose paths must be short."""
    place = Path(tempfile.mkdtemp(prefix="vmsandbox-bench-"))
    yield place
    shutil.rmtree(place)


def start_quickly(place: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    options = ["network", "--rounds", "1", "--cache-dir", CACHE, *arguments]
    return subprocess.Popen(
        [sys.executable, "-c", QUICK, *map(str, options)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(place)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_that_name(place: Path) -> list[str]:
    named = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_text(errors="replace")
        except OSError:
            continue  # it has ended meanwhile
        if str(place) in command:
            named.append(command)
    return named


def plain_can_be_had() -> bool:
    return os.geteuid() == 0 and os.access("/dev/net/tun", os.R_OK | os.W_OK)


@pytest.mark.machine
def test_both_ways_to_a_guest_are_measured_beside_plain_qemu(
    vm_host: HostFacts, place: Path
) -> None:
    process = start_quickly(place, "--json", place / "figures")
    _, said = process.communicate()

    assert process.returncode == 0, said
    measured = json.loads((place / "figures").read_text())["measurements"]
    whats = {each["what"] for each in measured}
    for quantity in ("throughput", "latency"):
        for between in (
            "guest to guest, socket",
            "test to guest, vm.connect, socket",
            "test to guest, vm.forward, socket",
            "test to guest, vm.forward without a network",
        ):
            assert f"{quantity}, {between}" in whats
    assert "start of a machine on a network, socket" in whats
    assert all(value > 0 for each in measured for value in each["values"])
    if "without taps of ours" not in said:
        assert {what.replace("socket", "tap") for what in whats} <= whats
    if "no tap can be had" in said:
        assert not plain_can_be_had()
        return
    compared = [each for each in measured if each["unit"] in ("Mbit/s", "ms")]
    assert all(each["ratio"] > 0 for each in compared)
    assert [path.name for path in place.iterdir()] == ["figures"]


@pytest.mark.machine
def test_one_that_is_interrupted_leaves_no_machine_by_hand(place: Path) -> None:
    if not plain_can_be_had():
        pytest.skip("machines by hand are made by root, where /dev/net/tun can be opened")
    process = start_quickly(place)
    assert process.stderr is not None
    while "transfers of" not in process.stderr.readline():
        assert process.poll() is None
    seen = processes_that_name(place)

    process.send_signal(signal.SIGINT)
    process.communicate()

    assert len(seen) == 3
    assert process.returncode == 128 + signal.SIGINT
    assert processes_that_name(place) == []
    assert list(place.iterdir()) == []


def test_what_is_made_in_a_namespace_of_our_own_is_seen_there_alone() -> None:
    if os.geteuid() != 0:
        pytest.skip("a network namespace is made by root")
    with open_own_namespace() as namespace:
        namespace.run("ip", "link", "add", "vmsbench0", "type", "bridge")
        sleeper = namespace.start(["sleep", "600"])
        own = Path(f"/proc/{sleeper.pid}/ns/net").readlink()
        inside = Path(f"/proc/{sleeper.pid}/net/dev").read_text()

        assert own != Path("/proc/self/ns/net").readlink()
        assert "vmsbench0" in inside
        assert "vmsbench0" not in [name for _, name in socket.if_nameindex()]
        with pytest.raises(OSError, match="no-such-link"):
            namespace.run("ip", "link", "show", "no-such-link")

    assert sleeper.returncode == -signal.SIGKILL
