"""The gateway: a QEMU without a machine, whose user-mode network is joined to our switch."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv6Network

from pytest_vmsandbox.network.addresses import (
    GATEWAY,
    HOST_END,
    RESOLVER,
    WAY_OUT,
    address_of,
)
from pytest_vmsandbox.network.frames import FrameReader, NotAFrame, encode_frame

_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

_ARP_REQUEST = struct.Struct("!HHBBH6s4s6s4s")
_FRAME_BYTES = 60  # an Ethernet frame's least, without its checksum


def render_gateway(program: str, *, wire: int, ipv6: bool, seccomp: bool) -> Sequence[str]:
    """The command of a gateway whose end of the wire is the descriptor `wire`.

    It listens nowhere, serves no files (tftp, smb), and ends when it is killed.
    """
    return (
        *(program, "-M", "none", "-nodefaults", "-no-user-config", "-display", "none"),
        *(("-sandbox", _SANDBOX) if seccomp else ()),
        *("-netdev", f"user,id=world,{_stack(ipv6=ipv6)}"),
        *("-netdev", "hubport,id=inner,hubid=0,netdev=world"),
        *("-netdev", f"socket,id=wire,fd={wire}"),
        *("-netdev", "hubport,id=outer,hubid=0,netdev=wire"),
    )


def _stack(*, ipv6: bool) -> str:
    gateway, resolver = address_of(WAY_OUT, GATEWAY), address_of(WAY_OUT, RESOLVER)
    options = {
        "ipv4": "on",
        "net": str(gateway.ipv4.network),
        "host": str(gateway.ip),
        "dns": str(resolver.ip),
        "ipv6": "on" if ipv6 else "off",
    }
    if ipv6:
        prefix: IPv6Network = gateway.ipv6.network
        options |= {
            "ipv6-prefix": str(prefix.network_address),
            "ipv6-prefixlen": str(prefix.prefixlen),
            "ipv6-host": str(gateway.ip6),
            "ipv6-dns": str(resolver.ip6),
        }
    return ",".join(f"{name}={value}" for name, value in options.items())


async def knock(wire: socket.socket) -> None:
    """Return once the gateway at the other end of the wire answers, by ARP.

    OSError where it has ended. Nobody else may use the wire yet, which does not block.
    """
    host, gateway = address_of(WAY_OUT, HOST_END), address_of(WAY_OUT, GATEWAY)
    mac = bytes.fromhex(host.mac.replace(":", ""))
    question = _ARP_REQUEST.pack(
        *(1, 0x0800, 6, 4, 1, mac, host.ip.packed, bytes(6), gateway.ip.packed)
    )
    frame = b"\xff" * 6 + mac + b"\x08\x06" + question
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(wire, encode_frame(frame.ljust(_FRAME_BYTES, b"\0")))
    reader = FrameReader()
    while True:
        piece = await loop.sock_recv(wire, 4096)
        if not piece:
            raise ConnectionResetError("it hung up")
        try:
            frames = reader.feed(piece)
        except NotAFrame as error:
            raise ConnectionResetError(f"it sent what is no frame: {error}") from None
        if any(_answers(frame, mac, gateway.ip.packed) for frame in frames):
            return


def _answers(frame: bytes, mac: bytes, gateway: bytes) -> bool:
    return frame[:6] == mac and frame[12:14] == b"\x08\x06" and frame[28:32] == gateway
