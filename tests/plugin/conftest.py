"""Runs of pytest inside a test: with our plugin, in a process of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from pytest_vmsandbox.machine.worker import Worker, WorkerSettings
from tests.people import CHECKOUT
from tests.world import THERE

# Found before pytester gives each run a home of its own: images are built once.
CACHE = os.environ.get("VMSANDBOX_CACHE_DIR") or str(user_cache_path("vmsandbox"))

RunInWorld = Callable[..., pytest.RunResult]


@pytest.fixture(autouse=True)
def _shared_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMSANDBOX_CACHE_DIR", CACHE)
    monkeypatch.delenv("VMSANDBOX_POOL", raising=False)  # a run has it on, as its user's would


@pytest.fixture
def run_pytest(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """Run pytest on `source` as a user would, in a process apart from this run."""

    def run(source: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments, timeout=240)

    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    return run


@pytest.fixture
def run_in_world(pytester: pytest.Pytester) -> RunInWorld:
    """Run pytest on a source, beyond whose host there is the world and nothing else."""
    user = () if os.getuid() == 0 else ("--user", "--map-current-user", "--keep-caps")
    before = ["unshare", *user, "--net", "--mount", "--propagation=private", "--"]
    if shutil.which("unshare") is None or subprocess.run([*before, "true"], check=False).returncode:
        pytest.skip("no network namespace can be made here")

    _have_the_image()  # there is nothing in that world to build it of

    def run(source: str, *arguments: str) -> pytest.RunResult:
        file = pytester.makepyfile(source)
        resolv_conf = pytester.makefile(".conf", "".join(f"nameserver {it}\n" for it in THERE))
        (pytester.path / "pytest.ini").write_text("[pytest]\n")
        inner = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file), *arguments]
        world = [*before, sys.executable, "-m", "tests.world", str(resolv_conf), *inner]
        path = os.pathsep.join((str(CHECKOUT), *filter(None, sys.path)))
        return pytester.run("env", f"PYTHONPATH={path}", *world, timeout=400)

    return run


def _have_the_image() -> None:
    worker = Worker(WorkerSettings(cache_dir=Path(CACHE)))
    try:
        worker.engine.run(worker.image("mini"))
    finally:
        worker.close()
