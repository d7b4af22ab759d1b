"""What the tests of probes share: trials, and proof that nothing stays."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.host.trial import Trial, start_trial
from pytest_vmsandbox.linux import prctl_set_child_subreaper

if TYPE_CHECKING:
    from tests.host.conftest import Stubs

# A stub that neither ends nor minds SIGTERM, and leaves one more such process beside it.
HANGS = 'trap "" TERM INT HUP\n(exec /bin/sleep 60) &\nexec /bin/sleep 60'


@pytest.fixture
def hangs() -> str:
    return HANGS


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    """A trial of this very host."""
    return start_trial(run_dir=tmp_path)


@pytest.fixture
def stub_trial(stubs: Stubs, tmp_path: Path) -> Trial:
    """A trial that finds stubs alone, and is impatient."""
    return Trial(
        run_dir=tmp_path, search_path=str(stubs.directory), deadline_s=0.4, guest_deadline_s=0.4
    )


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Orphans of a probe become our children, so that none can hide."""
    prctl_set_child_subreaper()
    before = set(children())
    try:
        yield
        deadline = time.monotonic() + 20.0
        while left := set(children()) - before:
            assert time.monotonic() < deadline, f"left running: {[command_of(pid) for pid in left]}"
            time.sleep(0.01)
    finally:
        prctl_set_child_subreaper(enabled=False)


@pytest.fixture(autouse=True)
def nothing_left_in(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("vmsandbox-probe-*"))


def children() -> list[int]:
    """Our living children; those that have ended are reaped."""
    pids = [
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    return [pid for pid in pids if not is_over(pid)]


def is_over(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None
    except ChildProcessError:
        return True


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
