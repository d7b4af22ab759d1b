"""What is remembered of this host: facts, for this boot of it, this user, QEMU and version of us.

A file in the cache directory, written whole and renamed into place. Whatever can't be read is as
good as not there: the host is then probed again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, Timeout

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.host.facts import Fact, HostFacts, Verdict
from pytest_vmsandbox.host.forget import forget_old
from pytest_vmsandbox.host.rights import Rights, read_rights
from pytest_vmsandbox.host.setup_record import RECORD
from pytest_vmsandbox.linux.process_identity import read_boot_id

# Grows with every change of a probe, so that nothing an older one said is believed.
PROBES_VERSION = 7

_DISTRIBUTION = "pytest-vmsandbox"

# How often a worker that waits for another's survey looks.
_LOOK_EVERY_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """All that the facts depend on; facts under another key are not these facts."""

    boot_id: str
    uid: int
    groups: tuple[int, ...]
    rights: Rights
    search_path: str
    run_device: int  # the file system of the run directory; its name changes with each run
    qemu: tuple[str, int, int]  # path, mtime in ns, size
    python: tuple[str, int, int]  # the same of the interpreter, which other users must reach
    setup: tuple[str, int, int]  # the same of the record of `vmsandbox setup`
    our_version: str
    probes_version: int = PROBES_VERSION

    @property
    def file_name(self) -> str:
        """The name of the file that holds the facts under this key."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"host-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def key_of(*, qemu: Path | None, search_path: str, run_dir: Path) -> Key:
    """The key of this host for this process, at this moment."""
    return Key(
        boot_id=_boot_id(),
        uid=os.getuid(),
        groups=tuple(sorted(os.getgroups())),
        rights=read_rights(),
        search_path=search_path,
        run_device=run_dir.stat().st_dev,
        qemu=_identity(qemu),
        python=_identity(Path(sys.executable)),
        setup=_identity(RECORD),
        our_version=_our_version(),
    )


def recall(cache_dir: Path, key: Key) -> HostFacts | None:
    """The facts under this key, or None. They count as used just now."""
    file = cache_dir / key.file_name
    try:
        facts = HostFacts.from_json(json.loads(file.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return None
    with suppress(OSError):
        os.utime(file)
    return facts


def remember(cache_dir: Path, key: Key, facts: HostFacts) -> None:
    """Keep the facts, unless one ran out of time: then the next process shall try again.

    A cache directory that can't be written is no error: the facts are then not remembered.
    """
    if not facts.settled:
        return
    with suppress(OSError):
        _make(cache_dir)
        _publish(cache_dir / key.file_name, json.dumps(facts.to_json(), indent=1))
        forget_old(cache_dir)


@asynccontextmanager
async def surveying_alone(cache_dir: Path, key: Key, *, deadline: Deadline) -> AsyncIterator[None]:
    """Keep the other workers waiting meanwhile: they shall find what we remember.

    Once the deadline has passed, or where the cache can't be written, nobody waits.
    """
    lock = FileLock(cache_dir / f"{key.file_name}.lock", thread_local=False)
    with ExitStack() as undo:
        with suppress(OSError):
            _make(cache_dir)
            while not deadline.passed:
                try:
                    undo.enter_context(lock.acquire(blocking=False))
                    break
                except Timeout:
                    await asyncio.sleep(_LOOK_EVERY_S)
        yield


def is_final(kvm: Fact) -> bool:
    """Whether KVM needs no kernel to be tried on it any more."""
    return kvm.verdict is not Verdict.UNCONFIRMED


def _boot_id() -> str:
    try:
        return read_boot_id()
    except OSError:  # then nothing is remembered for longer than this process
        return f"no boot id: process {os.getpid()}"


def _our_version() -> str:
    try:
        return version(_DISTRIBUTION)
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"


def _identity(file: Path | None) -> tuple[str, int, int]:
    try:
        seen = None if file is None else file.stat()
    except OSError:
        seen = None
    return ("", 0, 0) if seen is None else (str(file), seen.st_mtime_ns, seen.st_size)


def _make(cache_dir: Path) -> None:
    cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)


def _publish(path: Path, content: str) -> None:
    # Workers finish at the same time: each renames a whole file of its own into place.
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=".host-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
        Path(draft).rename(path)
    except OSError:
        Path(draft).unlink(missing_ok=True)
        raise
