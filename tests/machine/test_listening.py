"""What is asked in a guest, asked here: of the nc that this host has, whichever it is."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator

import pytest

from pytest_vmsandbox.machine.listening import listener_check, port_check

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


def test_the_end_of_what_is_sent_is_handed_on(listener: socket.socket) -> None:
    port = _port(listener)
    told = subprocess.run(
        listener_check("127.0.0.1", port), capture_output=True, text=True, check=True, timeout=20
    )

    with subprocess.Popen(
        ["nc", *told.stdout.split(), "127.0.0.1", str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as carrier:
        served, _ = listener.accept()
        with served:
            served.settimeout(20)
            assert carrier.stdin is not None
            carrier.stdin.write(b"all of it")
            carrier.stdin.close()
            heard = served.makefile("rb").read()
            served.sendall(b"answer")
        assert carrier.stdout is not None
        assert carrier.stdout.read() == b"answer"

    assert heard == b"all of it"
