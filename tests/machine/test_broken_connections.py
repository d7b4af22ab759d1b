"""Connections to a guest that dies: an error at once, for whoever reads and whoever writes."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from pytest_vmsandbox import Machine, MachineFactory, MachineFailed, RequestInvalid
from tests.signals import send_signal

# Far above what it takes, far below what TCP by itself would wait (tcp(7), tcp_retries2).
AT_ONCE_S = 15.0

TALKS, SILENT = 9, 10
SERVE = f"nc -ll -p {TALKS} -e cat /dev/zero & exec nc -ll -p {SILENT} -e sleep 1000"


def _kill_9(vm: Machine) -> None:
    send_signal(vm._controller.running.process.pid, signal.SIGKILL)


def _panic(vm: Machine) -> None:
    with suppress(MachineFailed):  # it may be too late to say that it has begun
        vm.popen("echo c > /proc/sysrq-trigger")


def _cut_power(vm: Machine) -> None:
    vm.power_cut()


def _hear_all(sock: socket.socket) -> None:
    while sock.recv(1 << 20):
        pass


def _hear_nothing(sock: socket.socket) -> None:
    assert sock.recv(1) == b"something"


def _say_without_end(sock: socket.socket) -> None:
    while True:
        sock.sendall(bytes(1 << 16))


# What it does to whom: a service that talks is heard; one that never reads is waited for, and told
# more than fits into any buffer.
CLIENTS = ((TALKS, _hear_all), (SILENT, _hear_nothing), (SILENT, _say_without_end))


@pytest.mark.parametrize("network", ["lan", None], ids=["on a network", "on none"])
@pytest.mark.parametrize("die", [_kill_9, _panic, _cut_power])
def test_whoever_is_connected_to_a_guest_that_dies_gets_an_error_and_does_not_wait(
    vm_factory: MachineFactory, die: Callable[[Machine], None], network: str | None
) -> None:
    vm = vm_factory(network=network)
    vm.popen(SERVE)
    vm.wait_for_port(TALKS)
    vm.wait_for_port(SILENT)
    clients = [
        (act, _connected(vm, port, how=how))
        for how in ("connect", "forward")
        for port, act in CLIENTS
    ]

    with ThreadPoolExecutor(max_workers=len(clients)) as threads:
        waiting = [threads.submit(act, sock) for act, sock in clients]
        time.sleep(0.5)  # so that those who send are blocked
        assert not any(each.done() for each in waiting)
        die(vm)
        began = time.monotonic()
        ends = [each.exception(timeout=120) for each in waiting]

    assert [end for end in ends if not isinstance(end, ConnectionError)] == []
    assert time.monotonic() - began < AT_ONCE_S
    for _, sock in clients:
        sock.close()
    _require_nobody_answers(vm)


def _connected(vm: Machine, port: int, *, how: str) -> socket.socket:
    sock = vm.connect(port) if how == "connect" else socket.create_connection(vm.forward(port))
    sock.settimeout(100)
    return sock


def _require_nobody_answers(vm: Machine) -> None:
    """Later ones are refused as well: by its failure, where it was not switched off by us."""
    with pytest.raises((MachineFailed, RequestInvalid)):
        vm.connect(TALKS)
    with socket.create_connection(vm.forward(TALKS)) as sock, pytest.raises(ConnectionError):
        sock.recv(1)
