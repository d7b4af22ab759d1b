"""Names in /etc/hosts: ours come and go, what else stands there stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.network.addresses import address_of
from pytest_vmsandbox.network.hosts import render_hosts

ONE = {"db": address_of(0, 2)}
TWO = {**ONE, "web": address_of(0, 3)}


def test_each_machine_has_its_name_for_both_of_its_addresses() -> None:
    lines = render_hosts("127.0.0.1 localhost\n", TWO).splitlines()

    assert lines[0] == "127.0.0.1 localhost"
    assert "10.76.0.2 db" in lines
    assert "fd76:6d73:6200::3 web" in lines


@given(
    st.lists(st.sampled_from(["127.0.0.1 localhost", "::1 localhost", "# a note", "", "1.2.3.4 x"]))
)
def test_what_was_there_stays_and_nothing_piles_up(lines: list[str]) -> None:
    before = "".join(f"{line}\n" for line in lines)

    once = render_hosts(before, ONE)
    again = render_hosts(render_hosts(once, TWO), ONE)

    assert again == once
    assert render_hosts(again, {}) == before


def test_what_somebody_added_behind_ours_stays_and_a_last_line_without_an_end_gets_one() -> None:
    text = render_hosts("127.0.0.1 localhost", ONE) + "9.9.9.9 mine\n"

    again = render_hosts(text, TWO)

    assert again.startswith("127.0.0.1 localhost\n")
    assert again.endswith("9.9.9.9 mine\n")
    assert again.count("# vmsandbox") == 2
