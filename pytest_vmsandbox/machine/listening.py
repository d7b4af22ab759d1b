"""Listening: commands that tell, by their exit status in a guest, whether a TCP port is."""

from __future__ import annotations

from pytest_vmsandbox.errors import RequestInvalid

PORTS = range(1, 65536)

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


def port_check(where: tuple[int | str, ...]) -> list[str]:
    """A command that succeeds where a port is listened on: `(80,)` here, `(host, 80)` from here.

    RequestInvalid for anything else.
    """
    match where:
        case (int(port),) if port in PORTS:
            return _listed(port)
        case (str(host), int(port)) if port in PORTS and host:
            return ["sh", "-c", _REACHES, "sh", host, str(port)]
    raise RequestInvalid(f"wait_for_port{where!r}: a port, or a host and a port, is needed")


def _listed(port: int) -> list[str]:
    # proc_net_tcp: local address in hexadecimal, then the remote one, then 0A = LISTEN
    listening = f"^ *[0-9]+: [0-9A-F]+:{port:04X} [0-9A-F:]+ 0A "
    return ["sh", "-c", f"cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -qE '{listening}'"]
