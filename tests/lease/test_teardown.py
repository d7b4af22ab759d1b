"""Teardown in a mount namespace that is thrown away, as root and as an ordinary user."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from unittest.mock import patch

import pytest

from pytest_vmsandbox.errors import TeardownRefused
from pytest_vmsandbox.lease.layout import DEAD
from pytest_vmsandbox.lease.place import Place
from pytest_vmsandbox.lease.privilege import OwnPrivilege
from pytest_vmsandbox.lease.teardown import tear_down
from pytest_vmsandbox.linux import MountFlags, mount, mounts_at_or_below, read_mountinfo, umount
from tests.precious import (
    ODD_NAMES,
    ROOM,
    InterruptedHere,
    checksum,
    interrupted_before_change,
    make_precious,
    make_run_directory,
    names_in,
    refusal_of,
)

InChild = Callable[..., None]


def test_what_is_bound_inside_comes_off_and_survives(in_room: InChild) -> None:
    """On the same file system, so that its device number tells nothing."""

    def body() -> None:
        before = make_precious(ROOM / "precious")
        run = make_run_directory(ROOM / "run")
        (run / "m1" / "file").touch()
        mount(ROOM / "precious", run / "m1" / "root", None, MountFlags.BIND)
        mount(ROOM / "precious" / "file", run / "m1" / "file", None, MountFlags.BIND)

        tear_down(run)

        assert checksum(ROOM / "precious") == before
        assert names_in(ROOM) == ["precious"]
        assert mounts_at_or_below(read_mountinfo(), run) == ()

    in_room(body)


def test_nested_stacked_and_hidden_mounts_come_off(in_room: InChild) -> None:
    def body() -> None:
        before = make_precious(ROOM / "precious")
        run = make_run_directory(ROOM / "run")
        root = run / "m1" / "root"
        mount("a", root, "tmpfs")
        (root / "deeper").mkdir()
        mount("b", root / "deeper", "tmpfs")
        for _ in range(3):
            mount(ROOM / "precious", root / "deeper", None, MountFlags.BIND)
        mount("over all of it", run / "m1", "tmpfs")

        tear_down(run)

        assert checksum(ROOM / "precious") == before
        assert names_in(ROOM) == ["precious"]
        assert mounts_at_or_below(read_mountinfo(), run) == ()

    in_room(body)


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_names_are_taken_as_they_are(in_room: InChild, name: str) -> None:
    def body(name: str) -> None:
        before = make_precious(ROOM / "precious")
        # What the name would be, were an escape undone once too often, or not at all.
        others = {"literal 040", "literal ", "literal", r"two\040words", "new", "line", "two"}
        for other in others:
            (ROOM / other).mkdir()
        run = make_run_directory(ROOM / name)
        (run / name).mkdir()
        mount(ROOM / "precious", run / name, None, MountFlags.BIND)

        tear_down(run)

        assert checksum(ROOM / "precious") == before
        assert names_in(ROOM) == sorted(["precious", *others])

    in_room(body, name)


def test_a_sibling_with_the_same_beginning_is_not_touched(in_room: InChild) -> None:
    def body() -> None:
        before = make_precious(ROOM / "run-2")
        mount(ROOM / "run-2", ROOM / "run-2", None, MountFlags.BIND)
        (ROOM / "ru").mkdir()
        mount("above by letters only", ROOM / "ru", "tmpfs")
        run = make_run_directory(ROOM / "run")

        tear_down(run)

        assert checksum(ROOM / "run-2") == before
        assert len(mounts_at_or_below(read_mountinfo(), ROOM / "run-2")) == 1
        assert len(mounts_at_or_below(read_mountinfo(), ROOM / "ru")) == 1

    in_room(body)


def test_a_busy_mount_comes_off_and_who_uses_it_goes_on(in_room: InChild) -> None:
    def body() -> None:
        before = make_precious(ROOM / "precious")
        run = make_run_directory(ROOM / "run")
        mount(ROOM / "precious", run / "m1" / "root", None, MountFlags.BIND)
        os.chdir(run / "m1" / "root" / "sub")
        with Path("file").open() as busy:
            tear_down(run)

            assert busy.read() == "theirs, too"
        assert Path("file").read_text() == "theirs, too"
        os.chdir("/")
        assert checksum(ROOM / "precious") == before
        assert names_in(ROOM) == ["precious"]

    in_room(body)


@pytest.mark.parametrize("where", ["run", "run/m1", "run/m1/root"])
def test_a_link_at_the_end_is_refused(in_room: InChild, where: str) -> None:
    def body(where: str) -> None:
        before = make_precious(ROOM / "precious")
        run = make_run_directory(ROOM / "real")
        target = ROOM / where
        if where == "run":
            target.symlink_to(run)
        else:
            run.rename(ROOM / "run")
            target.rename(ROOM / "moved away")
            target.symlink_to(ROOM / "precious")

        assert "is a symbolic link" in str(refusal_of(target))

        assert target.is_symlink()
        assert checksum(ROOM / "precious") == before

    in_room(body, where)


def test_a_link_on_the_way_is_refused(in_room: InChild) -> None:
    def body() -> None:
        run = make_run_directory(ROOM / "real" / "run")
        (ROOM / "link").symlink_to(ROOM / "real")
        before = checksum(run)

        refused = refusal_of(ROOM / "link" / "run")

        assert f"{ROOM / 'link'} is a symbolic link" in str(refused)

        assert checksum(run) == before

    in_room(body)


def test_links_inside_go_and_what_they_lead_to_stays(in_room: InChild) -> None:
    def body() -> None:
        before = make_precious(ROOM / "precious")
        run = make_run_directory(ROOM / "run")
        (run / "link").symlink_to(ROOM / "precious")
        (run / "m1" / "root" / "link").symlink_to(ROOM / "precious" / "file")
        (run / "m1" / "hard link").hardlink_to(ROOM / "precious" / "file")

        tear_down(run)

        assert checksum(ROOM / "precious") == before
        assert names_in(ROOM) == ["precious"]

    in_room(body)


@pytest.mark.parametrize("moment", ["at each detach", "at the last detach", "before the removal"])
def test_a_mount_that_somebody_makes_meanwhile_survives(in_room: InChild, moment: str) -> None:
    def body(moment: str) -> None:
        class BesideSomebody(OwnPrivilege):
            times = 0

            def detach(self, target: Path) -> None:
                super().detach(target)
                self.times += 1
                if moment == "at each detach" or (
                    moment == "at the last detach" and self.times == 3
                ):
                    self.interfere(run)

            def remove(self, place: Place) -> None:
                if moment == "before the removal":
                    self.interfere(place.path)
                super().remove(place)

            def interfere(self, run: Path) -> None:
                mount(ROOM / "precious", run / "m1" / "root", None, MountFlags.BIND)

        before = make_precious(ROOM / "precious")
        run = make_run_directory(ROOM / "run")
        for _ in range(3):
            mount("ours", run / "m1" / "root", "tmpfs")

        refused = refusal_of(run, privilege=BesideSomebody())

        assert "m1/root" in str(refused)
        assert "findmnt" in refused.inspect
        assert checksum(ROOM / "precious") == before
        tear_down(run)  # which goes on where the other stopped
        assert checksum(ROOM / "precious") == before
        assert names_in(ROOM) == ["precious"]

    in_room(body, moment)


@pytest.mark.parametrize("turn", [1, 4, 7])
def test_a_mount_that_comes_in_the_midst_of_the_removal_survives(
    in_room: InChild, turn: int
) -> None:
    """When a directory is about to go, another one still to come is mounted upon."""

    def body(turn: int) -> None:
        before = make_precious(ROOM / "precious")
        run = make_run_directory(ROOM / "run")
        for number in range(10):
            (run / f"d{number}" / "sub").mkdir(parents=True)
        calls = 0
        rmdir = os.rmdir

        def interfere(path: str, *, dir_fd: int | None = None) -> None:
            nonlocal calls
            calls += 1
            rmdir(path, dir_fd=dir_fd)
            if calls == turn:
                for left in (ROOM / f"{DEAD}run").glob("d*"):
                    mount(ROOM / "precious", left, None, MountFlags.BIND)

        with patch("os.rmdir", interfere):
            refused = refusal_of(run)

        assert "something is mounted here" in str(refused)
        assert checksum(ROOM / "precious") == before
        tear_down(run)
        assert checksum(ROOM / "precious") == before
        assert names_in(ROOM) == ["precious"]

    in_room(body, turn)


def test_beside_a_process_that_keeps_on_mounting_nothing_is_lost(in_room: InChild) -> None:
    def body() -> None:
        # No more than a few at a time: who never stops mounting would keep us busy for ever.
        mounting = (
            "import time\n"
            "from contextlib import suppress\n"
            "from pytest_vmsandbox.linux import MountFlags, mount, read_mountinfo\n"
            "while True:\n"
            "    for name in ('run', '.dead-run'):\n"
            "        with suppress(OSError):\n"
            "            mount('/mnt/precious', f'/mnt/{name}/m1/root', None, MountFlags.BIND)\n"
            "            print('mounted', flush=True)\n"
            "    while sum(m.mount_point.startswith('/mnt/') for m in read_mountinfo()) > 5:\n"
            "        time.sleep(0.001)\n"
        )
        before = make_precious(ROOM / "precious")
        run = make_run_directory(ROOM / "run")
        with subprocess.Popen(
            [sys.executable, "-c", mounting], stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "mounted\n"
            try:
                for _ in range(100):
                    if not run.exists():
                        make_run_directory(run)
                    with suppress(TeardownRefused):
                        tear_down(run)
                    assert checksum(ROOM / "precious") == before
            finally:
                other.kill()
        tear_down(run)
        assert checksum(ROOM / "precious") == before
        assert names_in(ROOM) == ["precious"]

    in_room(body)


def test_a_directory_below_a_run_directory_can_go_alone(in_room: InChild) -> None:
    """A jail's root, bound onto itself as jails are."""

    def body() -> None:
        run = make_run_directory(ROOM / "run")
        jail = run / "m1" / "root"
        mount(jail, jail, None, MountFlags.BIND)
        (jail / "usr").mkdir()
        mount("/usr", jail / "usr", None, MountFlags.BIND | MountFlags.REC)

        tear_down(jail)

        assert not jail.exists()
        assert (run / "m1" / "console.log").read_text() == "boot"
        assert Path("/usr/bin").is_dir()

    in_room(body)


def test_a_mount_upon_the_run_directory_itself_hides_the_marker_and_is_refused(
    in_room: InChild,
) -> None:
    def body() -> None:
        before = make_precious(ROOM / "precious")
        run = make_run_directory(ROOM / "run")
        mount(ROOM / "precious", run, None, MountFlags.BIND)

        assert "marker" in str(refusal_of(run))

        assert checksum(run) == before
        umount(run)
        tear_down(run)
        assert names_in(ROOM) == ["precious"]

    in_room(body)


def test_a_teardown_that_is_interrupted_goes_on_when_it_is_called_again(in_room: InChild) -> None:
    """Interrupted before each of its calls that change something, one after the other."""

    def body() -> None:
        before = make_precious(ROOM / "precious")
        for number in count(1):
            run = make_run_directory(ROOM / "run")
            mount(ROOM / "precious", run / "m1" / "root", None, MountFlags.BIND)
            try:
                with interrupted_before_change(number):
                    tear_down(run)
                break  # there was no call with this number
            except InterruptedHere:
                left = ROOM / next(name for name in names_in(ROOM) if name != "precious")
            if names_in(left):
                tear_down(run)
            else:
                left.rmdir()  # the marker went last: the reaper knows it by its name alone
            assert names_in(ROOM) == ["precious"]
        assert number > 5
        assert checksum(ROOM / "precious") == before

    in_room(body)


@pytest.mark.parametrize("path", [None, "", " ", "\n\t"], ids=repr)
def test_a_blank_path_asks_for_nothing(path: str | None) -> None:
    tear_down(path)


def test_what_is_not_there_asks_for_nothing(base: Path) -> None:
    tear_down(base)
    tear_down(base / "not" / "there")


@pytest.mark.parametrize(
    ("path", "because"),
    [
        ("/", "root of everything"),
        ("//", "root of everything"),
        ("/./", "root of everything"),
        ("tmp", "relative"),
        (".", "relative"),
        ("/tmp/../etc", "goes up"),
        ("/tmp/a\0b", "no file system"),
        ("/etc", "marker"),
        ("/tmp", "marker"),
        ("/proc/self", "symbolic link"),
        ("/etc/passwd", "not a directory"),
        ("/etc/passwd/below", "not a directory"),
    ],
)
def test_what_can_not_be_meant_is_refused(path: str, because: str) -> None:
    with pytest.raises(TeardownRefused, match=because):
        tear_down(path)


@pytest.mark.parametrize("spelling", ["{}/", "/{}", "{}/./", "{}//"])
def test_a_path_is_cleaned_once(base: Path, spelling: str) -> None:
    run = make_run_directory(base)

    tear_down(spelling.format(run))

    assert not run.exists()


def test_what_others_may_write_is_refused(base: Path) -> None:
    run = make_run_directory(base)
    run.chmod(0o770)

    with pytest.raises(TeardownRefused, match="marker"):
        tear_down(run)
    assert (run / "m1" / "console.log").read_text() == "boot"


@pytest.mark.skipif(os.getuid() != 0, reason="giving files away needs root")
@pytest.mark.parametrize("given_away", [".", ".vmsandbox-run"])
def test_what_is_not_ours_is_refused(base: Path, given_away: str) -> None:
    run = make_run_directory(base)
    os.chown(run / given_away, 12345, 12345)

    with pytest.raises(TeardownRefused, match="marker"):
        tear_down(run)
    assert (run / "m1" / "console.log").read_text() == "boot"
