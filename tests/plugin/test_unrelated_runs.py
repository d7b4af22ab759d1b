"""A run that asks for no machine pays nothing for this plugin."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]


def test_no_room_is_imported_no_thread_started_and_nothing_probed(
    run_pytest: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMSANDBOX_CACHE_DIR", str(pytester.path / "cache"))

    result = run_pytest(
        """
        import sys, threading

        def test_unrelated():
            loaded = {name for name in sys.modules if name.startswith("pytest_vmsandbox.")}
            rooms = {name.split(".")[1] for name in loaded}
            assert rooms == {"plugin", "errors"}, loaded
            assert {t.name for t in threading.enumerate()} == {"MainThread"}
    """,
        "-p",
        "no:xdist",
    )

    result.assert_outcomes(passed=1)
    assert not (pytester.path / "cache").exists()
    assert "vmsandbox" not in result.stdout.str().replace("vmsandbox-", "")


def test_the_package_itself_imports_nothing_until_a_name_is_used(run_pytest: Run) -> None:
    result = run_pytest("""
        import sys
        import pytest_vmsandbox

        def test_lazy():
            before = set(sys.modules)
            assert pytest_vmsandbox.HostUnfit.__module__ == "pytest_vmsandbox.errors"
            assert "pytest_vmsandbox.machine.machine" not in before
            assert pytest_vmsandbox.Machine.__name__ == "Machine"
            assert "pytest_vmsandbox.machine.machine" in sys.modules
    """)

    result.assert_outcomes(passed=1)


WITH_AND_WITHOUT = """
    import pytest

    def test_machine(vm, vm_host): pass

    def test_pure(): pass
"""


@pytest.mark.parametrize("way", ["too-long", "not-ours"])
@pytest.mark.parametrize("workers", [(), ("-n1",)])
def test_an_unfit_run_directory_is_told_and_skips_only_tests_with_machines(
    run_pytest: Run, pytester: pytest.Pytester, way: str, workers: tuple[str, ...]
) -> None:
    not_ours = pytester.mkdir("open-to-all")
    not_ours.chmod(0o777)
    directory = not_ours if way == "not-ours" and len(str(not_ours)) < 60 else "/tmp/" + "x" * 90

    result = run_pytest(WITH_AND_WITHOUT, f"--vm-run-dir={directory}", *workers)

    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["vmsandbox: VMS-RUN-DIR-*: *"])


def test_collecting_only_probes_and_boots_nothing(
    run_pytest: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMSANDBOX_CACHE_DIR", str(pytester.path / "cache"))

    for directory in ("run", "x" * 90):
        result = run_pytest(
            WITH_AND_WITHOUT, "--collect-only", f"--vm-run-dir={pytester.path / directory}"
        )
        assert result.ret == 0
        result.stdout.fnmatch_lines(["*2 tests collected*"])

    assert not (pytester.path / "run").exists()
    assert not (pytester.path / "cache").exists()
    assert "vmsandbox:" not in result.stdout.str()
