from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytest_vmsandbox.jail.sandbox_config import parse_config
from pytest_vmsandbox.jail.sandbox_plan import (
    TMPFS_MIB,
    MountPoint,
    SandboxPlan,
    plan_sandbox,
    visible_mounts,
)
from pytest_vmsandbox.linux import MountInfo, read_mountinfo
from pytest_vmsandbox.warden.steps import (
    Access,
    Bind,
    Device,
    Proc,
    ReadOnly,
    Tmpfs,
    parse_steps,
    render_step,
)


def mounted(fs_type: str, mount_point: str) -> MountInfo:
    return MountInfo(
        mount_id=1,
        parent_id=0,
        device=(0, 1),
        root="/",
        mount_point=mount_point,
        options=(),
        fs_type=fs_type,
        source="none",
        super_options=(),
    )


HOST = (
    mounted("ext4", "/"),
    mounted("proc", "/proc"),
    mounted("binfmt_misc", "/proc/sys/fs/binfmt_misc"),
    mounted("sysfs", "/sys"),
    mounted("tmpfs", "/sys/fs/cgroup"),
    mounted("cgroup", "/sys/fs/cgroup/cpu"),
    mounted("devtmpfs", "/dev"),
    mounted("tmpfs", "/dev/shm"),
    mounted("ext4", "/home"),
)


def plan(
    *, mounts: tuple[MountInfo, ...] = (), devices: tuple[str, ...] | None = None, **options: Any
) -> SandboxPlan:
    config = parse_config("true", **options)
    return plan_sandbox(config, mounts=mounts, devices=devices)


def bound_root(path: Path) -> Bind:
    return Bind(source=str(path), target="/", access=Access.READ_WRITE, devices=True)


def test_the_root_is_bound_as_it_is_where_everything_is_writable(tmp_path: Path) -> None:
    made = plan(filesystem_root=tmp_path)

    assert made == SandboxPlan(steps=(bound_root(tmp_path),), mount_points=())


def test_all_but_the_writable_paths_is_read_only_in_the_end(tmp_path: Path) -> None:
    made = plan(
        filesystem_root=tmp_path,
        filesystem_writable_paths=["/data"],
        extra_mounts=[(None, "/shm", "tmpfs")],
    )

    assert made.steps == (
        bound_root(tmp_path),
        Tmpfs(target="/shm", size_mib=TMPFS_MIB),
        ReadOnly(target="/", writable=("/data",)),
    )


def test_extra_mounts_keep_their_order(tmp_path: Path) -> None:
    made = plan(
        filesystem_root=tmp_path,
        extra_mounts=[
            (None, "/a", "tmpfs"),
            ("/usr", "/a/usr", None, "bind"),
            (None, "/a/usr", None, "remount,ro"),
            ("proc", "/a/proc", "proc"),
        ],
    )

    assert made.steps == (
        bound_root(tmp_path),
        Tmpfs(target="/a", size_mib=TMPFS_MIB),
        Bind(source="/usr", target="/a/usr", access=Access.READ_WRITE, devices=True),
        ReadOnly(target="/a/usr"),
        Proc(target="/a/proc", only_pids=False),
        ReadOnly(target="/a/proc"),
    )


def test_the_kernels_own_file_systems_are_read_only_and_proc_is_a_new_one() -> None:
    made = plan(mounts=HOST)

    assert made.steps == (
        bound_root(Path("/")),
        ReadOnly(target="/dev", writable=("/dev/shm",)),
        Proc(target="/proc", only_pids=False),
        ReadOnly(target="/proc"),
        ReadOnly(target="/sys"),
    )


def test_a_kernels_file_system_that_is_named_stays_writable() -> None:
    made = plan(mounts=HOST, filesystem_writable_paths=["/sys/fs/cgroup", "/home"])

    assert ReadOnly(target="/sys") not in made.steps
    assert made.steps[-1] == ReadOnly(target="/", writable=("/home", "/sys/fs/cgroup"))


def test_the_kernels_file_systems_in_a_bind_are_found_where_it_puts_them() -> None:
    made = plan(
        mounts=HOST,
        extra_mounts=[("/", "/mnt", None, "bind"), ("/sys/kernel", "/srv", None, "bind")],
    )

    assert ReadOnly(target="/mnt/dev", writable=("/mnt/dev/shm",)) in made.steps
    assert Proc(target="/mnt/proc", only_pids=False) in made.steps
    assert ReadOnly(target="/srv") in made.steps


def test_given_devices_are_the_only_ones(tmp_path: Path) -> None:
    made = plan(
        filesystem_root=tmp_path,
        devices=("null", "zero"),
        extra_mounts=[("/dev", "/mnt", None, "bind")],
    )

    assert made.steps == (
        Bind(source=str(tmp_path), target="/", access=Access.READ_WRITE, devices=False),
        Device(name="null"),
        Device(name="zero"),
        Bind(source="/dev", target="/mnt", access=Access.READ_WRITE, devices=False),
    )


def test_mount_points_lie_on_what_was_mounted_last(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    made = plan(
        filesystem_root="/usr",
        extra_mounts=[
            (tmp_path, "/mnt", None, "bind"),
            (tmp_path / "file", "/mnt/x/file", None, "bind"),
            (None, "/tmp", "tmpfs"),
            (None, "/tmp/deep/proc", "proc"),
            (None, "/mntx", "tmpfs"),
            (None, "/mnt", None, "remount,ro"),
        ],
    )

    assert made.mount_points == (
        MountPoint(root="/usr", path="/mnt", directory=True),
        MountPoint(root=str(tmp_path), path="/x/file", directory=False),
        MountPoint(root="/usr", path="/tmp", directory=True),
        MountPoint(root="/usr", path="/mntx", directory=True),
    )


def test_the_steps_are_such_as_the_warden_takes() -> None:
    steps = plan(
        mounts=HOST,
        devices=("null",),
        filesystem_writable_paths=["/home"],
        extra_mounts=[(None, "/a", "tmpfs"), ("/usr", "/b", "", "bind")],
    ).steps

    crossed = json.loads(json.dumps([render_step(step) for step in steps]))

    assert parse_steps(crossed) == steps


def test_mounts_that_can_not_be_reached_are_left_out() -> None:
    hidden = (mounted("sysfs", "/nowhere/sys"), mounted("tmpfs", "/nowhere/sys/x"))

    assert visible_mounts(hidden) == ()


def test_a_mount_that_lies_under_another_is_left_out() -> None:
    ours = read_mountinfo()
    proc = next(entry for entry in ours if entry.fs_type == "proc")

    seen = visible_mounts([mounted("sysfs", proc.mount_point), proc])

    assert seen == (proc,)


def test_what_would_be_mounted_when_it_is_looked_at_is_not() -> None:
    assert visible_mounts([mounted("autofs", "/proc/sys/fs/binfmt_misc")]) == ()


def test_mounts_of_other_file_systems_are_not_even_looked_at() -> None:
    elsewhere = mounted("nfs", "/nowhere")

    assert visible_mounts([elsewhere]) == (elsewhere,)
