"""The modules disk, looked at with e2fsprogs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.image.disk import make_modules_disk

DEBUGFS = shutil.which("debugfs", path="/usr/sbin:/sbin") or ""
pytestmark = pytest.mark.skipif(not DEBUGFS, reason="e2fsprogs is not installed")


def ask(image: Path, request: str) -> str:
    return subprocess.run(
        [DEBUGFS, "-R", request, image], capture_output=True, text=True, check=True, timeout=20
    ).stdout


def make(directory: Path, *, uid: int | None = None) -> Path:
    tree = directory / "tree"
    for number in range(300):
        path = tree / "6.1" / f"folder-{number % 7}" / f"module-{number}.ko"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(number.to_bytes(4, "little") * number * 100)
        if uid is not None:
            os.chown(path, uid, uid)
    out = directory / "modules.img"
    make_modules_disk(tree, out, deadline=Deadline.after(seconds=60))
    return out


def test_the_file_system_is_sound_and_gives_back_what_went_in(tmp_path: Path) -> None:
    image = make(tmp_path)

    check = subprocess.run(
        [Path(DEBUGFS).with_name("e2fsck"), "-fn", image],
        check=False,
        capture_output=True,
        timeout=60,
    )
    subprocess.run([DEBUGFS, "-R", f"rdump 6.1 {tmp_path}", image], check=True, timeout=60)
    assert check.returncode == 0, check.stdout
    given_back = tmp_path / "6.1" / "folder-5" / "module-299.ko"
    assert given_back.read_bytes() == (299).to_bytes(4, "little") * 29900


def test_everything_belongs_to_root_and_has_no_age(tmp_path: Path) -> None:
    image = make(tmp_path)

    for path in ("/", "6.1", "6.1/folder-0", "6.1/folder-6/module-69.ko"):
        seen = ask(image, f"stat {path}").split()
        assert seen[seen.index("User:") + 1] == "0", path
        assert seen[seen.index("Group:") + 1] == "0", path
        assert seen[seen.index("ctime:") + 1].startswith("0x00000000"), path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_same_tree_gives_the_same_bytes_whoever_owns_it(tmp_path: Path) -> None:
    ours = make(tmp_path / "a")
    theirs = make(tmp_path / "b", uid=65534)

    assert ours.read_bytes() == theirs.read_bytes()


def test_nothing_but_the_disk_is_left_behind(tmp_path: Path) -> None:
    make(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["modules.img", "tree"]
