"""How messages to and from the kernel begin on a netlink socket (netlink(7), rtnetlink(7))."""

from __future__ import annotations

import struct

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, sender
LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
