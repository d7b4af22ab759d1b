"""The host's end of a network: an interface in the switch's own network namespace.

A pair of interfaces: one has addresses and belongs to the kernel's TCP, the other is ours, by a
packet socket. Nothing of it is in the host's own namespace, and it needs no /dev/net/tun.
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from contextlib import ExitStack

from pytest_vmsandbox.linux.rtnetlink import RouteSocket
from pytest_vmsandbox.network.addresses import HOST_END, address_of
from pytest_vmsandbox.network.own_address import take_all, take_only_own

_SIOCETHTOOL = 0x8946
_ETHTOOL_STXCSUM = 0x17
_ETH_P_ALL = 0x0003
_SOL_PACKET = 263
_PACKET_IGNORE_OUTGOING = 23

# What may wait for the switch at the host's end, as far as the host allows (rmem_max): the kernel
# sends bursts, and what does not fit is lost without a word.
_WAITING_BYTES = 4 << 20


def open_host_end(number: int) -> socket.socket:
    """Make the host's end of that network: a packet socket for what passes between the two.

    Must be called in a network namespace of one's own. OSError where the kernel does not let us;
    nothing is left then. `close_host_end` removes it.
    """
    inner, outer = _names(number)
    address = address_of(number, HOST_END)
    with RouteSocket() as route, ExitStack() as undo:
        route.add_veth(inner, outer)
        undo.callback(close_host_end, number)
        route.set_mac(inner, bytes.fromhex(address.mac.replace(":", "")))
        # The kernel would leave checksums to a device that is none: the frames leave here.
        _compute_checksums(inner)
        sock = undo.enter_context(_packet_socket(outer))
        for name in (inner, outer):
            route.set_up(name)
        # A namespace may be born with the host's settings (ip-sysctl, devconf_inherit_init_net):
        # where that forwards, two networks would reach each other through us.
        route.forbid_forwarding(inner)
        take_only_own(route, inner, address)
        for each in (address.ipv4, address.ipv6):
            route.add_address(inner, each)
        undo.pop_all()
    return sock


def close_host_end(number: int) -> None:
    """Remove what `open_host_end` made."""
    inner, _ = _names(number)
    with RouteSocket() as route:
        route.delete(inner)
        take_all(route, inner, address_of(number, HOST_END))


def _names(number: int) -> tuple[str, str]:
    return f"host{number}", f"wire{number}"


def _packet_socket(interface: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WAITING_BYTES)
        sock.bind((interface, _ETH_P_ALL))
    except BaseException:
        sock.close()
        raise
    return sock


def _compute_checksums(interface: str) -> None:
    """Ethtool -K INTERFACE tx off (<linux/ethtool.h>): no checksum is left for later."""
    wanted = array.array("I", (_ETHTOOL_STXCSUM, 0))
    address, _ = wanted.buffer_info()
    request = struct.pack("16sP16x", interface.encode(), address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCETHTOOL, request)
