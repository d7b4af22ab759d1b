"""The reaper, after runs that were killed: what is dead goes, what lives or is in doubt stays."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import TeardownRefused
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.lease.entries import CgroupEntry, ProcessEntry, Role, identity_to_json
from pytest_vmsandbox.lease.layout import LEDGER, LOCK
from pytest_vmsandbox.lease.locks import hold_base_lock, hold_lock_of_the_dead
from pytest_vmsandbox.lease.reaper import Reaped, Run, Standing, reap, survey
from pytest_vmsandbox.lease.run_directory import open_run_directory
from pytest_vmsandbox.linux import (
    ProcessIdentity,
    prctl_set_child_subreaper,
    read_boot_id,
)
from tests.dead_runs import (
    CHECKOUT,
    leave_dead_run,
    leave_dead_run_with_pids,
    leave_dead_runs,
    rewrite_ledger,
)
from tests.people import Kind, Person
from tests.precious import checksum, make_precious

ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="takes root")


@pytest.fixture(autouse=True)
def no_orphan_left() -> Iterator[None]:
    """What a killed run started becomes our child, is seen and, at the end, is gone."""
    prctl_set_child_subreaper()
    try:
        yield
    finally:
        prctl_set_child_subreaper(enabled=False)
    with suppress(ChildProcessError):
        pytest.fail(f"left behind: {os.waitpid(-1, os.WNOHANG)}")


@pytest.fixture
def innocent() -> Iterator[subprocess.Popen[bytes]]:
    """A process that no reaper may end."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        assert process.poll() is None
        process.kill()


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A place for control groups of our own."""
    for controller in ("unified", "pids", "."):
        place = Path("/sys/fs/cgroup", controller)
        with suppress(OSError):
            (place / f"vmsandbox-t{os.getpid()}").mkdir()
            break
    else:
        pytest.skip("no control group can be made here")
    group = place / f"vmsandbox-t{os.getpid()}"
    if not (group / "cgroup.procs").exists():
        group.rmdir()
        pytest.skip("no control group file system here")
    yield group
    for left in [*group.glob("vmsandbox-*"), group]:
        left.rmdir()


def _ended(pid: int) -> int:
    """How our adopted child ended; it must end now."""
    _pid, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _only_leftover(done: Reaped, path: Path) -> str:
    assert done.removed == []
    (leftover,) = done.leftovers
    assert leftover.path == path
    assert leftover.inspect
    assert path.is_dir()
    return leftover.reason


def test_files_processes_groups_and_mounts_of_a_killed_run_go(base: Path, cgroup: Path) -> None:
    """Its mounts are in a namespace of its own, as a warden's are: they go with its processes."""
    precious = base.with_name("precious")
    before = make_precious(precious)
    if os.getuid() != 0:
        pytest.skip("takes root: it mounts")
    group = cgroup / "vmsandbox-m1"
    run, (pid,) = leave_dead_run_with_pids(
        base,
        f"""
mount({str(precious)!r}, machine, None, MountFlags.BIND)
group = Path({str(group)!r})
ledger.record(CgroupEntry(path=group))
group.mkdir()
number = ledger.record(vmm())
identity = start()
ledger.identify(number, identity)
(group / "cgroup.procs").write_text(str(identity.pid))
""",
        prefix=["unshare", "--mount", "--propagation", "private"],
    )
    assert (group / "cgroup.procs").read_text() == f"{pid}\n"
    steps: list[str] = []

    done = reap(base, report=steps.append)

    assert done == Reaped(removed=[run])
    assert _ended(pid) == -9
    assert not group.exists()
    assert list(base.iterdir()) == []
    assert checksum(precious) == before
    assert steps == [
        f"vmm vm1, pid {pid}: killed",
        f"control group {group}: removed",
        f"{run}: removed",
    ]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "ledger.record(vmm())",
        "ledger.identify(ledger.record(vmm()), start('true'))",
        "ledger.strike(ledger.record(vmm()))",
        "ledger.record(CgroupEntry(path=Path('/sys/fs/cgroup/vmsandbox-never-made')))",
        "os.write(ledger._descriptor, b'{\"record\": 1, ')",
        "path.rename(path.with_name('.dead-' + path.name))",
        "path = path.rename(path.with_name('.dead-' + path.name)); (path / 'ledger').unlink()",
    ],
    ids=[
        "nothing",
        "between record and start",
        "process that ended",
        "struck out",
        "between record and mkdir",
        "in the midst of a line",
        "renamed",
        "without its ledger",
    ],
)
def test_a_run_that_was_killed_between_two_steps_leaves_nothing(base: Path, body: str) -> None:
    _run, pids = leave_dead_run_with_pids(base, body)
    for pid in pids:
        _ended(pid)

    done = reap(base)

    assert len(done.removed) == 1
    assert done.leftovers == []
    assert list(base.iterdir()) == []


def test_the_next_run_reaps_before_it_begins(base: Path) -> None:
    left, (pid,) = leave_dead_run_with_pids(base, "ledger.identify(ledger.record(vmm()), start())")

    with open_run_directory(base, worker="main") as directory:
        assert not left.exists()
        assert directory.leftovers == []
    assert _ended(pid) == -9


def test_what_was_started_and_not_identified_is_awaited(base: Path) -> None:
    """Killed between start and identify: as a warden does, it ends by itself, with its owner."""
    _run, (pid,) = leave_dead_run_with_pids(
        base, "ledger.record(vmm()); start('sh', '-c', 'sleep 1', path.name)"
    )

    assert reap(base).leftovers == []
    assert _ended(pid) == 0
    assert list(base.iterdir()) == []


def test_what_was_started_and_not_identified_and_stays_is_in_doubt(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_vmsandbox.lease.undo._ENDING_S", 0.1)
    run, (pid,) = leave_dead_run_with_pids(
        base, "ledger.record(vmm()); start('sh', '-c', 'sleep 600; :', path.name)"
    )

    done = reap(base)

    assert "its command line names the run" in _only_leftover(done, run)
    assert done.leftovers[0].inspect == f"ps -fp {pid}"
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for member in (pid, *map(int, children)):
        os.kill(member, 9)  # our adopted children, not yet reaped: nobody else has these pids
        _ended(member)
    assert reap(base).removed == [run]


def test_after_a_reboot_only_files_remain(base: Path, innocent: subprocess.Popen[bytes]) -> None:
    run, (pid,) = leave_dead_run_with_pids(
        base,
        """
ledger.record(CgroupEntry(path=Path("/sys/fs/cgroup/vmsandbox-not-ours-any-more")))
identity = start("true")
ledger.identify(ledger.record(vmm()), identity)
ledger.record(vmm("vm2"))
""",
    )
    _ended(pid)
    now = ProcessIdentity.of(innocent.pid)
    steps: list[str] = []
    # The process of before has the pid and the start time of one of today.
    rewrite_ledger(
        run,
        (read_boot_id(), "another boot"),
        (f'"pid": {pid}, "start_ticks"', f'"pid": {now.pid}, "start_ticks"'),
    )

    assert reap(base, report=steps.append).removed == [run]
    assert [step for step in steps if "last boot" in step] == steps[:3]


def test_a_pid_that_was_given_out_again_is_not_touched(
    base: Path, innocent: subprocess.Popen[bytes]
) -> None:
    run, (pid,) = leave_dead_run_with_pids(
        base, "ledger.identify(ledger.record(vmm()), start('true'))"
    )
    _ended(pid)
    rewrite_ledger(run, (f'"pid": {pid}, "start_ticks"', f'"pid": {innocent.pid}, "start_ticks"'))

    assert reap(base).removed == [run]
    assert innocent.poll() is None


def test_a_pid_of_another_namespace_is_not_touched(base: Path) -> None:
    run, (pid,) = leave_dead_run_with_pids(base, "ledger.identify(ledger.record(vmm()), start())")
    own = Path("/proc/self/ns/pid").stat().st_ino
    rewrite_ledger(run, (f'"pid_namespace": {own}', '"pid_namespace": 1'))

    assert "another pid namespace" in _only_leftover(reap(base), run)
    os.kill(pid, 9)
    _ended(pid)


def _give_ledger_to(run: Path, owner: ProcessIdentity) -> None:
    head, *others = (run / LEDGER).read_text().splitlines(keepends=True)
    values = {**json.loads(head), "owner": identity_to_json(owner)}
    (run / LEDGER).write_text("".join([json.dumps(values) + "\n", *others]))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: (run / LEDGER).write_text("{}\n"), "its ledger is damaged: line 1"),
        (lambda run: (run / LEDGER).write_text(""), "its ledger is damaged: it has no head"),
        (lambda run: rewrite_ledger(run, ('"ledger": 1', '"ledger": 7')), "another format"),
        (lambda run: (run / LEDGER).chmod(0o666), "damaged: it is not a file that only we write"),
        (lambda run: (run / LEDGER).unlink(), "its ledger: No such file"),
        (lambda run: (run / LOCK).unlink(), "its lock is missing"),
        (
            lambda run: _give_ledger_to(run, ProcessIdentity.current()),
            "nobody holds its lock, but its owner",
        ),
    ],
    ids=["broken", "empty", "newer", "written by others", "no ledger", "no lock", "owner lives"],
)
def test_what_is_in_doubt_is_left_and_listed_with_a_command_to_look_at_it(
    base: Path, damage: object, reason: str
) -> None:
    run, (pid,) = leave_dead_run_with_pids(base, "ledger.identify(ledger.record(vmm()), start())")
    assert callable(damage)
    damage(run)

    done = reap(base)
    (seen,) = survey(base)

    assert reason in _only_leftover(done, run)
    assert seen.standing is Standing.DOUBTFUL
    assert reason in seen.reason
    inspect = shlex.split(done.leftovers[0].inspect)
    assert subprocess.run(inspect, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert (run / "m1" / "console.log").read_text() == "boot"
    assert Path(f"/proc/{pid}").exists()
    os.kill(pid, 9)
    _ended(pid)


def test_a_lock_that_a_daemon_of_the_dead_holds_is_in_doubt(base: Path) -> None:
    run, (pid,) = leave_dead_run_with_pids(
        base,
        """
links = Path("/proc/self/fd").iterdir()
lock = next(int(link.name) for link in links if link.resolve() == path / "lock")
nothing = subprocess.DEVNULL
daemon = subprocess.Popen(SLEEP, pass_fds=[lock], stdout=nothing, stderr=nothing)
print(daemon.pid, flush=True)
""",
    )

    (seen,) = survey(base)
    done = reap(base)

    assert seen.standing is Standing.DOUBTFUL
    assert "is gone, but somebody still holds its lock" in seen.reason
    assert seen.inspect == f"fuser -v -- {run / LOCK}"
    assert _only_leftover(done, run) == seen.reason
    os.kill(pid, 9)
    _ended(pid)
    assert reap(base).removed == [run]


def test_a_lock_that_a_reaper_holds_is_in_use(base: Path) -> None:
    run = leave_dead_run(base)

    with hold_lock_of_the_dead(run):
        assert survey(base)[0].standing is Standing.ALIVE
        assert reap(base) == Reaped()
    assert reap(base).removed == [run]


def test_an_owner_in_another_pid_namespace_may_hold_its_lock(base: Path) -> None:
    with open_run_directory(base, worker="main") as directory:
        whole = (directory.path / LEDGER).read_text()
        own = Path("/proc/self/ns/pid").stat().st_ino
        rewrite_ledger(directory.path, (f'"pid_namespace": {own}', '"pid_namespace": 1'))
        _give_ledger_to(directory.path, replace(ProcessIdentity.current(), start_ticks=1))

        assert survey(base)[0].standing is Standing.ALIVE
        assert reap(base) == Reaped()
        (directory.path / LEDGER).write_text(whole)


def test_one_that_is_being_made_is_not_dead(base: Path) -> None:
    base.mkdir(mode=0o700)
    path = base / "r00000000-gw0"
    answers: list[list[Run]] = []
    looking = threading.Thread(target=lambda: answers.append(survey(base)))

    with hold_base_lock(base):
        path.mkdir(mode=0o700)
        looking.start()
        time.sleep(0.1)  # so that it would have answered
        assert answers == []
        path.rmdir()
    looking.join()

    assert answers == [[]]


def test_a_half_made_one_is_dead_and_a_strange_one_in_doubt(base: Path) -> None:
    base.mkdir(mode=0o700)
    half, strange = base / "r00000000-gw0", base / "r00000001-gw0"
    half.mkdir()
    (half / LOCK).touch()
    strange.mkdir()
    (strange / "precious").touch()

    first, second = survey(base)
    done = reap(base)

    assert (first.standing, second.standing) == (Standing.DEAD, Standing.DOUBTFUL)
    assert "interrupted" in first.reason
    assert done.removed == [half]
    assert [left.reason for left in done.leftovers] == [second.reason]


@pytest.mark.parametrize("mode", [0o000, 0o300, 0o600])
def test_a_base_of_ours_that_we_may_not_enter_is_in_doubt(
    base: Path, people: Mapping[Kind, Person], mode: int
) -> None:
    someone = people[Kind.ORDINARY]
    with _base_of(someone, base):
        (base / "file").touch()
        run = leave_dead_run(base, prefix=someone.argv())
        base.chmod(mode)
        answer = someone.python(_REAP, base)
        base.chmod(0o700)

    assert isinstance(answer, dict)
    assert answer["removed"] == []
    ((_path, reason),) = answer["left"]
    assert "Permission denied" in reason
    assert run.is_dir()


def test_one_that_is_in_doubt_keeps_no_other_from_going(base: Path) -> None:
    runs = leave_dead_runs(base, 3)
    (runs[1] / LEDGER).unlink()

    done = reap(base)

    assert set(done.removed) == {runs[0], runs[2]}
    assert [leftover.path for leftover in done.leftovers] == [runs[1]]


def test_a_group_with_a_process_in_it_is_left(
    base: Path, cgroup: Path, innocent: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_vmsandbox.lease.undo._ENDING_S", 0.1)
    group = cgroup / "vmsandbox-m1"
    group.mkdir()
    (group / "cgroup.procs").write_text(str(innocent.pid))
    run = leave_dead_run(base, f"ledger.record(CgroupEntry(path=Path({str(group)!r})))")

    done = reap(base)

    assert "busy" in _only_leftover(done, run)
    inspect = shlex.split(done.leftovers[0].inspect)
    assert subprocess.check_output(inspect, text=True) == f"{innocent.pid}\n"
    (cgroup / "cgroup.procs").write_text(str(innocent.pid))
    assert reap(base).removed == [run]
    assert not group.exists()
    (cgroup.parent / "cgroup.procs").write_text(str(innocent.pid))


def test_what_only_has_the_name_of_a_group_is_left(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vmsandbox-precious"
    folder.mkdir()
    run = leave_dead_run(base, f"ledger.record(CgroupEntry(path=Path({str(folder)!r})))")

    assert "no cgroup file system" in _only_leftover(reap(base), run)
    assert folder.is_dir()


def test_several_reapers_beside_a_live_run(base: Path, innocent: subprocess.Popen[bytes]) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from pytest_vmsandbox.lease.reaper import reap\n"
        "sys.stdin.readline()\n"
        "done = reap(Path(sys.argv[1]))\n"
        "assert done.leftovers == [], done\n"
        "print(*done.removed, sep='\\n')\n"
    )
    with open_run_directory(base, worker="main") as directory:
        dead = {str(run) for run in leave_dead_runs(base, 12, "ledger.record(vmm())")}
        number = directory.ledger.record(
            ProcessEntry(role=Role.VMM, tier=Tier.BARE, identity=ProcessIdentity.of(innocent.pid))
        )
        (directory.path / "precious").write_text("in use")
        reapers = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(base)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=CHECKOUT,
                text=True,
            )
            for _ in range(3)
        ]
        time.sleep(0.5)  # so that they begin at the same time, imports done
        outputs = [reaper.communicate("\n") for reaper in reapers]

        assert [reaper.returncode for reaper in reapers] == [0, 0, 0], outputs
        assert {line for out, _ in outputs for line in out.split()} >= dead
        assert [path.name for path in base.iterdir()] == [directory.path.name]
        assert (directory.path / "precious").read_text() == "in use"
        (alive,) = survey(base)
        assert alive.standing is Standing.ALIVE
        directory.ledger.strike(number)


def test_the_end_of_a_run_undoes_what_is_still_open(base: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as forgotten:
        with open_run_directory(base, worker="main") as directory:
            number = directory.ledger.record(ProcessEntry(role=Role.VMM, tier=Tier.BARE))
            directory.ledger.identify(number, ProcessIdentity.of(forgotten.pid))

        assert forgotten.wait(timeout=5) == -9
    assert list(base.iterdir()) == []


def test_what_the_end_of_a_run_can_not_undo_is_named(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vmsandbox-precious"
    folder.mkdir()

    with (
        pytest.raises(TeardownRefused, match="no cgroup file system"),
        open_run_directory(base, worker="main") as directory,
    ):
        directory.ledger.record(CgroupEntry(path=folder))

    (leftover,) = directory.leftovers
    assert leftover.path == directory.path
    assert "no cgroup file system" in leftover.reason
    assert directory.path.is_dir()
    with open_run_directory(base, worker="main") as later:
        assert "nobody holds its lock, but its owner" in later.leftovers[0].reason


def test_no_undo_ends_ourselves(base: Path) -> None:
    run = leave_dead_run(
        base, f"ledger.identify(ledger.record(vmm()), ProcessIdentity.of({os.getpid()}))"
    )

    assert "ourselves" in _only_leftover(reap(base), run)


@pytest.mark.parametrize("made", ["a link", "written by others", "a file"])
def test_a_base_that_is_not_ours_alone_is_left(base: Path, made: str, tmp_path: Path) -> None:
    run = leave_dead_run(base)
    at = base
    if made == "a link":
        at = tmp_path / "link"
        at.symlink_to(base)
    elif made == "a file":
        at = tmp_path / "file"
        at.touch()
    else:
        base.chmod(0o777)

    done = reap(at)

    assert "not a directory of ours alone" in done.leftovers[0].reason
    assert run.is_dir()
    assert survey(at)[0].standing is Standing.DOUBTFUL


# Two users


@contextmanager
def _base_of(someone: Person, base: Path) -> Iterator[Path]:
    base.parent.chmod(0o755)
    base.mkdir(mode=0o700)
    os.chown(base, someone.uid, someone.gid)
    yield base


def test_nobody_reaps_for_somebody_else(base: Path, people: Mapping[Kind, Person]) -> None:
    someone = people[Kind.ORDINARY]
    with _base_of(someone, base):
        run = leave_dead_run(base, prefix=someone.argv())

        assert "not a directory of ours alone" in reap(base).leftovers[0].reason
        assert (run / "m1" / "console.log").read_text() == "boot"
        run_of_root = leave_dead_run(base.with_name("root"))
        run_of_root.rename(base / run_of_root.name)
        answer = someone.python(_REAP, base)

    assert answer == {
        "removed": [str(run)],
        "left": [[str(base / run_of_root.name), "it is not a directory of ours"]],
    }


@pytest.mark.parametrize("kind", [Kind.ORDINARY, Kind.SUDO_TO_ALL])
def test_what_root_left_in_a_users_run_goes_by_sudo_alone(
    base: Path, kind: Kind, people: Mapping[Kind, Person]
) -> None:
    someone = people[kind]
    with _base_of(someone, base):
        run = leave_dead_run(base, prefix=someone.argv())
        (run / "m1" / "of root" / "sub").mkdir(parents=True)
        (run / "m1" / "of root" / "sub" / "file").write_text("root's")

        answer = someone.python(_REAP, base)

        if kind is Kind.SUDO_TO_ALL:
            assert answer == {"removed": [str(run)], "left": []}
            assert list(base.iterdir()) == []
        else:
            (left,) = base.iterdir()
            assert isinstance(answer, dict)
            ((path, reason),) = answer["left"]
            assert path == str(left)
            assert "m1/of root" in reason
            assert (left / "m1" / "of root" / "sub" / "file").read_text() == "root's"


@ROOT_ONLY
def test_a_process_that_we_may_not_kill_is_in_doubt(
    base: Path, people: Mapping[Kind, Person], innocent: subprocess.Popen[bytes]
) -> None:
    """A user's ledger names root's process, rightly in all but that it was theirs to name."""
    someone = people[Kind.ORDINARY]
    identity = ProcessIdentity.of(innocent.pid)
    with _base_of(someone, base):
        run = leave_dead_run(
            base,
            f"""
ledger.identify(ledger.record(vmm()), ProcessIdentity(
    boot_id={identity.boot_id!r}, pid={identity.pid}, start_ticks={identity.start_ticks}))
""".replace("(\n    ", "("),
            prefix=someone.argv(),
        )
        answer = someone.python(_REAP, base)

    assert isinstance(answer, dict)
    ((path, reason),) = answer["left"]
    assert path == str(run)
    assert "we may not kill it" in reason


_REAP = """
import json, sys
from pathlib import Path
from pytest_vmsandbox.lease import undo
from pytest_vmsandbox.lease.reaper import reap
undo._ENDING_S = 0.1
done = reap(Path(sys.argv[1]))
print(json.dumps({
    "removed": [str(path) for path in done.removed],
    "left": [[str(left.path), left.reason] for left in done.leftovers],
}))
"""
