"""The networks of a worker as a test holds them: what is wrong with them, and what passes there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Self, TypeAlias

from pytest_vmsandbox.errors import NetworkFailed, RequestInvalid
from pytest_vmsandbox.machine.engine import Engine
from pytest_vmsandbox.machine.face import Face
from pytest_vmsandbox.machine.networks import Networks
from pytest_vmsandbox.network.impairment import parse_loss, parse_rate, parse_time

Side: TypeAlias = Face | str | Iterable[Face | str]
"""Machines, or their names: one, or several."""

# Where a capture goes: the file for a network of that name.
Place = Callable[[str], Path]


class Network:
    """All networks of this worker; `named` gives one alone.

    What is done to them lasts until `heal`, or the end of the test. None of it takes longer than
    some milliseconds, so that coroutines may call it as it is.
    """

    def __init__(
        self, networks: Networks, engine: Engine, *, place: Place, name: str | None = None
    ) -> None:
        self._networks = networks
        self._engine = engine
        self._place = place
        self.name = name

    def named(self, name: str) -> Network:
        """The network of that name alone."""
        return Network(self._networks, self._engine, place=self._place, name=name)

    def partition(self, one: Side, other: Side) -> None:
        """Let nothing pass between the machines of two sides; within each, all goes on.

        Cuts add up. RequestInvalid where a machine is on both sides, or on no such network.
        """
        sides = _names(one), _names(other)
        self._engine.run(self._networks.partition(*sides, network=self.name))

    def heal(self) -> None:
        """Let everything pass again, at once: nothing is cut, delayed, lost or limited."""
        self._engine.run(self._networks.heal(network=self.name))

    def delay(self, time: float | str, *, jitter: float | str = 0) -> None:
        """Deliver each frame that much later, in seconds or as in "50ms", give or take `jitter`.

        With a jitter frames overtake each other, as on a real network.
        """
        delay_s, jitter_s = parse_time("delay", time), parse_time("jitter", jitter)
        self._impair(delay_s=delay_s, jitter_s=jitter_s)

    def loss(self, share: float | str) -> None:
        """Lose that share of all frames: a number from 0 to 1, or as in "10%"."""
        self._impair(loss=parse_loss(share))

    def rate(self, rate: float | str | None) -> None:
        """Let each machine hear at most so many bits a second, as in "10mbit"; None: no limit."""
        self._impair(rate_bps=parse_rate(rate))

    def counts(self) -> Mapping[str, int]:
        """What became of the frames on this network: carried, cut, lost, overflowed."""
        return self._engine.run(self._networks.counts(network=self._one("counts")))

    def capture(self, path: Path | str | None = None) -> Capture:
        """Write all that machines send on this network to a file, for tcpdump or Wireshark.

        To `path`, or among the artifacts of the test; until `stop`, or the end of a `with`.
        """
        name = self._one("capture")
        target = self._place(name) if path is None else Path(path)
        number = self._engine.run(self._networks.start_capture(target, network=name))
        return Capture(target, lambda: self._engine.run(self._networks.end_capture(number)))

    def _impair(self, **changes: float | None) -> None:
        self._engine.run(self._networks.impair(network=self.name, **changes))

    def _one(self, verb: str) -> str:
        """The network's name; where none was chosen, the only one that there is."""
        there = self._networks.names
        if self.name is None and len(there) != 1:
            raise RequestInvalid(
                f"{verb}() is about one network, and there are: {', '.join(there) or 'none'}",
                f'vm_network.named("...").{verb}()',
            )
        return self.name or there[0]

    def __repr__(self) -> str:
        return f"<Network {self.name or 'all'}>"


class Capture:
    """A capture that is under way; `path` is its file."""

    def __init__(self, path: Path, stop: Callable[[], str]) -> None:
        self.path = path
        self._stop: Callable[[], str] | None = stop

    def stop(self) -> None:
        """Have all of it in the file; safe to repeat.

        NetworkFailed where it could not be written to its end, or got too long: what was sent
        until then is in the file.
        """
        stop, self._stop = self._stop, None
        if stop is not None and (failure := stop()):
            raise NetworkFailed(f"the capture {self.path} ended too early: {failure}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _names(side: Side) -> list[str]:
    if isinstance(side, Face | str):
        side = (side,)
    if not isinstance(side, Iterable):
        raise RequestInvalid(f"{side!r} is no machine, nor several")
    names = [each.name if isinstance(each, Face) else each for each in side]
    if not names or not all(isinstance(name, str) for name in names):
        raise RequestInvalid(f"{side!r} is no machine, nor several")
    return names
