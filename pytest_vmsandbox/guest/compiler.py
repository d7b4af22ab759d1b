"""The agent's binary for an architecture: packaged with the wheel, or built here once.

`hatch_build.py` loads this file by itself while a wheel is built, so it imports nothing of the
package at the top.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "agent"
PACKAGED = Path(__file__).parent / "bin"
FLAGS = ("-std=c11", "-Os", "-static", "-fno-pie", "-no-pie", "-s", "-ffunction-sections", "-Wl,--gc-sections")
BUILD_TIMEOUT_S = 300
_SPELLINGS = {"amd64": "x86_64", "arm64": "aarch64"}


def normalise_architecture(name: str) -> str:
    """The kernel's word for an architecture (`uname -m` of a Linux guest)."""
    return _SPELLINGS.get(name.lower(), name.lower())


def agent_binary(*, architecture: str, cache_dir: Path) -> Path:
    """A static agent for `architecture`, ready to be put into an image.

    The packaged one where there is one, else built into `cache_dir` under a name that its sources
    and flags decide, once however many ask. Raises HostUnfit (VMS-AGENT-COMPILER) where it can't be
    built.
    """
    from filelock import FileLock

    architecture = normalise_architecture(architecture)
    packaged = PACKAGED / f"agent-{architecture}-{source_digest()}"
    if packaged.is_file():
        return packaged
    target = cache_dir / packaged.name
    if target.is_file():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f"{target.name}.lock"):
        if not target.is_file():
            _build_or_explain(target, architecture=architecture)
    return target


def source_digest() -> str:
    """Sixteen hex digits that change with the sources and the flags."""
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        content = source.read_bytes()
        digest.update(f"{source.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def compiler_command(*, architecture: str) -> list[str] | None:
    """The C compiler to use: ziglang's for every architecture, else the host's for its own."""
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-musl"]
    native = sys.platform == "linux" and normalise_architecture(platform.machine()) == architecture
    found = (shutil.which("cc") or shutil.which("gcc")) if native else None
    return [found] if found else None


def build(target: Path, *, command: list[str]) -> None:
    """Compile into `target`, which appears whole or not at all; CalledProcessError if that fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".agent-") as scratch:
        made = Path(scratch) / "agent"
        subprocess.run(
            [*command, *FLAGS, "-o", str(made), *sources],
            check=True,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
        made.chmod(0o755)
        os.replace(made, target)


def _build_or_explain(target: Path, *, architecture: str) -> None:
    from pytest_vmsandbox.errors import HostUnfit

    need = f"a C compiler that makes a static agent for {architecture}"
    remedy = "pip install ziglang"
    command = compiler_command(architecture=architecture)
    if command is None:
        raise HostUnfit("VMS-AGENT-COMPILER", need, "neither ziglang nor a fitting cc", remedy)
    try:
        build(target, command=command)
    except subprocess.CalledProcessError as error:
        seen = f"{' '.join(command)}: {error.stderr.strip()[-2000:]}"
        raise HostUnfit("VMS-AGENT-COMPILER", need, seen, remedy) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostUnfit("VMS-AGENT-COMPILER", need, str(error), remedy) from error
