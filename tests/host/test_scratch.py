"""Scratch directories: private, gone afterwards, and none is left by those who were killed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_vmsandbox.host.scratch import open_scratch

HOLDS_ONE = """
import time
from pytest_vmsandbox.host.scratch import open_scratch
with open_scratch() as path:
    (path / "apt" / "lists").mkdir(parents=True)
    (path / "apt" / "lists" / "lock").touch()
    print(path, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@contextmanager
def _holder(temporary: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has one open, and which."""
    environment = {**os.environ, "TMPDIR": str(temporary)}
    argv = [sys.executable, "-c", HOLDS_ONE]
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            yield holder, Path(holder.stdout.readline().strip())
        finally:
            holder.kill()


def test_it_is_for_its_user_alone_and_gone_afterwards(temporary: Path) -> None:
    with open_scratch() as path:
        (path / "file").touch()

        assert path.stat().st_mode & 0o777 == 0o700
        assert list(temporary.iterdir()) == [path]
    assert list(temporary.iterdir()) == []


def test_what_one_who_was_killed_left_is_removed_by_the_next(temporary: Path) -> None:
    with _holder(temporary) as (holder, left):
        holder.kill()
        holder.wait()
        assert (left / "apt/lists/lock").exists()

    with open_scratch() as path:
        assert list(temporary.iterdir()) == [path]


def test_nobody_takes_away_that_of_one_who_lives(temporary: Path) -> None:
    with _holder(temporary) as (_, path):
        with open_scratch() as ours, open_scratch() as another:
            assert set(temporary.iterdir()) == {path, ours, another}
        assert (path / "apt/lists/lock").exists()


def test_what_is_nobodys_scratch_is_left_alone(temporary: Path) -> None:
    precious = temporary / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (temporary / "vmsandbox-scratch-link").symlink_to(precious)
    (temporary / "vmsandbox-scratch-file").touch()
    there = set(temporary.iterdir())

    with open_scratch():
        pass

    assert set(temporary.iterdir()) == there
    assert (precious / "file").exists()
