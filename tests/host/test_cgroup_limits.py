"""What control groups leave us, as their files tell it in both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_vmsandbox.host import spare
from pytest_vmsandbox.host.cgroup_limits import MemoryLimit, memory_limits, processor_limit
from pytest_vmsandbox.linux import MountInfo, read_mountinfo

GIB = 1 << 30


def mounted(
    place: Path, fs_type: str, *, root: str = "/", words: tuple[str, ...] = ()
) -> MountInfo:
    return MountInfo(
        mount_id=1,
        parent_id=0,
        device=(0, 1),
        root=root,
        mount_point=str(place),
        options=("rw",),
        fs_type=fs_type,
        source=fs_type,
        super_options=("rw", *words),
    )


def member(tmp_path: Path, line: str) -> Path:
    file = tmp_path / "cgroup"
    file.write_text(f"{line}\n")
    return file


def group(directory: Path, **files: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(f"{text}\n")


def test_every_group_above_ours_may_limit_it(tmp_path: Path) -> None:
    top = tmp_path / "top"
    group(top)  # the topmost group has no such files
    group(top / "a", memory__max=GIB, memory__current=400, memory__stat="anon 1\ninactive_file 100")
    group(top / "a/b", memory__max="max", memory__current=200, memory__stat="inactive_file 0")
    group(top / "a", cpu__max="150000 100000")
    group(top / "a/b", cpu__max="max 100000")
    seen = {
        "membership": member(tmp_path, "0::/a/b"),
        "mounts": [mounted(top, "cgroup2")],
    }

    assert memory_limits(**seen) == [MemoryLimit(limit=GIB, used=300)]  # type: ignore[arg-type]
    assert processor_limit(**seen) == 1.5  # type: ignore[arg-type]


def test_the_first_version_names_them_otherwise(tmp_path: Path) -> None:
    top = tmp_path / "top"
    files = {"memory__limit_in_bytes": str(GIB), "memory__usage_in_bytes": "500"}
    group(top / "x", **files, memory__stat="total_inactive_file 100\ninactive_file 7")
    group(top / "x", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    group(top, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    mounts = [mounted(top, "cgroup", words=("memory", "cpu"))]
    membership = member(tmp_path, "4:memory,cpu:/x")

    assert memory_limits(membership=membership, mounts=mounts) == [MemoryLimit(limit=GIB, used=400)]
    assert processor_limit(membership=membership, mounts=mounts) == 0.5


@pytest.mark.parametrize("path", ["/docker/abc", "/../..", "/elsewhere"])
def test_in_a_container_the_group_is_what_is_mounted(tmp_path: Path, path: str) -> None:
    top = tmp_path / "top"
    group(top, memory__max="1000", memory__current="10", memory__stat="inactive_file 0")
    mounts = [mounted(top, "cgroup2", root="/docker/abc" if "docker" in path else "/x")]

    assert memory_limits(membership=member(tmp_path, f"0::{path}"), mounts=mounts) == [
        MemoryLimit(limit=1000, used=10)
    ]


def test_what_changes_is_seen_at_the_next_look(tmp_path: Path) -> None:
    top = tmp_path / "top"
    group(top / "a", memory__max="1000", memory__current="10", memory__stat="inactive_file 0")
    group(top / "b", memory__max="5000", memory__current="20", memory__stat="inactive_file 0")
    mounts = [mounted(top, "cgroup2")]

    def limits(path: str) -> list[int]:
        seen = memory_limits(membership=member(tmp_path, f"0::{path}"), mounts=mounts)
        return [one.limit for one in seen]

    assert limits("/a") == [1000]
    group(top / "a", memory__max="500")
    assert limits("/a") == [500]
    assert limits("/b") == [5000]


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    seen = member(tmp_path, "0::/")

    assert memory_limits(membership=seen, mounts=[]) == []
    assert processor_limit(membership=seen, mounts=[]) is None


def test_what_a_group_leaves_is_all_that_is_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = MemoryLimit(limit=1000 << 20, used=500 << 20)
    monkeypatch.setattr(spare, "memory_limits", lambda: [limit])
    monkeypatch.setattr(spare, "processor_limit", lambda: 0.5)

    assert spare.spare_memory_bytes() <= 400 << 20
    assert spare.idle_processors() == 0


def test_this_hosts_own_groups_are_understood() -> None:
    assert all(limit.used >= 0 for limit in memory_limits())
    assert spare.spare_memory_bytes() >= 0
    limit = processor_limit()
    assert limit is None or limit > 0


@pytest.mark.skipif(os.getuid() != 0, reason="making a control group needs root")
def test_a_real_limit_is_seen(tmp_path: Path) -> None:
    ours = next(
        (line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line),
        None,
    )
    mount = next((one for one in read_mountinfo() if "memory" in one.super_options), None)
    if ours is None or mount is None or mount.root != "/":
        pytest.skip("no control groups of the first version, in which anybody's may be divided")
    path = ours.split(":", 2)[2].rstrip("/") + f"/vmsandbox-test-{os.getpid()}"
    made = Path(mount.mount_point + path)
    try:
        made.mkdir()
        (made / "memory.limit_in_bytes").write_text(str(64 << 20))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        innermost = memory_limits(membership=member(tmp_path, f"4:memory:{path}"))[0]
        assert innermost.limit == 64 << 20
    finally:
        made.rmdir()
