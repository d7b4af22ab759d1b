"""What passes on networks, and between them, of whatever kind, and whoever sends it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from pytest_vmsandbox import CommandFailed, Machine, MachineFactory, Network
from pytest_vmsandbox.machine.process import Process
from tests.compiled import compile_static

DATAGRAMS = "/tmp/datagrams"

GROUPS = ("239.76.0.7", "ff15::76:7")
PORT = 7000

# More addresses than a switch learns (LEARNED_AT_MOST in hub.py).
FORGED = 6000


@pytest.fixture(scope="module")
def datagrams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What busybox has no program for (see its source)."""
    source = Path(__file__).with_name("datagrams.c")
    return compile_static(source, tmp_path_factory.mktemp("datagrams") / "datagrams")


def _equip(datagrams: Path, *machines: Machine) -> None:
    for vm in machines:
        vm.push(datagrams, DATAGRAMS)


def _hear(vm: Machine, address: str) -> Process:
    """A process that prints what comes to that address; it listens when this returns."""
    process = vm.popen([DATAGRAMS, "hear", "eth0", address, str(PORT)])
    assert process.stdout.readline() == "ready\n"
    return process


def _say(vm: Machine, address: str, text: str) -> None:
    vm.run([DATAGRAMS, "say", "eth0", address, str(PORT), text], check=True)


def test_datagrams_come_to_whom_they_are_for_and_those_to_a_group_to_all_who_have_joined(
    vm_factory: MachineFactory, datagrams: Path
) -> None:
    one, two, three = machines = vm_factory(count=3, network="lan")
    _equip(datagrams, *machines)
    joined = [_hear(vm, group) for group in GROUPS for vm in (two, three)]
    alone = [_hear(two, address) for address in (two.ip, two.ip6)]
    left_out = _hear(one, one.ip)

    for address in (*GROUPS, two.ip, two.ip6):
        _say(one, address, f"to {address}")
    _say(three, one.ip, "the end")

    for process, group in zip(joined, (GROUPS[0],) * 2 + (GROUPS[1],) * 2, strict=True):
        _, _, text = process.stdout.readline().partition(" ")
        assert text == f"to {group}\n"
    assert alone[0].stdout.readline() == f"{one.ip} to {two.ip}\n"
    assert alone[1].stdout.readline() == f"{one.ip6} to {two.ip6}\n"
    assert left_out.stdout.readline() == f"{three.ip} the end\n"


TALK = f"nc -ll -p {PORT + 1} -e echo reached"


def _talks_to(one: Machine, other: str) -> bool:
    done = one.run(["nc", "-w", "2", other, str(PORT + 1)], input="")
    return "reached" in done.stdout


def _pings(one: Machine, other: str) -> bool:
    return one.run(["ping", "-c", "1", "-W", "10", other]).returncode == 0


def test_a_hostile_guest_reaches_no_other_network_and_its_own_goes_on(
    vm_factory: MachineFactory, vm_network: Network, datagrams: Path, tmp_path: Path
) -> None:
    hostile, bystander = vm_factory(count=2, network="left", name="left")
    victim, peer = vm_factory(count=2, network="right", name="right")
    _equip(datagrams, hostile, victim)
    for vm in (victim, bystander):
        vm.popen(TALK)
        vm.wait_for_port(PORT + 1)
    heard = _hear(victim, victim.ip)
    for vm in (bystander, victim):  # so that the host has an end of both
        vm.connect(PORT + 1).close()
    own = {"ip": hostile.ip, "mac": hostile.run("cat /sys/class/net/eth0/address").stdout.strip()}
    theirs = {
        vm: vm.run("cat /sys/class/net/eth0/address").stdout.strip() for vm in (bystander, victim)
    }

    with vm_network.named("right").capture(tmp_path / "right.pcap") as capture:
        # As if it were on that network, and by way of the host's end of its own.
        hostile.run("ip address add 10.76.1.99/24 dev eth0", check=True)
        hostile.run("sysctl -w net.ipv6.conf.eth0.dad_transmits=0", check=True)
        hostile.run("ip -6 address add fd76:6d73:6200:1::99/64 dev eth0", check=True)
        _require_cut_off(hostile, victim)
        hostile.run("ip address del 10.76.1.99/24 dev eth0", check=True)
        hostile.run("ip -6 address del fd76:6d73:6200:1::99/64 dev eth0", check=True)
        hostile.run("ip route add 10.76.1.0/24 via 10.76.0.1", check=True)
        hostile.run("ip -6 route add fd76:6d73:6200:1::/64 via fd76:6d73:6200::1", check=True)
        _require_cut_off(hostile, victim)
        # Frames: more addresses than a switch learns, to all; under the addresses of others.
        for count, to, sender in (
            (FORGED, "ff:ff:ff:ff:ff:ff", ()),
            (20, "ff:ff:ff:ff:ff:ff", (theirs[victim],)),
            (20, theirs[victim], (theirs[bystander],)),
        ):
            forge = [DATAGRAMS, "forge", "eth0", str(count), to, *sender]
            hostile.run(forge, check=True, timeout=120)
        assert _pings(victim, peer.ip)
    seen = capture.path.read_bytes()

    assert b"forged" not in seen
    assert bytes.fromhex(own["mac"].replace(":", "")) not in seen
    for vm, other in ((victim, peer), (peer, victim), (bystander, hostile)):
        assert _pings(vm, other.ip)
        assert _pings(vm, other.ip6)
    assert _talks_to(hostile, bystander.ip)
    assert _talks_to(peer, victim.ip)
    for vm in (bystander, victim):
        with vm.connect(PORT + 1) as sock:
            assert sock.recv(100) == b"reached\n"
    _equip(datagrams, peer)
    _say(peer, victim.ip, "of its own network")
    assert heard.stdout.readline() == f"{peer.ip} of its own network\n"


def _require_cut_off(hostile: Machine, victim: Machine) -> None:
    ends = ("10.76.1.1", "fd76:6d73:6200:1::1")  # the host's, of that network
    assert _reached(hostile, victim.ip, victim.ip6, *ends) == ""
    for address in (victim.ip, victim.ip6):
        with contextlib.suppress(CommandFailed):  # its own kernel may know that there is no way
            _say(hostile, address, "of another network")


# All at once: each that does not succeed takes its time.
REACHED = f"""
reached() {{ "$@" < /dev/null > /dev/null 2>&1 && echo "$*"; }}
for address in "$@"; do
    reached nc -w 2 $address {PORT + 1} &
    reached ping -c 1 -W 2 $address &
done
wait
"""


def _reached(one: Machine, *addresses: str) -> str:
    """What succeeds, of connections and pings to these."""
    return one.run(["sh", "-c", REACHED, "sh", *addresses], timeout=60).stdout


def test_a_router_carries_connections_and_datagrams_between_two_networks(
    vm_factory: MachineFactory, datagrams: Path
) -> None:
    left = vm_factory(network="left", name="left")
    right = vm_factory(network="right", name="right")
    router = vm_factory(network=["left", "right"], name="router")
    _equip(datagrams, left, right)
    right.popen(TALK)
    right.wait_for_port(PORT + 1)
    heard = [_hear(right, address) for address in (right.ip, right.ip6)]
    for vm, network in ((left, "left"), (right, "right")):
        vm.run(f"ip route add default via {router.ip_on(network)}", check=True)
        vm.run(f"ip -6 route add default via {router.ip6_on(network)}", check=True)
    assert _reached(left, right.ip, right.ip6) == ""

    router.run("sysctl -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1", check=True)

    assert _talks_to(left, right.ip)
    assert _talks_to(left, right.ip6)
    for address, sender, process in (
        (right.ip, left.ip, heard[0]),
        (right.ip6, left.ip6, heard[1]),
    ):
        _say(left, address, "by way of the router")
        assert process.stdout.readline() == f"{sender} by way of the router\n"
