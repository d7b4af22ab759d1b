from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit, RequestInvalid, TeardownRefused, TimedOut
from pytest_vmsandbox.jail import mount_points
from pytest_vmsandbox.jail.mount_points import (
    REGISTER,
    MountPoint,
    open_mount_points,
    remove_abandoned_mount_points,
)
from pytest_vmsandbox.lease.locks import hold_directory_lock
from tests.people import CHECKOUT, Kind, Person


@pytest.fixture
def root(scratch: Path) -> Path:
    directory = scratch / "root"
    directory.mkdir()
    return directory


@pytest.fixture
def base(scratch: Path) -> Iterator[Path]:
    """Where the register lies; empty afterwards."""
    directory = scratch / "base"
    yield directory
    if (directory / REGISTER).exists():
        assert everything(directory / REGISTER) == []


def place(root: Path, path: str, *, directory: bool = True) -> MountPoint:
    return MountPoint(root=str(root), path=path, directory=directory)


def everything(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_what_is_missing_is_there_meanwhile_and_gone_afterwards(root: Path, base: Path) -> None:
    points = [place(root, "/a/b/c"), place(root, "/a/file", directory=False)]

    with open_mount_points(points, base=base):
        meanwhile = everything(root)
        is_file = (root / "a/file").is_file()

    assert meanwhile == ["a", "a/b", "a/b/c", "a/file"]
    assert is_file
    assert everything(root) == []


def test_what_was_there_stays(root: Path, base: Path) -> None:
    (root / "a").mkdir()
    (root / "file").write_text("precious")

    with open_mount_points(
        [place(root, "/a/b"), place(root, "/a"), place(root, "/file", directory=False)], base=base
    ):
        assert (root / "a/b").is_dir()

    assert everything(root) == ["a", "file"]
    assert (root / "file").read_text() == "precious"


def test_it_is_gone_also_after_a_failure(root: Path, base: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_mount_points([place(root, "/a/b")], base=base):
        raise KeyboardInterrupt

    assert everything(root) == []


def test_what_was_made_before_a_refusal_is_gone(root: Path, base: Path) -> None:
    (root / "file").write_text("")
    points = [place(root, "/a/b"), place(root, "/file")]

    with pytest.raises(RequestInvalid, match="/file"), open_mount_points(points, base=base):
        pytest.fail("it was accepted")

    assert everything(root) == ["file"]


@pytest.mark.parametrize("text", ["/", "..", "../..", "/../../../..", "{outside}"])
def test_a_link_is_followed_as_from_inside(
    root: Path, base: Path, scratch: Path, text: str
) -> None:
    outside = scratch / "outside"
    outside.mkdir()
    (root / "trap").symlink_to(text.format(outside=outside))
    before = everything(scratch)

    refusal = ""
    with ExitStack() as held:
        try:
            held.enter_context(open_mount_points([place(root, "/trap/x/y")], base=base))
        except RequestInvalid as error:
            refusal = str(error)
        made = set(everything(scratch)) - {*before, "base", f"base/{REGISTER}"}

    assert bool(made) != ("leads nowhere" in refusal)
    assert all(path.startswith((f"base/{REGISTER}/", "root/")) for path in made)
    assert everything(root) == ["trap"]


def test_a_link_to_a_directory_of_the_host_by_its_name_leads_to_the_roots_own(
    root: Path, base: Path
) -> None:
    (root / "etc").mkdir()
    (root / "conf").symlink_to("/etc")

    with open_mount_points([place(root, "/conf/vmsandbox-test")], base=base):
        assert (root / "etc/vmsandbox-test").is_dir()
        assert not Path("/etc/vmsandbox-test").exists()

    assert everything(root) == ["conf", "etc"]


def test_a_link_of_proc_is_not_followed(root: Path, base: Path) -> None:
    with (
        pytest.raises(RequestInvalid),
        open_mount_points([place(Path("/proc/self"), "/root/vmsandbox-test")], base=base),
    ):
        pytest.fail("it was accepted")

    assert not Path("/vmsandbox-test").exists()


@pytest.mark.parametrize(("path", "directory"), [("/file", True), ("/dir", False)])
def test_a_place_of_the_wrong_kind_is_refused(
    root: Path, base: Path, path: str, *, directory: bool
) -> None:
    (root / "dir").mkdir()
    (root / "file").write_text("")

    with (
        pytest.raises(RequestInvalid, match=path),
        open_mount_points([place(root, path, directory=directory)], base=base),
    ):
        pytest.fail("it was accepted")


def test_a_file_on_the_way_is_refused_by_name(root: Path, base: Path) -> None:
    (root / "file").write_text("")

    with (
        pytest.raises(RequestInvalid, match="/file"),
        open_mount_points([place(root, "/file/x")], base=base),
    ):
        pytest.fail("it was accepted")


def test_what_somebody_has_put_something_into_stays(root: Path, base: Path) -> None:
    with open_mount_points([place(root, "/a/b"), place(root, "/file", directory=False)], base=base):
        (root / "a/precious").write_text("1")
        (root / "file").write_text("2")

    assert everything(root) == ["a", "a/precious", "file"]


def test_what_somebody_has_put_in_its_place_stays(root: Path, base: Path) -> None:
    with open_mount_points([place(root, "/a")], base=base):
        (root / "a").rmdir()
        (root / "a").write_text("precious")

    assert (root / "a").read_text() == "precious"


def test_what_somebody_has_removed_is_no_concern(root: Path, base: Path) -> None:
    with open_mount_points([place(root, "/a/b")], base=base):
        (root / "a/b").rmdir()

    assert everything(root) == []


def test_a_root_that_was_moved_away_is_found_again(root: Path, base: Path) -> None:
    with open_mount_points([place(root, "/a/b")], base=base):
        root.rename(root.with_name("moved"))
        root.mkdir()
        (root / "a").mkdir()
        (root / "a/b").mkdir()

    assert everything(root) == ["a", "a/b"]
    assert everything(root.with_name("moved")) == []


@pytest.mark.parametrize("first_out", ["first", "second"])
def test_who_uses_it_last_removes_it(root: Path, base: Path, first_out: str) -> None:
    point = place(root, "/a/b")
    first, second = ExitStack(), ExitStack()
    first.enter_context(open_mount_points([point], base=base))
    second.enter_context(open_mount_points([point], base=base))

    early, late = (first, second) if first_out == "first" else (second, first)
    early.close()
    meanwhile = everything(root)
    late.close()

    assert meanwhile == ["a", "a/b"]
    assert everything(root) == []


def test_what_a_user_of_another_register_uses_is_not_taken_away(
    root: Path, base: Path, scratch: Path
) -> None:
    point = place(root, "/a")

    with open_mount_points([point], base=scratch / "other"):
        with open_mount_points([point], base=base):
            pass
        assert (root / "a").is_dir()

    assert everything(root) == []


def test_it_stays_while_a_stranger_holds_it(root: Path, base: Path) -> None:
    with open_mount_points([place(root, "/a")], base=base):
        stranger = os.open(root / "a", os.O_RDONLY)
        fcntl.flock(stranger, fcntl.LOCK_SH)

    assert everything(root) == ["a"]

    os.close(stranger)
    with open_mount_points([place(root, "/a")], base=base):
        pass
    assert everything(root) == []


def test_many_threads_leave_nothing(root: Path, base: Path) -> None:
    points = [place(root, "/a/b"), place(root, "/a/c"), place(root, "/f", directory=False)]
    missing: list[MountPoint] = []

    def use() -> None:
        for _ in range(20):
            with open_mount_points(points, base=base):
                missing.extend(point for point in points if not (root / point.path[1:]).exists())

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert missing == []
    assert everything(root) == []


def killed_user(root: Path, base: Path) -> None:
    """Somebody makes /a/b and /f and is killed meanwhile."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from pytest_vmsandbox.jail.mount_points import MountPoint, open_mount_points\n"
        "points = [MountPoint(root=sys.argv[1], path='/a/b', directory=True),\n"
        "          MountPoint(root=sys.argv[1], path='/f', directory=False)]\n"
        "with open_mount_points(points, base=Path(sys.argv[2])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, root, base], cwd=CHECKOUT, check=False)
    assert done.returncode == -signal.SIGKILL


def test_what_a_killed_process_left_is_removed_by_the_next(root: Path, base: Path) -> None:
    killed_user(root, base)
    left = everything(root)

    with open_mount_points([place(root, "/a/b"), place(root, "/f", directory=False)], base=base):
        pass

    assert left == ["a", "a/b", "f"]
    assert everything(root) == []


def test_what_a_killed_process_left_is_removed_by_whoever_looks(root: Path, base: Path) -> None:
    killed_user(root, base)

    remove_abandoned_mount_points(base=base)

    assert everything(root) == []


def test_whoever_looks_leaves_what_is_used_and_what_has_changed(root: Path, base: Path) -> None:
    killed_user(root, base)
    os.utime(root / "f", (1, 1))

    with open_mount_points([place(root, "/a/c")], base=base):
        remove_abandoned_mount_points(base=base)
        meanwhile = everything(root)

    assert meanwhile == ["a", "a/c", "f"]
    assert everything(root) == ["f"]


def test_whoever_looks_follows_no_link_that_took_the_place(root: Path, base: Path) -> None:
    killed_user(root, base)
    (root / "a").rename(root / "moved")
    (root / "a").symlink_to("moved")
    remove_abandoned_mount_points(base=base)

    assert everything(root) == ["a", "moved", "moved/b"]
    (root / "a").unlink()
    (root / "moved").rename(root / "a")
    remove_abandoned_mount_points(base=base)
    assert everything(root) == []


def test_what_has_changed_since_a_process_was_killed_stays(root: Path, base: Path) -> None:
    killed_user(root, base)
    (root / "a/b/x").write_text("")
    (root / "a/b/x").unlink()
    os.utime(root / "f", (1, 1))

    with open_mount_points([place(root, "/a/b"), place(root, "/f", directory=False)], base=base):
        pass

    assert everything(root) == ["a", "a/b", "f"]


def test_what_can_not_be_removed_is_named_and_the_rest_is_gone(root: Path, base: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("takes root: it mounts")
    busy = root / "busy"
    with (
        pytest.raises(TeardownRefused, match=str(busy)),
        open_mount_points([place(root, "/busy"), place(root, "/other")], base=base),
    ):
        subprocess.run(["mount", "--bind", busy, busy], check=True)
    subprocess.run(["umount", busy], check=True)

    assert everything(root) == ["busy"]


def test_a_pipe_or_a_socket_is_not_opened(root: Path, base: Path) -> None:
    os.mkfifo(root / "pipe")

    with open_mount_points([place(root, "/pipe", directory=False)], base=base):
        pass

    assert stat.S_ISFIFO((root / "pipe").stat().st_mode)


def test_nothing_is_made_for_no_mount_points(scratch: Path) -> None:
    with open_mount_points([], base=scratch / "base"):
        pass

    assert not (scratch / "base").exists()


def test_a_register_that_is_not_ours_alone_is_refused(root: Path, scratch: Path) -> None:
    base = scratch / "shared"
    base.mkdir()
    base.chmod(0o777)

    with (
        pytest.raises(HostUnfit, match="ours alone"),
        open_mount_points([place(root, "/a")], base=base),
    ):
        pytest.fail("it was accepted")

    assert everything(root) == []


def test_no_descriptor_is_left(
    root: Path, base: Path, open_descriptors: Callable[[], list[str]]
) -> None:
    (root / "file").write_text("")
    before = open_descriptors()

    with open_mount_points([place(root, "/a/b")], base=base):
        pass
    with (
        pytest.raises(RequestInvalid),
        open_mount_points([place(root, "/a/b"), place(root, "/file/x")], base=base),
    ):
        pytest.fail("it was accepted")

    assert open_descriptors() == before


@contextmanager
def busy(base: Path) -> Iterator[None]:
    """Somebody holds the register's lock."""
    with hold_directory_lock(base / REGISTER, deadline=Deadline.after(seconds=5)):
        yield


@pytest.fixture
def impatient(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A register that is not waited for long."""
    monkeypatch.setattr(mount_points, "_REGISTER_S", 0.05)
    base.mkdir(mode=0o700)
    (base / REGISTER).mkdir(mode=0o700)


@pytest.mark.usefixtures("impatient")
def test_a_register_that_somebody_holds_is_given_up(root: Path, base: Path) -> None:
    with (
        busy(base),
        pytest.raises(TimedOut, match=REGISTER),
        open_mount_points([place(root, "/a")], base=base),
    ):
        pytest.fail("it was entered")

    assert everything(root) == []


@pytest.mark.usefixtures("impatient")
def test_what_can_not_be_removed_in_time_is_left_to_the_next(
    root: Path, base: Path, open_descriptors: Callable[[], list[str]]
) -> None:
    before = open_descriptors()
    with (
        ExitStack() as somebody,
        pytest.raises(TimedOut),
        open_mount_points([place(root, "/a/b")], base=base),
    ):
        somebody.enter_context(busy(base))
    assert everything(root) == ["a", "a/b"]
    assert open_descriptors() == before

    assert remove_abandoned_mount_points(base=base) == []
    assert everything(root) == []


@pytest.mark.usefixtures("impatient")
def test_who_looks_names_a_register_that_somebody_holds(base: Path) -> None:
    with busy(base):
        (leftover,) = remove_abandoned_mount_points(base=base)

    assert leftover.path == base
    assert "the lock of" in leftover.reason


@pytest.mark.parametrize("made", ["written by others", "a link", "of somebody else"])
def test_who_looks_names_a_register_that_is_not_ours(scratch: Path, made: str) -> None:
    base = scratch / "foreign"
    base.mkdir(mode=0o700)
    (base / REGISTER).mkdir()
    if made == "written by others":
        base.chmod(0o777)
    elif made == "a link":
        (base / REGISTER).rename(base / "elsewhere")
        (base / REGISTER).symlink_to("elsewhere")
    elif os.getuid() != 0:
        pytest.skip("giving files away needs root")
    else:
        os.chown(base, 12345, 12345)

    (leftover,) = remove_abandoned_mount_points(base=base)

    assert leftover.path == base
    assert "its mount points" in leftover.reason
    assert leftover.inspect


def test_who_looks_may_not_look_into_the_base_of_another(
    scratch: Path, people: Mapping[Kind, Person]
) -> None:
    base = scratch / "roots"
    base.mkdir(mode=0o700)

    answer = people[Kind.ORDINARY].python(
        """
import json, sys
from pathlib import Path
from pytest_vmsandbox.jail.mount_points import remove_abandoned_mount_points
print(json.dumps([str(left) for left in remove_abandoned_mount_points(base=Path(sys.argv[1]))]))
""",
        base,
    )

    assert isinstance(answer, list)
    (left,) = answer
    assert "Permission denied" in left


def test_who_looks_names_what_can_not_be_removed_and_removes_the_rest(
    root: Path, base: Path
) -> None:
    if os.getuid() != 0:
        pytest.skip("takes root: it mounts")
    killed_user(root, base)
    subprocess.run(["mount", "--bind", root / "f", root / "f"], check=True)
    try:
        (leftover,) = remove_abandoned_mount_points(base=base)
    finally:
        subprocess.run(["umount", root / "f"], check=True)

    assert leftover.path == root / "f"
    assert everything(root) == ["f"]
