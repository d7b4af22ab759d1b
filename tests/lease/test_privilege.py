"""Teardown where root's mounts and files stand in a user's run directory: through sudo, or not."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.people import CHECKOUT, Kind, Person, plain_environment
from tests.precious import ODD_NAMES, checksum, make_precious

# Run as root in a mount namespace of its own: binds the first to the others, then runs a command.
_BINDING = """
import subprocess, sys
from pytest_vmsandbox.linux import MountFlags, mount
separator = sys.argv.index("--")
source, *targets = sys.argv[1:separator]
for target in targets:
    mount(source, target, None, MountFlags.BIND)
sys.exit(subprocess.run(sys.argv[separator + 1:], check=False).returncode)
"""

_MAKE = """
import json, sys
from pathlib import Path
from tests.precious import make_run_directory
make_run_directory(Path(sys.argv[1]))
print(json.dumps("made"))
"""

_TEAR_DOWN = """
import json, subprocess, sys
from pathlib import Path
from pytest_vmsandbox.errors import TeardownRefused
from pytest_vmsandbox.lease import privilege
from pytest_vmsandbox.lease.privilege import SudoPrivilege
from pytest_vmsandbox.lease.teardown import tear_down
path, interfering, source = sys.argv[1:]
calls = []
sudo = privilege._sudo
def record(*words, **options):
    calls.append([str(word) for word in words])
    if words[0] == interfering:
        for target in Path(path).parent.glob("*run*/m1/of root/sub"):
            mount = ["sudo", "-n", "mount", "--bind", "--", source, target]
            subprocess.run(mount, check=True)
    sudo(*words, **options)
privilege._sudo = record
refused = ""
try:
    tear_down(path, privilege=SudoPrivilege())
except TeardownRefused as error:
    refused = str(error)
print(json.dumps({"refused": refused, "calls": calls}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A user's run directory with files of root's in it, and precious files beside it."""

    someone: Person
    run: Path
    precious: Path
    before: str

    def tear_down(
        self, path: Path, *targets: Path, interfering: str = "-"
    ) -> tuple[str, list[list[str]]]:
        """With the precious files bound to `targets`; the refusal, and what sudo was asked for."""
        acting = [sys.executable, "-c", _TEAR_DOWN, str(path), interfering, str(self.precious)]
        done = subprocess.run(
            [
                *("unshare", "--mount", "--propagation", "private"),
                *(sys.executable, "-c", _BINDING, str(self.precious), *map(str, targets), "--"),
                *self.someone.argv(*acting),
            ],
            cwd=CHECKOUT,
            env=plain_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert checksum(self.precious) == self.before
        answer = json.loads(done.stdout)
        return answer["refused"], answer["calls"]


@pytest.fixture
def kind() -> Kind:
    return Kind.SUDO_TO_ALL


@pytest.fixture
def scene(kind: Kind, base: Path, people: Mapping[Kind, Person]) -> Scene:
    someone = people[kind]
    base.parent.chmod(0o755)
    base.mkdir(mode=0o700)
    os.chown(base, someone.uid, someone.gid)
    run = base / "run"
    someone.python(_MAKE, run)
    (run / "m1" / "of root" / "sub").mkdir(parents=True)
    (run / "m1" / "of root" / "file").write_text("root's")
    precious = base.with_name("precious")
    return Scene(someone=someone, run=run, precious=precious, before=make_precious(precious))


def test_mounts_come_off_one_by_one_and_the_rest_goes_last(scene: Scene) -> None:
    root = scene.run / "m1" / "root"

    refused, calls = scene.tear_down(scene.run, root, root, scene.run / "m1" / "of root" / "sub")

    assert refused == ""
    assert not any(scene.run.parent.iterdir())
    umounts, last = calls[:-1], calls[-1]
    assert [words[:3] for words in umounts] == [["umount", "--lazy", "--"]] * 3
    assert sorted(words[3] for words in umounts) == sorted(
        [str(root), str(root), str(scene.run / "m1" / "of root" / "sub")]
    )
    assert "rm -rf -- " in last[-4]
    assert last[-1] == str(scene.run.with_name(".dead-run") / "m1")


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_names_are_taken_as_they_are(scene: Scene, name: str) -> None:
    target = scene.run / "m1" / name
    target.mkdir()
    (scene.run / "m1" / "literal 040").mkdir()

    refused, calls = scene.tear_down(scene.run, target)

    assert refused == ""
    assert calls[0] == ["umount", "--lazy", "--", str(target)]
    assert not any(scene.run.parent.iterdir())


def test_a_mount_that_comes_just_before_the_removal_survives(scene: Scene) -> None:
    """On the same file system, so that rm(1) would walk right into it."""
    refused, calls = scene.tear_down(scene.run, interfering="unshare")

    assert "of root" in refused
    assert calls[-1][0] == "unshare"
    refused, _calls = scene.tear_down(scene.run)  # the namespace of that mount is gone
    assert refused == ""
    assert not any(scene.run.parent.iterdir())


def test_a_mount_that_comes_while_others_come_off_is_refused(scene: Scene) -> None:
    refused, calls = scene.tear_down(scene.run, scene.run / "m1" / "root", interfering="umount")

    assert "still mounted" in refused
    assert "of root/sub" in refused
    assert [words[0] for words in calls] == ["umount"]
    assert (scene.run / "m1" / "of root" / "file").read_text() == "root's"


def test_what_is_below_a_folder_of_somebody_else_is_not_handed_to_sudo(scene: Scene) -> None:
    """Whoever may write there could exchange it for a link before sudo comes to it."""
    (scene.run / "m1").chmod(0o777)

    refused, calls = scene.tear_down(scene.run, scene.run / "m1" / "root")

    assert "still mounted" in refused
    assert calls == []


@pytest.mark.parametrize("kind", [Kind.ORDINARY, Kind.SUDO_TO_QEMU_VM])
def test_without_sudo_to_root_all_stays(scene: Scene) -> None:
    refused, _calls = scene.tear_down(scene.run, scene.run / "m1" / "root")
    assert "still mounted" in refused
    assert "m1/root" in refused
    assert (scene.run / "m1" / "console.log").read_text() == "boot"

    refused, _calls = scene.tear_down(scene.run)
    assert "m1/of root" in refused
    assert "ls -ld -- " in refused
    assert (scene.run.with_name(".dead-run") / "m1" / "of root" / "file").read_text() == "root's"


_REMOVE_CGROUP = """
import json, sys
from pathlib import Path
from pytest_vmsandbox.lease.privilege import SudoPrivilege
try:
    SudoPrivilege().remove_cgroup(Path(sys.argv[1]))
except OSError as error:
    print(json.dumps(error.errno))
else:
    print(json.dumps(None))
"""


def test_a_control_group_that_sudo_finds_busy_or_gone_is_so_for_us(
    tmp_path: Path, people: Mapping[Kind, Person]
) -> None:
    someone = people[Kind.SUDO_TO_ALL]
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    (hidden / "group").mkdir()
    subprocess.run(["mount", "--bind", hidden / "group", hidden / "group"], check=True)
    try:
        busy = someone.python(_REMOVE_CGROUP, hidden / "group")
    finally:
        subprocess.run(["umount", hidden / "group"], check=True)
    removed = someone.python(_REMOVE_CGROUP, hidden / "group")
    gone = someone.python(_REMOVE_CGROUP, hidden / "group")

    assert (busy, removed, gone) == (errno.EBUSY, None, errno.ENOENT)
