"""The hub of one network: which frame goes to whom, when, and whether at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random

from pytest_vmsandbox.network.frames import ADDRESS_BYTES, is_for_many
from pytest_vmsandbox.network.impairment import Impairment
from pytest_vmsandbox.network.pcap import PcapWriter
from pytest_vmsandbox.network.port import Port

# As many hosts as a network may have several times over; a guest that makes up addresses fills
# the table, and frames for those that are not in it go to everybody.
LEARNED_AT_MOST = 4096

# What waits for a slow wire longer than this is lost, as in a router with a queue of that length.
QUEUE_AT_MOST_S = 1.0

# What is late for one machine takes no more than this; what would be more is lost. Each frame
# counts with what it takes to remember it.
LATE_AT_MOST = 32 << 20
_REMEMBERING = 512


@dataclass(slots=True, kw_only=True)
class Counts:
    """Frames since the network was made: what became of each copy of them."""

    carried: int = 0
    cut: int = 0
    lost: int = 0
    overflowed: int = 0


@dataclass(slots=True)
class Wire:
    """What the hub knows of a port."""

    port: Port
    free_at: float = 0.0  # when what it hears at a limited rate will have been said
    late_bytes: int = 0  # of what it will hear
    addresses: set[bytes] = field(default_factory=set)


class Hub:
    """Carries frames between ports as a learning switch does (IEEE 802.1D, 7.7 to 7.9)."""

    def __init__(self, *, random: Random | None = None) -> None:
        self.counts = Counts()
        self.captures: dict[int, PcapWriter] = {}
        self.caught_up: Callable[[], None] = nobody  # called whenever no frame is late any more
        self._impairment = Impairment()
        # Which losses there are follows from the frames alone, so that a run can be repeated.
        self._random = random or Random(0)  # noqa: S311 - no secret
        self._wires: dict[str, Wire] = {}
        self._learned: dict[bytes, str] = {}
        self._cuts: frozenset[frozenset[str]] = frozenset()
        self._late: dict[int, asyncio.TimerHandle] = {}  # what is still to be delivered
        self._numbers = count()
        self._loop = asyncio.get_running_loop()

    @property
    def ports(self) -> tuple[str, ...]:
        """Who is plugged in, by name."""
        return tuple(self._wires)

    @property
    def cuts(self) -> frozenset[frozenset[str]]:
        """The pairs between which nothing passes."""
        return self._cuts

    @property
    def impairment(self) -> Impairment:
        """How every frame is treated."""
        return self._impairment

    @impairment.setter
    def impairment(self, changed: Impairment) -> None:
        """Treat every frame so from now on."""
        if changed.rate_bps != self._impairment.rate_bps:
            for wire in self._wires.values():  # what waits by the former rate delays nothing more
                wire.free_at = 0.0
        self._impairment = changed

    @property
    def disturbed(self) -> bool:
        """Whether a frame may be treated otherwise than by a switch that is as it should be."""
        return bool(self._cuts or not self.impairment.none or self.captures or self._late)

    def plug(self, port: Port) -> None:
        """Carry what comes from this port, and bring it what is for it."""
        if port.name in self._wires:
            raise ValueError(f"there is a port {port.name} already")
        self._wires[port.name] = Wire(port)
        port.start(self.carry)

    def plug_machine(self, port: Port, machine: int | None) -> None:
        """The same for a machine, whose number is nothing to this hub."""
        del machine
        self.plug(port)

    def unplug(self, name: str) -> None:
        """Forget a port, and close it; KeyError where there is none."""
        wire = self._wires.pop(name)
        for address in wire.addresses:
            self._learned.pop(address, None)
        wire.port.close()

    def cut(self, pairs: Iterable[frozenset[str]]) -> None:
        """Let nothing pass between these pairs of ports, and everything between all others."""
        self._cuts = frozenset(pairs)

    def forget_addresses(self) -> None:
        """Learn anew who is where."""
        self._learned.clear()
        for wire in self._wires.values():
            wire.addresses.clear()

    def close(self) -> None:
        """Unplug everybody, and end every capture; what is late is lost."""
        for late in self._late.values():
            late.cancel()
        self._late.clear()
        for name in self.ports:
            self.unplug(name)
        for capture in self.captures.values():
            capture.close()

    def carry(self, source: Port, frames: Sequence[bytes]) -> None:
        """Bring each frame to whom it is for."""
        wire = self._wires.get(source.name)
        if wire is None or wire.port is not source:
            return
        touched: dict[str, Port] = {}
        for frame in frames:
            self._capture(frame)
            self._learn(wire, frame[ADDRESS_BYTES : 2 * ADDRESS_BYTES])
            for target in self._targets(source.name, frame[:ADDRESS_BYTES]):
                if self._send(source.name, target, frame):
                    touched[target.port.name] = target.port
        for port in touched.values():
            port.flush()
        for capture in self.captures.values():
            capture.flush()

    def _capture(self, frame: bytes) -> None:
        for capture in self.captures.values():
            capture.write(frame, at_s=time.time())

    def _learn(self, wire: Wire, address: bytes) -> None:
        known = self._learned.get(address)
        if known == wire.port.name or is_for_many(address):
            return
        if known is not None:
            self._wires[known].addresses.discard(address)
        elif len(self._learned) >= LEARNED_AT_MOST:
            return
        self._learned[address] = wire.port.name
        wire.addresses.add(address)

    def _targets(self, source: str, address: bytes) -> Iterator[Wire]:
        known = None if is_for_many(address) else self._learned.get(address)
        if known is None:
            yield from (wire for name, wire in self._wires.items() if name != source)
        elif known != source:
            yield self._wires[known]

    def _send(self, source: str, target: Wire, frame: bytes) -> bool:
        """Offer it to a port, or have that done later; whether the port is to be flushed now."""
        if self._is_cut(source, target):
            self.counts.cut += 1
            return False
        if self.impairment.none:
            return self._offer(target, frame)
        if self._random.random() < self.impairment.loss:
            self.counts.lost += 1
            return False
        weight = len(frame) + _REMEMBERING
        full = target.late_bytes + weight > LATE_AT_MOST
        delay_s = None if full else self._delay_s(target, len(frame))
        if delay_s is None:
            self.counts.overflowed += 1
        else:
            target.late_bytes += weight
            number = next(self._numbers)
            self._late[number] = self._loop.call_later(
                delay_s, self._deliver_late, number, source, target, frame
            )
        return False

    def _is_cut(self, source: str, target: Wire) -> bool:
        return bool(self._cuts) and frozenset((source, target.port.name)) in self._cuts

    def _delay_s(self, target: Wire, length: int) -> float | None:
        """In how many seconds it will have come; None where too much waits already."""
        wrong = self.impairment
        delay_s = wrong.delay_s + self._random.uniform(-wrong.jitter_s, wrong.jitter_s)
        if wrong.rate_bps is not None:
            now = self._loop.time()
            begins = max(now, target.free_at)
            if begins - now > QUEUE_AT_MOST_S:
                return None
            target.free_at = begins + length * 8 / wrong.rate_bps
            delay_s += target.free_at - now
        return max(0.0, delay_s)

    def _deliver_late(self, number: int, source: str, target: Wire, frame: bytes) -> None:
        del self._late[number]
        target.late_bytes -= len(frame) + _REMEMBERING
        if self._wires.get(target.port.name) is target:
            if self._is_cut(source, target):  # since it was sent
                self.counts.cut += 1
            elif self._offer(target, frame):
                target.port.flush()
        if not self._late:
            self.caught_up()

    def _offer(self, target: Wire, frame: bytes) -> bool:
        if target.port.offer(frame):
            self.counts.carried += 1
            return True
        self.counts.overflowed += 1
        return False


def nobody() -> None:
    """Whom nobody asked to be told."""
