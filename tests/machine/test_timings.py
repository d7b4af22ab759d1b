"""What a machine cost, as people read it."""

from __future__ import annotations

import pytest

from pytest_vmsandbox.machine.timings import Timings


@pytest.mark.parametrize(
    ("timings", "shown", "total_s"),
    [
        (Timings(), "", 0.0),
        (Timings(spawn_s=0.25), "spawn 0.250 s", 0.25),
        (
            Timings(spawn_s=0.25, boot_s=1.5, first_command_s=0.5, teardown_s=0.125),
            "spawn 0.250 s, boot 1.500 s, first command 0.500 s, teardown 0.125 s",
            2.375,
        ),
        (
            Timings(spawn_s=0.25, load_s=0.125, restore_s=0.5, from_pool=True),
            "spawn 0.250 s, load 0.125 s, ready 0.375 s, from the pool",
            0.0,
        ),
        (
            Timings(spawn_s=0.25, restore_s=0.5, teardown_s=0.25, waited_s=0.125, from_pool=True),
            "spawn 0.250 s, restore 0.500 s, teardown 0.250 s, from the pool, waited 0.125 s",
            0.375,
        ),
        (Timings(restore_s=0.5, waited_s=0.75), "restore 0.500 s", 0.5),
        (Timings(restore_s=0.5), "restore 0.500 s", 0.5),
        (Timings(boot_s=1.0, boot_attempts=2), "boot 1.000 s, 2 boot attempts", 1.0),
        (
            Timings(spawn_s=0.25, boot_s=1.0, load_s=0.125, restore_s=0.5),
            "spawn 0.250 s, boot 1.000 s, load 0.125 s, ready 0.375 s",
            1.75,
        ),
    ],
)
def test_steps_stand_in_their_order_and_what_was_not_taken_is_not_shown(
    timings: Timings, shown: str, total_s: float
) -> None:
    assert str(timings) == shown
    assert timings.total_s == total_s


def test_a_step_that_fails_was_not_taken() -> None:
    timings = Timings()
    with pytest.raises(LookupError), timings.measuring("boot_s"):
        raise LookupError

    with timings.measuring("spawn_s"):
        pass

    assert timings.boot_s is None
    assert timings.spawn_s is not None
