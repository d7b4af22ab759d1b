"""Twins in a test run: whoever holds the original holds them too."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]

pytestmark = pytest.mark.machine

FORKS = """
    import time
    from pathlib import Path

    pids = []

    def test_forks(vm):
        pids.extend(machine._controller.running.process.pid for machine in (vm, *vm.fork(2)))

    def test_sees_none_of_them():
        assert len(pids) == 3
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    def test_is_told_of_a_twin_that_died(vm):
        (twin,) = vm.fork(1)
        twin.popen("echo c > /proc/sysrq-trigger")
        while "Kernel panic" not in twin.console.text:
            time.sleep(0.05)
"""


def test_twins_end_with_their_original_and_fail_its_test(
    run_pytest: Run, pytester: pytest.Pytester
) -> None:
    result = run_pytest(FORKS, "--vm-keep=on-failure")

    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*GuestPanicked: *-fork-1: *"])
    kept = [path.name for path in (pytester.path / "vm-artifacts").glob("*/*")]
    assert len(kept) == 2
    assert len([name for name in kept if "-fork-1-" in name]) == 1
