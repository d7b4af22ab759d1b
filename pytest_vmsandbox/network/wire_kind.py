"""Kinds of wires: what a machine's card is plugged into."""

from __future__ import annotations

from enum import StrEnum


class WireKind(StrEnum):
    """A tap on a bridge of the kernel's, or a stream socket to the switch itself."""

    TAP = "tap"
    SOCKET = "socket"


AUTO = "auto"
"""Taps where one can be had, else sockets."""

WISHES = (AUTO, *WireKind)
