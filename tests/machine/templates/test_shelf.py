"""The directory of templates: what is not ours in it, or is no such directory, stays as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pytest_vmsandbox import RequestInvalid
from pytest_vmsandbox.machine.templates.cache import TemplateCache
from pytest_vmsandbox.machine.templates.shelf import MARK, NAME, OLD, is_shelf, make_shelf
from tests.machine.templates.handmade import RECIPE, frozen_by_hand, publish

HEX = "0123456789abcdef" * 2


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_project_that_is_the_cache_directory_loses_nothing(tmp_path: Path) -> None:
    for name in ("templates/admin", "templates/.old-admin", f"templates/{HEX}"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "base.html").write_text("theirs")
    cache = TemplateCache(tmp_path, limit_bytes=0)

    publish(cache, frozen_by_hand(1)).close()
    cache.tidy()

    assert cache.shelved() == []
    assert len(list(tmp_path.glob("templates/*/base.html"))) == 2 + 1


@pytest.mark.parametrize(
    "name", ["admin", ".old-", ".new-x", ".old-admin", HEX[1:], HEX + "0", HEX.upper(), f"{OLD}0"]
)
def test_what_is_called_otherwise_is_not_ours(tmp_path: Path, name: str) -> None:
    cache = TemplateCache(tmp_path, limit_bytes=0)
    publish(cache, frozen_by_hand(1)).close()
    (cache.directory / name).mkdir()
    (cache.directory / name / "theirs").write_text("theirs")

    assert name not in {one.directory.name for one in cache.shelved()}
    cache.tidy()
    assert (cache.directory / name / "theirs").read_text() == "theirs"


@pytest.mark.parametrize("name", [HEX, f".old-{HEX}", f".new-{HEX}"])
def test_a_link_is_not_ours_and_what_it_points_to_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("theirs")
    cache = TemplateCache(tmp_path, limit_bytes=0)
    make_shelf(cache.directory)
    (cache.directory / name).symlink_to(tmp_path / "theirs")

    assert cache.shelved() == []
    cache.tidy()
    assert _names(tmp_path / "theirs") == {"file"}


def test_a_link_in_the_place_of_a_template_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("theirs")
    cache = TemplateCache(tmp_path)
    make_shelf(cache.directory)
    place = cache.directory / RECIPE.digest[:32]
    place.symlink_to(tmp_path / "theirs")

    publish(cache, frozen_by_hand(1)).close()

    assert place.is_dir()
    assert not place.is_symlink()
    assert _names(tmp_path / "theirs") == {"file"}
    assert _names(cache.directory) == {".lock", MARK, place.name}


@pytest.mark.parametrize("mark", [None, "", "something else"])
def test_a_directory_without_our_mark_is_refused_and_stays_as_it_is(
    tmp_path: Path, mark: str | None
) -> None:
    directory = tmp_path / NAME
    (directory / HEX).mkdir(parents=True)
    directory.chmod(0o700)
    if mark is not None:
        (directory / MARK).write_text(mark)
    before = _names(directory)

    for use in _uses(TemplateCache(tmp_path, limit_bytes=0)):
        with pytest.raises(RequestInvalid, match=f"has no {MARK}"):
            use()

    assert _names(directory) == before
    assert _names(tmp_path) == {NAME}


def _uses(cache: TemplateCache) -> Iterator[Callable[[], object]]:
    yield lambda: cache.load(RECIPE, room=cache.directory.parent)
    yield cache.shelved
    yield cache.tidy
    yield lambda: cache.remove(cache.directory / HEX)
    yield lambda: publish(cache, frozen_by_hand(1))


def test_an_empty_directory_becomes_ours(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir(mode=0o700)
    assert not is_shelf(tmp_path / NAME)

    with closing(publish(TemplateCache(tmp_path), frozen_by_hand(1))):
        assert is_shelf(tmp_path / NAME)


def test_the_mark_is_what_backup_programs_know(tmp_path: Path) -> None:
    make_shelf(tmp_path / NAME)
    make_shelf(tmp_path / NAME)

    mark = (tmp_path / NAME / MARK).read_text()
    assert mark.startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    assert _names(tmp_path) == {NAME}


@pytest.mark.parametrize(("mode", "refused"), [(0o777, True), (0o1777, False), (0o775, False)])
def test_a_cache_directory_that_everybody_may_write_is_refused(
    tmp_path: Path, mode: int, *, refused: bool
) -> None:
    directory = tmp_path / "cache" / NAME
    make_shelf(directory)
    directory.parent.chmod(mode)

    if refused:
        with pytest.raises(RequestInvalid, match="chmod o-w"):
            is_shelf(directory)
    else:
        assert is_shelf(directory)


@pytest.mark.skipif(os.geteuid() == 0, reason="VMS-TEST-USER: root may write everywhere")
def test_where_nothing_can_be_made_the_reason_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)

    with pytest.raises(PermissionError):
        make_shelf(tmp_path / "cache" / NAME)
