"""Packets and their descriptors, over a real pair of sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from pytest_vmsandbox.linux.packets import received_packets


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(0)
        yield ours, theirs


def _received(line: socket.socket) -> list[tuple[bytes, list[int]]]:
    return list(received_packets(line, bytes_at_most=100, descriptors_at_most=2))


def test_nothing_has_come_yet(pair: tuple[socket.socket, socket.socket]) -> None:
    assert _received(pair[0]) == []


def test_all_that_has_come_comes_packet_by_packet_with_its_descriptors(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    socket.send_fds(theirs, [b"one"], [theirs.fileno()])
    theirs.send(b"two")

    (one, (descriptor,)), (two, none) = _received(ours)

    assert (one, two, none) == (b"one", b"two", [])
    assert os.path.sameopenfile(descriptor, theirs.fileno())
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


def test_the_last_packet_of_a_line_that_has_ended_is_empty(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    theirs.send(b"last")
    theirs.close()

    assert _received(ours) == [(b"last", []), (b"", [])]


def test_an_error_ends_a_line_as_well() -> None:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.settimeout(0)
    with line:  # it was never connected
        assert _received(line) == [(b"", [])]
