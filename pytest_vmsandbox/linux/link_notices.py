"""Link notices: which interfaces of the caller's network namespace have gone (rtnetlink(7))."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import Self

from pytest_vmsandbox.linux.netlink import HEADER, LINK

_RTMGRP_LINK = 1
_RTM_DELLINK = 17
_BYTES = 1 << 16


class LinkNotices:
    """A line on which the kernel says what becomes of interfaces, from now on."""

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        try:
            self._socket.bind((0, _RTMGRP_LINK))
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Readable whenever there is something new."""
        return self._socket.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()

    def gone(self) -> list[int] | None:
        """The indices of those that have gone since; None where notices were lost.

        Then it is for the caller to look which are there: none of what follows is lost too.
        """
        found: list[int] | None = []
        while True:
            try:
                notices = self._socket.recv(_BYTES)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # The kernel says so once, and drops whatever comes until all that waits is read
                # (netlink_overrun()).
                found = None
            else:
                if found is not None:
                    found += _gone(notices)


def _gone(notices: bytes) -> Iterator[int]:
    at = 0
    while at < len(notices):
        length, kind, *_ = HEADER.unpack_from(notices, at)
        family, _, index, *_ = LINK.unpack_from(notices, at + HEADER.size)
        # A bridge says in the same words, for its own family, that a port has left it.
        if kind == _RTM_DELLINK and family == socket.AF_UNSPEC:
            yield index
        at += length + -length % 4
