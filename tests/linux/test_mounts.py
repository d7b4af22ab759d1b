"""The classic mount calls, in a mount namespace that is thrown away."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import (
    MountFlags,
    UmountFlags,
    mount,
    pivot_root,
    read_mountinfo,
    umount,
)

InChild = Callable[..., None]
_ALONE = "^umount: flags: MNT_EXPIRE goes with neither MNT_FORCE nor MNT_DETACH$"
PROPAGATION = [flag for flag in MountFlags if flag & MountFlags.PROPAGATION]


def test_a_tmpfs_comes_with_its_options_and_goes(in_room: InChild) -> None:
    def body() -> None:
        Path("m").mkdir()
        mount("it", "m", "tmpfs", MountFlags.NOSUID | MountFlags.NODEV, ["size=64k", b"mode=0710"])
        (found,) = [one for one in read_mountinfo() if one.is_at("/mnt/m")]

        assert (found.fs_type, found.source) == ("tmpfs", "it")
        assert {"rw", "nosuid", "nodev"} <= set(found.options)
        assert "size=64k" in found.super_options
        assert Path("m").stat().st_mode & 0o777 == 0o710

        umount("m")
        assert not [one for one in read_mountinfo() if one.is_at("/mnt/m")]

    in_room(body)


def test_data_may_be_one_text_or_nothing(in_room: InChild) -> None:
    def body() -> None:
        Path("m").mkdir()
        for data in ("size=64k,nr_inodes=9", b"size=64k,nr_inodes=9", ("size=64k", "nr_inodes=9")):
            mount("it", b"m", b"tmpfs", 0, data)
            assert os.statvfs("m").f_files == 9
            umount(Path("m"))
        mount(None, "m", "tmpfs", 0, [])
        umount("m")

    in_room(body)


def test_a_bind_becomes_read_only_in_a_second_step(in_room: InChild) -> None:
    def body() -> None:
        for name in ("a", "b"):
            Path(name).mkdir()
        mount("a", "b", None, MountFlags.BIND)
        Path("b/x").write_text("1")
        mount(None, "b", None, MountFlags.fromstr("remount,bind,ro,nosuid"))

        assert Path("a/x").read_text() == "1"
        with pytest.raises(OSError, match="Read-only file system"):
            Path("b/x").write_text("2")

    in_room(body)


def test_a_path_of_any_bytes_can_be_mounted_on(in_room: InChild) -> None:
    def body() -> None:
        odd = b"a b\t\\\n\xff#"
        Path(os.fsdecode(odd)).mkdir()
        mount("it", odd, "tmpfs")
        (found,) = [one for one in read_mountinfo() if one.is_at(b"/mnt/" + odd)]
        assert os.fsencode(found.mount_point) == b"/mnt/" + odd

        umount(os.fsdecode(odd))
        assert not [one for one in read_mountinfo() if one.is_at(b"/mnt/" + odd)]

    in_room(body)


def test_propagation_is_changed_alone(in_room: InChild) -> None:
    def body() -> None:
        Path("m").mkdir()
        mount("it", "m", "tmpfs")
        mount(None, "m", None, MountFlags.SHARED | MountFlags.REC | MountFlags.SILENT)
        (found,) = [one for one in read_mountinfo() if one.is_at("/mnt/m")]
        assert found.shared_group
        mount(None, "m", None, MountFlags.UNBINDABLE)
        (found,) = [one for one in read_mountinfo() if one.is_at("/mnt/m")]
        assert found.unbindable
        assert found.shared_group is None

    in_room(body)


@pytest.mark.parametrize("first", PROPAGATION)
@pytest.mark.parametrize("second", PROPAGATION)
def test_two_propagation_flags_are_refused(first: MountFlags, second: MountFlags) -> None:
    if first == second:
        return  # one flag said twice is one flag
    with pytest.raises(
        ValueError, match=r"^mount: flags: more than one propagation flag: 0x[0-9a-f]+$"
    ):
        mount(None, "/no such place", None, first | second)


@pytest.mark.parametrize(
    "other",
    [
        flag
        for flag in MountFlags
        if not flag & (MountFlags.PROPAGATION | MountFlags.KERNEL_ONLY)
        and flag not in {MountFlags.REC, MountFlags.SILENT}
    ],
)
def test_beside_a_propagation_flag_there_is_only_rec_and_silent(other: MountFlags) -> None:
    said = f"{int(other):#x} can't go with a propagation flag"
    with pytest.raises(ValueError, match=f"^mount: flags: {said}$"):
        mount(None, "/no such place", None, MountFlags.PRIVATE | other | MountFlags.REC)


@pytest.mark.parametrize("option", ["a,b", b"a,b", ","])
def test_an_option_with_a_comma_would_be_two_and_is_refused(option: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"^data: an option holds a comma: '[a,b]+'$"):
        mount("it", "/no such place", "tmpfs", 0, ["size=64k", option])


def test_data_that_the_kernel_would_cut_is_refused() -> None:
    page = resource.getpagesize()
    with pytest.raises(
        ValueError, match=f"^data is {page} bytes long, and mount.2. reads one page$"
    ):
        mount("it", "/no such place", "tmpfs", 0, "x" * page)
    with pytest.raises(FileNotFoundError):
        mount("it", "/no such place", "tmpfs", 0, "x" * (page - 1))


def test_expiry_takes_off_what_nobody_used(in_room: InChild) -> None:
    def body() -> None:
        Path("m").mkdir()
        mount("it", "m", "tmpfs")
        with pytest.raises(OSError, match="Resource temporarily unavailable"):
            umount("m", UmountFlags.EXPIRE | UmountFlags.NOFOLLOW)
        umount("m", UmountFlags.EXPIRE)
        assert not [one for one in read_mountinfo() if one.is_at("/mnt/m")]

    in_room(body)


@pytest.mark.parametrize("other", [UmountFlags.FORCE, UmountFlags.DETACH])
def test_expiry_goes_with_neither_force_nor_detach(other: UmountFlags) -> None:
    with pytest.raises(ValueError, match=_ALONE):
        umount("/no such place", UmountFlags.EXPIRE | other)


def test_a_busy_mount_stays_unless_it_is_detached(in_room: InChild) -> None:
    def body() -> None:
        Path("m").mkdir()
        mount("it", "m", "tmpfs")
        with Path("m/open").open("w"):
            with pytest.raises(OSError, match="umount2: Device or resource busy") as caught:
                umount("m")
            assert caught.value.filename == "m"
            umount("m", UmountFlags.FORCE | UmountFlags.DETACH)
        assert list(Path("m").iterdir()) == []

    in_room(body)


def test_unmounting_forces_nothing_unless_asked_to(in_room: InChild) -> None:
    def body() -> None:
        # Forcing is for those who own the file system, which here is the host's (umount2(2)).
        Path("m").touch()
        mount("/etc/passwd", "m", None, MountFlags.BIND)
        umount("m")
        assert Path("m").read_text() == ""

    in_room(body)


def test_a_link_is_not_followed_where_that_was_asked_for(in_room: InChild) -> None:
    def body() -> None:
        Path("m").mkdir()
        Path("link").symlink_to("m")
        mount("it", "m", "tmpfs")
        with pytest.raises(OSError, match="Invalid argument"):
            umount("link", UmountFlags.NOFOLLOW | UmountFlags.DETACH)
        umount("link")

    in_room(body)


def test_the_root_is_exchanged_and_the_old_one_dropped(in_room: InChild) -> None:
    def body() -> None:
        Path("root").mkdir()
        mount("root", "root", None, MountFlags.BIND)
        Path("root/mine").write_text("yes")
        os.chdir("root")
        pivot_root(".", ".")
        umount(".", UmountFlags.DETACH)
        os.chdir("/")

        assert list(Path("/").iterdir()) == [Path("/mine")]

    in_room(body)


def test_a_root_that_is_no_mount_is_refused_with_both_names(in_room: InChild) -> None:
    def body() -> None:
        Path("root").mkdir()
        with pytest.raises(OSError, match="pivot_root: Invalid argument") as caught:
            pivot_root(b"root", Path("root"))
        assert (caught.value.filename, caught.value.filename2) == ("root", "root")

    in_room(body)


def test_a_failed_mount_names_the_call_and_the_target() -> None:
    with pytest.raises(FileNotFoundError, match=r"mount: No such file or directory") as caught:
        mount("it", b"/no such place/\xff", "tmpfs")

    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == "/no such place/\udcff"


def test_an_ordinary_user_may_not_mount_where_everybody_sees_it(
    in_child: InChild, user_id: int
) -> None:
    if user_id == 0:
        pytest.skip("VMS-TEST-ROOT: root may")

    def body() -> None:
        def mount_it() -> None:
            mount("it", "/mnt", "tmpfs")

        def umount_it() -> None:
            umount("/mnt")

        for call in (mount_it, umount_it):
            with pytest.raises(PermissionError) as caught:
                call()
            assert caught.value.filename == "/mnt"

    in_child(body)
