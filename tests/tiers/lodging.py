"""A lodging: a user for one tier, with a home and a cache; nothing of it is left afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pytest_vmsandbox.image.image import Image
from tests.people import as_user, counted_for_qemu_vm, made_qemu_vm, made_sudoers, made_user
from tests.removal import remove_as

# What a tier's user is given to start a warden with; {user} is the user's name.
SUDO_RULES = {
    "sudo": "{user} ALL=(ALL:ALL) NOPASSWD: ALL",
    "qemu-vm": "{user} ALL=(qemu-vm) NOPASSWD: ALL",
}

_HANDED_ON = ("VMSANDBOX_SEED", "VMSANDBOX_MOMENTS")

# How much is tried at random, by default: `make test` has no time for as much.
_THOROUGH = {
    "VMSANDBOX_MUTATIONS": "100000",
    "VMSANDBOX_TEST_FUZZED": "100000",
    "VMSANDBOX_RESTORES": "40",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lodging:
    """Who runs a tier's tests, and where that one may write; `left` is what was found at the end.

    `left` is filled when the lodging is closed, and what is in it removed, but for what it says.
    """

    tier: str
    user: str
    place: Path
    left: list[str] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        """Where its images are kept."""
        return self.place / "home" / ".cache" / "vmsandbox"

    def argv(self, *argv: str | Path) -> list[str]:
        """The command line that runs `argv` as its user, in the lodging."""
        return [*as_user(self.user), *map(str, argv)]

    def environment(self) -> dict[str, str]:
        """All of the environment: nothing of ours, of coverage's or of an outer run's.

        But for what says how much is tried, and out of which seed.
        """
        home = self.place / "home"
        return {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(home),
            "USER": self.user,
            "LANG": "C.UTF-8",
            "TMPDIR": str(self.place / "tmp"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(home / "hypothesis"),
            "VMSANDBOX_TIER": self.tier,
            "VMSANDBOX_CACHE_DIR": str(self.cache),
            **_THOROUGH,
            **{n: os.environ[n] for n in (*_HANDED_ON, *_THOROUGH) if n in os.environ},
        }


@contextmanager
def open_lodging(tier: str, *, image: Image, agents: Sequence[Path]) -> Iterator[Lodging]:
    """A lodging for a tier, with a copy of an image and of agents in its cache; we are root."""
    with ExitStack() as undo:
        undo.enter_context(counted_for_qemu_vm())
        made_qemu_vm()
        name = "root"
        if tier != "root":
            # Two runs at once, and tiers of one run, have users of their own.
            name = f"vmst{os.getpid()}t{tier[:1]}"  # not what people.py calls its own
            undo.enter_context(made_user(name))
        if rule := SUDO_RULES.get(tier):
            undo.enter_context(made_sudoers(name, [rule.format(user=name)]))
        place = Path(tempfile.mkdtemp(prefix="vmst-", dir="/tmp"))
        lodging = Lodging(tier=tier, user=name, place=place)
        undo.callback(_remove, lodging, place)
        _furnish(lodging, image=image, agents=agents)
        if tier != "root":
            # A number is given out again: what another user had it for is not ours.
            undo.callback(_leave, lodging, others=frozenset(_files_of(lodging)))
        yield lodging


def _furnish(lodging: Lodging, *, image: Image, agents: Sequence[Path]) -> None:
    lodging.place.chmod(0o755)
    (lodging.place / "tmp").mkdir()
    lodging.cache.mkdir(parents=True)
    # Built anew it would be the same, after half a minute. The packages decide which it is.
    shutil.copytree(image.directory.parents[1] / "packages", lodging.cache / "packages")
    shutil.copytree(image.directory, lodging.cache / "images" / image.directory.name)
    # What the C compiler made of its own library, half a minute's work.
    compiled = Path("~/.cache/zig").expanduser()
    if compiled.is_dir():
        shutil.copytree(compiled, lodging.place / "home" / ".cache" / "zig")
    for agent in agents:
        shutil.copy2(agent, lodging.cache)
    user = pwd.getpwnam(lodging.user)
    for found in [lodging.place, *lodging.place.rglob("*")]:
        os.chown(found, user.pw_uid, user.pw_gid, follow_symlinks=False)


def _leave(lodging: Lodging, *, others: frozenset[Path]) -> None:
    """Note and remove what lies about."""
    user = pwd.getpwnam(lodging.user)
    base = Path(f"/tmp/vmsandbox-{user.pw_uid}")  # the base of its run directories
    for path in _files_of(lodging):
        if path in others:
            continue
        if path != base:
            lodging.left.append(str(path))
        else:
            runs = [run for run in path.iterdir() if run.name != "mount-points"]
            lodging.left.extend(map(str, [*runs, *(path / "mount-points").glob("*")]))
        _remove(lodging, path)


def _remove(lodging: Lodging, path: Path) -> None:
    if stays := remove_as(pwd.getpwnam(lodging.user), path):
        lodging.left.append(f"{stays} (it is still there)")


def _files_of(lodging: Lodging) -> list[Path]:
    uid = pwd.getpwnam(lodging.user).pw_uid
    return [
        path
        for folder in map(Path, ("/tmp", "/var/tmp", "/dev/shm", "/run", "/run/lock"))
        if folder.is_dir()
        for path in folder.iterdir()
        if not path.name.startswith("vmst-") and path.lstat().st_uid == uid
    ]
