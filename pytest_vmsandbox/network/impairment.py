"""Impairment: what is wrong with a network's wires, as tests ask for it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pytest_vmsandbox.errors import RequestInvalid

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([a-z%]+)")
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
# As in tc(8): bits, by powers of a thousand.
_RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}

DELAY_AT_MOST_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Impairment:
    """What happens to each frame between two machines, in each direction.

    It comes `delay_s` seconds later, give or take up to `jitter_s`, and not at all with the
    probability `loss`; each machine hears at most `rate_bps` bits a second (None: no limit).
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    rate_bps: float | None = None

    @property
    def none(self) -> bool:
        """Whether frames are carried at once, all of them."""
        return self == Impairment()


def parse_time(name: str, wanted: object) -> float:
    """Seconds, from a number of them or a text such as "50ms"."""
    seconds = _quantity(wanted, _TIMES) if isinstance(wanted, str) else _number(wanted)
    if seconds is None or not 0 <= seconds <= DELAY_AT_MOST_S:
        raise RequestInvalid(
            f"{name}={wanted!r} must be a time from 0 to {DELAY_AT_MOST_S:.0f} s",
            'seconds, or a text such as "50ms"',
        )
    return seconds


def parse_loss(wanted: object) -> float:
    """A probability, from a number from 0 to 1 or a text such as "10%"."""
    share = _quantity(wanted, {"%": 0.01}) if isinstance(wanted, str) else _number(wanted)
    if share is None or not 0 <= share <= 1:
        raise RequestInvalid(
            f"loss={wanted!r} must be a share of all frames", 'a number from 0 to 1, or "10%"'
        )
    return share


def parse_rate(wanted: object) -> float | None:
    """Bits a second, from a number of them or a text such as "10mbit"; None is no limit."""
    if wanted is None:
        return None
    bits = _quantity(wanted, _RATES) if isinstance(wanted, str) else _number(wanted)
    if bits is None or not 1e3 <= bits <= 1e12:  # noqa: PLR2004 - kbit to Tbit
        raise RequestInvalid(
            f"rate={wanted!r} must be from 1kbit to 1000gbit a second", 'as in "10mbit"'
        )
    return bits


def _number(wanted: object) -> float | None:
    if isinstance(wanted, bool) or not isinstance(wanted, int | float):
        return None
    return float(wanted)


def _quantity(text: str, units: dict[str, float]) -> float | None:
    match = _QUANTITY.fullmatch(text.strip().lower())
    if match is None or match[2] not in units:
        return None
    return float(match[1]) * units[match[2]]
