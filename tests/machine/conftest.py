"""What the tests of machines share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from pytest_vmsandbox.machine.worker import Worker, WorkerSettings


@pytest.fixture
def worker() -> Iterator[Worker]:
    cache = os.environ.get("VMSANDBOX_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="vmsb-") as short:
        settings = WorkerSettings(
            cache_dir=Path(cache) if cache else user_cache_path("vmsandbox"),
            run_dir=Path(short) / "run",
        )
        with closing(Worker(settings)) as worker:
            yield worker
        assert list((Path(short) / "run").glob("*")) == []


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An image of 8 MiB that says so at its beginning and in the middle."""
    path = tmp_path / "source.img"
    content = bytearray(8 << 20)
    content[0:6] = b"first\n"
    content[4 << 20 : (4 << 20) + 7] = b"middle\n"
    path.write_bytes(content)
    tmp_path.chmod(0o755)
    return path
