"""Nothing of a run outlives it: not after Ctrl-C, a time-out, or kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import prctl_set_child_subreaper
from tests.process_trees import Part, living_namespaces, members_of, namespaces_of

pytestmark = pytest.mark.machine

Run = Callable[..., pytest.RunResult]

# An end that is not seen to is never: the machine's command sleeps for long. What comes by itself
# is there in a moment, and a worker that has lost its controller is given time by execnet.
GONE_S = 30.0

SLEEPS = """
    import os, sys
    import pytest

    @pytest.mark.vm(network="lan")
    def test_it(vm):
        with pytest.raises(ConnectionError):
            vm.connect(22)  # so that the host has an end of the network
        pid = vm._controller._running.process.pid
        directory = vm._controller.build.config.directory.parent
        sys.__stderr__.write(f"UP {pid} {os.getpid()} {vm.facts.tier} {directory}\\n")
        sys.__stderr__.flush()
        vm.run("sleep 1000", timeout=500)
"""


class _Run:
    """A pytest in a process of its own, up to the point where its test waits for a machine."""

    def __init__(self, path: Path, *arguments: str) -> None:
        log = path / "log"
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
                cwd=path,
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
                process_group=0,
            )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("UP "):
                _, vmm, worker, tier, directory = line.split()
                self.worker, self.directory = int(worker), Path(directory)
                self._others = [
                    member
                    for member in members_of(self.process.pid)
                    if member.part not in (Part.PYTEST, Part.WORKER)
                ]
                assert int(vmm) in {member.pid for member in self._others}
                assert Part.SWITCH in {member.part for member in self._others}
                assert tier == "bare" or {Part.OUTER, Part.INNER} <= {m.part for m in self._others}
                return
        pytest.fail(f"the machine never came up\n{log.read_text(errors='replace')[-5000:]}")

    def left(self) -> list[str]:
        """What there still is of VMM, switch, warden and sudo, and of their namespaces, in time."""
        over = time.monotonic() + GONE_S
        while True:
            left = [f"{m.part}, pid {m.pid}" for m in self._others if not m.is_gone()]
            left += sorted(self._namespaces())
            if not left or time.monotonic() > over:
                return left
            time.sleep(0.02)

    def _namespaces(self) -> frozenset[str]:
        theirs = frozenset[str]().union(*(member.namespaces for member in self._others))
        return (theirs - namespaces_of(Path("/proc/self"))) & living_namespaces()


@pytest.fixture(autouse=True)
def _adopts_orphans() -> Iterator[None]:
    """What a killed run leaves becomes ours to look at, and not pid 1's, which may not reap."""
    prctl_set_child_subreaper(enabled=True)
    yield
    prctl_set_child_subreaper(enabled=False)


@pytest.fixture
def start(pytester: pytest.Pytester) -> Iterator[Callable[..., _Run]]:
    runs: list[_Run] = []
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makepyfile(SLEEPS)

    def start(*arguments: str) -> _Run:
        runs.append(_Run(pytester.path, *arguments))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()
        run.left()
        if run.worker != run.process.pid:
            with suppress(ChildProcessError):
                os.waitpid(run.worker, 0)
        assert run.process.stderr is not None
        run.process.stderr.close()


@pytest.mark.parametrize("workers", [(), ("-n1",)])
def test_ctrl_c_ends_the_machine_and_removes_its_files(
    start: Callable[..., _Run], workers: tuple[str, ...]
) -> None:
    run = start("-s", *workers)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does

    assert run.process.wait(timeout=60) == pytest.ExitCode.INTERRUPTED
    assert run.left() == []
    assert not run.directory.exists()


def test_pytest_timeout_interrupts_the_wait_and_nothing_is_left(
    start: Callable[..., _Run],
) -> None:
    # Of the test alone: what it takes until the machine is up depends on the host.
    run = start("-s", "--timeout=3", "-o", "timeout_func_only=true")

    assert run.process.wait(timeout=90) == pytest.ExitCode.TESTS_FAILED
    assert run.left() == []
    assert not run.directory.exists()


@pytest.mark.parametrize("workers", [(), ("-n1",)])
def test_kill_9_leaves_no_process_and_no_files_after_the_next_run(
    start: Callable[..., _Run], workers: tuple[str, ...], run_pytest: Run
) -> None:
    run = start("-s", *workers)
    run.process.kill()

    assert run.left() == []
    next_run = run_pytest("def test_it(vm): pass")
    next_run.assert_outcomes(passed=1)
    assert not run.directory.exists()


def test_sigterm_leaves_no_process_and_no_files_after_the_next_run(
    start: Callable[..., _Run], run_pytest: Run
) -> None:
    run = start("-s")
    os.kill(run.process.pid, signal.SIGTERM)
    run.process.wait(timeout=30)

    assert run.left() == []
    run_pytest("def test_it(vm): pass").assert_outcomes(passed=1)
    assert not run.directory.exists()
