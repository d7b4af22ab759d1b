"""Programs of ours for guests: in C, static, for this architecture."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path


def compile_static(source: Path, out: Path) -> Path:
    """The program, made by the host's compiler, or by the one that comes from PyPI."""
    compiler = ["cc"] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]
    musl = ["-target", f"{platform.machine()}-linux-musl"] if len(compiler) > 1 else []
    subprocess.run([*compiler, *musl, "-static", "-O1", "-o", out, source], check=True, timeout=200)
    return out
