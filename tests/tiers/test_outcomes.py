from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiers.outcomes import Outcomes

SOURCE = """
    import pytest

    pytestmark = pytest.mark.filterwarnings("ignore")

    def test_passes(): pass

    def test_fails(): assert False

    @pytest.fixture
    def broken(): raise OSError

    def test_has_no_setup(broken): pass

    def test_skips(): pytest.skip("no zig: nowhere")

    @pytest.mark.machine
    def test_lacks_a_machine(): pytest.skip("VMS-QEMU-MISSING: no QEMU")

    @pytest.mark.machine
    def test_lacks_what_no_tier_gives(): pytest.skip("VMS-KVM-DENIED: /dev/kvm")
"""


def _outcomes(pytester: pytest.Pytester, *arguments: str) -> Outcomes:
    pytester.makeini("[pytest]\nmarkers = machine\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makepyfile(SOURCE)
    written = pytester.path / "outcomes.json"
    pytester.runpytest_subprocess(
        *("-p", "tests.tiers.outcomes", f"--outcomes={written}", "-p", "no:cacheprovider"),
        *arguments,
    )
    return Outcomes.read(written)


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["alone", "xdist"])
def test_each_outcome_is_counted_and_a_missing_machine_is_named(
    pytester: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    seen = _outcomes(pytester, *workers)

    assert seen.passed == 1
    assert sorted(name.partition("::")[2] for name in seen.failed) == [
        "test_fails (call)",
        "test_has_no_setup (setup)",
    ]
    assert seen.skipped == {"no zig": 1, "VMS-QEMU-MISSING": 1, "VMS-KVM-DENIED": 1}
    (missing,) = seen.skipped_machines
    assert missing.endswith("::test_lacks_a_machine: VMS-QEMU-MISSING: no QEMU")


def test_walls_only_leaves_what_depends_on_no_tier(pytester: pytest.Pytester) -> None:
    seen = _outcomes(pytester, "--walls-only")

    assert (seen.passed, seen.failed) == (0, [])
    assert set(seen.skipped) == {"VMS-QEMU-MISSING", "VMS-KVM-DENIED"}


def test_a_run_that_never_began_counts_nothing(tmp_path: Path) -> None:
    assert Outcomes.read(tmp_path / "none") == Outcomes()
