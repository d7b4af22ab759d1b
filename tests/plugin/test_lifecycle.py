"""Which lifecycle a test's machine has, and what a run says of machines that can't be restored."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., pytest.RunResult]

pytestmark = pytest.mark.machine

LIFECYCLES = """
    import pytest

    def test_usual(vm, expected):
        assert vm.facts.lifecycle == expected

    @pytest.mark.vm(lifecycle="booted")
    def test_booted(vm):
        assert vm.facts.lifecycle == "booted"

    @pytest.mark.vm(lifecycle="restored")
    def test_restored(vm):
        assert vm.facts.lifecycle == "restored"

    @pytest.mark.vm(lifecycle="both")
    def test_both(vm, request):
        assert f"[{vm.facts.lifecycle}]" in request.node.name

    def test_the_factorys(vm_factory, expected):
        assert vm_factory().facts.lifecycle == expected
        assert vm_factory(lifecycle="booted").facts.lifecycle == "booted"

    def test_shared(vm_module, vm_session, expected):
        assert vm_module.facts.lifecycle == vm_session.facts.lifecycle == expected
"""
EXPECTING = """
    import pytest

    @pytest.fixture(scope="session")
    def expected():
        return "{}"
"""


@pytest.mark.parametrize("usual", ["restored", "booted"])
def test_the_option_says_it_and_a_mark_says_otherwise(
    run_pytest: Run, pytester: pytest.Pytester, usual: str
) -> None:
    pytester.makeconftest(EXPECTING.format(usual))

    result = run_pytest(LIFECYCLES, *([] if usual == "restored" else ["--vm-lifecycle=booted"]))

    result.assert_outcomes(passed=7)
    result.stdout.no_fnmatch_line("*booted each time*")


@pytest.mark.parametrize("source", ["ini", "environment"])
def test_so_do_ini_and_environment(
    run_pytest: Run, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    if source == "environment":
        monkeypatch.setenv("VMSANDBOX_LIFECYCLE", "booted")
    words = ["-o", "vm_lifecycle=booted"] if source == "ini" else []

    result = run_pytest("def test_it(vm): assert vm.facts.lifecycle == 'booted'", *words)

    result.assert_outcomes(passed=1)


def test_a_machine_with_a_device_that_forbids_it_boots_and_the_summary_says_so_once(
    run_pytest: Run, qemu_with_nvme: Path
) -> None:
    result = run_pytest(
        """
        import pytest

        def test_one(vm):
            assert vm.facts.lifecycle == "booted"

        def test_two(vm):
            assert vm.facts.lifecycle == "booted"

        @pytest.mark.vm(lifecycle="restored")
        def test_demands_it(vm):
            pass
        """,
        "--vm-tier=bare",
        "-rs",
    )

    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        [
            "E *RequestInvalid: vm3 can't be restored: *nvme*",
            "E *lifecycle=*booted*",
            "booted each time, not restored: mini, 128 MiB, *nvme*",
        ]
    )
    assert str(result.stdout).count("not restored: mini") == 1
    assert str(qemu_with_nvme.parent) in os.environ["PATH"]


def test_the_report_says_out_of_which_lifecycle_a_machine_came(run_pytest: Run) -> None:
    result = run_pytest("def test_it(vm): assert False, 'on purpose'")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*: facts -*", "tier *, restored r*-m1, image mini, *"])


@pytest.fixture
def qemu_with_nvme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A QEMU first in the search path that gives each machine a disk that can't be migrated."""
    name = f"qemu-system-{os.uname().machine}"
    disk = "-drive if=none,id=n,file=null-co://,format=raw -device nvme,drive=n,serial=n"
    real = shutil.which(name)
    program = tmp_path / "bin" / name
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *virtserialport*) exec {real} "$@" {disk};; esac\n'
        f'exec {real} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return program
