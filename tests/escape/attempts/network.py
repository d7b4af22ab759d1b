"""Network: sockets of the host and of other machines, and the host's wires."""

from __future__ import annotations

import fcntl
import socket
import struct

from tests.escape.attempts.table import Refused, Targets, attempt

_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914


def _connected(family: int, address: object) -> str:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(3)
        sock.connect(address)  # type: ignore[arg-type]  # an address of whatever family
        sock.sendall(b"hello")
    return f"connected to {address}"


@attempt("connect to a TCP port of the host's loopback")
def tcp(targets: Targets) -> str:
    return _connected(socket.AF_INET, ("127.0.0.1", targets.tcp_port))


@attempt("connect to a TCP port of the host's loopback, IPv6", by_host=True)
def tcp6(targets: Targets) -> str:
    return _connected(socket.AF_INET6, ("::1", targets.tcp6_port))


@attempt("send a datagram to the host's loopback")
def udp(targets: Targets) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"hello", ("127.0.0.1", targets.udp_port))
    return "sent it"


@attempt("connect to an abstract socket of the host")
def abstract(targets: Targets) -> str:
    return _connected(socket.AF_UNIX, f"\0{targets.abstract}")


@attempt("connect to a socket of the host by its path")
def path_socket(targets: Targets) -> str:
    return _connected(socket.AF_UNIX, targets.listener)


@attempt("connect to the QMP socket of the other machine, and of another worker's")
def neighbours_qmp(targets: Targets) -> str:
    last: OSError = OSError(2, "none")
    for root in ("", *(f"/proc/{pid}/root" for pid in targets.neighbours)):
        for path in targets.neighbour_sockets:
            try:
                return _connected(socket.AF_UNIX, f"{root}{path}")
            except OSError as error:
                last = error
    raise last


@attempt("connect to an abstract socket of the other machine, and of another worker's")
def neighbours_abstract(targets: Targets) -> str:
    last: OSError = OSError(2, "none")
    for name in targets.neighbour_names:
        try:
            return _connected(socket.AF_UNIX, f"\0{name}")
        except OSError as error:
            last = error
    raise last


@attempt("see the host's network interfaces", by_host=True)
def interfaces(targets: Targets) -> str:
    found = [name for _, name in socket.if_nameindex() if name != "lo"]
    if not found:
        raise Refused("there is only lo")
    return f"saw {found}"


@attempt("change a network interface")
def change_interface(targets: Targets) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sH14x", b"lo", 0))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, request)
    return "set lo to what it was"


@attempt("open a raw socket")
def raw_socket(targets: Targets) -> str:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
    return "opened it"


@attempt("open a packet socket", by_host=True)
def packet_socket(targets: Targets) -> str:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    return "opened it"


@attempt("open a vsock socket, which knows no network namespace", by_host=True)
def vsock(targets: Targets) -> str:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    return "opened it"


@attempt("open a socket to the kernel's ciphers (AF_ALG)", by_host=True)
def alg(targets: Targets) -> str:
    socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET).close()
    return "opened it"


@attempt("open sockets of rare families, which load modules into the host's kernel", by_host=True)
def rare_families(targets: Targets) -> str:
    opened = []
    for family in range(3, 46):
        if family in (socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK):
            continue
        if family == socket.AF_ALG:
            continue
        try:
            socket.socket(family, socket.SOCK_DGRAM).close()
        except OSError as error:
            last = error
        else:
            opened.append(family)
    if not opened:
        raise last
    return f"opened families {opened}"
