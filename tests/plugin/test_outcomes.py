"""What becomes of tests with machines: passes, failures with evidence, skips with codes."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree as ET

import pytest

Run = Callable[..., pytest.RunResult]

# The mark keeps these out of runs that may boot nothing.
pytestmark = pytest.mark.machine

SYNC_AND_ASYNC = """
    import pytest

    def test_sync(vm):
        assert vm.run("uname -s").stdout == "Linux\\n"

    @pytest.mark.asyncio
    async def test_function_loop(async_vm):
        assert (await async_vm.run("uname -s")).stdout == "Linux\\n"

    @pytest.mark.asyncio(loop_scope="session")
    class TestSessionLoop:
        async def test_one(self, async_vm_factory):
            one, other = await async_vm_factory(count=2)
            assert one.id != other.id
            assert (await other.run("echo $((6 * 7))")).stdout == "42\\n"

    @pytest.mark.asyncio(loop_scope="module")
    async def test_module_loop(async_vm):
        assert (await async_vm.run(["true"])).returncode == 0
"""


def test_sync_and_async_tests_under_every_loop_scope(run_pytest: Run) -> None:
    result = run_pytest(SYNC_AND_ASYNC)

    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["vmsandbox: tier *", "vmsandbox: acceleration *"])


def test_the_same_under_xdist(run_pytest: Run) -> None:
    result = run_pytest(SYNC_AND_ASYNC, "-n2")

    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["vmsandbox: acceleration *"])


FAILING = """
    import pytest

    def test_call(vm):
        vm.run("echo a word from the console > /dev/console", check=True)
        assert False, "on purpose"

    @pytest.fixture
    def broken_setup(vm):
        raise LookupError("in set-up")

    def test_setup(broken_setup): pass

    @pytest.fixture
    def broken_teardown(vm):
        yield
        raise LookupError("in teardown")

    def test_teardown(broken_teardown): pass
"""


@pytest.mark.parametrize("workers", [(), ("-n2",)])
def test_every_failing_phase_shows_what_the_machine_left(
    run_pytest: Run, pytester: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    result = run_pytest(
        FAILING, "--junitxml=junit.xml", "--vm-keep=on-failure", "--vm-artifacts=kept", *workers
    )

    result.assert_outcomes(failed=1, passed=1, errors=2)
    text = result.stdout.str()
    assert text.count(": console -") == 3
    assert text.count(": command line -") == 3
    assert text.count(": timings -") == 3
    assert "a word from the console" in text
    junit = ET.parse(pytester.path / "junit.xml")
    told = [element.text or "" for kind in ("failure", "error") for element in junit.iter(kind)]
    assert len(told) == 3
    assert all(
        ("qemu-system" in one and "Linux version" in one) or "console" in one for one in told
    )
    kept = pytester.path / "kept"
    logs = [path.relative_to(kept) for path in kept.rglob("*") if path.is_file()]
    assert len({log.parts[0] for log in logs}) == 3
    assert {log.name for log in logs} == {"console.log", "vmm.log", "command.txt", "facts.json"}


def test_a_passing_test_keeps_nothing(run_pytest: Run, pytester: pytest.Pytester) -> None:
    result = run_pytest("def test_it(vm): pass", "--vm-keep=on-failure")

    result.assert_outcomes(passed=1)
    assert not (pytester.path / "vm-artifacts").exists()


PANICS = """
    import pytest
    from pytest_vmsandbox import GuestPanicked

    def test_unexpected(vm):
        vm.run("echo c > /proc/sysrq-trigger")

    def test_unnoticed(vm):
        vm.popen("sleep 0.3; echo c > /proc/sysrq-trigger")
        vm.console.wait_for("end Kernel panic")

    def test_next_one_is_well(vm):
        assert vm.run(["true"]).returncode == 0

    @pytest.mark.vm_expect("panic")
    def test_expected(vm):
        vm.run("echo c > /proc/sysrq-trigger")

    @pytest.mark.vm_expect("panic")
    def test_expected_and_late(vm):
        vm.popen("sleep 0.5; echo c > /proc/sysrq-trigger")

    @pytest.mark.vm_expect("panic")
    def test_expected_in_vain(vm):
        vm.run(["true"])

    @pytest.mark.vm_expect("shutdown")
    def test_shutdown(vm):
        vm.run("poweroff -f; sleep 60")

    @pytest.mark.vm_expect("shutdown")
    def test_another_end_than_expected(vm):
        vm.run("echo c > /proc/sysrq-trigger")

    def test_caught(vm):
        with pytest.raises(GuestPanicked):
            vm.run("echo c > /proc/sysrq-trigger")
"""


def test_guests_die_as_expected_or_fail_their_test(run_pytest: Run) -> None:
    result = run_pytest(PANICS, "-rA", "-n2")

    result.assert_outcomes(passed=5, failed=4)
    result.stdout.fnmatch_lines_random(
        [
            "FAILED *::test_unexpected*",
            "FAILED *::test_unnoticed*",
            "FAILED *::test_expected_in_vain*",
            "FAILED *::test_another_end_than_expected*",
            "E *the guest was expected to end by panic, and did not within 5 s*",
        ]
    )


NEEDS_KVM = """
    import pytest

    @pytest.mark.vm_requires("kvm")
    def test_marked(): pass

    @pytest.mark.vm(accel="kvm")
    def test_asked(vm): pass

    def test_in_the_call(vm_factory):
        vm_factory(accel="kvm")
"""


def test_what_this_host_can_not_run_is_skipped_with_code_and_counted(run_pytest: Run) -> None:
    result = run_pytest(NEEDS_KVM, "-rs")
    if result.parseoutcomes().get("passed"):
        pytest.skip("KVM works here")

    result.assert_outcomes(skipped=3)
    result.stdout.fnmatch_lines(["3 skipped: VMS-KVM-* (vmsandbox doctor tells more)"])
    assert result.stdout.str().count(": VMS-KVM-") == 3 + len(["the header", "the count"])


@pytest.mark.parametrize("required", ["kvm", "all", "sudo,kvm"])
def test_what_is_required_fails_instead(run_pytest: Run, required: str) -> None:
    result = run_pytest(NEEDS_KVM, f"--vm-require={required}")
    if result.parseoutcomes().get("passed"):
        pytest.skip("KVM works here")

    result.assert_outcomes(failed=1, errors=2)
    assert "VMS-KVM-" in result.stdout.str()


def test_a_host_without_qemu_skips_and_says_what_to_install(
    run_pytest: Run, monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester
) -> None:
    monkeypatch.setenv("PATH", str(pytester.mkdir("empty")))

    result = run_pytest("def test_it(vm): pass", "-rs")

    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*VMS-QEMU-MISSING*"])


def test_forcing_an_accelerator_that_does_not_work_gives_the_evidence(run_pytest: Run) -> None:
    result = run_pytest("def test_it(vm): pass", "--vm-accel=kvm", "--vm-require=kvm")
    if result.parseoutcomes().get("passed"):
        pytest.skip("KVM works here")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*VMS-KVM-*", "*found:*", "*try:*"])


def test_durations_show_the_slowest_machines_step_by_step(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import pytest

        def test_usual(vm):
            vm.run(["true"])

        @pytest.mark.vm(lifecycle="booted")
        def test_booted(vm):
            vm.run(["true"])
        """,
        "--vm-durations=3",
        "-n1",
    )

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        [
            "* s r*-gw0-m2 (booted): spawn * s, boot * s, first command * s, teardown * s",
            "* s r*-gw0-m1 (restored): spawn * s, * s, first command * s, teardown * s",
        ]
    )


def test_a_shared_machine_is_one_machine_and_only_news_of_its_console_are_shown(
    run_pytest: Run,
) -> None:
    result = run_pytest("""
        def test_one(vm_module):
            vm_module.write_text("/run/here", "")
            vm_module.run("echo first-test > /dev/console")

        def test_two(vm_module):
            assert vm_module.run("test -e /run/here").returncode == 0
            vm_module.run("echo second-test > /dev/console")
            vm_module.console.wait_for("second-test")
            assert False
    """)

    result.assert_outcomes(passed=1, failed=1)
    console = result.stdout.str().partition(": console -")[2].partition("VMM status")[0]
    assert "second-test" in console
    assert "first-test" not in console


def test_an_image_of_the_users_own_is_a_fixture_to_override(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import pytest

        @pytest.fixture(scope="session")
        def vm_image():
            return "/no/such/image"

        def test_it(vm): pass
    """
    )

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*RequestInvalid*/no/such/image*"])


def test_the_summary_says_where_each_code_is_explained(run_pytest: Run) -> None:
    result = run_pytest("""
        import pytest

        @pytest.mark.parametrize(
            "code",
            ["VMS-IMAGE-CACHE", "VMS-RUN-DIR-UNUSABLE", "VMS-WALLS-UNUSABLE", "VMS-TAP-DENIED"],
        )
        def test_it(code):
            pytest.skip(f"{code}: as if")
    """)

    result.assert_outcomes(skipped=4)
    result.stdout.fnmatch_lines_random(
        [
            "1 skipped: VMS-IMAGE-CACHE (docs/images.md explains it)",
            "1 skipped: VMS-RUN-DIR-UNUSABLE (docs/usage.md explains it)",
            "1 skipped: VMS-WALLS-UNUSABLE (docs/hosts.md explains it)",
            "1 skipped: VMS-TAP-DENIED (vmsandbox doctor tells more)",
        ]
    )
