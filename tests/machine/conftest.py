"""What the tests of machines share."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

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


class SmallHost(Protocol):
    """Runs a test module where run directories have so much room; what pytest said of it."""

    def __call__(self, module: str, *, room_mib: int) -> str: ...


@pytest.fixture
def small_host(tmp_path: Path, scratch: Path) -> SmallHost:
    """A host that is soon full: what it takes is a user namespace, and the tier bare."""

    def run(module: str, *, room_mib: int) -> str:
        (tmp_path / "test_full.py").write_text(module)
        run = scratch / "run"
        run.mkdir(mode=0o700)
        pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--vm-tier=bare"]
        mounted = f"mount -t tmpfs -o size={room_mib}m,mode=700 none {run} && exec " + shlex.join(
            [*pytest_, f"--vm-run-dir={run}", str(tmp_path / "test_full.py")]
        )
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.stdout + done.stderr

    return run


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
