"""`vmsandbox cache`: what it shows, what it removes, and what it exits with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox.machine.templates.cache import TemplateCache
from pytest_vmsandbox.machine.templates.memory_file import MEMORY
from pytest_vmsandbox.machine.templates.shelf import MARK
from pytest_vmsandbox.machine.templates.template import MANIFEST
from tests.dead_runs import CHECKOUT
from tests.machine.templates.handmade import (
    RECIPE,
    frozen_by_hand,
    publish,
    recipe_called,
    with_changes,
)

LAYER = recipe_called("layer")


@pytest.fixture
def cache(tmp_path: Path) -> TemplateCache:
    """A base and a layer on it; nobody uses them."""
    cache = TemplateCache(tmp_path)
    with closing(publish(cache, frozen_by_hand(1))) as base:
        later = with_changes(base.frozen, {0: b"new"})
        publish(cache, later, recipe=LAYER, base=base).close()
    return cache


def _run(cache: TemplateCache, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest_vmsandbox.cli", "cache", *words],
        cwd=CHECKOUT,
        env={"PATH": os.environ["PATH"], "VMSANDBOX_CACHE_DIR": str(cache.directory.parent)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _rows(cache: TemplateCache) -> dict[str, dict[str, Any]]:
    done = _run(cache, "list", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return {row["title"]: row for row in json.loads(done.stdout)["templates"]}


def test_where_nothing_is_nothing_is_shown_and_nothing_done(tmp_path: Path) -> None:
    cache = TemplateCache(tmp_path)

    assert _run(cache, "list").stdout == "no templates\n"
    for action in ("verify", "clear"):
        done = _run(cache, action)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_list_says_what_each_is_and_who_stands_on_whom(cache: TemplateCache) -> None:
    rows = _rows(cache)

    assert rows["by hand"]["base"] is None
    assert rows["layer"]["base"] == rows["by hand"]["digest"] == RECIPE.digest[:32]
    assert 0 < rows["layer"]["bytes"] < rows["by hand"]["bytes"]
    assert {row["in_use"] for row in rows.values()} == {False}
    assert {row["trouble"] for row in rows.values()} == {""}
    assert all(Path(row["path"]).is_dir() for row in rows.values())
    lines = _run(cache, "list").stdout.splitlines()
    assert len(lines) == 2
    assert any("layer" in line and f"on {RECIPE.digest[:12]}" in line for line in lines)


def test_the_list_says_what_is_in_use(cache: TemplateCache) -> None:
    kept = cache.load(RECIPE, room=cache.directory.parent)
    assert kept is not None
    with closing(kept):
        assert {title: row["in_use"] for title, row in _rows(cache).items()} == {
            "by hand": True,
            "layer": False,
        }
        assert "in use" in _run(cache, "list").stdout


def test_verify_is_content_with_what_is_whole(cache: TemplateCache) -> None:
    done = _run(cache, "verify")

    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(line.split()[-1] for line in done.stdout.splitlines()) == ["whole", "whole"]


def test_verify_names_what_is_damaged_and_exits_with_1(cache: TemplateCache) -> None:
    path = cache.directory / LAYER.digest[:32] / MEMORY
    path.chmod(0o600)
    path.write_bytes(b"other" + path.read_bytes()[5:])

    done = _run(cache, "verify")

    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if "damaged" in line)
    assert LAYER.digest[:12] in line
    assert "its memory is not what its manifest says" in line


def test_a_template_of_another_version_is_no_damage(cache: TemplateCache) -> None:
    path = cache.directory / LAYER.digest[:32] / MANIFEST
    path.chmod(0o600)
    path.write_text('{"format": 1}')

    done = _run(cache, "verify")

    assert done.returncode == 0, done.stdout
    assert "of another version" in done.stdout


def test_clear_removes_all(cache: TemplateCache) -> None:
    done = _run(cache, "clear")

    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2
    assert {path.name for path in cache.directory.iterdir()} == {".lock", MARK}


def test_clear_removes_what_killed_builders_left(cache: TemplateCache) -> None:
    for name in (".new-" + 32 * "0", ".old-" + 32 * "a"):
        (cache.directory / name).mkdir()
        (cache.directory / name / MEMORY).write_text("half")

    assert _run(cache, "clear").returncode == 0

    assert {path.name for path in cache.directory.iterdir()} == {".lock", MARK}


def test_clear_leaves_what_is_in_use_and_says_so(cache: TemplateCache) -> None:
    kept = cache.load(LAYER, room=cache.directory.parent)
    assert kept is not None
    with closing(kept):
        done = _run(cache, "clear")

    assert done.returncode == 0
    assert done.stdout.count("left ") == 2
    assert set(_rows(cache)) == {"by hand", "layer"}


def test_clear_removes_the_one_that_is_named(cache: TemplateCache) -> None:
    assert _run(cache, "clear", LAYER.digest[:10]).returncode == 0

    assert set(_rows(cache)) == {"by hand"}


def test_clear_exits_with_1_where_it_must_leave_the_one_that_is_named(
    cache: TemplateCache,
) -> None:
    done = _run(cache, "clear", RECIPE.digest[:10])

    assert done.returncode == 1
    assert "another template" in done.stdout
    assert set(_rows(cache)) == {"by hand", "layer"}


@pytest.mark.parametrize("digest", ["zzz", "../x", "", "/"])
def test_clear_refuses_what_names_not_one(cache: TemplateCache, digest: str) -> None:
    done = _run(cache, "clear", digest)

    assert done.returncode == 125
    assert "vmsandbox cache list" in done.stderr
    assert set(_rows(cache)) == {"by hand", "layer"}


def test_a_cache_that_others_may_write_is_refused(cache: TemplateCache) -> None:
    cache.directory.chmod(0o777)

    for action in ("list", "verify", "clear"):
        done = _run(cache, action)
        assert done.returncode == 125
        assert "nobody else may write" in done.stderr
