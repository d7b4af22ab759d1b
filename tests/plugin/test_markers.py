"""Wrong marks are errors at collection, at the mark; no machine is needed to see that."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("vm(memory=256)", "*a machine has no 'memory'*"),
        ("vm(memory_mib=1)", "*memory_mib=1 must be a whole number from 80*"),
        ("vm(cpus='2')", "*cpus='2' must be a whole number*"),
        ("vm(accel='xen')", "*accel='xen' must be one of auto, kvm, tcg, hvf*"),
        ("vm(clock='utc')", "*clock='utc' must be one of host, frozen*"),
        ("vm(clock='frozen', lifecycle='booted')", "*clock=*frozen*goes on from a template*"),
        ("vm(256)", "*keyword arguments only, not (256,)*"),
        ("vm_requires('kwm')", "*'kwm' is not a valid Capability*"),
        ("vm_requires()", "*takes the names of capabilities*"),
        ("vm_expect('death')", "*'death'*is no end that a guest can be meant to have*"),
    ],
)
def test_a_wrong_mark_is_an_error_at_collection(run_pytest: Run, mark: str, message: str) -> None:
    result = run_pytest(f"""
        import pytest

        @pytest.mark.{mark}
        def test_marked():
            raise AssertionError("it must not run")

        def test_other():
            pass
    """)

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*test_a_wrong_mark*.py:3: test_marked: {message}"])
    assert "it must not run" not in result.stdout.str()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def test_it(vm_module): pass", "*vm_module is one machine for many tests*"),
        ("class TestIt(TestCase):\n    def test_it(self): pass", "*no two tests of a unittest*"),
    ],
)
def test_both_is_an_error_where_a_test_would_not_run_in_both(
    run_pytest: Run, source: str, message: str
) -> None:
    head = "import pytest\nfrom unittest import TestCase\n"
    result = run_pytest(f"{head}pytestmark = pytest.mark.vm(lifecycle='both')\n{source}\n")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([message])


def test_a_wrong_mark_on_a_class_or_a_module_is_found_too(run_pytest: Run) -> None:
    on_class = run_pytest("""
        import pytest

        @pytest.mark.vm(cpus=0)
        class TestMarked:
            def test_it(self): pass
    """)
    on_module = run_pytest("""
        import pytest

        pytestmark = pytest.mark.vm(cpus=0)

        def test_it(): pass
    """)

    for result in (on_class, on_module):
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines(["*cpus=0 must be a whole number from 1*"])


def test_a_clock_that_can_not_be_frozen_in_both_is_an_error_at_the_mark(run_pytest: Run) -> None:
    result = run_pytest("""
        import pytest

        @pytest.mark.vm(clock="frozen", lifecycle="both")
        def test_marked(vm): pass
    """)

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*test_marked*: clock=*frozen*goes on from a template*"])


def test_wrong_marks_are_errors_under_xdist_too(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import pytest

        @pytest.mark.vm(cpus=0)
        def test_marked(): pass
    """,
        "-n2",
    )

    assert result.ret != 0
    result.stdout.fnmatch_lines(["*cpus=0 must be a whole number from 1*"])


def test_right_marks_of_a_test_that_asks_for_no_machine_cost_nothing(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import sys
        import pytest

        @pytest.mark.vm(memory_mib=256, cpus=2)
        @pytest.mark.vm_expect("panic", "oops")
        def test_marked():
            raise SystemExit
    """,
        "--collect-only",
        "-q",
        "--strict-markers",
    )

    result.stdout.fnmatch_lines(["*::test_marked", "1 test collected*"])
