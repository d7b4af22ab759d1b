"""Ports of a guest, when the host or the guest is short of something."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_vmsandbox import Machine

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
