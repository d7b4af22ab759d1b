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


SHARED = """
    from pathlib import Path
    import pytest

    pids, names = [], []

    @pytest.fixture(scope="module")
    def kept(vm_module):
        return vm_module.fork(1)[0]

    @pytest.fixture
    def twins(vm_module):
        made = []
        yield made
        # They are gone before what the test got from fixtures is.
        assert not [twin for twin in made if twin._controller.is_on]

    @pytest.mark.parametrize("time", [1, 2])
    def test_forks(vm_module, kept, twins, time):
        (twin,) = vm_module.fork(1)
        (grandchild,) = twin.fork(1)
        twins += [twin, grandchild]
        pids.extend(machine._controller.running.process.pid for machine in twins)
        names.append(twin.name)

    def test_only_its_own_are_left(vm_module, kept):
        assert len(pids) == 4
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert len(set(names)) == 1, names
        assert kept.run("hostname").stdout.strip() == kept.name not in names
        assert vm_module.run(["true"]).returncode == 0

    def test_fails_with_a_twin(vm_module):
        (twin,) = vm_module.fork(1)
        assert twin.run("echo said > /dev/console; false").returncode == 0
"""


def test_twins_of_a_shared_machine_end_with_the_test_that_made_them(
    run_pytest: Run, pytester: pytest.Pytester
) -> None:
    result = run_pytest(SHARED, "--vm-keep=on-failure")

    result.assert_outcomes(passed=3, failed=1)
    kept = [path.name for path in (pytester.path / "vm-artifacts").glob("*/*")]
    assert [name for name in kept if "-fork-2-" in name], kept
