"""Whom a guest can't reach: the host, and the world that the host can reach."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.homes import HOME, HOME6, WORLD, WORLD6, Home

pytestmark = pytest.mark.machine

# The port at which everybody listens whom no guest is to reach.
PORT = 7676

SOURCE = f"""
    import socket
    from contextlib import ExitStack, suppress

    import pytest

    HOST = ["{HOME}", "{HOME6}", "127.0.0.1"]
    WORLD = ["{WORLD}", "{WORLD6}"]
    # The host's end of the machine's own network, and of another one.
    OWN_END = ["10.76.0.1", "fd76:6d73:6200::1"]
    OTHER_END = ["10.76.1.1", "fd76:6d73:6200:1::1"]

    TRY = '''
    reached() {{ "$@" < /dev/null > /dev/null 2>&1 && echo "$*"; }}
    for address in %s; do
        reached nc -w 2 $address {PORT} &
        [ %d = 0 ] || reached ping -c 1 -W 2 $address &
        (echo told | nc -u -w 1 $address {PORT}) 2> /dev/null &
    done
    wait
    '''

    def reached(vm, addresses, *, ping=True):
        return vm.run(TRY % (" ".join(addresses), ping), timeout=60).stdout

    @pytest.fixture(autouse=True)
    def services():
        # Whatever the host runs: at every address, and at its loopback alone.
        with ExitStack() as held:
            found = []
            for family, address in (
                (socket.AF_INET, ""), (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"),
            ):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    sock = held.enter_context(socket.socket(family, kind))
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                    sock.bind((address, {PORT}))
                    if kind is socket.SOCK_STREAM:
                        sock.listen()
                    sock.settimeout(0)
                    found.append(sock)
            # They can be reached, and so can the world.
            for address in ("{HOME}", "127.0.0.1", *WORLD):
                socket.create_connection((address, {PORT}), timeout=20).close()
            for sock in found:
                with suppress(BlockingIOError):
                    sock.accept() if sock.type is socket.SOCK_STREAM else sock.recv(1)
            yield
            for sock in found:
                with pytest.raises(BlockingIOError):
                    sock.accept() if sock.type is socket.SOCK_STREAM else sock.recv(1)

    def test_a_machine_on_no_network(vm):
        assert vm.run("ls /sys/class/net").stdout.split() == ["lo"]
        assert vm.run("cat /proc/net/route /proc/net/ipv6_route").stdout.count("eth") == 0
        assert reached(vm, [*HOST, *WORLD, *OWN_END]) == "ping -c 1 -W 2 127.0.0.1\\n"
        # Nor after whatever its kernel has a driver for was loaded.
        vm.run("modprobe -a virtio_net e1000 e1000e vmw_vsock_virtio_transport 2>/dev/null")
        assert vm.run("ls /sys/class/net").stdout.split() == ["lo"]

    @pytest.mark.vm(network="lan")
    def test_a_machine_on_a_network(vm, vm_factory):
        other = vm_factory(network="dmz")
        for each in (vm, other):
            with suppress(ConnectionError):
                each.connect(1)  # so that the host has an end of both
        assert reached(vm, [*HOST[:2], *WORLD]) == ""
        assert reached(vm, OWN_END, ping=False) == ""
        # By way of the host's end, if that were to forward; and to what is the host's loopback.
        vm.run(
            "ip route add default via 10.76.0.1; ip -6 route add default via fd76:6d73:6200::1;"
            "sysctl -w net.ipv4.conf.all.route_localnet=1;"
            "ip address del 127.0.0.1/8 dev lo; ip route add 127.0.0.1 via 10.76.0.1"
        )
        assert reached(vm, [*HOST, *WORLD, *OTHER_END, other.ip, other.ip6]) == ""
        assert vm.run(["ping", "-c", "1", "-W", "5", "10.76.0.1"]).returncode == 0
"""


class Ears:
    """What the world hears at that port, by TCP and by UDP."""

    def __init__(self) -> None:
        self._held = ExitStack()
        self._sockets = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                sock = self._held.enter_context(socket.socket(family, kind))
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(("", PORT))
                if kind == socket.SOCK_STREAM:
                    sock.listen(100)
                sock.settimeout(0)
                self._sockets.append(sock)

    def heard(self) -> Iterator[str]:
        """From whom, and how."""
        for sock in self._sockets:
            while True:
                try:
                    if sock.type == socket.SOCK_STREAM:
                        client, address = sock.accept()
                        client.close()
                    else:
                        _, address = sock.recvfrom(1)
                except BlockingIOError:
                    break
                yield f"{sock.type.name} from {address[0]}"

    def close(self) -> None:
        self._held.close()


def _pings_heard() -> int:
    """How many the kernel has answered (proc_pid_net(5), "snmp"; and snmp6)."""
    lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Icmp: "))
    six = dict(
        line.split() for line in Path("/proc/thread-self/net/snmp6").read_text().splitlines()
    )
    return int(dict(zip(names, values, strict=True))["InEchos"]) + int(six["Icmp6InEchos"])


def test_a_guest_reaches_neither_the_host_nor_the_world(
    pytester: pytest.Pytester, home: Home
) -> None:
    pytester.makepyfile(SOURCE)
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    ears = home.world.do(Ears)

    argv = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
    result = pytester.run(*home.inside.argv(*argv), timeout=240)
    heard = home.world.do(lambda: list(ears.heard()))
    pinged = [place.do(_pings_heard) for place in (home.inside, home.world)]
    home.world.do(ears.close)

    result.assert_outcomes(passed=2)
    # Each test has shown by itself that the world can be reached; nobody else has.
    assert sorted(heard) == sorted(2 * [f"SOCK_STREAM from {address}" for address in (HOME, HOME6)])
    assert pinged == [0, 0]
