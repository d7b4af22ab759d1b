"""The tier as users see it: in the header, on reports, and where it is demanded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.machine.worker import Worker, WorkerSettings
from tests.plugin.conftest import CACHE

Run = Callable[..., pytest.RunResult]

pytestmark = pytest.mark.machine

TESTS = """
    def test_machine(vm):
        assert vm.run("true").returncode == 0

    def test_jail(vm_jail):
        assert vm_jail.run(["true"])[0] == 0
"""


@pytest.fixture
def best() -> Tier:
    """The tier that is chosen here where none is asked for."""
    if named := os.environ.get("VMSANDBOX_TIER"):
        return Tier(named)
    worker = Worker(WorkerSettings(cache_dir=Path(CACHE)))
    try:
        return worker.facts.tier
    finally:
        worker.close()


def test_it_stands_in_the_header_and_on_each_report(
    run_pytest: Run, pytester: pytest.Pytester, best: Tier
) -> None:
    if best is Tier.BARE:
        pytest.skip("the tier bare has no walls")
    result = run_pytest(TESTS, "--junitxml=report.xml")

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines([f"vmsandbox: tier {best}: *"])
    report = (pytester.path / "report.xml").read_text()
    assert f'name="vmsandbox" value="vm1: tier {best}, ' in report
    assert f'name="vmsandbox" value="vm_jail: tier {best}"' in report


def test_bare_is_called_what_it_is(run_pytest: Run) -> None:
    result = run_pytest(TESTS, "--vm-tier=bare")

    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "vmsandbox: tier bare, no walls: VMMs may do what you may: asked for",
            "1 skipped: VMS-TIER-BARE (docs/hosts.md explains it)",
        ]
    )


def test_one_that_can_not_be_had_is_named_at_once(run_pytest: Run) -> None:
    other = "userns" if os.getuid() == 0 else "root"
    result = run_pytest(TESTS, f"--vm-tier={other}")

    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(
        [f"vmsandbox: tier {other} was asked for and can't be had: VMS-TIER-{other.upper()}: *"]
    )


@pytest.mark.parametrize("tier", ["bare", "userns" if os.getuid() == 0 else "root"])
def test_required_walls_are_no_wish(run_pytest: Run, tier: str) -> None:
    result = run_pytest(TESTS, f"--vm-tier={tier}", "--vm-require=jail")

    outcomes = result.parseoutcomes()
    assert outcomes.get("passed", 0) + outcomes.get("skipped", 0) == 0
    assert outcomes["errors"] == 2


@pytest.mark.vm_requires("jail")
def test_required_acceleration_is_no_wish(run_pytest: Run) -> None:
    result = run_pytest(TESTS, "--vm-require=kvm", "-k", "machine")

    result.assert_outcomes(**({"passed": 1} if _has_kvm() else {"errors": 1}))


def _has_kvm() -> bool:
    worker = Worker(WorkerSettings(cache_dir=Path(CACHE)))
    try:
        return worker.facts.accel == "kvm"
    finally:
        worker.close()


def test_a_tier_is_demanded_of_one_test(run_pytest: Run) -> None:
    other = "userns" if os.getuid() == 0 else "root"
    result = run_pytest(
        f"""
        import pytest

        @pytest.mark.vm(tier="{other}")
        def test_other(vm):
            pass

        @pytest.mark.vm(tier="bare")
        def test_bare(vm):
            assert vm.facts.tier == "bare"
        """
    )

    result.assert_outcomes(passed=1, skipped=1)
