"""One built image for all tests of this room, and caches whose packages are there already."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.image.cache import ensure_image
from pytest_vmsandbox.image.image import Image
from pytest_vmsandbox.image.packages import PackageStore, Resolution
from pytest_vmsandbox.image.progress import SilentProgress
from pytest_vmsandbox.image.recipe import host_architecture, recipe_named
from tests.compiled import compile_static

FreshCache = Callable[[], Path]


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> PackageStore:
    """The packages of `mini`, downloaded the first time that this user runs these tests."""
    store = PackageStore(directory=platformdirs.user_cache_path("pytest-vmsandbox") / "packages")
    recipe, architecture = recipe_named("mini"), host_architecture()
    known = store.resolution(recipe, architecture)
    if known is None or not store.is_complete(known):
        scratch = tmp_path_factory.mktemp("apt") / "state"
        try:
            store.resolve(
                recipe, architecture, scratch=scratch, deadline=Deadline.after(seconds=200)
            )
        except HostUnfit as reason:
            pytest.skip(str(reason))
    return store


@pytest.fixture(scope="session")
def resolution(packages: PackageStore) -> Resolution:
    """What `mini` was resolved to."""
    known = packages.resolution(recipe_named("mini"), host_architecture())
    assert known is not None
    return known


@pytest.fixture(scope="session")
def fresh_cache(
    packages: PackageStore, resolution: Resolution, tmp_path_factory: pytest.TempPathFactory
) -> FreshCache:
    """Makes a cache with the packages of `mini` and without any image."""

    def make() -> Path:
        cache = tmp_path_factory.mktemp("cache")
        (cache / "packages").mkdir()
        for package in resolution.packages:
            shutil.copy(packages.directory / package.file_name, cache / "packages")
        shutil.copy(packages.directory / f"mini-{host_architecture()}.json", cache / "packages")
        return cache

    return make


@pytest.fixture(scope="session")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static program that can be pid 1."""
    out = tmp_path_factory.mktemp("agent") / "init"
    source = Path(__file__).with_name("boot_init.c")
    return compile_static(source, out)


@pytest.fixture(scope="session")
def cache(fresh_cache: FreshCache) -> Path:
    """The cache with the image that the whole session shares: look, and leave it whole."""
    return fresh_cache()


@pytest.fixture(scope="session")
def image(cache: Path, agent: Path) -> Image:
    """Image `mini`, built from its packages."""
    return ensure_image("mini", cache_dir=cache, agent=agent, progress=SilentProgress())


@pytest.fixture(scope="session")
def unpacked(
    packages: PackageStore, resolution: Resolution, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The packages of `mini`, unpacked into one root."""
    root = tmp_path_factory.mktemp("unpacked") / "root"
    packages.extract(resolution.kernel, root / "kernel", deadline=Deadline.after(seconds=100))
    packages.extract(resolution.others, root / "others", deadline=Deadline.after(seconds=100))
    return root


@pytest.fixture(scope="session")
def busybox(unpacked: Path) -> Path:
    """The packaged busybox, to run here."""
    places = (unpacked / "others" / place for place in ("bin/busybox", "usr/bin/busybox"))
    return next(place for place in places if place.exists())


@pytest.fixture(scope="session")
def python_environment() -> dict[str, str]:
    """The environment in which a fresh interpreter finds this package."""
    import pytest_vmsandbox

    root = Path(pytest_vmsandbox.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
