"""`.ci/prepare`, with programs that only pretend: what it asks for, and what it makes anew."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PREPARE = Path(__file__).parents[2] / ".ci" / "prepare"

# What prepare runs itself, and what it looks for.
TOOLS = ["sh", "cat", "cut", "sed", "dirname", "touch", "mkdir"]
PROGRAMS = ["qemu-system-x86_64", "mke2fs", "setpriv", "setfacl", "newuidmap", "ssh"]

PYTHON = """#!/bin/sh
echo "python $*" >>"$LOG"
case "$*" in *" venv "*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;; esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout's folder with `prepare`, beside it a `bin` in which everything is there."""
    (tmp_path / "checkout" / ".ci").mkdir(parents=True)
    shutil.copy(PREPARE, tmp_path / "checkout" / ".ci")
    (tmp_path / "bin").mkdir()
    for name in [*TOOLS, "cp"]:
        found = shutil.which(name)
        assert found is not None
        (tmp_path / "bin" / name).symlink_to(found)
    for name in [*PROGRAMS, "sudo"]:
        _pretend(tmp_path / "bin" / name, "#!/bin/sh\nexit 1\n")
    _pretend(tmp_path / "bin" / "id", "#!/bin/sh\necho 1000\n")
    _pretend(tmp_path / "bin" / "python", PYTHON)
    return tmp_path / "checkout"


def _pretend(program: Path, script: str) -> None:
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(script)
    program.chmod(0o755)


def _prepare(checkout: Path) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    log = checkout.parent / "log"
    log.write_text("")
    programs = checkout.parent / "bin"
    done = subprocess.run(
        [programs / "sh", checkout / ".ci" / "prepare"],
        env={"PATH": str(programs), "PYTHON": str(programs / "python"), "LOG": str(log)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done, log.read_text().splitlines()


def test_what_is_missing_is_named_with_who_needs_it(checkout: Path) -> None:
    (checkout.parent / "bin" / "setfacl").unlink()
    (checkout.parent / "bin" / "qemu-system-x86_64").unlink()
    done, _ = _prepare(checkout)

    assert done.returncode == 1
    assert "     qemu-system-x86 (for every machine)\n" in done.stdout
    assert "     acl (for the walls and the suite)\n" in done.stdout
    assert "apt-get install --no-install-recommends qemu-system-x86 acl\n" in done.stdout
    assert not (checkout / ".venv").exists()


def test_a_venv_without_pip_is_made_anew(checkout: Path) -> None:
    _pretend(checkout / ".venv" / "bin" / "python", "#!/bin/sh\nexit 1\n")
    done, calls = _prepare(checkout)

    assert done.returncode == 0, done.stderr
    assert "python -m venv --clear .venv" in calls
    assert (checkout / ".venv" / "ready").is_file()


def test_a_venv_with_pip_is_kept(checkout: Path) -> None:
    _pretend(checkout / ".venv" / "bin" / "python", PYTHON)
    done, calls = _prepare(checkout)

    assert done.returncode == 0, done.stderr
    assert not [call for call in calls if " venv " in call]
    assert [call for call in calls if "pip install" in call]
