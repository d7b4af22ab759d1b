"""The C compilers that can build the agent, and how they are asked to.

Standard library only: `hatch_build.py` loads this file by itself while a wheel is built.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "agent"
# Small and quick to start under emulation: no relocations to perform, nothing unused linked.
FLAGS = (
    *("-std=c11", "-Os", "-static", "-fno-pie", "-no-pie", "-s"),
    *("-ffunction-sections", "-Wl,--gc-sections"),
)
_BUILD_TIMEOUT_S = 300
_SPELLINGS = {"amd64": "x86_64", "arm64": "aarch64"}


def normalise_architecture(name: str) -> str:
    """The kernel's word for an architecture (`uname -m` in a Linux guest)."""
    return _SPELLINGS.get(name.lower(), name.lower())


def host_architecture() -> str:
    """The architecture of this host, in the kernel's word."""
    return normalise_architecture(platform.machine())


def source_digest() -> str:
    """Sixteen hex digits that change with the agent's sources and the flags."""
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        content = source.read_bytes()
        digest.update(f"{source.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def find_compiler(*, architecture: str) -> list[str] | None:
    """The command: ziglang's for every architecture, else the host's for its own, else None."""
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-musl"]
    native = sys.platform == "linux" and host_architecture() == architecture
    found = (shutil.which("cc") or shutil.which("gcc")) if native else None
    return [found] if found else None


def compile_agent(target: Path, *, command: list[str]) -> None:
    """Compile the agent into `target`, which appears whole or not at all.

    Raises subprocess.CalledProcessError (with the compiler's words), TimeoutExpired, OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".agent-") as scratch:
        made = Path(scratch) / "agent"
        subprocess.run(
            [*command, *FLAGS, "-o", str(made), *sources],
            check=True,
            capture_output=True,
            text=True,
            timeout=_BUILD_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
        made.chmod(0o755)
        made.replace(target)
