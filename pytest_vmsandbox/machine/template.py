"""A template: a machine that was booted once and frozen, as a directory that never changes.

memory          the guest's RAM, sparse
console         what the guest had printed
state           the state of its devices, as QEMU writes it for a migration
manifest.json   what it was made of and how long and which content the others must have
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pytest_vmsandbox.errors import VmSandboxError
from pytest_vmsandbox.machine.frozen import Frozen, state_of
from pytest_vmsandbox.machine.memory import load_memory, save_memory

# It grows whenever a template of the older form would be misread.
FORMAT = 2

MEMORY, STATE, CONSOLE, MANIFEST = "memory", "state", "console", "manifest.json"


class TemplateDamaged(VmSandboxError):
    """A template is not what its manifest says; it is made anew, never used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides what a template is: equal recipes give interchangeable templates.

    `parts` is text by name (image digest, VMM and its version, machine configuration, ...).
    """

    parts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """What names the template: the SHA-256 of format and parts, in hexadecimal."""
        return hashlib.sha256(
            json.dumps({"format": FORMAT, **self.parts}, sort_keys=True).encode()
        ).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """manifest.json: the recipe, the nonce of the boot that was frozen, sizes and checksums."""

    digest: str
    parts: Mapping[str, str]
    nonce: str
    memory_bytes: int
    memory_sha256: str
    state_bytes: int
    state_sha256: str
    console_sha256: str


def save_template(directory: Path, *, recipe: Recipe, frozen: Frozen) -> None:
    """Write a template into an empty directory of ours, for nobody else to read."""
    digest = save_memory(frozen.memory, directory / MEMORY)
    state = frozen.read_state()
    (directory / STATE).write_bytes(state)
    (directory / CONSOLE).write_bytes(frozen.console)
    manifest = Manifest(
        digest=recipe.digest,
        parts=recipe.parts,
        nonce=frozen.nonce,
        memory_bytes=frozen.memory.size,
        memory_sha256=digest,
        state_bytes=len(state),
        state_sha256=hashlib.sha256(state).hexdigest(),
        console_sha256=hashlib.sha256(frozen.console).hexdigest(),
    )
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
    for name in (MEMORY, STATE, CONSOLE, MANIFEST):
        (directory / name).chmod(0o400)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the template in `directory`; TemplateDamaged says what is wrong with it."""
    path = directory / MANIFEST
    try:
        form = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TemplateDamaged(f"{path}: {error}") from error
    match form:
        case {
            "format": 2,
            "digest": str(digest),
            "parts": dict(parts),
            "nonce": str(nonce),
            "memory_bytes": int(memory_bytes),
            "memory_sha256": str(memory_sha256),
            "state_bytes": int(state_bytes),
            "state_sha256": str(state_sha256),
            "console_sha256": str(console_sha256),
        }:
            manifest = Manifest(
                digest=digest,
                parts={str(name): str(part) for name, part in parts.items()},
                nonce=nonce,
                memory_bytes=memory_bytes,
                memory_sha256=memory_sha256,
                state_bytes=state_bytes,
                state_sha256=state_sha256,
                console_sha256=console_sha256,
            )
        case _:
            raise TemplateDamaged(f"{path}: not a manifest of format {FORMAT}")
    if Recipe(parts=manifest.parts).digest != digest:
        raise TemplateDamaged(f"{path}: its digest is not that of its parts")
    return manifest


def load_template(directory: Path, recipe: Recipe) -> Frozen:
    """Read all of it into sealed memory and check every byte.

    Raises TemplateDamaged where a byte is wrong, or it is one of another recipe.
    """
    manifest = read_manifest(directory)
    if manifest.digest != recipe.digest:
        raise TemplateDamaged(f"{directory}: it was made of something else")
    try:
        state = (directory / STATE).read_bytes()
        console = (directory / CONSOLE).read_bytes()
        memory, digest = load_memory(directory / MEMORY)
    except OSError as error:
        raise TemplateDamaged(str(error)) from error
    right = (
        digest == manifest.memory_sha256
        and memory.size == manifest.memory_bytes
        and len(state) == manifest.state_bytes
        and hashlib.sha256(state).hexdigest() == manifest.state_sha256
        and hashlib.sha256(console).hexdigest() == manifest.console_sha256
    )
    if not right:
        memory.close()
        raise TemplateDamaged(f"{directory}: its content is not what its manifest says")
    return Frozen(nonce=manifest.nonce, memory=memory, state=state_of(state), console=console)
