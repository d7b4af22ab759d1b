"""The cache of images: built once, published whole, noticed when damaged.

    images/NAME-DIGEST/     published images          layers/DIGEST/   kernels' shares of them
    packages/               package files             staging/         builds that are going on

Whatever is built is built in staging and published by rename, under one lock for the whole cache.
Whoever holds the lock is the only builder, so all that lies in staging then is what a killed one
left, and is removed.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit, RequestInvalid
from pytest_vmsandbox.image import recipe as recipes
from pytest_vmsandbox.image.build import Ingredients, build_image, build_layer
from pytest_vmsandbox.image.image import Image, open_image, verify_image
from pytest_vmsandbox.image.layer import installed_kernel
from pytest_vmsandbox.image.packages import PackageStore, Resolution
from pytest_vmsandbox.image.programs import Program, ProgramFailed
from pytest_vmsandbox.image.progress import Progress
from pytest_vmsandbox.image.recipe import Recipe, recipe_named

_BUILD_S: Final = 900.0
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE: Final = (errno.EACCES, errno.EPERM, errno.EROFS)


def ensure_image(
    wanted: str,
    *,
    cache_dir: Path,
    agent: Path,
    progress: Progress,
    host_kernel: Path | None = None,
    refresh: bool = False,
) -> Image:
    """The image `wanted`: a recipe's name, or a path to a directory that is an image.

    A recipe is built when the cache has no whole image of its ingredients; however many processes
    ask at once, one builds and the others wait. `agent` is the program that the guest starts as
    pid 1. `host_kernel` boots that kernel of the host, with its modules, in place of a packaged
    one. `refresh` asks the host's package sources for newer packages first.

    Raises RequestInvalid for what can't be, HostUnfit for what the host lacks (the programs,
    the packages, disk space, a cache that can be written), TimedOut after a quarter of an hour.
    After a failure nothing is published, and what was there is still there. Blocks; Ctrl-C is
    safe at any moment.
    """
    if os.sep in wanted or wanted.startswith("."):
        if host_kernel is not None:
            raise RequestInvalid(f"{wanted} has a kernel of its own: {host_kernel} is one too many")
        return open_image(Path(wanted))
    recipe = recipe_named(wanted)
    builder = _Builder(
        cache_dir=cache_dir,
        recipe=recipe if host_kernel is None else recipes.on_host_kernel(recipe),
        architecture=recipes.host_architecture(),
        agent=agent,
        host_kernel=host_kernel,
        progress=progress,
    )
    if not refresh and (image := builder.published()):
        return image
    return builder.build(refresh=refresh)


def list_images(cache_dir: Path) -> tuple[Image, ...]:
    """The whole images in the cache, by name and age, the newest of each name last."""
    whole = [image for path in (cache_dir / "images").glob("*-*") if (image := _opened(path))]
    return tuple(sorted(whole, key=lambda i: (i.name, i.directory.stat().st_mtime_ns)))


def remove_image(image: Image, *, cache_dir: Path) -> None:
    """Remove it from the cache, and each kernel layer that no other image uses.

    RequestInvalid when it lies elsewhere: only what the cache made is removed. Machines that run
    from it keep running, since they have its files open.
    """
    images = cache_dir / "images"
    if image.directory.parent.resolve() != images.resolve():
        raise RequestInvalid(f"{image.directory} is not in the cache {images}")
    with _locked(cache_dir, Deadline.after(seconds=_BUILD_S)), _staging(cache_dir) as staging:
        _discard(image.directory, staging)
        used = {_inode(other.kernel) for other in list_images(cache_dir)}
        for path in (cache_dir / "layers").glob("*"):
            layer = _opened(path)
            if layer is None or _inode(layer.kernel) not in used:
                _discard(path, staging)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Builder:
    cache_dir: Path
    recipe: Recipe
    architecture: str
    agent: Path
    host_kernel: Path | None
    progress: Progress

    def published(self) -> Image | None:
        """The image, when the packages are known and it is there and whole; quick."""
        resolution = self._store.resolution(self.recipe, self.architecture)
        if resolution is None:
            return None
        return _opened(self._place(self._ingredients(resolution)))

    def build(self, *, refresh: bool) -> Image:
        deadline = Deadline.after(seconds=_BUILD_S)
        with ExitStack() as stack:
            stack.enter_context(_storage_errors(self.cache_dir))
            stack.enter_context(_locked(self.cache_dir, deadline, progress=self.progress))
            # Another process may have built it while this one waited for the lock.
            if not refresh and (image := self.published()):
                return image
            staging = stack.enter_context(_staging(self.cache_dir))
            return self._build(staging, refresh=refresh, deadline=deadline)

    def _build(self, staging: Path, *, refresh: bool, deadline: Deadline) -> Image:
        wanted = self._ingredients(self._resolved(staging, refresh=refresh, deadline=deadline))
        place = self._place(wanted)
        if image := _opened(place):
            return image
        base = self._layer(wanted, staging, deadline)
        self.progress.step(f"image {self.recipe.name}: putting it together")
        build_image(
            wanted,
            base=base,
            store=self._store,
            scratch=staging / "image-scratch",
            out=staging / "image",
            deadline=deadline,
        )
        _publish(staging / "image", place, staging)
        return open_image(place)

    def _resolved(self, staging: Path, *, refresh: bool, deadline: Deadline) -> Resolution:
        known = self._store.resolution(self.recipe, self.architecture)
        if known is not None and not refresh and self._store.is_complete(known):
            return known
        self.progress.step(f"image {self.recipe.name}: fetching packages")
        return self._store.resolve(
            self.recipe, self.architecture, scratch=staging / "apt", deadline=deadline
        )

    def _layer(self, wanted: Ingredients, staging: Path, deadline: Deadline) -> Image:
        place = self.cache_dir / "layers" / wanted.layer_digest[:16]
        # An image that is made of a damaged layer would be damaged, so here every byte counts.
        if (layer := _opened(place)) and not verify_image(layer):
            return layer
        self.progress.step(f"image {self.recipe.name}: kernel and modules")
        build_layer(
            wanted,
            store=self._store,
            scratch=staging / "layer-scratch",
            out=staging / "layer",
            deadline=deadline,
        )
        _publish(staging / "layer", place, staging)
        return open_image(place)

    def _ingredients(self, resolution: Resolution) -> Ingredients:
        return Ingredients(
            recipe=self.recipe,
            architecture=self.architecture,
            resolution=resolution,
            agent=self.agent,
            host_kernel=None if self.host_kernel is None else installed_kernel(self.host_kernel),
            mke2fs_version=_mke2fs_version(),
        )

    def _place(self, wanted: Ingredients) -> Path:
        return self.cache_dir / "images" / f"{self.recipe.name}-{wanted.image_digest[:16]}"

    @property
    def _store(self) -> PackageStore:
        return PackageStore(directory=self.cache_dir / "packages")


def _mke2fs_version() -> str:
    said = Program.find("mke2fs").run(["-V"], deadline=Deadline.after(seconds=10)).stderr
    return said.splitlines()[0]


@contextmanager
def _locked(
    cache_dir: Path, deadline: Deadline, *, progress: Progress | None = None
) -> Iterator[None]:
    cache_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache_dir / "images.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if progress:
            progress.step("waiting for another process, which is building an image")
        try:
            lock.acquire(timeout=-1 if deadline.timeout_s is None else deadline.timeout_s)
        except Timeout:
            raise deadline.timed_out(f"the lock {lock.lock_file}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _staging(cache_dir: Path) -> Iterator[Path]:
    """A new directory for a build, alone in its parent; call it under the lock."""
    parent = cache_dir / "staging"
    # What a killed builder's children still write fails there; what resists goes next time.
    shutil.rmtree(parent, ignore_errors=True)
    parent.mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _publish(built: Path, place: Path, staging: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        _discard(place, staging)
    built.rename(place)


def _discard(directory: Path, staging: Path) -> None:
    # Out of sight in one step; nobody sees half of it.
    directory.rename(tempfile.mkdtemp(dir=staging))


def _opened(directory: Path) -> Image | None:
    try:
        return open_image(directory)
    except RequestInvalid:
        return None  # absent or damaged, which is the same to a cache


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


@contextmanager
def _storage_errors(cache_dir: Path) -> Iterator[None]:
    """Turn "no space left", ours or a program's, and "not writable" into HostUnfit."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _no_space(cache_dir, str(error)) from error
        if error.errno in _NOT_WRITABLE:
            raise HostUnfit(
                "VMS-IMAGE-CACHE",
                f"a cache directory for images that can be written: {cache_dir}",
                str(error),
                "choose another place with --vm-cache-dir",
            ) from error
        raise
    except (ProgramFailed, HostUnfit) as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise _no_space(cache_dir, str(error)) from error


def _no_space(cache_dir: Path, seen: str) -> HostUnfit:
    free_mib = shutil.disk_usage(cache_dir).free >> 20
    return HostUnfit(
        "VMS-IMAGE-SPACE",
        f"room for building an image in {cache_dir}: about 500 MiB",
        f"{free_mib} MiB are free now; {seen}",
        "make room, or choose another place with --vm-cache-dir",
    )
