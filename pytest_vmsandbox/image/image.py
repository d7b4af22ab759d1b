"""An image: what a machine boots from, as its manifest describes it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.image.manifest import MANIFEST_NAME, Manifest, read_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What a machine boots from. The files are in `directory`, and never change.

    `kernel` is what a VMM starts; `compressed_kernel` is the same kernel as distributions ship
    it, where it is there: slower to start, but it places itself at random (KASLR). `modules` is an
    ext4 disk for the guest's /lib/modules. `architecture` is as uname(2) says it.
    """

    name: str
    digest: str
    directory: Path
    kernel: Path
    compressed_kernel: Path | None
    initramfs: Path
    modules: Path | None
    command_line: tuple[str, ...]
    architecture: str
    kernel_release: str


def open_image(directory: Path) -> Image:
    """The image in `directory`, which has a manifest.json; docs/images.md says what is in it.

    Every field is checked, and that the files are there and as long as it says. RequestInvalid
    names the file and the field.
    """
    manifest = read_manifest(directory)
    for name in manifest.file_names:
        _check_file(directory / name, manifest)
    return Image(
        name=manifest.name,
        digest=manifest.digest or _digest_of_content(directory, manifest),
        directory=directory,
        kernel=directory / manifest.kernel,
        compressed_kernel=_optional(directory, manifest.compressed_kernel),
        initramfs=directory / manifest.initramfs,
        modules=_optional(directory, manifest.modules),
        command_line=manifest.command_line,
        architecture=manifest.architecture,
        kernel_release=manifest.kernel_release,
    )


def verify_image(image: Image) -> Mapping[str, str]:
    """What is wrong with its files, by name; empty when each has the checksum in the manifest.

    A file that the manifest has no checksum for counts as wrong: nothing can be said for it.
    """
    manifest = read_manifest(image.directory)
    wrong: dict[str, str] = {}
    for name in manifest.file_names:
        expected = manifest.files.get(name)
        if expected is None:
            wrong[name] = "the manifest has no checksum for it"
            continue
        try:
            actual = sha256_of(image.directory / name)
        except OSError as error:
            wrong[name] = str(error)
            continue
        if actual != expected.sha256:
            wrong[name] = f"sha256 is {actual}, and should be {expected.sha256}"
    return wrong


def sha256_of(path: Path) -> str:
    """The SHA-256 of that file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_NOT_THERE: Final = "the manifest names it, and it is not there or not readable"


def _check_file(path: Path, manifest: Manifest) -> None:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
    except OSError as error:
        raise RequestInvalid(f"{path}: {_NOT_THERE}: {error.strerror}") from error
    expected = manifest.files.get(path.name)
    if expected is not None and expected.size != size:
        raise RequestInvalid(
            f"{path} has {size} bytes, and {expected.size} by field 'files' of {MANIFEST_NAME}"
        )


def _optional(directory: Path, name: str | None) -> Path | None:
    return None if name is None else directory / name


def _digest_of_content(directory: Path, manifest: Manifest) -> str:
    # Templates are named by the digest, so a manifest that states none gets one that follows
    # every byte that the machine boots from.
    whole = hashlib.sha256(manifest.render().encode())
    for name in manifest.file_names:
        whole.update(f"{name} {sha256_of(directory / name)}\n".encode())
    return whole.hexdigest()
