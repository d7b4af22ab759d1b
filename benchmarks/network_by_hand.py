"""The other side of the networks: plain QEMU, in a network namespace of its own.

Two machines with taps on a bridge, and a third with user-mode networking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from benchmarks.by_hand import GuestAgent, open_by_hand
from benchmarks.by_hand_image import ByHandImage
from benchmarks.own_namespace import OwnNamespace, open_own_namespace

HOST: Final = "10.99.0.1"
SERVER: Final = "10.99.0.2"
CLIENT: Final = "10.99.0.3"
# What slirp calls its guest unless it is told otherwise (qemu(1), -netdev user).
USER: Final = "10.0.2.15"

# A command that takes seconds is not looked for so often that looking slows it down.
POLL_S: Final = 0.25

_CARD_UP: Final = """\
for module in /iperf/*.ko; do insmod "$module"; done
busybox ip link set lo up
busybox ip addr add {address}/24 dev eth0
busybox ip link set eth0 up
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainMachine:
    """What a machine by hand is like: all but its card."""

    image: ByHandImage
    accel: str
    cpu: str
    memory_mib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ByHandNetwork:
    """Machines that run: `server` and `client` on the bridge, whose host's end is `HOST`.

    `user` is reached from inside the namespace, at its loopback, by the ports forwarded.
    """

    namespace: OwnNamespace
    server: GuestAgent
    client: GuestAgent
    user: GuestAgent


@contextmanager
def open_by_hand_network(
    machine: PlainMachine, *, forwarded: tuple[int, ...]
) -> Iterator[ByHandNetwork]:
    """The three of them, booted; ended with the block.

    OSError where it can't be made: for those who are not root, or without /dev/net/tun.
    """
    with open_own_namespace() as namespace, ExitStack() as held:
        _make_bridge(namespace)

        def boot(address: str, number: int, netdev: str) -> GuestAgent:
            card = f"virtio-net-pci,netdev=net,romfile=,mac=02:00:00:00:00:{number:02x}"
            agent = held.enter_context(
                open_by_hand(
                    machine.image,
                    accel=machine.accel,
                    cpu=machine.cpu,
                    memory_mib=machine.memory_mib,
                    devices=("-netdev", f"{netdev},id=net", "-device", card),
                    start=namespace.start,
                )
            )
            shell_of(agent)(_CARD_UP.format(address=address))
            return agent

        forwards = "".join(f",hostfwd=tcp:127.0.0.1:{port}-:{port}" for port in forwarded)
        yield ByHandNetwork(
            namespace=namespace,
            server=boot(SERVER, 2, _tap(namespace, "tap2")),
            client=boot(CLIENT, 3, _tap(namespace, "tap3")),
            user=boot(USER, 4, f"user,restrict=on{forwards}"),
        )


def shell_of(agent: GuestAgent) -> Callable[[str], str]:
    """Runs a script in that guest: its output; RuntimeError where it fails."""

    def run(script: str) -> str:
        done = agent.run(["sh", "-c", script], poll_s=POLL_S)
        if done.returncode != 0:
            raise RuntimeError(f"{script}: {done.stdout!r} {done.stderr!r}")
        return done.stdout.decode()

    return run


def _make_bridge(namespace: OwnNamespace) -> None:
    namespace.run("ip", "link", "add", "bridge", "type", "bridge")
    namespace.run("ip", "addr", "add", f"{HOST}/24", "dev", "bridge")
    namespace.run("ip", "link", "set", "bridge", "up")


def _tap(namespace: OwnNamespace, name: str) -> str:
    namespace.run("ip", "tuntap", "add", name, "mode", "tap")
    namespace.run("ip", "link", "set", name, "master", "bridge", "up")
    return f"tap,ifname={name},script=no,downscript=no"
