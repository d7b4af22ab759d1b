"""Taps: interfaces whose other end is a descriptor (tuntap.rst of the kernel's documents)."""

from __future__ import annotations

import fcntl
import os
import struct

from pytest_vmsandbox.linux.interface_name import check_interface_name
from pytest_vmsandbox.linux.owned_fd import OwnedFd

DEVICE = "/dev/net/tun"

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_IFF_TUN_EXCL = 0x8000

_REQUEST = struct.Struct("16sH22x")  # struct ifreq


def open_tap(name: str, *, offloads: bool = False) -> OwnedFd:
    """Make a tap in the caller's network namespace; it is there until all close what this gives.

    Each read gives a frame that the tap was sent, each write is one that comes out of it. With
    `offloads` a virtio_net_hdr stands before each, and a VMM may leave checksums and the cutting
    of long segments to whoever gets the frame. The descriptor does not block.

    OSError, and nothing is there, where DEVICE can't be opened, the caller has no CAP_NET_ADMIN
    in its network namespace, or the name is taken.
    """
    descriptor = OwnedFd(os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_TUN_EXCL | (_IFF_VNET_HDR if offloads else 0)
    try:
        fcntl.ioctl(
            descriptor, _TUNSETIFF, _REQUEST.pack(check_interface_name(name).encode(), flags)
        )
    except BaseException as error:
        descriptor.close()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"TUNSETIFF: {error.strerror}", name) from None
        raise
    return descriptor
