"""Which run directories `ps` and `reap` look at: ours, and as root everybody's."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pytest_vmsandbox.cli.arguments import run_dir_of
from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import RequestInvalid, VmSandboxError
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

    Its answers can be written as JSON. `failed` makes one where it could not be looked at: the
    others are. RequestInvalid where the base that was asked for can't be one.
    """
    given = run_dir_of(arguments)
    for uid, base in _given(given) if given else [*_ours(), *_others()]:
        try:
            answer = _ask(uid, settled(base), look)
        except (OSError, VmSandboxError) as error:
            answer = failed(base, str(error))
        yield answer


def _ask(uid: int, base: Path, look: Callable[[Path], Answer]) -> Answer:
    if uid == os.geteuid():
        return look(base)
    deadline = Deadline.after(seconds=_OTHER_USER_S)
    answer: Answer = json.loads(
        call_as_user(uid, lambda: json.dumps(look(base)), deadline=deadline)
    )
    return answer


def _given(base: Path) -> list[tuple[int, Path]]:
    try:
        owner = base.lstat().st_uid
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RequestInvalid(
            f"run directories can't lie in {base}: {error.strerror}",
            "name the directory that a run had as --vm-run-dir, in --run-dir or VMSANDBOX_RUN_DIR",
        ) from error
    return [(owner if os.geteuid() == 0 else os.geteuid(), base)]


def _ours() -> list[tuple[int, Path]]:
    return [(os.geteuid(), base) for base in own_bases()]


def _others() -> list[tuple[int, Path]]:
    return bases_of_others() if os.geteuid() == 0 else []
