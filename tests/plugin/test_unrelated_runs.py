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
