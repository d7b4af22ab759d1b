"""Topologies: what a machine may ask to be on."""

from __future__ import annotations

import pytest

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.network.topology import CARDS_AT_MOST, parse_networks


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (None, ()),
        ([], ()),
        ("lan", ("lan",)),
        (["lan"], ("lan",)),
        (("front", "back"), ("front", "back")),
        (["lan", "nat"], ("lan", "nat")),
        ("a", ("a",)),
        ("0-9", ("0-9",)),
        ("a" * 32, ("a" * 32,)),
    ],
)
def test_networks_are_named_in_the_order_of_the_cards(
    wanted: object, names: tuple[str, ...]
) -> None:
    assert parse_networks(wanted) == names


@pytest.mark.parametrize(
    "wanted",
    [
        *("", "LAN", "l_n", "-lan", "lan-", "lan\n", " lan", "a" * 33, "län", "a.b", "a/b"),
        *(1, True, {"lan"}, {"lan": 1}, b"lan", [None], [["lan"]], ["lan", ""]),
    ],
)
def test_what_is_no_name_is_refused_and_named(wanted: object) -> None:
    with pytest.raises(RequestInvalid, match="network="):
        parse_networks(wanted)


@pytest.mark.parametrize("wanted", ["host", "none", ["lan", "host"]])
def test_names_that_mean_something_else_are_refused(wanted: object) -> None:
    with pytest.raises(RequestInvalid, match="not a name to choose"):
        parse_networks(wanted)


def test_no_machine_is_twice_on_a_network_or_on_too_many() -> None:
    with pytest.raises(RequestInvalid, match="twice"):
        parse_networks(["lan", "dmz", "lan"])
    with pytest.raises(RequestInvalid, match="more than 8"):
        parse_networks([f"n{number}" for number in range(CARDS_AT_MOST + 1)])
