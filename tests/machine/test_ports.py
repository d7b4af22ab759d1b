"""Ports of a guest that are hard to reach: who connects is served, or gets an error."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_vmsandbox import Machine, MachineFactory, Network, TimedOut
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker

ECHO = "nc -ll -p 7 -e cat"


@contextmanager
def no_descriptor_to_spare() -> Iterator[None]:
    """Have this process open as many files as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open("/dev/null", os.O_RDONLY)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_highest() + 8, hard))
        try:
            while True:
                taken.append(os.dup(taken[0]))
        except OSError:
            pass
        yield
    finally:
        for each in taken:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _highest() -> int:
    return max(int(each.name) for each in Path("/proc/self/fd").iterdir())


def test_a_forward_outlives_a_time_without_a_descriptor_to_spare(vm: Machine) -> None:
    vm.popen(ECHO)
    vm.wait_for_port(7)
    address = vm.forward(7)
    with socket.socket() as waits:
        waits.settimeout(20)
        with no_descriptor_to_spare():
            waits.connect(address)
            time.sleep(0.3)  # so that it was tried

        for client in (waits, socket.create_connection(address, timeout=20)):
            with client:
                client.sendall(b"served")
                assert client.recv(100) == b"served"


def test_a_connection_that_can_not_be_carried_leaves_nothing_in_the_guest(vm: Machine) -> None:
    vm.popen(ECHO)
    vm.wait_for_port(7)
    before = _netcats(vm)

    with no_descriptor_to_spare(), pytest.raises(OSError, match="Too many open files"):
        vm.connect(7)

    assert _netcats(vm) == before


def test_who_connects_while_a_guest_reboots_is_answered_by_the_next_boot(vm: Machine) -> None:
    answers = vm._controller.running._answering
    vm.popen("reboot -f")
    deadline = time.monotonic() + 20
    while answers.is_set() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not answers.is_set()

    with pytest.raises(ConnectionRefusedError):
        vm.connect(7)

    assert answers.is_set()


def _netcats(vm: Machine) -> list[str]:
    return vm.run("pidof nc").stdout.split()


def _require_refused(vm: Machine, port: int) -> None:
    with pytest.raises(ConnectionRefusedError, match=f"port {port} "):
        vm.connect(port)
    with (
        socket.create_connection(vm.forward(port), timeout=20) as sock,
        pytest.raises(ConnectionError),
    ):
        sock.recv(100)


@pytest.mark.parametrize("address", ["127.0.0.2", "[::1]"])
def test_who_listens_elsewhere_on_the_loopback_is_not_reached(vm: Machine, address: str) -> None:
    vm.run(["httpd", "-p", f"{address}:80"], check=True)
    vm.wait_for_port(80)

    _require_refused(vm, 80)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "[::]"])
def test_who_listens_on_the_loopback_or_everywhere_is_reached(vm: Machine, address: str) -> None:
    vm.run(["httpd", "-p", f"{address}:80"], check=True)

    with vm.connect(80) as sock:
        sock.settimeout(20)
        sock.sendall(b"GET /nothing HTTP/1.0\r\n\r\n")
        assert b" 404 " in sock.recv(1000)


def test_without_an_end_on_the_host_a_network_reaches_what_listens_on_it(worker: Worker) -> None:
    engine, spec = worker.engine, MachineSpec(network="lan", tier="bare")
    (vm,) = engine.run(worker.make([spec]))
    engine.run(worker.boot([vm]))
    for port, address in ((80, "127.0.0.1"), (81, str(vm.address().ip)), (82, "0.0.0.0")):
        engine.run(vm.run(["httpd", "-p", f"{address}:{port}"], check=True))

    with pytest.raises(ConnectionRefusedError):
        engine.run(vm.connect(80))
    for port in (81, 82):
        with engine.run(vm.connect(port)) as sock:
            sock.settimeout(20)
            sock.sendall(b"GET /nothing HTTP/1.0\r\n\r\n")
            assert b" 404 " in sock.recv(1000)
    engine.run(worker.end([vm]))


def test_who_listens_on_all_of_ipv6_and_not_on_ipv4_too_is_not_reached(vm: Machine) -> None:
    vm.run("sysctl -w net.ipv6.bindv6only=1 && httpd -p '[::]:80'", check=True)
    vm.wait_for_port(80)

    _require_refused(vm, 80)


def test_what_is_carried_needs_no_program_in_the_guest(vm: Machine) -> None:
    vm.popen(ECHO)
    vm.wait_for_port(7)
    vm.run("mount -t tmpfs none /bin && mount -t tmpfs none /usr", check=True)

    with vm.connect(7) as sock:
        sock.settimeout(20)
        sock.sendall(b"here")
        assert sock.recv(100) == b"here"


def test_a_port_is_awaited_on_a_slow_network(
    vm_factory: MachineFactory, vm_network: Network
) -> None:
    server, client = vm_factory(count=2, network="lan")
    server.run("httpd -p 80", check=True)
    vm_network.delay("600ms")

    client.wait_for_port(server.ip, 80)

    with pytest.raises(TimedOut, match=r"(?s)port 81 on 10\.76\.0\.2, .*refused"):
        client.wait_for_port(server.ip, 81, timeout=10)
