"""Packets with descriptors, as they come on a line of them (unix(7), SOCK_SEQPACKET)."""

from __future__ import annotations

import socket
from array import array
from collections.abc import Iterator, Sequence


def receive_packet(
    line: socket.socket, *, bytes_at_most: int, descriptors_at_most: int
) -> tuple[bytes, list[int], int]:
    """The next packet, the descriptors that came with it, and recvmsg(2)'s flags of both.

    They are close-on-exec, and the caller's. Empty without any: the line has ended. Raises OSError.
    """
    # Not socket.recv_fds(), which takes flags and does not pass them on: what it receives would be
    # inherited.
    room = socket.CMSG_LEN(descriptors_at_most * array("i").itemsize)
    packet, ancillary, flags, _ = line.recvmsg(bytes_at_most, room, socket.MSG_CMSG_CLOEXEC)
    return packet, _descriptors(ancillary), flags


def received_packets(
    line: socket.socket, *, bytes_at_most: int, descriptors_at_most: int
) -> Iterator[tuple[bytes, list[int]]]:
    """What has come by now on a line that does not block, each packet with its descriptors.

    Last comes an empty packet where the line has ended, in order or by an error.
    """
    while True:
        try:
            packet, descriptors, _ = receive_packet(
                line, bytes_at_most=bytes_at_most, descriptors_at_most=descriptors_at_most
            )
        except BlockingIOError:
            return
        except OSError:
            packet, descriptors = b"", []
        yield packet, descriptors
        if not packet:
            return


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    found = array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()
