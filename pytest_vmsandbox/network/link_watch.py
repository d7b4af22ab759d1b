"""The link watch: whoever holds an interface is told when it goes by another hand than theirs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable

from pytest_vmsandbox.linux.link_notices import LinkNotices


class LinkWatch:
    """Interfaces of this network namespace that must stay; it reads as long as the loop runs."""

    def __init__(self) -> None:
        self._notices = LinkNotices()
        self._watched: dict[int, Callable[[], None]] = {}
        asyncio.get_running_loop().add_reader(self._notices, self.look)

    def watch(self, name: str, gone: Callable[[], None]) -> int:
        """Call `gone` once when that interface is no more; its number is for `forget`.

        OSError where it is not there now.
        """
        index = socket.if_nametoindex(name)
        self._watched[index] = gone
        return index

    def forget(self, indices: Iterable[int]) -> None:
        """Watch these no more."""
        for index in indices:
            self._watched.pop(index, None)

    def look(self) -> None:
        """Tell of whatever has gone by now; the loop does so, as soon as it gets to it."""
        indices = self._notices.gone()
        if indices is None:
            there = {index for index, _ in socket.if_nameindex()}
            indices = [index for index in self._watched if index not in there]
        for index in indices:
            gone = self._watched.pop(index, None)
            if gone is not None:
                gone()
