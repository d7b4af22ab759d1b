"""Places for the *at calls."""

from __future__ import annotations

import errno
import os
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import AT_FDCWD, AtFlags, AtLocation


def test_a_location_reads_a_file_below_its_descriptor(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").write_text("here")
    fd = os.open(tmp_path, os.O_PATH)
    try:
        place = AtLocation(fd).joinpath("a", "b")

        text = Path(place).read_text()
    finally:
        os.close(fd)

    assert text == "here"
    assert place == AtLocation(fd, "a/b")
    assert place == AtLocation(fd) / b"a" / Path("b")


def test_a_location_never_closes_its_descriptor(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    place = AtLocation(fd, "x")
    del place

    os.close(fd)  # would fail with EBADF


def test_the_lowest_descriptor_is_one_too() -> None:
    assert AtLocation(0, "x").fspath() == "/proc/self/fd/0/x"


def test_a_location_stays_what_it_was_checked_to_be() -> None:
    place = AtLocation(7, "a")

    with pytest.raises(FrozenInstanceError):
        place.path = "\0"  # type: ignore[misc]  # the very mistake
    with pytest.raises((AttributeError, TypeError)):
        object.__setattr__(place, "flag", AtFlags(0))

    assert place == AtLocation(7, "a")


def test_an_empty_path_means_the_descriptor_itself() -> None:
    place = AtLocation(7)

    assert place.flags == AtFlags.AT_EMPTY_PATH
    assert place.fspath() == "/proc/self/fd/7"
    assert place.joinpath("x").flags == AtFlags(0)
    assert place.joinpath("") == place
    assert AtLocation().fspath() == "."


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (AtLocation(path="a/b"), "a/b"),
        (AtLocation(path="/a/b"), "/a/b"),
        (AtLocation(7, "a"), "/proc/self/fd/7/a"),
        (AtLocation(7, "a/"), "/proc/self/fd/7/a/"),
        (AtLocation(7, "/a"), "/a"),
        (AtLocation(path=b"\xff"), "\udcff"),
    ],
)
def test_a_location_has_a_path_for_calls_without_descriptors(place: AtLocation, text: str) -> None:
    assert place.fspath() == os.fspath(place) == str(place) == text


def test_not_following_a_link_can_be_asked_for_and_taken_back() -> None:
    place = AtLocation(7, "a", AtFlags.AT_RECURSIVE)

    assert place.nosymfollow().flags == AtFlags.AT_RECURSIVE | AtFlags.AT_SYMLINK_NOFOLLOW
    assert place.nosymfollow().nosymfollow() == place.nosymfollow()
    assert place.nosymfollow().symfollow() == place
    assert place.nosymfollow().joinpath("b").flags == place.nosymfollow().flags


@pytest.mark.parametrize("part", ["/etc", b"/etc", Path("/etc")])
def test_an_absolute_part_would_leave_the_place_and_is_refused(part: str | bytes | Path) -> None:
    with pytest.raises(ValueError, match=r"^part is absolute: '/etc'$"):
        AtLocation(7, "a").joinpath("b", part)


def test_a_bare_path_is_a_place_below_the_working_directory() -> None:
    place = AtLocation.of("a")

    assert (place.fd, place.path, place.flags) == (AT_FDCWD, "a", 0)
    assert AtLocation.of(place) is place


def test_a_forgotten_bare_path_names_no_place() -> None:
    with pytest.raises(FileNotFoundError, match=r"an empty path names nothing: ''$") as caught:
        AtLocation.of("")

    assert caught.value.errno == errno.ENOENT
