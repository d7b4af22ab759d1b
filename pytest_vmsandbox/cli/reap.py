"""`vmsandbox reap`: undo what provably dead runs left, and name what is in doubt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TypedDict

from pytest_vmsandbox.cli.runs import add_run_dir_argument, ask_each_base
from pytest_vmsandbox.errors import TeardownRefused, visible
from pytest_vmsandbox.jail.mount_points import remove_abandoned_mount_points
from pytest_vmsandbox.lease.layout import Leftover, leftover_of, look_at
from pytest_vmsandbox.lease.reaper import reap

# What is doubtful was left in place.
LEFT = 1


class Answer(TypedDict):
    """What was done at one base, step by step, and what was left, a line for each."""

    steps: list[str]
    left: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmsandbox reap`."""
    add_run_dir_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 where something doubtful was left in place. Runs that live are not touched."""
    status = 0
    for answer in ask_each_base(arguments, _reap, failed=_not_asked):
        for step in answer["steps"]:
            sys.stdout.write(f"{visible(step)}\n")
        for left in answer["left"]:
            sys.stderr.write(f"vmsandbox reap: left in place: {visible(left)}\n")
            status = LEFT
    return status


def _reap(base: Path) -> Answer:
    steps: list[str] = []
    leftovers = reap(base, report=steps.append).leftovers
    try:
        remove_abandoned_mount_points(base=base)
    except TeardownRefused as refused:
        leftovers.append(leftover_of(refused))
    except OSError as error:  # in a base of somebody else
        leftovers.append(Leftover(path=base, reason=str(error), inspect=look_at(base)))
    return {"steps": steps, "left": [str(leftover) for leftover in leftovers]}


def _not_asked(base: Path, reason: str) -> Answer:
    return {
        "steps": [],
        "left": [str(Leftover(path=base, reason=reason, inspect=look_at(base)))],
    }
