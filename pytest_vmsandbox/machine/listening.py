"""Listening: commands that tell, by their exit status in a guest, whether a TCP port is."""

from __future__ import annotations

from ipaddress import IPv4Address

from pytest_vmsandbox.errors import RequestInvalid

PORTS = range(1, 65536)

_ANY_V4 = "0" * 8
_ANY_V6 = "0" * 32
# ::ffff:a.b.c.d (RFC 4291, 2.5.5.2), but for the last 32 bits.
_MAPPED = "0000000000000000FFFF0000"

# Connect and hang up: with -z, or where there is none, as in most of busybox, by the program that
# runs once it is connected. A first try that is lost is soon repeated; a slow network has longer.
_REACHES = """\
case $(nc -h 2>&1) in *ero-I/O*) scan=-z run= ;; *) scan= run="-e true" ;; esac
for seconds in 1 3 10; do
    said=$(nc $scan -w $seconds "$1" "$2" $run 2>&1) && exit
done
echo "$said" >&2
exit 1
"""

_SAY_OPTIONS = 'case $(nc -h 2>&1) in *"Shutdown the network socket"*) echo -N ;; esac'


def port_check(where: tuple[int | str, ...]) -> list[str]:
    """A command that succeeds where a port is listened on: `(80,)` here, `(host, 80)` from here.

    RequestInvalid for anything else.
    """
    match where:
        case (int(port),) if port in PORTS:
            return _listed("[0-9A-F]+", port)
        case (str(host), int(port)) if port in PORTS and host:
            return ["sh", "-c", _REACHES, "sh", host, str(port)]
    raise RequestInvalid(f"wait_for_port{where!r}: a port, or a host and a port, is needed")


def listener_check(address: str, port: int) -> list[str]:
    """A command that succeeds where who connects to that IPv4 address of the guest is heard.

    It prints the options with which the guest's nc, as others do, hands on that its input has
    ended: OpenBSD's keeps it to itself without.
    """
    # proc_net_tcp: each 32 bits as the guest's processor reads them, the lowest byte first.
    exact = IPv4Address(address).packed[::-1].hex().upper()
    listed = _listed(f"({_ANY_V4}|{exact}|{_ANY_V6}|{_MAPPED}{exact})", port)
    listed[-1] += f" && {_SAY_OPTIONS}"
    return listed


def _listed(address: str, port: int) -> list[str]:
    # proc_net_tcp: local address in hexadecimal, then the remote one, then 0A = LISTEN
    listening = f"^ *[0-9]+: {address}:{port:04X} [0-9A-F:]+ 0A "
    return ["sh", "-c", f"cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -qE '{listening}'"]
