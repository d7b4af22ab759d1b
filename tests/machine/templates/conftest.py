"""Workers with a cache of templates of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_vmsandbox.machine.worker import Worker, WorkerSettings
from tests.machine.templates.preparing import Builder
from tests.machine.templates.template_caches import make_cache


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this module's own, but for images and all else that is not the templates."""
    return make_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def new_worker(cache_dir: Path, scratch: Path) -> Iterator[Callable[[str], Worker]]:
    """Makes workers that share the cache; they are closed afterwards."""
    workers: list[Worker] = []

    def make(name: str) -> Worker:
        settings = WorkerSettings(cache_dir=cache_dir, run_dir=scratch / "run", id=name)
        workers.append(Worker(settings))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()
    assert list((scratch / "run").glob("*")) == []


@pytest.fixture
def worker(new_worker: Callable[[str], Worker]) -> Worker:
    return new_worker("main")


@pytest.fixture
def builder(worker: Worker) -> Builder:
    return Builder(worker)
