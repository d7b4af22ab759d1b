"""The fields of JSON that somebody else may have written, each read as exactly what it must be."""

from __future__ import annotations

import math


def fields_of(value: object, *names: str) -> dict[str, object]:
    """A JSON object with exactly these fields; ValueError for anything else."""
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(f"not an object of {', '.join(names)}: {value!r}")
    return value


def text_of(value: object) -> str:
    """A JSON string without a NUL."""
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"no text: {value!r}")
    return value


def number_of(value: object) -> int:
    """A whole JSON number that is not negative, and neither true nor false."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"no number: {value!r}")
    return value


def seconds_of(value: object) -> float:
    """A finite JSON number, seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"no seconds: {value!r}")
    return float(value)
