"""The agent's binary for an architecture: packaged with the wheel, or built here once."""

from __future__ import annotations

import subprocess
from pathlib import Path

from filelock import FileLock

from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.guest.toolchain import (
    compile_agent,
    find_compiler,
    normalise_architecture,
    source_digest,
)

PACKAGED = Path(__file__).parent / "bin"


def agent_binary(*, architecture: str, cache_dir: Path) -> Path:
    """A static agent for `architecture`, ready to be put into an image.

    The packaged one where there is one, else built into `cache_dir` under a name that its sources
    and flags decide, once however many ask. Raises HostUnfit (VMS-AGENT-COMPILER) where it can't
    be built; nothing is left in `cache_dir` then but the lock.
    """
    architecture = normalise_architecture(architecture)
    packaged = PACKAGED / f"agent-{architecture}"
    if packaged.is_file():
        return packaged
    target = cache_dir / f"agent-{architecture}-{source_digest()}"
    if target.is_file():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f"{target.name}.lock"):
        if not target.is_file():
            _compile_or_explain(target, architecture=architecture)
    return target


def _compile_or_explain(target: Path, *, architecture: str) -> None:
    command = find_compiler(architecture=architecture)
    if command is None:
        raise _unfit(architecture, "neither ziglang nor a C compiler for it")
    try:
        compile_agent(target, command=command)
    except subprocess.CalledProcessError as error:
        said = f"{' '.join(command)}: {error.stderr.strip()[-2000:]}"
        raise _unfit(architecture, said) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _unfit(architecture, str(error)) from error


def _unfit(architecture: str, evidence: str) -> HostUnfit:
    need = f"a C compiler that makes a static agent for {architecture}"
    return HostUnfit("VMS-AGENT-COMPILER", need, evidence, "pip install ziglang")
