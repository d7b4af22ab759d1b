"""Packages from apt sources, with the real apt; its errors, and what must not be accepted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.image.apt import open_apt, parse_stanzas
from pytest_vmsandbox.image.packages import PackageStore, Resolution
from pytest_vmsandbox.image.recipe import DEBIAN_ARCHITECTURES, host_architecture, recipe_named

needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt is not installed")

# As `apt-cache show` prints it on Ubuntu 24.04, shortened.
UBUNTU = """\
Package: linux-image-virtual
Architecture: amd64
Version: 6.8.0-60.63
Depends: linux-image-6.8.0-60-generic, linux-firmware (>= 1) | firmware-free
Description-en: Minimal Generic Linux Image
 Depends: not-a-field
SHA256: 0d4bd1d5d11b1dd4af6d9b34da9d2e2ff7f4c0e56f7d9ab1a3a8cd42a1d5eb0c

Package: linux-image-6.8.0-60-generic
Architecture: amd64
Version: 6.8.0-60.63
Depends: kmod, linux-base (>= 4.5ubuntu1~16.04.1), linux-modules-6.8.0-60-generic
SHA256: 1d4bd1d5d11b1dd4af6d9b34da9d2e2ff7f4c0e56f7d9ab1a3a8cd42a1d5eb0c
"""


def sources(monkeypatch: pytest.MonkeyPatch, directory: Path, line: str) -> None:
    """Let apt see this source and no other."""
    (directory / "sources.list").write_text(line + "\n")
    # Read before the host's configuration, which on Debian and Ubuntu says nothing of these.
    (directory / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{directory}/sources.list";\nDir::Etc::sourceparts "-";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(directory / "apt.conf"))


def resolve(directory: Path) -> Resolution:
    return PackageStore(directory=directory / "packages").resolve(
        recipe_named("mini"),
        host_architecture(),
        scratch=directory / "state",
        deadline=Deadline.after(seconds=60),
    )


def test_the_packages_behind_a_kernel_are_read_with_their_dependencies() -> None:
    first, second = parse_stanzas(UBUNTU)

    assert first.depends == ("linux-image-6.8.0-60-generic", "linux-firmware", "firmware-free")
    assert second.package.name == "linux-image-6.8.0-60-generic"
    assert "linux-modules-6.8.0-60-generic" in second.depends


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("Package", "../evil"),
        ("Package", "-oOption"),
        ("Version", "1; rm"),
        ("Version", "../1"),
        ("Architecture", "../x"),
        ("SHA256", "00"),
    ],
)
def test_a_stanza_that_could_name_something_else_is_passed_over(field: str, value: str) -> None:
    stanza = UBUNTU.split("\n\n")[1]
    lines = [f"{field}: {value}" if line.startswith(field) else line for line in stanza.split("\n")]

    assert parse_stanzas("\n".join(lines)) == ()


@needs_apt
def test_without_a_network_the_error_has_what_apt_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources(monkeypatch, tmp_path, "deb [trusted=yes] http://127.0.0.1:9/debian stable main")

    with pytest.raises(HostUnfit, match=r"127\.0\.0\.1") as caught:
        resolve(tmp_path)

    assert caught.value.code == "VMS-IMAGE-PACKAGES"
    assert "--vm-image=PATH" in caught.value.remedy
    assert not (tmp_path / "state").exists()


@needs_apt
def test_sources_without_the_packages_are_said_to_lack_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources(monkeypatch, tmp_path, "# none")

    with pytest.raises(HostUnfit, match=r"linux-image-cloud.*linux-image-virtual") as caught:
        resolve(tmp_path)

    assert caught.value.code == "VMS-IMAGE-PACKAGES"


@needs_apt
def test_a_repository_without_a_signature_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resolution: Resolution, packages: PackageStore
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    for package in resolution.packages:
        shutil.copy(packages.directory / package.file_name, repository)
    offered = "".join(
        f"Package: {p.name}\nVersion: {p.version}\nArchitecture: {p.architecture}\n"
        f"Filename: ./{p.file_name}\nSHA256: {p.sha256}\n\n"
        for p in resolution.packages
    )
    (repository / "Packages").write_text(offered)
    sources(monkeypatch, tmp_path, f"deb file:{repository} ./")

    with pytest.raises(HostUnfit, match=r"(?i)release file|not signed") as caught:
        resolve(tmp_path)

    assert caught.value.code == "VMS-IMAGE-PACKAGES"


def test_a_host_without_apt_is_told_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(HostUnfit, match="apt-get") as caught:
        resolve(tmp_path)

    assert caught.value.code == "VMS-IMAGE-BUILDER"
    assert "--vm-image=PATH" in caught.value.remedy


@needs_apt
def test_a_damaged_package_file_is_fetched_again(
    packages: PackageStore, resolution: Resolution, tmp_path: Path
) -> None:
    (busybox,) = resolution.others
    (tmp_path / busybox.file_name).write_bytes(b"half of it")
    debian = DEBIAN_ARCHITECTURES[host_architecture()]
    with open_apt(
        tmp_path / "state", architecture=debian, deadline=Deadline.after(seconds=120)
    ) as apt:
        if apt.named([busybox.name]) != (busybox,):
            pytest.skip("the sources have a newer busybox than the one that is kept")
        apt.download([busybox], tmp_path)

    assert busybox.is_whole(tmp_path / busybox.file_name)
