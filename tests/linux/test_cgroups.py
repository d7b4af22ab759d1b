"""Control groups: which ones a process is in, and where they lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import MountInfo, own_and_above, read_mountinfo, read_own_groups


def mounted(place: Path, *, root: str = "/") -> MountInfo:
    return MountInfo.parse(f"9 1 0:99 {root} {place} rw - cgroup2 none rw".encode())


def test_each_controller_is_told_with_its_group(tmp_path: Path) -> None:
    told = tmp_path / "cgroup"
    told.write_bytes(b"12:cpu,cpuacct:/a:b\n3:name=systemd:/user \xff\n0::/scope\n")

    assert read_own_groups(told) == {
        "cpu": "/a:b",
        "cpuacct": "/a:b",
        "name=systemd": os.fsdecode(b"/user \xff"),
        "": "/scope",
    }


def test_what_is_no_such_file_is_a_value_error(tmp_path: Path) -> None:
    told = tmp_path / "cgroup"
    told.write_text("0:nothing\n")

    with pytest.raises(ValueError, match="unpack"):
        read_own_groups(told)


def test_a_group_comes_with_all_above_it_as_far_as_they_are_mounted(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)

    assert own_and_above(mounted(tmp_path), "/a/b") == [tmp_path / "a/b", tmp_path / "a", tmp_path]
    assert own_and_above(mounted(tmp_path, root="/box"), "/box/a") == [tmp_path / "a", tmp_path]
    assert own_and_above(mounted(tmp_path), "/a/gone") == [tmp_path / "a", tmp_path]


@pytest.mark.parametrize(
    ("root", "own"), [("/box", "/elsewhere"), ("/", "/../a"), ("/..", "/a"), ("/", "")]
)
def test_of_a_group_out_of_sight_the_top_is_left(root: str, own: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    assert own_and_above(mounted(tmp_path, root=root), own) == [tmp_path]


def test_this_process_is_in_what_is_found_first() -> None:
    mounts = [mount for mount in read_mountinfo() if mount.fs_type in ("cgroup", "cgroup2")]
    own = read_own_groups()
    seen = [
        own_and_above(mount, own[name])[0]
        for mount in mounts
        for name in own
        if (name in mount.super_options if name else mount.fs_type == "cgroup2")
        and own[name].startswith(mount.root.rstrip("/") + "/")
    ]
    if not seen:
        pytest.skip("no control groups of ours are mounted here")

    for group in seen:
        assert str(os.getpid()) in (group / "cgroup.procs").read_text().split()
