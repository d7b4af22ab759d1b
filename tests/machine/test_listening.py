"""What is asked in a guest, asked here: of the nc that this host has, whichever it is."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator

import pytest

from pytest_vmsandbox.machine.listening import port_check

pytestmark = pytest.mark.skipif(shutil.which("nc") is None, reason="there is no nc here")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(20)
        yield listening


def _port(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def _status(command: list[str]) -> int:
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, timeout=20)
    return done.returncode


def test_a_port_is_reached_while_somebody_listens(listener: socket.socket) -> None:
    check = port_check(("127.0.0.1", _port(listener)))

    assert _status(check) == 0
    listener.close()
    assert _status(check) == 1
