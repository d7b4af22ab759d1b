"""A measurement: the same thing done several times, and beside it what it is compared with."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Unit(StrEnum):
    """What the values count."""

    SECONDS = "s"
    MILLISECONDS = "ms"
    MEGABYTES_PER_SECOND = "MB/s"
    MEGABITS_PER_SECOND = "Mbit/s"
    TIMES = "times"
    PER_SECOND = "/s"
    MEBIBYTES = "MiB"
    PERCENT = "%"

    @property
    def is_rate(self) -> bool:
        """Whether more of it is better."""
        return self in (Unit.MEGABYTES_PER_SECOND, Unit.MEGABITS_PER_SECOND, Unit.PER_SECOND)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One row of the report.

    `values` has one value a round, `peer_values` the peer's of the same rounds, or nothing.
    `how` says for people what was done.
    """

    benchmark: str
    what: str
    unit: Unit
    values: tuple[float, ...]
    how: str
    peer: str = ""
    peer_values: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def ratio(self) -> float | None:
        """How good ours is where the peer is 1: 2.0 is half the time, or twice the rate.

        The median of the rounds' own ratios, since the load of a shared host moves both sides
        of a round alike. None without a peer.
        """
        if not self.peer_values:
            return None
        ours, theirs = self.values, self.peer_values
        over, under = (ours, theirs) if self.unit.is_rate else (theirs, ours)
        ratios = [one / other for one, other in zip(over, under, strict=True) if other]
        return statistics.median(ratios) if ratios else None


def quotients(
    *, benchmark: str, what: str, ours: Sequence[float], theirs: Sequence[float], how: str
) -> Measurement:
    """How many times theirs ours takes, round by round."""
    return Measurement(
        benchmark=benchmark,
        what=what,
        unit=Unit.TIMES,
        values=tuple(our / their for our, their in zip(ours, theirs, strict=True)),
        how=f"{how}; of the medians: {statistics.median(ours) / statistics.median(theirs):.3g}",
    )


Act = Callable[[], float]


def alternate(sides: Mapping[str, Act], *, rounds: int) -> dict[str, tuple[float, ...]]:
    """Each side's values: A B A B ..., and every other round B A, so that neither is favoured.

    A side returns its value itself, since it alone knows what must stay outside the clock.
    """
    values: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in names:
            values[name].append(sides[name]())
    return {name: tuple(seen) for name, seen in values.items()}
