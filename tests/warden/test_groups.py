"""Control groups: limits for all that a process starts, gone with it."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Timer

import pytest

from pytest_vmsandbox.linux.mountinfo import MountInfo, read_mountinfo
from pytest_vmsandbox.warden.client import Warden
from pytest_vmsandbox.warden.groups import (
    Group,
    Hierarchy,
    candidates,
    find_hierarchies,
    try_hierarchy,
)
from pytest_vmsandbox.warden.requests import Limits
from tests.warden.conftest import GROUP, SLEEP, TRUE, Streams, order, python, run, see

LIMITS = ("memory.limit_in_bytes", "memory.max", "pids.max")


async def test_it_is_in_a_group_of_its_own_which_is_gone_afterwards(warden: Warden) -> None:
    if not warden.greeting.groups:
        pytest.skip("this user can't make control groups")
    limits = Limits(memory_bytes=64 << 20, processes=20)
    ordered = order(SLEEP, "60", group=GROUP, limits=limits)
    groups = [Path(parent) / f"vmsandbox-{GROUP}" for parent in warden.greeting.groups]
    with Streams() as streams:
        async with warden.launch(ordered, streams.descriptors) as process:
            for group in groups:
                assert (group / "cgroup.procs").read_text().split() == [str(process.pid)]
            said = [
                (group / name).read_text().strip()
                for group in groups
                for name in (*LIMITS, "memory.memsw.limit_in_bytes")
                if (group / name).exists()
            ]
            swap, whole = (
                {(group / name).read_text() for group in groups if (group / name).exists()}
                for name in ("memory.swap.max", "memory.oom.group")
            )
    assert set(said) == {"67108864", "20"}
    assert swap <= {"0\n"}
    assert whole <= {"1\n"}
    assert not any(group.exists() for group in groups)


async def test_what_it_starts_is_limited_with_it(warden: Warden) -> None:
    if "pids" not in warden.greeting.limits:
        pytest.skip("this user can't limit the number of processes")
    script = """
import json, os
children = 0
try:
    while True:
        if os.fork() == 0:
            import time; time.sleep(60)
        children += 1
except OSError as error:
    print(json.dumps([children, error.errno]))
"""
    limits = Limits(processes=12)

    assert await see(warden, python(script, group=GROUP, limits=limits)) == [11, errno.EAGAIN]


async def test_a_group_s_name_serves_one_at_a_time(warden: Warden) -> None:
    if not warden.greeting.groups:
        pytest.skip("this user can't make control groups")
    with Streams() as streams:
        async with warden.launch(order(SLEEP, "60", group=GROUP), streams.descriptors) as first:
            with pytest.raises(OSError, match="busy"):
                async with warden.launch(order(TRUE, group=GROUP), streams.descriptors):
                    pass
            for parent in warden.greeting.groups:
                members = (Path(parent) / f"vmsandbox-{GROUP}" / "cgroup.procs").read_text()
                assert members.split() == [str(first.pid)]


async def test_a_group_that_a_dead_warden_left_is_no_hindrance(warden: Warden) -> None:
    if not warden.greeting.groups:
        pytest.skip("this user can't make control groups")
    left = [Path(parent) / f"vmsandbox-{GROUP}" for parent in warden.greeting.groups]
    if not all(os.access(group.parent, os.W_OK) for group in left):
        pytest.skip("takes the warden's own rights: it makes what a warden left")
    for group in left:
        group.mkdir()

    assert (await run(warden, order(TRUE, group=GROUP)))[0] == 0

    assert not any(group.exists() for group in left)


# The choice, on directories that look like hierarchies


def mounted(
    place: Path, *, kind: str = "cgroup2", root: str = "/", device: str = "0:99"
) -> MountInfo:
    words = {"cgroup2": "rw", "cgroup": "rw,memory,pids"}[kind]
    return MountInfo.parse(f"9 1 {device} {root} {place} rw - {kind} none {words}".encode())


def make_tree(top: Path, handed_on: Mapping[str, str]) -> None:
    for name, controllers in handed_on.items():
        (top / name).mkdir(parents=True, exist_ok=True)
        (top / name / "cgroup.subtree_control").write_text(f"{controllers}\n")


# As systemd makes them for a program in a scope of an ordinary user's own.
SYSTEMD = {
    "": "cpu memory pids",
    "user.slice": "memory pids",
    "user.slice/service": "memory pids",
    "user.slice/service/app.slice": "memory",
    "user.slice/service/app.slice/run.scope": "",
}


def places(choices: Sequence[Hierarchy], top: Path) -> list[str]:
    return [str(choice.parent.relative_to(top)) for choice in choices]


def test_our_own_group_comes_first_and_then_what_lies_above_it(tmp_path: Path) -> None:
    make_tree(tmp_path, SYSTEMD)
    app = "user.slice/service/app.slice"

    (choices,) = candidates([mounted(tmp_path)], own={"": f"/{app}/run.scope"})

    # The scope holds a process, and so hands on nothing.
    assert places(choices, tmp_path) == [app, "user.slice/service", "user.slice", "."]
    assert [sorted(choice.files) for choice in choices[:2]] == [["memory"], ["memory", "pids"]]


def test_version_1_is_as_good_in_our_own_group(tmp_path: Path) -> None:
    (tmp_path / "ours" / "deep").mkdir(parents=True)

    (choices,) = candidates([mounted(tmp_path, kind="cgroup")], own={"memory": "/ours/deep"})

    assert places(choices, tmp_path) == ["ours/deep", "ours", "."]
    assert {name for choice in choices for name in choice.files} == {"memory", "pids"}


@pytest.mark.parametrize(
    ("root", "own", "expected"),
    [
        ("/box", "/box/ours", ["ours", "."]),  # a container that sees its own part
        ("/box", "/box", ["."]),
        ("/box", "/elsewhere", ["."]),
        ("/", "/../ours", ["."]),  # a namespace that begins below
        ("/..", "/ours", ["."]),
    ],
)
def test_a_group_out_of_sight_is_not_looked_for(
    root: str, own: str, expected: list[str], tmp_path: Path
) -> None:
    make_tree(tmp_path / "top", {"": "memory", "ours": "memory"})
    make_tree(tmp_path / "ours", {"": "memory"})

    (choices,) = candidates([mounted(tmp_path / "top", root=root)], own={"": own})

    assert places(choices, tmp_path / "top") == expected


def test_version_2_goes_first_and_each_hierarchy_once(tmp_path: Path) -> None:
    first, again, old = (tmp_path / name for name in ("first", "again", "old"))
    for top in (first, again, old):
        make_tree(top, {"": "memory"})
    mounts = [
        mounted(old, kind="cgroup", device="0:50"),
        mounted(first),
        mounted(again),
    ]

    found = candidates(mounts, own={"": "/", "memory": "/"})

    assert [[choice.parent for choice in choices] for choices in found] == [[first], [old]]


# The trial, on this host's own


@pytest.fixture
def hierarchy() -> Iterator[Hierarchy]:
    """A real one, in which we may make groups; nothing may be left in it."""
    found = find_hierarchies()
    if not found:
        pytest.skip("this user can't make control groups")
    yield found[0]
    assert not list(found[0].parent.glob("vmsandbox-trial-*"))


def test_what_a_group_does_not_take_is_dropped(hierarchy: Hierarchy) -> None:
    ((controller, settings),) = list(hierarchy.files.items())[:1]
    odd = {**settings, "memory.no.such": None, "cgroup.procs": 0x7FFFFFFF}

    assert try_hierarchy(replace(hierarchy, files={controller: odd})) == replace(
        hierarchy, files={controller: settings}
    )


def test_without_its_limit_a_controller_is_not_reported(hierarchy: Hierarchy) -> None:
    broken = {**hierarchy.files, "pids": {"no.such": None, "cgroup.clone_children": 0}}
    alone = {"memory": {"no.such": None}}

    tried = try_hierarchy(replace(hierarchy, files=broken))

    assert "pids" not in (tried.files if tried else {})
    assert try_hierarchy(replace(hierarchy, files=alone)) is None


def test_where_no_group_can_be_made_there_is_none(tmp_path: Path) -> None:
    nowhere = Hierarchy(parent=tmp_path / "gone", files={"pids": {"pids.max": None}})

    assert try_hierarchy(nowhere) is None


def real_mount(kind: str, option: str = "rw") -> Path:
    """Where this host has mounted such a hierarchy, in which we may make groups."""
    for found in read_mountinfo():
        place = Path(found.mount_point)
        if found.fs_type == kind and option in found.super_options and os.access(place, os.W_OK):
            return place
    pytest.skip(f"takes a {kind} ({option}) that may be written")


def test_a_group_that_nobody_can_enter_is_no_limit() -> None:
    place = real_mount("cgroup", "cpuset")  # a new group there has no processor
    closed = Hierarchy(parent=place, files={"pids": {"cpuset.memory_migrate": 1}})

    assert try_hierarchy(closed) is None
    assert not list(place.glob("vmsandbox-trial-*"))


def test_a_group_of_version_2_is_tried_and_removed() -> None:
    place = real_mount("cgroup2")
    files = {"pids": {"cgroup.max.descendants": None, "memory.no.such": 0}}

    tried = try_hierarchy(Hierarchy(parent=place, files=files))

    assert tried is not None
    assert tried.files == {"pids": {"cgroup.max.descendants": None}}
    assert not list(place.glob("vmsandbox-trial-*"))


@pytest.fixture
def apart(hierarchy: Hierarchy) -> Iterator[Hierarchy]:
    """One in which there are no groups but the test's."""
    parent = hierarchy.parent / f"vmsandbox-apart-{os.getpid()}"
    parent.mkdir()
    yield replace(hierarchy, parent=parent)
    for left in parent.glob("vmsandbox-*"):
        left.rmdir()
    parent.rmdir()


@pytest.mark.parametrize("name", ["vmsandbox-trial-left", "vmsandbox-r0123abcd-gw0-m1"])
def test_an_empty_group_that_a_killed_warden_left_is_swept_an_hour_later(
    name: str, apart: Hierarchy, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, entered = apart.parent / name, apart.parent / "vmsandbox-entered"
    for group in (left, entered):
        group.mkdir()
    try_hierarchy(apart)
    assert left.exists()  # it may be another warden's, at this moment

    now = time.time()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        (entered / "cgroup.procs").write_text(str(process.pid))
        with monkeypatch.context() as later:
            later.setattr(time, "time", lambda: now + 3700)
            try_hierarchy(apart)

        assert entered.exists()
        process.kill()
    assert not left.exists()


@contextmanager
def _with_a_process(hierarchy: Hierarchy) -> Iterator[tuple[Group, subprocess.Popen[bytes]]]:
    """A group, and a process in it that waits for its stdin."""
    group = Group(f"test-{os.getpid()}", hierarchies=[hierarchy], limits=Limits(processes=64))
    (path,) = group.paths
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        try:
            (path / "cgroup.procs").write_text(str(process.pid))
            yield group, process
        finally:
            process.kill()
    group.close()
    assert not path.exists()


def test_a_group_whose_last_process_is_about_to_end_is_removed(hierarchy: Hierarchy) -> None:
    with _with_a_process(hierarchy) as (group, process):
        (path,) = group.paths
        Timer(0.05, process.kill).start()

        group.close()

        assert not path.exists()


def test_a_group_that_is_not_left_is_not_waited_for_for_long(hierarchy: Hierarchy) -> None:
    with _with_a_process(hierarchy) as (group, _):
        (path,) = group.paths
        began = time.monotonic()

        group.close()

        assert path.exists()
        assert time.monotonic() - began < 10


def test_what_makes_a_limit_whole_goes_with_it() -> None:
    memory = {"memory.max": None, "memory.swap.max": 0}
    hierarchy = Hierarchy(parent=Path("/"), files={"memory": memory, "pids": {"pids.max": None}})

    assert hierarchy.amounts(Limits(memory_bytes=7)) == {"memory.max": 7, "memory.swap.max": 0}
    assert hierarchy.amounts(Limits(processes=3)) == {"pids.max": 3}
