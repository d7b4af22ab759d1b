"""What is kept of machines: whole, each in its own place, and never at the run's expense."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]

pytestmark = pytest.mark.machine

NAMES = """
    import pytest

    @pytest.mark.parametrize("value", ["a/b", "a_b", "x" * 300, "\\N{SNOWMAN}"])
    def test_named(vm_module, value):
        vm_module.run("seq 20000 > /dev/console; echo \\N{SNOWMAN} > /dev/console", check=True)
        vm_module.console.wait_for("19999\\n20000")
"""


def test_every_test_has_a_place_whatever_its_name_and_logs_are_whole(
    run_pytest: Run, pytester: pytest.Pytester
) -> None:
    result = run_pytest(NAMES, "--vm-keep=always", "-p", "no:terminal")
    assert result.ret == 0

    tests = list((pytester.path / "vm-artifacts").iterdir())
    assert len(tests) == 4
    for test in tests:
        (machine,) = test.iterdir()
        log = (machine / "console.log").read_text()
        assert "Linux version" in log
        assert "\n19999\n20000\n" in log
    assert not result.stdout.str().strip()


def test_a_log_longer_than_memory_is_kept_from_disk(
    run_pytest: Run, pytester: pytest.Pytester
) -> None:
    result = run_pytest(
        """
        from pytest_vmsandbox.machine import console

        # The limit is what is tested, and not the hours that a serial line takes to reach it.
        console.MEMORY_LIMIT = 1000

        def test_long(vm):
            assert "Linux version" not in vm.console.text
    """,
        "--vm-keep=always",
    )

    result.assert_outcomes(passed=1)
    (log,) = pytester.path.rglob("console.log")
    assert "Linux version" in log.read_text()


@pytest.mark.parametrize("workers", [(), ("-n1",)])
def test_what_can_not_be_kept_is_told_and_changes_no_outcome(
    run_pytest: Run, pytester: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    pytester.path.joinpath("in-the-way").write_text("a file")

    result = run_pytest(
        "def test_it(vm): pass", "--vm-keep=always", "--vm-artifacts=in-the-way", *workers
    )

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["artifacts not kept: r*-m1: *Not a directory*"])
