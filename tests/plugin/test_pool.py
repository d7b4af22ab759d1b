"""What a run's user sees of the pool: who gets a machine made ahead, and how to do without."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]

pytestmark = pytest.mark.machine

# As on a host with a processor to spare: this one may be busy with other tests.
IDLE = """
    import pytest
    from pytest_vmsandbox.machine import pool

    pool.idle_processors = lambda: 1
"""

TESTS = """
    import time
    import pytest

    def ahead(vm):
        return vm.timings.from_pool

    def test_first(vm):
        assert not ahead(vm)
        time.sleep(0.5)  # as a test that takes its time

    def test_second(vm):
        assert ahead(vm) == EXPECTED
        vm.run("echo left > /tmp/behind", check=True)
        time.sleep(0.5)

    def test_third(vm):
        assert ahead(vm) == EXPECTED
        assert vm.run("cat /tmp/behind").returncode != 0

    @pytest.mark.vm(memory_mib=160)
    def test_of_another_shape(vm):
        assert not ahead(vm)

    def test_without_a_machine():
        time.sleep(0.5)

    async def test_async(async_vm):
        assert ahead(async_vm) == EXPECTED
"""


@pytest.mark.parametrize(("options", "expected"), [((), "True"), (("--vm-pool=off",), "False")])
def test_the_next_tests_machine_is_started_ahead(
    pytester: pytest.Pytester, run_pytest: Run, options: tuple[str, ...], expected: str
) -> None:
    pytester.makeconftest(IDLE)
    tests = TESTS.replace("EXPECTED", expected)
    result = run_pytest(tests, *options, "--asyncio-mode=auto", "-p", "no:xdist")

    result.assert_outcomes(passed=6)


def test_durations_say_what_came_from_the_pool(pytester: pytest.Pytester, run_pytest: Run) -> None:
    pytester.makeconftest(IDLE)
    result = run_pytest(
        """
        import time

        def test_first(vm):
            time.sleep(0.5)

        def test_second(vm):
            vm.run(["true"])
        """,
        "--vm-durations=5",
        *("-p", "no:xdist"),
    )

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*-m2 (restored): *, from the pool, waited * s"])


def test_a_failed_test_has_the_evidence_of_a_machine_from_the_pool(
    pytester: pytest.Pytester, run_pytest: Run
) -> None:
    pytester.makeconftest(IDLE)
    result = run_pytest(
        """
        import time

        def test_first(vm):
            time.sleep(0.5)

        def test_second(vm):
            assert vm.timings.from_pool
            vm.run("echo a last word > /dev/console", check=True)
            vm.console.wait_for("a last word")
            assert False
        """,
        "--vm-keep=on-failure",
        *("-p", "no:xdist"),
    )

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*vm2: console*", "*a last word*", "*vm2: command line*"])
    (log,) = pytester.path.rglob("console.log")
    assert "a last word" in log.read_text()


def test_workers_of_one_run_each_have_their_own(pytester: pytest.Pytester, run_pytest: Run) -> None:
    pytester.makeconftest(IDLE)
    result = run_pytest(
        """
        import pytest

        @pytest.mark.parametrize("number", range(6))
        def test_each(vm, number):
            assert vm.run("test -e /tmp/behind").returncode == 1
            vm.run("touch /tmp/behind", check=True)
            assert vm.run("hostname").stdout == f"{vm.name}\\n"
        """,
        *("-n", "2"),
    )

    result.assert_outcomes(passed=6)
