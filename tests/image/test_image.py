"""Images that users bring along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.image.image import Image, open_image, verify_image

MANIFEST = {
    "format": 1,
    "name": "mine",
    "architecture": "x86_64",
    "kernel_release": "6.1.0",
    "kernel": "bzImage",
    "initramfs": "initrd.img",
    "command_line": ["console=ttyS0"],
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "bzImage").write_bytes(b"kernel")
    (tmp_path / "initrd.img").write_bytes(b"initramfs")
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    return tmp_path


def test_a_kernel_an_initramfs_and_a_short_manifest_are_an_image(directory: Path) -> None:
    image = open_image(directory)

    assert image.kernel == directory / "bzImage"
    assert image.initramfs == directory / "initrd.img"
    assert (image.modules, image.compressed_kernel) == (None, None)
    assert image.command_line == ("console=ttyS0",)


def test_the_digest_follows_every_byte_when_the_manifest_states_none(directory: Path) -> None:
    before = open_image(directory).digest
    (directory / "bzImage").write_bytes(b"kernal")

    assert open_image(directory).digest != before
    assert len(before) == 64


@pytest.mark.parametrize("missing", ["bzImage", "initrd.img", "manifest.json"])
def test_a_missing_file_is_named(directory: Path, missing: str) -> None:
    (directory / missing).unlink()

    with pytest.raises(RequestInvalid, match=missing):
        open_image(directory)


def test_a_file_of_another_length_than_the_manifest_says_is_named(directory: Path) -> None:
    files = {"bzImage": {"size": 7, "sha256": "0" * 64}}
    (directory / "manifest.json").write_text(json.dumps({**MANIFEST, "files": files}))

    with pytest.raises(RequestInvalid, match="bzImage has 6 bytes, and 7 by field 'files'"):
        open_image(directory)


def test_a_directory_without_a_manifest_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(RequestInvalid, match=r"docs/images\.md"):
        open_image(tmp_path / "nowhere")


def test_the_built_image_has_the_checksums_of_its_manifest(image: Image) -> None:
    assert verify_image(image) == {}


def test_a_file_without_a_checksum_is_not_vouched_for(directory: Path) -> None:
    assert sorted(verify_image(open_image(directory))) == ["bzImage", "initrd.img"]
