"""The wheel: what is in it, and that it works where nothing of this repository is."""

from __future__ import annotations

import os
import platform
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from platformdirs import user_cache_path

CHECKOUT = Path(__file__).resolve().parents[2]

# The system's own: another user can run it too, which is not said of one in our home.
PYTHON = "/usr/bin/python3"

TEST_FILE = """\
import pytest, pytest_vmsandbox

def test_sync(vm):
    assert "site-packages" in pytest_vmsandbox.__file__
    assert vm.run("uname -s").stdout == "Linux\\n"

@pytest.mark.asyncio
async def test_async(async_vm, vm_host):
    assert (await async_vm.run("id -u")).stdout == "0\\n"
    assert async_vm.facts.tier == vm_host.tier
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A directory of its own with a venv, for root and others alike."""

    directory: Path

    @property
    def python(self) -> str:
        """The venv's interpreter."""
        return str(self.directory / "venv/bin/python")


def _pip(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "--retries=1", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def _skip_without_index(done: subprocess.CompletedProcess[str]) -> None:
    """Skip where pip could not reach its index; any other failure is one."""
    unreachable = ("NewConnectionError", "No matching distribution", "ConnectTimeout", "ProxyError")
    if done.returncode and any(sign in done.stderr for sign in unreachable):
        pytest.skip(f"pip can't reach its package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    # With what the build needs at hand nothing has to be fetched for it.
    at_hand = all(find_spec(name) for name in ("hatchling", "ziglang"))
    isolation = ["--no-build-isolation"] if at_hand else []

    _skip_without_index(
        _pip("wheel", "--no-deps", *isolation, f"--wheel-dir={directory}", str(CHECKOUT))
    )

    (made,) = directory.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def place(wheel: Path) -> Iterator[Place]:
    """A venv with the wheel and what it depends on."""
    if not Path(PYTHON).exists():
        pytest.skip(f"no {PYTHON}, which every user of this host could run")
    with tempfile.TemporaryDirectory(prefix="vmsw-", dir="/tmp") as name:
        place = Place(directory=Path(name))
        place.directory.chmod(0o755)
        made = subprocess.run(
            [PYTHON, "-m", "venv", str(place.directory / "venv")],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            pytest.skip(f"{PYTHON} can't make a venv: {(made.stdout + made.stderr)[-300:]}")
        _skip_without_index(_pip("install", "--quiet", str(wheel), python=place.python))
        yield place


@contextmanager
def _ordinary_user() -> Iterator[pwd.struct_passwd]:
    """A user of this host who is in no group but his own, and can't sudo."""
    name = f"vmsw-{secrets.token_hex(3)}"
    making = ("useradd", "--user-group", "--no-create-home", "--shell", "/bin/sh", name)
    subprocess.run(making, check=True, capture_output=True, timeout=30)
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", name], check=True, capture_output=True, timeout=30)


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def _prepare(place: Place, *, name: str, owner: Sequence[int]) -> Path:
    """A home with the test file in it, and a cache that knows the packages, as `owner`'s."""
    home = place.directory / name
    home.mkdir(mode=0o700)
    (home / "work").mkdir()
    (home / "work" / "test_it.py").write_text(TEST_FILE)
    packages = user_cache_path("vmsandbox") / "packages"
    if packages.is_dir():
        shutil.copytree(packages, home / "cache" / "packages")
    for path in (home, *home.rglob("*")):
        os.chown(path, *owner)
    return home


def _test_it(
    place: Place, *, home: Path, user: pwd.struct_passwd | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [place.python, "-m", "pytest", "-n2", "-p", "no:cacheprovider", "-rA", "test_it.py"],
        cwd=home / "work",
        env={
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(home),
            "TMPDIR": str(home),
            "PYTHONDONTWRITEBYTECODE": "1",
            "VMSANDBOX_CACHE_DIR": str(home / "cache"),
            "VMSANDBOX_RUN_DIR": str(home / "run"),
            "VMSANDBOX_REQUIRE": "qemu,image_builder",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        user=user and user.pw_uid,
        group=user and user.pw_gid,
        extra_groups=user and [],
    )


def test_the_wheel_has_the_agent_for_this_architecture(wheel: Path) -> None:
    name = f"pytest_vmsandbox/guest/bin/agent-{platform.machine()}"
    with zipfile.ZipFile(wheel) as archive:
        agent = archive.read(name)

    assert agent.startswith(b"\x7fELF")
    assert b"/lib/ld-" not in agent  # static: it asks for no interpreter


def test_the_wheel_has_the_agents_sources_for_other_architectures(wheel: Path) -> None:
    sources = {path.name for path in (CHECKOUT / "pytest_vmsandbox/guest/agent").iterdir()}
    prefix = "pytest_vmsandbox/guest/agent/"

    assert {
        name.removeprefix(prefix) for name in _names(wheel) if name.startswith(prefix)
    } == sources


def test_the_wheel_has_every_module_and_says_that_it_is_typed(wheel: Path) -> None:
    names = _names(wheel)
    modules = (CHECKOUT / "pytest_vmsandbox").glob("**/*.py")

    assert {str(path.relative_to(CHECKOUT)) for path in modules} <= set(names)
    assert "pytest_vmsandbox/py.typed" in names


def test_the_wheel_has_nothing_else(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in _names(wheel)}
    strangers = [n for n in _names(wheel) if "__pycache__" in n or "/test" in n]

    assert {top for top in tops if not top.endswith(".dist-info")} == {"pytest_vmsandbox"}
    assert strangers == []


def test_the_wheel_offers_testinfra_as_an_extra_and_needs_it_for_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()

    assert "Provides-Extra: testinfra" in lines
    (needed,) = (line for line in lines if line.startswith("Requires-Dist: pytest-testinfra"))
    assert needed.endswith("; extra == 'testinfra'")


def test_the_wheel_announces_plugin_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        announced = archive.read(name).decode()

    assert "[pytest11]\nvmsandbox = pytest_vmsandbox.plugin" in announced
    assert "[console_scripts]\nvmsandbox = pytest_vmsandbox.cli:main" in announced


@pytest.mark.machine
def test_ten_lines_pass_outside_the_repository(place: Place) -> None:
    home = _prepare(place, name="ours", owner=(os.getuid(), os.getgid()))

    done = _test_it(place, home=home)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


@pytest.mark.machine
@pytest.mark.skipif(os.getuid() != 0, reason="takes root to make another user")
def test_ten_lines_pass_for_an_ordinary_user_without_sudo(place: Place) -> None:
    with _ordinary_user() as user:
        home = _prepare(place, name="theirs", owner=(user.pw_uid, user.pw_gid))

        done = _test_it(place, home=home, user=user)

        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 passed" in done.stdout
        assert not list((home / "run").iterdir())
