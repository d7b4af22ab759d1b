"""What is below a run directory of ours, and may be removed; everything else may not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_vmsandbox.host.run_directory import (
    RUN_DIRECTORY_MARKER,
    is_below_run_directory,
    mark_run_directory,
)


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    mark_run_directory(directory)
    return directory


def test_what_lies_below_is_ours_at_any_depth_and_whether_it_is_there_or_not(
    run_directory: Path,
) -> None:
    (run_directory / "a" / "b").mkdir(parents=True)

    assert is_below_run_directory(run_directory / "a")
    assert is_below_run_directory(run_directory / "a" / "b" / "c")
    assert is_below_run_directory(str(run_directory / "a"))


def test_the_run_directory_itself_and_its_neighbours_are_not_below_it(
    run_directory: Path, tmp_path: Path
) -> None:
    assert not is_below_run_directory(run_directory)
    assert not is_below_run_directory(f"{run_directory}-evil/x")
    assert not is_below_run_directory(tmp_path / "other")
    assert not is_below_run_directory(tmp_path)


@pytest.mark.parametrize("path", ["/", "", ".", "..", "a", "a/b", "/a\0b"])
def test_a_path_that_says_nothing_is_refused(path: str) -> None:
    assert not is_below_run_directory(path)


def test_a_relative_path_is_refused_though_it_leads_there(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_directory)

    assert not is_below_run_directory("a")


def test_two_dots_are_refused_though_they_lead_back(run_directory: Path) -> None:
    (run_directory / "a").mkdir()

    assert not is_below_run_directory(f"{run_directory}/a/../b")
    assert not is_below_run_directory(f"{run_directory}/..")


def test_a_nul_is_refused(run_directory: Path) -> None:
    assert not is_below_run_directory(f"{run_directory}/a\0b")


def test_a_link_on_the_way_is_refused_and_one_at_the_end_is_not(
    run_directory: Path, tmp_path: Path
) -> None:
    (run_directory / "out").symlink_to(tmp_path)
    (run_directory / "in").mkdir()
    (run_directory / "around").symlink_to(run_directory / "in")
    (tmp_path / "alias").symlink_to(run_directory)

    assert not is_below_run_directory(run_directory / "out" / "x")
    assert not is_below_run_directory(run_directory / "around" / "x")
    assert not is_below_run_directory(tmp_path / "alias" / "x")
    assert is_below_run_directory(run_directory / "out")


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_refused_wherever_it_stands(
    run_directory: Path, mode: int
) -> None:
    inside = run_directory / "inside"
    inside.mkdir(mode=0o700)
    assert is_below_run_directory(inside / "x")

    inside.chmod(mode)

    assert not is_below_run_directory(inside / "x")
    assert is_below_run_directory(inside)
    run_directory.chmod(mode)
    assert not is_below_run_directory(inside)


def test_a_file_in_the_place_of_a_folder_is_refused(run_directory: Path) -> None:
    (run_directory / "file").touch(mode=0o600)

    assert not is_below_run_directory(run_directory / "file" / "x")


def test_a_marker_that_others_may_write_marks_nothing(run_directory: Path) -> None:
    (run_directory / RUN_DIRECTORY_MARKER).chmod(0o622)

    assert not is_below_run_directory(run_directory / "x")


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_marker_that_is_no_file_marks_nothing(run_directory: Path, kind: str) -> None:
    marker = run_directory / RUN_DIRECTORY_MARKER
    marker.unlink()
    if kind == "folder":
        marker.mkdir(mode=0o700)
    else:
        marker.symlink_to("/etc/passwd")

    assert not is_below_run_directory(run_directory / "x")


@pytest.mark.skipif(os.getuid() != 0, reason="takes root: it gives files away")
@pytest.mark.parametrize("which", ["marker", "directory", "folder"])
def test_what_belongs_to_a_stranger_is_refused(run_directory: Path, which: str) -> None:
    folder = run_directory / "folder"
    folder.mkdir(mode=0o700)
    strange = {
        "marker": run_directory / RUN_DIRECTORY_MARKER,
        "directory": run_directory,
        "folder": folder,
    }[which]
    assert is_below_run_directory(folder / "x")

    os.chown(strange, 1, 1)

    assert not is_below_run_directory(folder / "x")


def test_a_mark_can_be_made_twice_and_closes_the_folder_to_writers(tmp_path: Path) -> None:
    tmp_path.chmod(0o1773)

    mark_run_directory(tmp_path)
    mark_run_directory(tmp_path)

    assert tmp_path.stat().st_mode & 0o7777 == 0o1751
    assert (tmp_path / RUN_DIRECTORY_MARKER).stat().st_mode & 0o777 == 0o600
    assert is_below_run_directory(tmp_path / "x")
