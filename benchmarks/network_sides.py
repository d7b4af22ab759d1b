"""The sides of the network's benchmark: guests that serve, and the ways to them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from benchmarks.iperf_client import PORT
from benchmarks.iperf_programs import PLACE, IperfPrograms, iperf
from benchmarks.network_by_hand import SERVER, ByHandNetwork, shell_of
from benchmarks.ours import open_machine
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.worker import Worker
from pytest_vmsandbox.network.wire_kind import WireKind

ECHO: Final = 7
PORTS: Final = (PORT, ECHO)

MEMORY_MIB: Final = 256

# iperf3's server, and an echo; it ends when both listen (proc(5), /proc/net/tcp: state 0A).
_SERVE: Final = f"""\
set -e
{" ".join(iperf("-s", "-D"))}
busybox nc -ll -p {ECHO} -e cat </dev/null >/dev/null 2>&1 &
for port in {PORT:04X} {ECHO:04X}; do
    until busybox grep -q ":$port .* 0A " /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done
done
"""

Shell = Callable[[str], str]
Dial = Callable[[int], socket.socket]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two guests on one network: what runs a script in one of them, and where the other is."""

    client: Shell
    server: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """Pairs of guests, and ways from the test to a port of a guest, by name."""

    pairs: Mapping[str, Pair]
    ways: Mapping[str, Dial]

    def __or__(self, other: Sides) -> Sides:
        return Sides(pairs={**self.pairs, **other.pairs}, ways={**self.ways, **other.ways})


@contextmanager
def open_ours(worker: Worker, programs: IperfPrograms, kind: WireKind) -> Iterator[Sides]:
    """Two machines on a network with that kind of wires; ended with the block.

    HostUnfit where there can be none.
    """
    with (
        open_machine(worker, network="lan", name="server", memory_mib=MEMORY_MIB) as server,
        open_machine(worker, network="lan", name="client", memory_mib=MEMORY_MIB) as client,
    ):
        for machine in (server, client):
            machine.push(programs.directory, PLACE)
        _shell_in(server)(_SERVE)
        yield Sides(
            pairs={kind: Pair(client=_shell_in(client), server=str(server.ip))},
            ways={f"connect {kind}": server.connect, f"forward {kind}": _forwarded(server)},
        )


@contextmanager
def open_alone(worker: Worker, programs: IperfPrograms) -> Iterator[Sides]:
    """A machine on no network; ended with the block."""
    with open_machine(worker, name="alone", memory_mib=MEMORY_MIB) as machine:
        machine.push(programs.directory, PLACE)
        _shell_in(machine)(_SERVE)
        yield Sides(pairs={}, ways={"agent": _forwarded(machine)})


def plain_sides(network: ByHandNetwork) -> Sides:
    """The same of plain QEMU, by hand."""
    for agent in (network.server, network.user):
        shell_of(agent)(_SERVE)
    connect = network.namespace.connect
    return Sides(
        pairs={"plain": Pair(client=shell_of(network.client), server=SERVER)},
        ways={
            "bridge": lambda port: connect(SERVER, port),
            "hostfwd": lambda port: connect("127.0.0.1", port),
        },
    )


def _shell_in(machine: Machine) -> Shell:
    return lambda script: machine.run(script, check=True, timeout=60).stdout


def _forwarded(machine: Machine) -> Dial:
    """By `vm.forward`, which is asked for each port once."""
    forwarded = {port: machine.forward(port) for port in PORTS}
    return lambda port: socket.create_connection(forwarded[port])
