from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from tests.people import CHECKOUT
from tests.removal import remove_as

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="takes root: it removes as others")

# In a mount namespace of its own.
REMOVE_ON_A_MOUNT = """
import pwd, subprocess, sys
from pathlib import Path
from tests.removal import remove_as
tree = Path(sys.argv[1])
subprocess.run(["mount", "--bind", sys.argv[2], tree / "deep"], check=True)
print(remove_as(pwd.getpwnam("nobody"), tree))
"""


@pytest.fixture
def tree(scratch: Path) -> Path:
    """A tree of nobody's."""
    directory = scratch / "tree"
    for made in (directory, directory / "deep"):
        made.mkdir()
    (directory / "deep" / "file").write_text("theirs")
    for found in (directory, *directory.rglob("*")):
        os.chown(found, pwd.getpwnam("nobody").pw_uid, -1)
    return directory


def test_a_tree_goes_from_a_folder_that_its_owner_can_write(tree: Path, scratch: Path) -> None:
    scratch.chmod(0o1777)

    assert remove_as(pwd.getpwnam("nobody"), tree) == ""
    assert not tree.exists()


def test_a_tree_goes_though_the_folder_around_it_is_roots(tree: Path) -> None:
    (tree / "deep").chmod(0)

    assert remove_as(pwd.getpwnam("nobody"), tree) == ""
    assert not tree.exists()


def test_a_link_goes_and_what_it_leads_to_stays(tree: Path, scratch: Path) -> None:
    (scratch / "link").symlink_to(tree)
    (tree / "out").symlink_to(scratch / "precious")
    (scratch / "precious").mkdir(mode=0o777)

    assert remove_as(pwd.getpwnam("nobody"), scratch / "link") == ""
    assert (tree / "deep" / "file").read_text() == "theirs"
    assert remove_as(pwd.getpwnam("nobody"), tree) == ""
    assert (scratch / "precious").is_dir()


def test_what_is_not_its_owners_stays_and_is_named(tree: Path) -> None:
    (tree / "deep" / "roots").mkdir(mode=0o755)
    (tree / "deep" / "roots" / "file").write_text("root's")

    stays = remove_as(pwd.getpwnam("nobody"), tree)

    assert stays.startswith(f"{tree}: Directory not empty; rm: ")
    assert (tree / "deep" / "roots" / "file").read_text() == "root's"


def test_a_tree_in_which_something_is_mounted_is_not_touched(tree: Path, scratch: Path) -> None:
    precious = scratch / "precious"
    precious.mkdir()
    precious.chmod(0o777)
    (precious / "file").write_text("precious")
    os.chown(precious / "file", pwd.getpwnam("nobody").pw_uid, -1)

    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", REMOVE_ON_A_MOUNT, tree, precious],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout == f"{tree}: {tree / 'deep'} is mounted\n", done.stderr
    assert (precious / "file").exists()
    assert (tree / "deep" / "file").exists()
