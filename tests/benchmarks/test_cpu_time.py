"""Processor time of a tree of processes."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.cpu_time import TreeClock

# It takes the time that it is told, says so, and lives until its stdin ends.
BUSY = """\
import sys, time
while time.process_time() < 0.2:
    pass
print(flush=True)
sys.stdin.read()
"""


def test_a_child_counts_while_it_lives_and_once_more_never() -> None:
    clock = TreeClock()
    before = clock.seconds()

    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        living = clock.seconds()
    ended = clock.seconds()

    assert 0.2 <= living - before < 2
    # What a parent is told is in ticks of the clock; the end itself takes a moment too.
    assert -0.02 <= ended - living < 0.15


def test_what_looking_costs_is_left_out() -> None:
    clock = TreeClock()
    before = clock.seconds()
    for _ in range(200):
        clock.seconds()

    assert clock.seconds() - before < 0.05
