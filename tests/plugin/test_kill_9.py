"""kill -9 at random moments of random processes: the next run leaves nothing of the dead one.

The moments are drawn from a seed, VMSANDBOX_SEED, and are as many as VMSANDBOX_MOMENTS says; all
the time another run, with the same base, lives and must not be touched.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL

import pytest

from pytest_vmsandbox.lease.entries import CgroupEntry, ProcessEntry
from pytest_vmsandbox.lease.layout import LEDGER
from pytest_vmsandbox.lease.ledger import Account, read_ledger
from pytest_vmsandbox.lease.run_directory import open_run_directory
from pytest_vmsandbox.linux import ProcessIdentity, prctl_set_child_subreaper
from tests.children import no_child_is_left, remember_children
from tests.process_trees import (
    Member,
    Part,
    all_mounts,
    living_namespaces,
    members_of,
    namespaces_of,
)
from tests.signals import send_signal

pytestmark = [pytest.mark.machine, pytest.mark.timeout(1200)]

MOMENTS = int(os.environ.get("VMSANDBOX_MOMENTS", "8"))
SEED = int(os.environ.get("VMSANDBOX_SEED") or random.SystemRandom().randrange(1 << 32))

# A machine of a victim takes about this long, in seconds, from its start to its end.
LATEST_S = 3.0
# What execnet gives an xdist worker that has lost its controller, and we an end of a run.
ENDING_S = 60.0

VICTIM = """
    import pytest

    def test_one(vm):
        vm.run("sleep 0.3")

    def test_command_behind_walls(vm_jail):
        root = ("/usr", "/usr", None, "bind"), ("/lib64", "/lib64", None, "bind")
        vm_jail.run(["/usr/bin/sleep", "0.5"], filesystem_root={root!r}, extra_mounts=root)

    def test_two_on_a_network(vm_factory):
        one, two = vm_factory(count=2, network="lan")
        with pytest.raises(ConnectionError):
            one.connect(22)
        one.run(["ping", "-c", "1", two.ip], check=True)
"""

NEIGHBOUR = """
    from pathlib import Path

    def test_it(vm):
        directory = vm._controller.build.config.directory.parent
        Path("up").write_text(str(directory))
        Path("up").rename("directory")
        answers = 0
        while not Path("stop").exists():
            assert vm.run("echo $((6 * 7)); sleep 0.1", timeout=60).stdout == "42\\n"
            answers += 1
        Path("answers").write_text(str(answers))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Which process is killed, how long after there was one of which kind; under xdist or not."""

    part: Part
    since: Part
    after_s: float
    xdist: bool

    def __str__(self) -> str:
        where = " under xdist" if self.xdist else ""
        return f"{self.part}, {self.after_s:.2f} s after the first {self.since}{where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What would betray that something is left of a run: taken just before the blow."""

    members: list[Member]
    runs: list[str]
    namespaces: frozenset[str]


def draw(count: int, *, seed: int) -> list[Moment]:
    """Moments out of a seed."""
    dice = random.Random(seed)
    moments = []
    for _ in range(count):
        xdist = dice.random() < 0.5
        parts = [part for part in Part if part is not Part.OTHER and (xdist or part != Part.WORKER)]
        part = dice.choice(parts)
        # Of pytest itself the time in which there is nothing yet is worth as much as the others.
        early = (Part.PYTEST, Part.WORKER)
        since = dice.choice((part, Part.OUTER, Part.VMM)) if part in early else part
        after_s = dice.uniform(0, LATEST_S)
        moments.append(Moment(part=part, since=since, after_s=after_s, xdist=xdist))
    return moments


class Scene:
    """A base for all runs of the test, and files for them in a directory of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = path / "run"
        self.root = path / "root"
        self.root.mkdir()
        self._starting = threading.Lock()
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, source: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A pytest on `source`, in a directory called `name`."""
        place = self.path / name
        place.mkdir()
        (place / "pytest.ini").write_text(
            "[pytest]\nasyncio_default_fixture_loop_scope = function\n"
        )
        (place / "test_it.py").write_text(
            "\n".join(line.removeprefix("    ") for line in source.splitlines())
        )
        with (place / "log").open("wb") as log, self._starting:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
                cwd=place,
                env={**os.environ, "VMSANDBOX_RUN_DIR": str(self.base)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            self._started.append(process)
            return process

    def running(self) -> frozenset[int]:
        """The pids of those runs that have not ended."""
        with self._starting:
            return frozenset(run.pid for run in self._started if run.returncode is None)

    def log(self, name: str) -> str:
        return (self.path / name / "log").read_text(errors="replace")[-3000:]

    def runs_of(self, members: list[Member]) -> list[str]:
        """The names of the run directories that these processes own."""
        owners = {member.identity for member in members}
        found = []
        for path in self.base.glob("r*"):
            with suppress(OSError):
                head = read_ledger(path / LEDGER).head
                if head is not None and head.owner in owners:
                    found.append(path.name)
        return found


class Neighbour:
    """A run that lives on: its machine answers all the time, and nothing of it is touched."""

    def __init__(self, scene: Scene) -> None:
        self._place = scene.path / "neighbour"
        self._scene = scene
        self._process = scene.start("neighbour", NEIGHBOUR)
        wait_until((self._place / "directory").exists, "the neighbour is up")
        self.directory = Path((self._place / "directory").read_text())
        self._files = self._seen_files()
        self._account = self._seen_account()

    def require_untouched(self) -> None:
        assert self._process.poll() is None, self._scene.log("neighbour")
        assert self._seen_files() == self._files
        assert self._seen_account() == self._account
        for entry in self._account.entries.values():
            if isinstance(entry, CgroupEntry):
                assert entry.path.is_dir()
            if isinstance(entry, ProcessEntry):
                assert entry.identity is not None
                assert entry.identity.is_alive()

    def end(self) -> None:
        """Let it end in good order; it fails where a single answer was wrong or late."""
        (self._place / "stop").touch()
        assert self._process.wait(ENDING_S) == 0, self._scene.log("neighbour")
        assert int((self._place / "answers").read_text()) > 0

    def kill(self) -> None:
        """In case of a failure."""
        self._process.kill()
        self._process.wait()

    def _seen_files(self) -> list[str]:
        return sorted(str(path) for path in self.directory.rglob("*"))

    def _seen_account(self) -> Account:
        return read_ledger(self.directory / LEDGER)


@pytest.fixture
def scene() -> Iterator[Scene]:
    """Orphans of killed runs become ours to look at, and not pid 1's, which may not reap."""
    remember_children()
    prctl_set_child_subreaper(enabled=True)
    try:
        with tempfile.TemporaryDirectory(prefix="vmsk-", dir="/tmp") as short:
            yield Scene(Path(short))
    finally:
        prctl_set_child_subreaper(enabled=False)


def test_after_kill_9_at_random_moments_nothing_is_left_and_no_other_run_is_touched(
    scene: Scene, record_property: Callable[[str, object], None]
) -> None:
    record_property("seed", SEED)
    sys.stdout.write(f"VMSANDBOX_SEED={SEED} VMSANDBOX_MOMENTS={MOMENTS}\n")
    moments = draw(MOMENTS, seed=SEED)
    with ExitStack() as undo:
        neighbour = Neighbour(scene)
        undo.callback(neighbour.kill)
        with ThreadPoolExecutor(max_workers=2) as threads:
            blows = [
                threads.submit(_suffer, scene, neighbour, number, moment)
                for number, moment in enumerate(moments, start=1)
            ]
        said = [blow.result() for blow in blows]
        sys.stdout.write("\n".join([*said, ""]))
        neighbour.end()

    wait_until(no_child_is_left_but_the_dead, "the end of every process")
    with open_run_directory(scene.base, worker="last") as last:
        assert [path for path in scene.base.glob("[r.]*") if path != last.path] == []
    assert list(scene.root.iterdir()) == []


def _suffer(scene: Scene, neighbour: Neighbour, number: int, moment: Moment) -> str:
    """One run with one blow; then another one begins, and looks around."""
    name = f"victim{number}"
    source = VICTIM.format(root=str(scene.root))
    with _victim(scene.start(name, source, *(("-n2",) if moment.xdist else ()))) as victim:
        trace, said = _strike(scene, victim, moment)
        said = f"{name}: {said}"
        victim.wait(ENDING_S)
        # Workers that lost their controller are alive until they have noticed.
        lingering = [m for m in trace.members if m.part is Part.WORKER]
        wait_until(lambda: all(m.is_gone() for m in lingering), f"{said}: its workers end")
    with open_run_directory(scene.base, worker="next") as following:
        assert following.leftovers == [], said
        # Of two runs that begin at once, one reaps, and the other does not wait for it.
        wait_until(
            lambda: not _betrayed(scene, trace),
            lambda: f"{said}: {_betrayed(scene, trace)}",
        )
    neighbour.require_untouched()
    return said


@contextmanager
def _victim(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _strike(scene: Scene, victim: subprocess.Popen[bytes], moment: Moment) -> tuple[Trace, str]:
    """Kill what is meant when its time has come: says what it was, and when.

    Where the tier has no such process, or the next one does not come any more, it is pytest.
    """
    began = time.monotonic()
    _see(victim, moment.since)
    time.sleep(moment.after_s)
    members = _see(victim, moment.part)
    trace = Trace(
        members=members,
        runs=scene.runs_of(members),
        namespaces=frozenset().union(*(m.namespaces for m in members)),
    )
    pytest_itself = Member(
        part=Part.PYTEST, identity=ProcessIdentity.of(victim.pid), namespaces=frozenset()
    )
    target = next((m for m in members if m.part is moment.part), pytest_itself)
    with suppress(ProcessLookupError):
        try:
            send_signal(target.pid, SIGKILL)
        except PermissionError:  # sudo itself belongs to root
            target = pytest_itself
            send_signal(target.pid, SIGKILL)
    return trace, f"{target.part} after {time.monotonic() - began:.2f} s ({moment})"


def _see(victim: subprocess.Popen[bytes], part: Part) -> list[Member]:
    """The processes of a run as soon as there is one of that kind, or there never will be."""
    while True:
        members = members_of(victim.pid)
        parts = {member.part for member in members}
        # A warden without sudo in front of it never has one.
        never = part is Part.SUDO and Part.OUTER in parts and Part.SUDO not in parts
        if part in parts or never or _has_ended(victim.pid):
            return members
        time.sleep(0.005)


def _has_ended(child: int) -> bool:
    """Whether a child has ended; it is not reaped, so that its pid stays its own."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _betrayed(scene: Scene, trace: Trace) -> list[str]:
    """What is left of a run."""
    own = namespaces_of(Path("/proc/self"))
    left = [f"{m.part}, pid {m.pid}" for m in trace.members if not m.is_gone()]
    left += sorted((trace.namespaces - own) & living_namespaces(but=scene.running()))
    mounts = all_mounts()
    for run in trace.runs:
        left += [f"mount of {run}"] if run in mounts else []
        left += [str(path) for path in scene.base.glob(f"*{run}")]
        left += [str(path) for path in _control_groups() if run in path]
    return left


def _control_groups() -> list[str]:
    walked = os.walk("/sys/fs/cgroup")
    return [path for path, _, _ in walked if Path(path).name.startswith("vmsandbox-")]


def no_child_is_left_but_the_dead() -> bool:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return no_child_is_left()


def wait_until(condition: Callable[[], bool], what: str | Callable[[], str]) -> None:
    """Return once it holds; fail, with `what`, when it does not within ENDING_S."""
    over = time.monotonic() + ENDING_S
    while not condition():
        if time.monotonic() > over:
            pytest.fail(what if isinstance(what, str) else what())
        time.sleep(0.02)
