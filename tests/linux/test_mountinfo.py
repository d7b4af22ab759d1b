"""The mount table: text that the kernel made, and text that it might make."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.linux import (
    MountFlags,
    MountInfo,
    mount,
    mounts_at_or_below,
    parse_mountinfo,
    read_mountinfo,
    umount,
)

InChild = Callable[..., None]


def line(
    *,
    mount_id: int = 36,
    parent_id: int = 35,
    root: bytes = b"/",
    at: bytes = b"/mnt",
    tags: bytes = b"",
    source: bytes = b"/dev/root",
) -> bytes:
    return b"%d %d 98:0 %s %s rw,noatime%s - ext3 %s rw,errors=continue" % (
        *(mount_id, parent_id, root, at),
        *(b" " + tags if tags else b"", source),
    )


def escaped(path: bytes) -> bytes:
    """As the kernel writes a path (seq_path, with the set of show_mountinfo, and # since 5.19)."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in path)


def test_every_field_is_read() -> None:
    found = MountInfo.parse(line(root=b"/sub", tags=b"shared:3 master:1 propagate_from:2"))

    assert found == MountInfo(
        mount_id=36,
        parent_id=35,
        device=(98, 0),
        root="/sub",
        mount_point="/mnt",
        options=("rw", "noatime"),
        shared_group=3,
        master_group=1,
        propagate_from=2,
        unbindable=False,
        fs_type="ext3",
        source="/dev/root",
        super_options=("rw", "errors=continue"),
    )


@pytest.mark.parametrize(
    ("tags", "shared", "master", "nearest", "unbindable"),
    [
        (b"", None, None, None, False),
        (b"shared:7", 7, None, None, False),
        (b"master:7", None, 7, None, False),
        (b"master:7 propagate_from:2", None, 7, 2, False),
        (b"unbindable", None, None, None, True),
        (b"from_the_future:9 shared:7", 7, None, None, False),
        (b"from_the_future shared:7", 7, None, None, False),
        (b"from_the_future:word shared:7", 7, None, None, False),
    ],
)
def test_propagation_is_read_and_unknown_fields_are_passed_over(
    tags: bytes, shared: int | None, master: int | None, nearest: int | None, *, unbindable: bool
) -> None:
    found = MountInfo.parse(line(tags=tags))

    assert (found.shared_group, found.master_group) == (shared, master)
    assert (found.propagate_from, found.unbindable) == (nearest, unbindable)


@given(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_any_name_comes_back_as_it_was(name: bytes) -> None:
    path = b"/" + name.replace(b"//", b"/")

    found = MountInfo.parse(line(root=escaped(path), at=escaped(path), source=escaped(path)))

    if not path.endswith(b"//deleted"):
        assert os.fsencode(found.root) == os.fsencode(found.mount_point) == path
    assert os.fsencode(found.source) == path


def test_a_backslash_before_digits_is_not_unescaped_twice() -> None:
    found = MountInfo.parse(line(at=escaped(b"/a\\040b") + b"\\134"))

    assert found.mount_point == "/a\\040b\\"


@pytest.mark.parametrize(
    ("written", "path", "deleted"),
    [
        (b"/a//deleted", "/a", True),
        (b"//deleted", "/", True),
        (b"/a/deleted", "/a/deleted", False),
        (b"/deleted", "/deleted", False),
        (b"/a", "/a", False),
    ],
)
def test_a_deleted_place_is_marked_and_keeps_its_path(
    written: bytes, path: str, *, deleted: bool
) -> None:
    found = MountInfo.parse(line(root=written))
    assert (found.root, found.root_deleted) == (path, deleted)
    assert not found.mount_point_deleted

    found = MountInfo.parse(line(at=written))
    assert (found.mount_point, found.mount_point_deleted) == (path, deleted)
    assert not found.root_deleted


@pytest.mark.parametrize(
    ("raw", "source", "super_options"),
    [
        (line(source=b""), "", ("rw", "errors=continue")),
        (line(source=b"-"), "-", ("rw", "errors=continue")),
        (line() + b" raw blank", "/dev/root", ("rw", "errors=continue raw blank")),
        (line() + b",a\\054b", "/dev/root", ("rw", "errors=continue", "a,b")),
        (line() + b"\n", "/dev/root", ("rw", "errors=continue")),
    ],
)
def test_odd_sources_and_options_stay_apart(
    raw: bytes, source: str, super_options: tuple[str, ...]
) -> None:
    found = MountInfo.parse(raw)

    assert found.source == source
    assert found.super_options == super_options


def test_a_root_need_not_be_a_path() -> None:
    assert MountInfo.parse(line(root=b"net:[4026531840]")).root == "net:[4026531840]"


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"nonsense",
        line().replace(b" - ", b" "),
        line().replace(b"98:0", b"98"),
        line().replace(b"98:0", b"x:0"),
        line().replace(b"36 ", b"x "),
        b"36 35 98:0 / /mnt - ext3 /dev/root rw",
        b"36 35 98:0 / /mnt rw - ext3",
        line(tags=b"shared:x"),
    ],
)
def test_a_broken_line_is_refused_and_shown(broken: bytes) -> None:
    with pytest.raises(ValueError, match="not a line of mountinfo") as caught:
        MountInfo.parse(broken)
    assert repr(broken) in str(caught.value)

    if broken:
        with pytest.raises(ValueError, match="not a line of mountinfo"):
            parse_mountinfo(line() + b"\n" + broken + b"\n")


def test_a_table_is_read_in_its_order() -> None:
    data = line(mount_id=1) + b"\n" + line(mount_id=3) + b"\n" + line(mount_id=2) + b"\n"

    assert [one.mount_id for one in parse_mountinfo(data)] == [1, 3, 2]
    assert parse_mountinfo(b"") == ()


@pytest.mark.parametrize(
    ("at", "path", "is_at", "is_below"),
    [
        ("/data", "/data", True, False),
        ("/data/", "/data", True, False),
        ("/data/x", "/data", False, True),
        ("/data/x/y", "/data//./", False, True),
        ("/database", "/data", False, False),
        ("/dat", "/data", False, False),
        ("/", "/", True, False),
        ("/data", "/", False, True),
        ("/", "/data", False, False),
        ("/x/data/y", "/data", False, False),
    ],
)
def test_places_are_compared_by_whole_components(
    at: str, path: str, *, is_at: bool, is_below: bool
) -> None:
    found = MountInfo.parse(line(at=at.encode()))

    assert found.is_at(path) is found.is_at(os.fsencode(path)) is is_at
    assert found.is_below(path) is found.is_below(Path(path)) is is_below


@pytest.mark.parametrize("path", ["", "data", "./data", "/data/..", "/../data", "/da\0ta"])
def test_a_place_that_is_not_plain_is_refused(path: str) -> None:
    found = MountInfo.parse(line())

    with pytest.raises(ValueError, match=r"^path "):
        found.is_below(path)
    with pytest.raises(ValueError, match=r"^path "):
        found.is_at(path)


def test_mounts_come_in_the_order_in_which_they_can_be_taken_off() -> None:
    table = [
        (1, 1, b"/"),
        (9, 1, b"/jail"),
        (2, 9, b"/jail/a"),
        (3, 9, b"/jail/b/c/d"),
        (8, 2, b"/jail/a"),  # stacked upon 2
        (4, 8, b"/jail/a/x"),
        (5, 1, b"/jailer"),
        (6, 1, b"/other"),
    ]
    mounts = [MountInfo.parse(line(mount_id=i, parent_id=p, at=at)) for i, p, at in table]

    order = [one.mount_id for one in mounts_at_or_below(iter(mounts), "/jail")]

    assert sorted(order) == [2, 3, 4, 8, 9]
    assert order.index(4) < order.index(8) < order.index(2) < order.index(9)
    assert order.index(3) < order.index(9)


def test_stacked_and_nested_mounts_are_really_taken_off_in_that_order(in_room: InChild) -> None:
    def body() -> None:
        for name in ("jail", "jailer"):
            Path(name).mkdir()
        mount("jail", "jail", None, MountFlags.BIND)
        for _ in range(3):
            mount("it", "jail", "tmpfs")
        Path("jail/a/b").mkdir(parents=True)
        mount("it", "jail/a", "tmpfs")
        mount("/mnt/jailer", "/mnt/jailer", None, MountFlags.BIND)
        # Moved below a younger one, its place in the table no longer tells its depth.
        mount("it", "jailer", "tmpfs")
        Path("jail/a/c").mkdir()
        mount("jailer", "jail/a/c", None, MountFlags.MOVE)

        order = mounts_at_or_below(read_mountinfo(), "/mnt/jail")
        assert len(order) == 6
        assert order[0].mount_point == "/mnt/jail/a/c"
        for one in order:
            umount(one.mount_point)
        assert mounts_at_or_below(read_mountinfo(), "/mnt/jail") == ()
        assert len(mounts_at_or_below(read_mountinfo(os.getpid()), "/mnt/jailer")) == 1

    in_room(body)


def test_a_mount_of_a_deleted_file_is_recognised(in_room: InChild) -> None:
    def body() -> None:
        for name in ("a", "b"):
            Path(name).write_text("")
        mount("a", "b", None, MountFlags.BIND)
        Path("a").unlink()
        (found,) = [one for one in read_mountinfo() if one.is_at("/mnt/b")]
        assert (found.root, found.root_deleted) == ("/a", True)
        umount("b")

    in_room(body)


def test_our_own_table_is_read_whole(in_room: InChild) -> None:
    def body() -> None:
        mount("", "/mnt", "tmpfs")  # an empty source
        raw = Path("/proc/self/mountinfo").read_bytes()
        found = read_mountinfo()
        assert len(found) == raw.count(b"\n")
        assert [one.mount_id for one in found] == [int(row.split()[0]) for row in raw.splitlines()]
        (top,) = [one for one in found if one.is_at("/mnt") and one.source == ""]
        assert top.fs_type == "tmpfs"
        assert found == read_mountinfo(os.getpid())

    in_room(body)


def test_the_table_of_no_process_can_not_be_read() -> None:
    with pytest.raises(FileNotFoundError):
        read_mountinfo(2**22 + 1)
    with pytest.raises(ValueError, match="pid: 0 is not in"):
        read_mountinfo(0)
