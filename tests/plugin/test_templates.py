"""Templates that a suite prepares, as its user sees them: built once, named by marks, failing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.machine

RunPytest = Callable[..., pytest.RunResult]


def test_workers_and_later_runs_share_what_the_first_one_built(
    run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    source = f"""
        import pytest

        @pytest.fixture(scope="session", autouse=True)
        def web(vm_templates):
            def setup(vm):
                vm.write_text("/root/made", "once")
                with open({str(pytester.path / "built")!r}, "a") as log:
                    log.write("built\\n")
            return vm_templates.build(setup=setup, name="web")

        @pytest.mark.parametrize("number", range(4))
        @pytest.mark.vm(template="web")
        def test_it(vm, number):
            assert vm.read_text("/root/made") == "once"
    """
    for arguments in (("-n2",), ()):
        run_pytest(source, *arguments).assert_outcomes(passed=4)

        assert (pytester.path / "built").read_text() == "built\n"


def test_what_a_setup_raises_is_the_error_of_who_asked(run_pytest: RunPytest) -> None:
    result = run_pytest("""
        import pytest

        @pytest.fixture(scope="session")
        def web(vm_templates):
            def prepare_the_web(vm):
                vm.run("echo on the console > /dev/console")
                vm.run("echo why; exit 3", check=True)
            return vm_templates.build(setup=prepare_the_web)

        def test_it(web):
            pass

        @pytest.mark.vm(template="web")
        def test_of_another_name(vm):
            pass
    """)

    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*in prepare_the_web", "E *CommandFailed: *exited with 3"])
    result.stdout.fnmatch_lines(["*on the console*"])
    result.stdout.fnmatch_lines(["E *template='web' has not been built; known are: none"])


@pytest.mark.parametrize("wrong", ["''", "3", "None, memory_mib=1"])
def test_a_mark_that_can_not_be_is_an_error_at_collection(
    run_pytest: RunPytest, wrong: str
) -> None:
    result = run_pytest(f"""
        import pytest

        @pytest.mark.vm(template={wrong})
        def test_it(vm):
            pass
    """)

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*test_it: *=* must be *"])


def test_a_setup_whose_source_nobody_has_is_refused(run_pytest: RunPytest) -> None:
    result = run_pytest("""
        import pytest

        def test_it(vm_templates):
            log = open("/dev/null")
            with log:
                vm_templates.build(setup=lambda vm: log.write("x"), name="log")
    """)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *log, a TextIOWrapper, is used by the setup*", "*key=*"])
