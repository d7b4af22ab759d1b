"""Options: command line before ini before environment; wrong ones end the run at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]

SHOW = """
    from pytest_vmsandbox.plugin.session import SETTINGS

    def test_show(pytestconfig):
        print("SEEN", pytestconfig.stash[SETTINGS])
"""


def test_the_command_line_wins_over_ini_and_ini_over_the_environment(
    run_pytest: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMSANDBOX_MEMORY_MIB", "101")
    monkeypatch.setenv("VMSANDBOX_CPUS", "3")
    monkeypatch.setenv("VMSANDBOX_IMAGE", "from-environment")
    pytester.makeini(
        "[pytest]\nasyncio_default_fixture_loop_scope = function\n"
        "vm_memory_mib = 102\nvm_cpus = 4\n"
    )

    result = run_pytest(SHOW, "-s", "--vm-memory-mib=103")

    result.stdout.fnmatch_lines(["*SEEN*image='from-environment', memory_mib=103, cpus=4,*"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--vm-memory-mib=12", "*--vm-memory-mib: '12' is not a whole number of at least 80*"),
        ("--vm-memory-mib=1e3", "*--vm-memory-mib: '1e3' is not a whole number*"),
        ("--vm-cpus=٣", "*--vm-cpus: '٣' is not a whole number*"),
        ("--vm-accel=xen", "*--vm-accel: 'xen' is none of auto, kvm, tcg, hvf*"),
        ("--vm-tier=jail", "*--vm-tier: 'jail' is none of auto, root, *"),
        ("--vm-lifecycle=both", "*--vm-lifecycle: 'both' is none of restored, booted*"),
        ("--vm-require=kvm,kwm", "*--vm-require: 'kvm,kwm' has kwm, known are*"),
        ("--vm-keep=maybe", "*--vm-keep: 'maybe' is none of never, on-failure, always*"),
        ("--vm-timeout-scale=0", "*--vm-timeout-scale: '0' is not a number above 0*"),
        ("--vm-timeout-scale=nan", "*--vm-timeout-scale: 'nan' is not a number above 0*"),
        ("--vm-durations=-1", "*--vm-durations: '-1' is not a whole number*"),
    ],
)
def test_a_wrong_option_ends_the_run_and_is_named(
    run_pytest: Run, option: str, message: str
) -> None:
    result = run_pytest("def test_it(): pass", option)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message[1:]}"])


def test_a_wrong_variable_is_named_as_such(
    run_pytest: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMSANDBOX_CPUS", "many")

    result = run_pytest("def test_it(): pass")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*environment variable VMSANDBOX_CPUS: 'many'*"])
