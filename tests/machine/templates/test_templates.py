"""Templates of real machines: whatever happens to one on disk, no wrong machine comes out of it."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_vmsandbox import Machine
from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.templates.memory_file import MEMORY, PAGES
from pytest_vmsandbox.machine.templates.shelf import MARK, NAME
from pytest_vmsandbox.machine.templates.template import CONSOLE, MANIFEST, STATE
from pytest_vmsandbox.machine.templates.templates import recipe_of
from pytest_vmsandbox.machine.worker import Worker, WorkerSettings
from tests.machine.templates.template_caches import make_cache

pytestmark = [pytest.mark.machine, pytest.mark.timeout(900)]

MOMENTS = int(os.environ.get("VMSANDBOX_MOMENTS", "2"))
SEED = int(os.environ.get("VMSANDBOX_SEED") or random.SystemRandom().randrange(1 << 32))
CHECKOUT = Path(__file__).resolve().parents[3]

# From the start of a builder to the end of its first test, in seconds.
BUILDING_S = 6.0

FILES = (MEMORY, PAGES, STATE, CONSOLE, MANIFEST)
SPEC = MachineSpec().changed({"lifecycle": "restored"})


class Session:
    """A worker as a test session has it; more than one may share a cache."""

    def __init__(self, cache_dir: Path, run_dir: Path, *, name: str = "main") -> None:
        self.cache_dir = cache_dir
        self.worker = Worker(WorkerSettings(cache_dir=cache_dir, run_dir=run_dir, id=name))

    @property
    def place(self) -> Path:
        """Where the template of the usual machine lies."""
        build: Build = self.worker.engine.run(self.worker.plan(SPEC))
        self.worker.engine.run(self.worker.end([MachineController(build)]))
        return self.cache_dir / NAME / recipe_of(build).digest[:32]

    @contextmanager
    def machine(self) -> Iterator[Machine]:
        """One restored machine, which answers as one of its own."""
        run = self.worker.engine.run
        (made,) = run(self.worker.make([SPEC]))
        try:
            run(self.worker.boot([made]))
            assert made.facts.lifecycle == "restored"
            machine = Machine(made, self.worker.engine)
            assert machine.run("hostname").stdout == f"{machine.name}\n"
            yield machine
        finally:
            run(self.worker.end([made]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a template in it, never to be changed."""
    cache = make_cache(tmp_path_factory.mktemp("whole"))
    with new_session(cache) as session, session.machine():
        pass
    return cache


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A copy of that cache."""
    make_cache(tmp_path / "cache")
    shutil.copytree(whole / NAME, tmp_path / "cache" / NAME)
    (tmp_path / "cache" / NAME).chmod(0o700)
    return tmp_path / "cache"


@contextmanager
def new_session(
    cache: Path, *, run_dir: Path | None = None, name: str = "main"
) -> Iterator[Session]:
    with tempfile.TemporaryDirectory(prefix="vmsb-") as short:
        session = Session(cache, run_dir or Path(short) / "run", name=name)
        try:
            yield session
        finally:
            session.worker.close()


def use(session: Session) -> None:
    with session.machine() as machine:
        assert machine.run("true").returncode == 0


def checksums(place: Path) -> dict[str, str]:
    return {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in FILES}


def flip_a_bit(path: Path, dice: random.Random) -> None:
    """Where there is something: a hole holds nothing that anybody reads."""
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    at = dice.choice([at for at in dice.choices(range(len(content)), k=10_000) if content[at]])
    content[at] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, dice: random.Random) -> None:
    path.chmod(0o600)
    os.truncate(path, dice.randrange(path.stat().st_size))


@pytest.mark.parametrize(
    ("name", "harm"), [(MEMORY, flip_a_bit), (STATE, flip_a_bit), (MANIFEST, truncate)]
)
def test_a_damaged_template_is_made_anew(
    cache: Path, name: str, harm: Callable[[Path, random.Random], None]
) -> None:
    with new_session(cache) as session:
        place = session.place
        before = checksums(place)
        harm(place / name, random.Random(f"{SEED} {name}"))

        with session.machine() as vm:
            assert vm.run("true").returncode == 0

        after = checksums(place)
    # A boot is never the same to the last byte.
    assert after[MEMORY] != before[MEMORY], SEED


def test_many_machines_leave_their_template_as_it_was(cache: Path) -> None:
    with new_session(cache) as session:
        place = session.place
        before = checksums(place)
        for _ in range(8):
            with session.machine() as vm:
                vm.run("dd if=/dev/urandom of=/dev/shm/x bs=1M count=24 2>/dev/null", check=True)
                vm.run("dd if=/dev/zero of=/root/x bs=1M count=8 2>/dev/null", check=True)
        after = checksums(place)

    assert after == before


def test_a_cache_that_is_removed_under_a_session_harms_none_of_its_machines(cache: Path) -> None:
    with new_session(cache) as session:
        with session.machine() as first:
            shutil.rmtree(cache / NAME)
            assert first.run("true").returncode == 0
            with session.machine() as second:
                assert second.run("true").returncode == 0
        assert not (cache / NAME).exists()

    with new_session(cache) as session, session.machine() as third:
        assert third.run("true").returncode == 0


def test_machines_are_restored_while_another_process_makes_their_template_anew(
    cache: Path,
) -> None:
    with new_session(cache, name="ours") as ours, new_session(cache, name="theirs") as theirs:
        place = ours.place
        with ours.machine():
            pass
        before = checksums(place)
        flip_a_bit(place / MEMORY, random.Random(SEED))
        making = threading.Thread(target=use, args=(theirs,))
        making.start()
        restored = 0
        while making.is_alive():
            with ours.machine() as one, ours.machine() as other:
                assert one.run("true").returncode == other.run("true").returncode == 0
                restored += 2
        making.join()
        with ours.machine():
            restored += 1

        assert restored > 2
        assert checksums(place)[MEMORY] != before[MEMORY]


def test_another_qemu_makes_a_template_of_its_own(cache: Path, scratch: Path) -> None:
    with new_session(cache) as session:
        build: Build = session.worker.engine.run(session.worker.plan(SPEC))
        session.worker.engine.run(session.worker.end([MachineController(build)]))
        program = scratch / "qemu"
        program.write_text(f'#!/bin/sh\nexec {build.config.program} "$@"\n')
        program.chmod(0o755)

        theirs = replace(build, config=replace(build.config, program=str(program)))
        first = recipe_of(theirs).digest
        os.utime(program, ns=(1, 1))  # as if another version had been installed there

        assert len({recipe_of(build).digest, first, recipe_of(theirs).digest}) == 3


def test_a_builder_killed_at_any_moment_is_followed_by_one_that_makes_it(
    tmp_path: Path, scratch: Path
) -> None:
    dice = random.Random(SEED)
    (tmp_path / "test_it.py").write_text("def test_it(vm):\n    vm.run('true', check=True)\n")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_default_fixture_loop_scope = function\n"
    )
    for number in range(MOMENTS):
        cache = make_cache(tmp_path / str(number))
        run_dir = scratch / str(number)
        with _session_of_its_own(tmp_path, cache, run_dir) as builder:
            time.sleep(dice.uniform(0, BUILDING_S))
            builder.kill()
            builder.wait()

        with new_session(cache, run_dir=run_dir) as session, session.machine() as vm:
            assert vm.run("true").returncode == 0, SEED
            names = {path.name for path in (cache / NAME).iterdir()}
            assert names == {".lock", MARK, session.place.name}, SEED
        assert list(run_dir.glob("*")) == [], SEED


def _session_of_its_own(tests: Path, cache: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    with (tests / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"],
            cwd=tests,
            env={
                **os.environ,
                "PYTHONPATH": str(CHECKOUT),
                "VMSANDBOX_CACHE_DIR": str(cache),
                "VMSANDBOX_RUN_DIR": str(run_dir),
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def test_the_log_of_the_machine_that_made_its_template_has_one_boot(tmp_path: Path) -> None:
    with new_session(make_cache(tmp_path / "cache")) as session, session.machine() as machine:
        machine.run("echo a word > /dev/console", check=True)
        machine.console.wait_for("a word")
        log = machine._controller.console.log.read_text(errors="replace")

        assert log.count("Linux version") == 1
        assert log.replace("\r", "") == machine.console.text
