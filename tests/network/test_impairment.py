"""Impairments: what tests say is wrong, as numbers."""

from __future__ import annotations

import pytest

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.network.impairment import Impairment, parse_loss, parse_rate, parse_time


@pytest.mark.parametrize(
    ("wanted", "seconds"),
    [(0, 0), (0.05, 0.05), ("50ms", 0.05), ("50 ms", 0.05), ("1.5s", 1.5), ("10us", 1e-5)],
)
def test_times(wanted: object, seconds: float) -> None:
    assert parse_time("delay", wanted) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "wanted", [-1, 61, True, None, "", "50", "ms", "-1ms", "1h", "1e3ms", float("nan"), "٣s"]
)
def test_what_is_no_time_is_refused(wanted: object) -> None:
    with pytest.raises(RequestInvalid, match="delay="):
        parse_time("delay", wanted)


@pytest.mark.parametrize(("wanted", "share"), [(0, 0), (1, 1), (0.25, 0.25), ("10%", 0.1)])
def test_losses(wanted: object, share: float) -> None:
    assert parse_loss(wanted) == pytest.approx(share)


@pytest.mark.parametrize("wanted", [-0.1, 1.1, "101%", "10", True, None, float("nan")])
def test_what_is_no_loss_is_refused(wanted: object) -> None:
    with pytest.raises(RequestInvalid, match="loss="):
        parse_loss(wanted)


@pytest.mark.parametrize(
    ("wanted", "bits"), [(None, None), (1e6, 1e6), ("10mbit", 1e7), ("1.5gbit", 1.5e9)]
)
def test_rates(wanted: object, bits: float | None) -> None:
    assert parse_rate(wanted) == bits


@pytest.mark.parametrize("wanted", [0, -1, 999, "10", "10mb", True, float("inf")])
def test_what_is_no_rate_is_refused(wanted: object) -> None:
    with pytest.raises(RequestInvalid, match="rate="):
        parse_rate(wanted)


def test_as_new_nothing_is_wrong() -> None:
    assert Impairment().none
    assert not Impairment(loss=0.1).none
