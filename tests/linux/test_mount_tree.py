"""Mounts as descriptors, in a mount namespace that is thrown away."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import (
    AtFlags,
    AtLocation,
    CloneFlags,
    MountAttrFlags,
    MountFlags,
    MountSetattrFlags,
    MoveMountFlags,
    OpenTreeFlags,
    mount,
    mount_setattr,
    move_mount,
    open_tree,
    read_mountinfo,
    unshare,
)
from pytest_vmsandbox.linux.mount_tree import _MountAttr, _with_place
from pytest_vmsandbox.linux.owned_fd import OwnedFd

InChild = Callable[..., None]

_TOGETHER = "userns_fd goes with MOUNT_ATTR_IDMAP, and it with that"


def test_a_copied_tree_is_attached_elsewhere(in_room: InChild) -> None:
    def body() -> None:
        for name in ("a", "b"):
            Path(name).mkdir()
        mount("it", "a", "tmpfs")
        Path("a/sub").mkdir()
        mount("deeper", "a/sub", "tmpfs")
        Path("a/sub/x").write_text("1")
        with open_tree("a", OpenTreeFlags.CLONE | OpenTreeFlags.AT_RECURSIVE) as tree:
            assert not os.get_inheritable(tree)
            mount_setattr(AtLocation(tree), attr_set=MountAttrFlags.RDONLY)
            move_mount(AtLocation(tree), "b")

        assert Path("b/sub/x").read_text() == "1"
        Path("b/sub/x").write_text("2")  # only the upper mount became read-only
        with pytest.raises(OSError, match="Read-only file system"):
            Path("b/y").write_text("1")

    in_room(body)


def test_an_attached_mount_is_moved_by_descriptor_and_name(in_room: InChild) -> None:
    def body() -> None:
        for name in ("a", "b"):
            Path(name).mkdir()
        mount("it", "a", "tmpfs")
        here = os.open(".", os.O_PATH)
        move_mount(AtLocation(here, "a"), AtLocation(here).joinpath("b"))

        assert [one.mount_point for one in read_mountinfo() if one.source == "it"] == ["/mnt/b"]

    in_room(body)


def test_the_places_decide_whether_links_are_followed(in_room: InChild) -> None:
    def body() -> None:
        for name in ("a", "b"):
            Path(name).mkdir()
        mount("it", "a", "tmpfs")
        Path("to_a").symlink_to("a")
        Path("to_b").symlink_to("b")
        every = MoveMountFlags.F_SYMLINKS | MoveMountFlags.T_SYMLINKS
        for source, target in (("to_a", "b"), ("a", "to_b")):
            places = [AtLocation.of(source), AtLocation.of(target)]
            nofollow = [p.nosymfollow() if "to" in str(p) else p for p in places]
            with pytest.raises(OSError, match="move_mount") as caught:
                # What the flags ask for makes no difference to the places.
                move_mount(nofollow[0], nofollow[1], every)
            assert caught.value.errno in (errno.EINVAL, errno.ENOTDIR)
            assert (caught.value.filename, caught.value.filename2) == (source, target)
        move_mount("to_a", "to_b")
        assert [one.mount_point for one in read_mountinfo() if one.source == "it"] == ["/mnt/b"]

    in_room(body)


@pytest.mark.parametrize(
    ("given", "of_place", "expected"),
    [
        ("", "", "own.SYMLINKS"),
        ("own.SYMLINKS", "", "own.SYMLINKS"),
        ("", "AT_SYMLINK_NOFOLLOW", ""),
        ("own.SYMLINKS other.SYMLINKS", "AT_SYMLINK_NOFOLLOW", "other.SYMLINKS"),
        ("own.AUTOMOUNTS", "", "own.SYMLINKS own.AUTOMOUNTS"),
        ("own.AUTOMOUNTS other.AUTOMOUNTS", "AT_NO_AUTOMOUNT", "own.SYMLINKS other.AUTOMOUNTS"),
        ("", "AT_EMPTY_PATH AT_SYMLINK_NOFOLLOW", "own.EMPTY_PATH"),
        ("SET_GROUP BENEATH", "", "own.SYMLINKS SET_GROUP BENEATH"),
    ],
)
@pytest.mark.parametrize(("own", "other"), [("F_", "T_"), ("T_", "F_")])
def test_what_a_place_says_becomes_move_mounts_own_flags(
    given: str, of_place: str, expected: str, own: str, other: str
) -> None:
    """`own.` stands for the end that the place is at."""

    def flags(words: str) -> int:
        named = words.replace("own.", own).replace("other.", other).split()
        return sum(MoveMountFlags[word] for word in named)

    place = AtLocation(path="x", flags=sum(AtFlags[word] for word in of_place.split()))

    found = _with_place(flags(given), place, argument="it", shift=0 if own == "F_" else 4)

    assert found == flags(expected)


@pytest.mark.parametrize("flag", [AtFlags.AT_RECURSIVE, AtFlags.AT_REMOVEDIR])
def test_a_flag_that_means_nothing_to_move_mount_is_refused(flag: AtFlags) -> None:
    odd = AtLocation(path="/no such place", flags=flag)

    with pytest.raises(ValueError, match=r"^move_mount: source: 0x.* not accepted: "):
        move_mount(odd, "/no such place")
    with pytest.raises(ValueError, match=r"^move_mount: target: 0x.* not accepted: "):
        move_mount("/no such place", odd)


def test_a_flag_of_a_place_that_a_call_does_not_take_is_refused() -> None:
    odd = AtLocation(path="/no such place", flags=AtFlags.AT_SYMLINK_FOLLOW)

    with pytest.raises(ValueError, match=r"^open_tree: place: 0x.* not accepted: 0x400$"):
        open_tree(odd)
    with pytest.raises(ValueError, match=r"^mount_setattr: place: 0x.* not accepted: 0x400$"):
        mount_setattr(odd)


def test_a_tree_is_only_copied_whole_when_it_is_copied() -> None:
    with pytest.raises(ValueError, match=r"^open_tree: flags: AT_RECURSIVE needs OPEN_TREE_CLONE$"):
        open_tree("/no such place", OpenTreeFlags.AT_RECURSIVE)
    with pytest.raises(ValueError, match=r"^open_tree: flags: AT_RECURSIVE needs OPEN_TREE_CLONE$"):
        open_tree(AtLocation(path="/no such place", flags=AtFlags.AT_RECURSIVE))


def test_a_tree_opened_without_a_copy_is_the_place_itself(tmp_path: Path) -> None:
    def mount_of(fd: int) -> str:
        return Path(f"/proc/self/fdinfo/{fd:d}").read_text().split("mnt_id:")[1].split()[0]

    with open_tree(tmp_path) as tree:
        assert os.path.samestat(os.fstat(tree), tmp_path.stat())
        with OwnedFd(os.open(tmp_path, os.O_PATH)) as usual:
            assert mount_of(tree) == mount_of(usual)
        with open_tree(AtLocation(tree)) as again:
            assert os.path.samestat(os.fstat(again), tmp_path.stat())
            assert not os.get_inheritable(again)


def test_a_link_can_be_opened_itself(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")

    with open_tree(AtLocation(path=tmp_path / "link").nosymfollow()) as tree:
        assert os.readlink("", dir_fd=tree) == "nowhere"


def test_attributes_are_changed_for_a_whole_tree(in_room: InChild) -> None:
    def body() -> None:
        def options(place: str) -> set[str]:
            (found,) = [one for one in read_mountinfo() if one.is_at(place)]
            return set(found.options)

        Path("a").mkdir()
        mount("it", "a", "tmpfs")
        Path("a/sub").mkdir()
        mount("deeper", "a/sub", "tmpfs")
        mount_setattr(
            "a",
            MountSetattrFlags.AT_RECURSIVE,
            attr_set=MountAttrFlags.NOEXEC | MountAttrFlags.NOATIME,
            attr_clr=MountAttrFlags.ATIME,
        )
        assert options("/mnt/a") >= {"noexec", "noatime"} <= options("/mnt/a/sub")

        mount_setattr("a", attr_clr=MountAttrFlags.NOEXEC, propagation=MountFlags.SHARED)
        assert "noexec" not in options("/mnt/a")
        assert "noexec" in options("/mnt/a/sub")
        (found,) = [one for one in read_mountinfo() if one.is_at("/mnt/a")]
        assert found.shared_group

    in_room(body)


def test_only_the_attributes_that_are_named_are_changed(in_room: InChild) -> None:
    def body() -> None:
        def options() -> set[str]:
            (found,) = [one for one in read_mountinfo() if one.is_at("/mnt/a")]
            return set(found.options) & {"ro", "rw", "nodev"}

        Path("a").mkdir()
        mount("it", "a", "tmpfs")
        mount_setattr("a", attr_set=MountAttrFlags.RDONLY)
        mount_setattr("a", attr_set=MountAttrFlags.NODEV)
        assert options() == {"ro", "nodev"}
        mount_setattr("a", attr_clr=MountAttrFlags.RDONLY)
        mount_setattr("a", attr_clr=MountAttrFlags.NODEV)
        assert options() == {"rw"}

    in_room(body)


def test_ids_are_mapped_by_a_user_namespace(in_room: InChild, user_id: int) -> None:
    if user_id != 0:
        pytest.skip("VMS-TEST-NOT-ROOT: mapping a file system's ids takes root of the host")

    def body() -> None:
        holder = subprocess.Popen(
            ["sleep", "60"],
            preexec_fn=lambda: unshare(CloneFlags.NEWUSER),  # noqa: PLW1509 - there are no threads
        )
        try:
            Path(f"/proc/{holder.pid}/uid_map").write_text("0 5000 10")
            Path(f"/proc/{holder.pid}/gid_map").write_text("0 5000 10")
            for name in ("a", "b"):
                Path(name).mkdir()
            with (
                open_tree("a", OpenTreeFlags.CLONE) as tree,
                Path(f"/proc/{holder.pid}/ns/user").open() as namespace,
            ):
                mount_setattr(
                    AtLocation(tree),
                    attr_set=MountAttrFlags.IDMAP,
                    userns_fd=namespace.fileno(),
                )
                move_mount(AtLocation(tree), "b")
            assert Path("a").stat().st_uid == 0
            assert Path("b").stat().st_uid == 5000
        finally:
            holder.kill()
            holder.wait()

    in_room(body)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attr_clr": MountAttrFlags.IDMAP}, "attr_clr: MOUNT_ATTR_IDMAP can't be cleared"),
        (
            {"attr_set": MountAttrFlags.IDMAP, "attr_clr": MountAttrFlags.IDMAP, "userns_fd": 0},
            "attr_clr: MOUNT_ATTR_IDMAP can't be cleared",
        ),
        ({"attr_set": MountAttrFlags.IDMAP}, _TOGETHER),
        ({"attr_set": MountAttrFlags.RDONLY, "userns_fd": 0}, _TOGETHER),
        (
            {"attr_set": MountAttrFlags.IDMAP, "userns_fd": 2**32},
            "userns_fd: 4294967296 is not in -1..2147483647",
        ),
        (
            {"propagation": MountFlags.PRIVATE | MountFlags.SHARED},
            "propagation: more than one propagation flag: 0x140000",
        ),
        (
            {"propagation": MountFlags.REC},
            "propagation: 0x4000 has bits that are not accepted: 0x4000",
        ),
    ],
)
def test_impossible_attributes_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^mount_setattr: {message}$"):
        mount_setattr("/no such place", 0, **wrong)


def test_attributes_are_laid_out_as_the_kernel_reads_them() -> None:
    fields = [getattr(_MountAttr, name) for name, _type in _MountAttr._fields_]
    names = [name for name, _type in _MountAttr._fields_]

    assert names == ["attr_set", "attr_clr", "propagation", "userns_fd"]
    assert [(field.offset, field.size) for field in fields] == [(0, 8), (8, 8), (16, 8), (24, 8)]


def test_a_failure_names_the_call_and_the_place(in_room: InChild) -> None:
    def body() -> None:
        with pytest.raises(FileNotFoundError, match="mount_setattr: No such") as caught:
            mount_setattr("/no such place", attr_set=MountAttrFlags.RDONLY)
        assert caught.value.filename == "/no such place"
        with pytest.raises(FileNotFoundError, match="open_tree: No such") as caught:
            open_tree("/no such place", OpenTreeFlags.AT_RECURSIVE | OpenTreeFlags.CLONE)
        assert caught.value.filename == "/no such place"

    in_room(body)
