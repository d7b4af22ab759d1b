"""The cache: built once, published whole, repaired when damaged."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import HostUnfit, RequestInvalid
from pytest_vmsandbox.image.cache import ensure_image, list_images, remove_image
from pytest_vmsandbox.image.image import Image, open_image, verify_image
from pytest_vmsandbox.image.progress import SilentProgress

FreshCache = Callable[[], Path]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

# Builds, saying each step as it begins, and the digest at the end.
BUILD = """
import sys
from pathlib import Path
from pytest_vmsandbox.image.cache import ensure_image

class Told:
    def step(self, title):
        print("step:", title, flush=True)

cache, agent, *kernel = map(Path, sys.argv[1:])
image = ensure_image(
    "mini", cache_dir=cache, agent=agent, progress=Told(), host_kernel=kernel[0] if kernel else None
)
print("digest:", image.digest, flush=True)
"""


class Steps:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def step(self, title: str) -> None:
        self.titles.append(title)


def start_build(
    *arguments: Path, environment: dict[str, str], user: int | None = None
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        start_new_session=True,
    )


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """The process and its children, in a session of their own, are gone at the end."""
    try:
        with process:
            try:
                yield
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        process.wait(timeout=10)


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def link_layers(image: Image, cache: Path) -> None:
    """Give `cache` the kernels' layers of the session's cache, without the time to build them."""
    layers = image.directory.parents[1] / "layers"
    shutil.copytree(layers, cache / "layers", copy_function=os.link)


def link_published(image: Image, cache: Path) -> None:
    """Give `cache` this image, and no other that the session has built, with its layer."""
    link_layers(image, cache)
    place = cache / "images" / image.directory.name
    shutil.copytree(image.directory, place, copy_function=os.link)


def test_a_second_call_finds_what_the_first_one_built(
    image: Image, cache: Path, agent: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = Steps()
    # No program but mke2fs, which is found in sbin: nothing can be asked, nothing built.
    monkeypatch.setenv("PATH", str(tmp_path))

    again = ensure_image("mini", cache_dir=cache, agent=agent, progress=steps)

    assert again == image
    assert steps.titles == []


def test_a_built_image_lies_there_read_only_and_alone(image: Image, cache: Path) -> None:
    assert image.name == "mini"
    assert image.modules is not None
    assert left_in(image.directory) == sorted(
        ["initramfs.cpio", "manifest.json", "modules.img", "vmlinux", "vmlinuz"]
    )
    assert {path.stat().st_mode & 0o777 for path in image.directory.iterdir()} == {0o444}
    assert image.directory.stat().st_mode & 0o777 == 0o755
    assert left_in(cache / "staging") == []


def test_a_path_is_taken_as_a_directory_with_an_image(image: Image, cache: Path) -> None:
    opened = ensure_image(
        str(image.directory),
        cache_dir=cache / "unused",
        agent=Path("/nonexistent"),
        progress=SilentProgress(),
    )

    assert opened == image
    assert not (cache / "unused").exists()


def test_a_path_and_a_kernel_of_the_host_contradict_each_other(image: Image, cache: Path) -> None:
    with pytest.raises(RequestInvalid, match="a kernel of its own"):
        ensure_image(
            str(image.directory),
            cache_dir=cache,
            agent=Path("/nonexistent"),
            progress=SilentProgress(),
            host_kernel=Path("/boot/vmlinuz"),
        )


def test_a_name_that_is_no_recipe_is_refused_with_those_that_are(cache: Path, agent: Path) -> None:
    with pytest.raises(RequestInvalid, match="maxi") as caught:
        ensure_image("maxi", cache_dir=cache, agent=agent, progress=SilentProgress())

    assert "mini, mini-full" in caught.value.hint


def test_two_processes_that_ask_at_once_build_once(
    fresh_cache: FreshCache, agent: Path, python_environment: dict[str, str]
) -> None:
    cache = fresh_cache()
    first = start_build(cache, agent, environment=python_environment)
    second = start_build(cache, agent, environment=python_environment)
    with ended(first), ended(second):
        said = [process.communicate(timeout=120)[0] for process in (first, second)]

    assert [first.returncode, second.returncode] == [0, 0]
    assert ("".join(said)).count("kernel and modules") == 1
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]
    assert len(list_images(cache)) == 1


@pytest.mark.parametrize("step", ["kernel and modules", "putting it together"])
def test_a_builder_that_is_killed_leaves_nothing_published_and_the_next_one_cleans_up(
    fresh_cache: FreshCache,
    image: Image,
    agent: Path,
    python_environment: dict[str, str],
    step: str,
) -> None:
    cache = fresh_cache()
    if step == "putting it together":
        link_layers(image, cache)
    process = start_build(cache, agent, environment=python_environment)
    assert process.stdout is not None
    with ended(process):
        for line in process.stdout:
            if step in line:
                break
        # Into the middle of the step: it writes by now.
        until = time.monotonic() + 20
        while not any((cache / "staging").glob("*/*")) and time.monotonic() < until:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)

    assert left_in(cache / "images") == []
    assert list_images(cache) == ()
    image = ensure_image("mini", cache_dir=cache, agent=agent, progress=SilentProgress())
    assert verify_image(image) == {}
    assert left_in(cache / "staging") == []


def test_another_agent_makes_another_image_on_the_same_kernel(
    image: Image, cache: Path, agent: Path, tmp_path: Path
) -> None:
    other_agent = tmp_path / "agent"
    other_agent.write_bytes(agent.read_bytes() + b"\0")
    steps = Steps()

    other = ensure_image("mini", cache_dir=cache, agent=other_agent, progress=steps)

    assert other.digest != image.digest
    assert steps.titles == ["image mini: putting it together"]
    assert other.kernel.samefile(image.kernel)
    assert {i.digest for i in list_images(cache)} >= {image.digest, other.digest}

    remove_image(other, cache_dir=cache)
    assert other.digest not in {i.digest for i in list_images(cache)}
    assert verify_image(image) == {}


def test_other_packages_make_another_image(
    fresh_cache: FreshCache, image: Image, agent: Path
) -> None:
    cache = fresh_cache()
    (kept,) = (cache / "packages").glob("*.json")
    document = json.loads(kept.read_text())
    document["others"][0]["version"] += "+b9"
    kept.write_text(json.dumps(document))
    package = next((cache / "packages").glob("busybox-static_*.deb"))
    package.rename(str(package).replace("_amd64.deb", "+b9_amd64.deb"))

    other = ensure_image("mini", cache_dir=cache, agent=agent, progress=SilentProgress())

    assert other.digest != image.digest


@pytest.mark.parametrize("name", ["vmlinux", "modules.img", "initramfs.cpio", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_image_is_noticed_and_built_again(
    fresh_cache: FreshCache, image: Image, agent: Path, name: str, damage: str
) -> None:
    cache = fresh_cache()
    link_published(image, cache)
    victim = cache / "images" / image.directory.name / name
    half = victim.read_bytes()[: victim.stat().st_size // 2]
    victim.unlink()  # it is the session's file too: only this name of it may suffer
    if damage == "truncated":
        victim.write_bytes(half)

    again = ensure_image("mini", cache_dir=cache, agent=agent, progress=SilentProgress())

    assert again.digest == image.digest
    assert verify_image(again) == {}


def test_a_layer_that_rotted_is_not_built_upon(
    fresh_cache: FreshCache, image: Image, agent: Path
) -> None:
    cache = fresh_cache()
    link_published(image, cache)
    shutil.rmtree(cache / "images")
    disk = next((cache / "layers").glob("*/modules.img"))
    content = bytearray(disk.read_bytes())
    content[1 << 20] ^= 1
    disk.unlink()
    disk.write_bytes(content)

    again = ensure_image("mini", cache_dir=cache, agent=agent, progress=SilentProgress())

    assert verify_image(again) == {}


def test_verify_names_the_file_that_rotted(image: Image, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(image.directory, copy)
    (copy / "initramfs.cpio").chmod(0o644)
    with (copy / "initramfs.cpio").open("r+b") as file:
        file.seek(5000)
        file.write(b"rot")

    assert list(verify_image(open_image(copy))) == ["initramfs.cpio"]


def test_an_image_outside_the_cache_is_not_removed(image: Image, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(image.directory, copy, copy_function=os.link)

    with pytest.raises(RequestInvalid, match="not in the cache"):
        remove_image(open_image(copy), cache_dir=tmp_path / "cache")

    assert verify_image(open_image(copy)) == {}


def test_removing_the_last_image_of_a_kernel_removes_the_kernel(
    fresh_cache: FreshCache, image: Image, agent: Path
) -> None:
    cache = fresh_cache()
    link_published(image, cache)
    own = ensure_image("mini", cache_dir=cache, agent=agent, progress=SilentProgress())
    assert own.directory.is_relative_to(cache)

    remove_image(own, cache_dir=cache)

    assert (left_in(cache / "images"), left_in(cache / "layers")) == ([], [])
    assert left_in(cache / "staging") == []


@needs_root
@pytest.mark.parametrize("size_mib", [40, 150, 280])
def test_a_full_disk_is_said_to_be_full_and_nothing_is_published(
    fresh_cache: FreshCache, agent: Path, tmp_path: Path, size_mib: int
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    packages = fresh_cache() / "packages"
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", small], check=True, timeout=20
    )
    try:
        shutil.copytree(packages, small / "packages")
        with pytest.raises(HostUnfit) as caught:
            ensure_image("mini", cache_dir=small, agent=agent, progress=SilentProgress())
        published = left_in(small / "images")
        staged = left_in(small / "staging")
    finally:
        subprocess.run(["umount", small], check=True, timeout=20)

    assert caught.value.code == "VMS-IMAGE-SPACE"
    assert (published, staged) == ([], [])


@pytest.fixture
def ordinary_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """A user without privilege, and a directory of theirs."""
    name = f"vmsb-image-{os.getpid()}"
    subprocess.run(
        ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", name],
        check=True,
        timeout=30,
    )
    directory = Path("/tmp") / name  # every parent of it must be open to that user
    try:
        uid = pwd.getpwnam(name).pw_uid
        directory.mkdir()
        os.chown(directory, uid, uid)
        yield uid, directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        subprocess.run(["userdel", name], check=True, timeout=30)


@needs_root
def test_an_ordinary_user_builds_the_same_image_as_root(
    ordinary_user: tuple[int, Path],
    fresh_cache: FreshCache,
    image: Image,
    agent: Path,
    python_environment: dict[str, str],
) -> None:
    uid, home = ordinary_user
    shutil.copytree(fresh_cache() / "packages", home / "cache" / "packages")
    shutil.copy(agent, home / "agent")
    for path in (home, *home.rglob("*")):
        os.chown(path, uid, uid)
    environment = {**python_environment, "HOME": str(home)}
    process = start_build(home / "cache", home / "agent", environment=environment, user=uid)
    with ended(process):
        out, err = process.communicate(timeout=120)

    assert process.returncode == 0, err
    assert out.splitlines()[-1] == f"digest: {image.digest}"
    (theirs,) = list_images(home / "cache")
    for name in ("initramfs.cpio", "vmlinux", "modules.img"):
        assert (theirs.directory / name).read_bytes() == (image.directory / name).read_bytes()


@needs_root
def test_a_cache_that_can_not_be_written_is_a_lack_of_the_host(
    ordinary_user: tuple[int, Path], agent: Path, python_environment: dict[str, str]
) -> None:
    uid, home = ordinary_user
    shutil.copy(agent, home / "agent")
    os.chown(home, 0, 0)
    process = start_build(home / "cache", home / "agent", environment=python_environment, user=uid)
    with ended(process):
        _, err = process.communicate(timeout=60)

    assert "VMS-IMAGE-CACHE" in err
    assert "--vm-cache-dir" in err


@needs_root
def test_an_ordinary_user_fetches_packages_of_their_own(
    ordinary_user: tuple[int, Path], agent: Path, python_environment: dict[str, str]
) -> None:
    uid, home = ordinary_user
    shutil.copy(agent, home / "agent")
    environment = {**python_environment, "HOME": str(home)}
    process = start_build(home / "cache", home / "agent", environment=environment, user=uid)
    with ended(process):
        out, err = process.communicate(timeout=200)
    if "VMS-IMAGE-PACKAGES" in err:
        pytest.skip("no network to the package sources")

    assert process.returncode == 0, err
    assert "fetching packages" in out
    assert len(list_images(home / "cache")) == 1


@pytest.fixture
def host_root(unpacked: Path) -> Path:
    """A root directory with a kernel installed as distributions do it, without busybox."""
    return unpacked / "kernel"


def test_a_kernel_of_the_host_is_booted_with_its_own_modules(
    host_root: Path, fresh_cache: FreshCache, agent: Path, image: Image
) -> None:
    cache = fresh_cache()
    mini = next((cache / "packages").glob("mini-*.json"))
    document = json.loads(mini.read_text())
    kept = cache / "packages" / mini.name.replace("mini-", "mini-on-host-kernel-")
    kept.write_text(json.dumps({**document, "kernel": []}))
    kernel = next(host_root.glob("boot/vmlinuz-*"))

    ours = ensure_image(
        "mini", cache_dir=cache, agent=agent, progress=SilentProgress(), host_kernel=kernel
    )

    assert ours.name == "mini-on-host-kernel"
    assert ours.digest != image.digest
    assert ours.kernel_release == image.kernel_release
    assert ours.initramfs.read_bytes() == image.initramfs.read_bytes()


def test_a_host_kernel_without_modules_is_refused(
    host_root: Path, cache: Path, agent: Path, tmp_path: Path, image: Image
) -> None:
    (tmp_path / "boot").mkdir()
    alone = Path(shutil.copy(next(host_root.glob("boot/vmlinuz-*")), tmp_path / "boot"))

    with pytest.raises(RequestInvalid, match=image.kernel_release):
        ensure_image(
            "mini", cache_dir=cache, agent=agent, progress=SilentProgress(), host_kernel=alone
        )


@needs_root
def test_a_host_kernel_that_may_not_be_read_is_a_lack_of_the_host(
    ordinary_user: tuple[int, Path],
    host_root: Path,
    agent: Path,
    packages: object,
    python_environment: dict[str, str],
) -> None:
    uid, home = ordinary_user
    (home / "boot").mkdir()
    kernel = Path(shutil.copy(next(host_root.glob("boot/vmlinuz-*")), home / "boot"))
    kernel.chmod(0o600)
    shutil.copy(agent, home / "agent")
    process = start_build(
        home / "cache", home / "agent", kernel, environment=python_environment, user=uid
    )
    with ended(process):
        _, err = process.communicate(timeout=120)

    assert process.returncode == 1
    assert "VMS-HOST-KERNEL" in err
    assert f"sudo chmod +r {kernel}" in err
