"""Tests of unittest's kind, and failures that come in groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]

CASES = """
    import asyncio
    import unittest
    import pytest
    from pytest_vmsandbox import HostUnfit

    class TestWithMachine(unittest.TestCase):
        @pytest.fixture(autouse=True)
        def _machine(self, vm_factory):
            self.make = vm_factory

        def test_unfit(self):
            raise HostUnfit("VMS-NEVER", "a thing", "nothing", "no remedy")

        @pytest.mark.vm_expect("panic")
        def test_expected(self):
            self.make().run("echo c > /proc/sysrq-trigger")

        def test_unexpected(self):
            self.make().run("echo c > /proc/sysrq-trigger")

        @pytest.mark.xfail(reason="known")
        def test_still_a_failure(self):
            self.fail("on purpose")

    @pytest.mark.asyncio
    @pytest.mark.vm_expect("panic")
    @pytest.mark.parametrize("also", [False, True])
    async def test_group(async_vm, also):
        async def fail():
            try:
                await asyncio.sleep(1000)
            finally:
                raise LookupError("another one")

        async with asyncio.TaskGroup() as group:
            if also:
                group.create_task(fail())
            for _ in range(2):
                group.create_task(async_vm.run("echo c > /proc/sysrq-trigger; sleep 60"))
"""


@pytest.mark.machine
def test_methods_and_groups_are_treated_as_functions_are(run_pytest: Run) -> None:
    result = run_pytest(CASES, "-rA")

    result.assert_outcomes(passed=2, failed=2, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines_random(
        [
            "SKIPPED *VMS-NEVER: a thing*",
            "PASSED *::TestWithMachine::test_expected",
            "FAILED *::TestWithMachine::test_unexpected*",
            "E *GuestPanicked: *",
            "XFAIL *::test_still_a_failure*",
            "PASSED *::test_group?False?",
            "FAILED *::test_group?True?*",
            "1 skipped: VMS-NEVER* (docs/usage.md explains it)",
        ]
    )


@pytest.mark.parametrize("workers", [(), ("-n1",)])
def test_a_wrong_mark_on_a_method_is_an_error_at_collection(
    run_pytest: Run, workers: tuple[str, ...]
) -> None:
    result = run_pytest(
        """
        import unittest
        import pytest

        class TestMarked(unittest.TestCase):
            @pytest.mark.vm(cpus=0)
            def test_it(self):
                raise AssertionError("it must not run")
    """,
        *workers,
    )

    assert result.ret != 0
    result.stdout.fnmatch_lines(["*.py:5: TestMarked.test_it: cpus=0 must be a whole number*"])
    assert "it must not run" not in result.stdout.str()
