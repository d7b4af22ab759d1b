"""Ending a TCP connection under whoever holds it, without taking its descriptor away."""

from __future__ import annotations

import ctypes
import errno
import socket
import struct

from pytest_vmsandbox.linux.libc import call_libc

_NOBODY = struct.pack("=H14x", socket.AF_UNSPEC)  # struct sockaddr


def disconnect(sock: socket.socket) -> None:
    """Abort a TCP connection: whoever waits for it gets ECONNRESET, as does its other side.

    connect(2) with AF_UNSPEC. From Linux 6.5 to 6.6 it can't be done while a thread waits, who
    then sees an end of it instead. OSError where it is not connected, or closed.
    """
    try:
        call_libc("connect", sock.fileno(), ctypes.create_string_buffer(_NOBODY), len(_NOBODY))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        sock.shutdown(socket.SHUT_RDWR)
