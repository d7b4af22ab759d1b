"""TCP connections that are ended under whoever holds them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pytest_vmsandbox.linux.disconnect import disconnect


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname(), timeout=20)
        other, _ = listener.accept()
        other.settimeout(20)
    with one, other:
        yield one, other


def test_both_sides_of_a_connection_that_is_disconnected_get_an_error(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    one, other = ends
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(one.recv, 1)
        threads.submit(threading.Event().wait, 0.1).result()
        disconnect(one)

        assert isinstance(waiting.exception(timeout=20), ConnectionResetError)
    with pytest.raises(ConnectionResetError):
        other.recv(1)


def test_what_is_closed_can_not_be_disconnected(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    one, _ = ends
    one.close()

    with pytest.raises(OSError, match="Bad file descriptor"):
        disconnect(one)
