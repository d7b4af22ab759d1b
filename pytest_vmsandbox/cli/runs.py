"""Which run directories `ps` and `reap` look at: ours, and as root everybody's."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import TimedOut
from pytest_vmsandbox.lease.as_user import call_as_user
from pytest_vmsandbox.lease.bases import bases_of_others, own_bases, settled

# For all that one other user has.
_OTHER_USER_S = 60.0

Answer = TypeVar("Answer")


def add_run_dir_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --run-dir."""
    parser.add_argument(
        "--run-dir",
        type=Path,
        help="look there only, where a run had --vm-run-dir (default: VMSANDBOX_RUN_DIR, or "
        "wherever runs of this user are; as root, of all users)",
    )


def ask_each_base(
    arguments: argparse.Namespace,
    look: Callable[[Path], Answer],
    *,
    failed: Callable[[Path, str], Answer],
) -> Iterator[Answer]:
    """What `look` says of each base; it is called in its owner's place where we are root.

    Its answers can be written as JSON. `failed` makes one where that user could not be asked.
    """
    given = arguments.run_dir or os.environ.get("VMSANDBOX_RUN_DIR")
    asked = _given(Path(given)) if given else [*_ours(), *_others()]
    for uid, base in asked:
        if uid == os.geteuid():
            yield look(settled(base))
            continue
        try:
            deadline = Deadline.after(seconds=_OTHER_USER_S)
            text = call_as_user(uid, lambda: json.dumps(look(settled(base))), deadline=deadline)  # noqa: B023  # called at once
            answer: Answer = json.loads(text)
        except (OSError, TimedOut) as error:
            answer = failed(base, str(error))
        yield answer


def _given(base: Path) -> list[tuple[int, Path]]:
    try:
        owner = base.lstat().st_uid
    except FileNotFoundError:
        return []
    return [(owner if os.geteuid() == 0 else os.geteuid(), base)]


def _ours() -> list[tuple[int, Path]]:
    return [(os.geteuid(), base) for base in own_bases()]


def _others() -> list[tuple[int, Path]]:
    return bases_of_others() if os.geteuid() == 0 else []
