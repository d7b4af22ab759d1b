"""A test answers for the machines that it uses, and only for what happened during it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]

pytestmark = pytest.mark.machine

SHARED = """
    import pytest

    @pytest.mark.vm_expect("oops")
    def test_oops(vm_module):
        # What the kernel would say, said through its log: the machine lives on.
        vm_module.run("echo '<0>Oops: 0000 [#1] PREEMPT SMP' > /dev/kmsg", check=True)
        vm_module.console.wait_for("Oops")

    def test_same_machine_with_old_trouble(vm_module):
        assert vm_module.run(["true"]).returncode == 0

    def test_dies_unannounced(vm_module):
        vm_module.popen("sleep 0.1; echo c > /proc/sysrq-trigger")
        vm_module.console.wait_for("Kernel panic - not syncing")

    def test_pure_after_it():
        pass

    def test_pure_failure():
        assert False, "nothing to do with machines"

    @pytest.mark.vm_expect("panic")
    def test_expects_what_was_long_ago(vm_module):
        pass

    def test_asks_late(request):
        machine = request.getfixturevalue("vm")
        machine.run("echo c > /proc/sysrq-trigger")
"""

LAST = """
    from pytest_vmsandbox.plugin.holding import HELD

    def test_ended_machines_are_let_go(request):
        nodes = {node for item in request.session.items for node in item.listchain()}
        assert len(request.session.items) == 8
        assert not [held for node in nodes for held in node.stash.get(HELD, ())]
"""


def test_trouble_of_a_shared_machine_is_of_the_test_that_made_it(
    run_pytest: Run, pytester: pytest.Pytester
) -> None:
    pytester.makepyfile(test_zz_last=LAST)

    result = run_pytest(SHARED, "-rA", "--vm-keep=on-failure", "--tb=short", ".")

    result.stdout.fnmatch_lines_random(
        [
            "PASSED *::test_oops",
            "PASSED *::test_same_machine_with_old_trouble",
            "FAILED *::test_dies_unannounced*",
            "E *GuestPanicked: vm1: *Kernel panic*",
            "PASSED *::test_pure_after_it",
            "FAILED *::test_pure_failure*",
            "FAILED *::test_expects_what_was_long_ago*",
            "E *the guest was expected to end by panic*",
            "FAILED *::test_asks_late*",
            "PASSED *::test_ended_machines_are_let_go",
        ]
    )
    result.assert_outcomes(passed=4, failed=4)
    kept = [path.name for path in (pytester.path / "vm-artifacts").iterdir()]
    assert len(kept) == 3
    assert not [name for name in kept if "pure" in name]


RERUN = """
    from _pytest.runner import runtestprotocol

    def pytest_runtest_protocol(item, nextitem):
        runtestprotocol(item, log=False)
        runtestprotocol(item, nextitem=nextitem)
        return True
"""


def test_a_second_attempt_has_nothing_of_the_first(
    run_pytest: Run, pytester: pytest.Pytester
) -> None:
    pytester.makeconftest(RERUN)

    result = run_pytest(
        """
        attempts = []

        def test_flaky(vm):
            attempts.append(vm.id)
            if len(attempts) == 1:
                vm.run("echo c > /proc/sysrq-trigger")
    """,
        "--vm-keep=on-failure",
        "-p",
        "no:xdist",
    )

    result.assert_outcomes(passed=1)
    (kept,) = (pytester.path / "vm-artifacts").iterdir()
    assert len(list(kept.iterdir())) == 1, "the second attempt, which passed, kept something"
