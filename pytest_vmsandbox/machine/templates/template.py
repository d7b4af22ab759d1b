"""A template: a machine that was prepared once and frozen, as a directory that never changes.

memory          the guest's RAM, or what differs from that of the template it stands on
pages           which pages of RAM are in `memory`
console         what the guest had printed
state           the state of its devices, as QEMU writes it for a migration
SERIAL.0, ...   what was written to its disks, by their serials
manifest.json   what it was made of, and how long and which content all of it must have
lock            held by whoever makes it or uses it
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pytest_vmsandbox.errors import VmSandboxError
from pytest_vmsandbox.machine.frozen import Frozen, state_of
from pytest_vmsandbox.machine.memory import new_memory
from pytest_vmsandbox.machine.templates.disks import (
    DisksDamaged,
    SavedDisks,
    check_disks,
    load_disks,
    parse_saved_disks,
    save_disks,
)
from pytest_vmsandbox.machine.templates.memory_file import (
    MEMORY,
    PAGES,
    MemoryDamaged,
    hash_memory,
    load_memory,
    save_memory,
)

# It grows whenever a template of the older form would be misread.
FORMAT = 4

_OF_THE_HOST = frozenset(
    getattr(errno, name)
    for name in ("EMFILE", "ENFILE", "ENOMEM", "EIO", "ENOSPC", "EDQUOT", "ENOLCK", "ESTALE")
)

STATE, CONSOLE, MANIFEST = "state", "console", "manifest.json"


class TemplateDamaged(VmSandboxError):
    """A template is not what its manifest says; it is made anew, never used."""


class OtherFormat(TemplateDamaged):
    """Another version of this package made it, and can read it; we can't."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides what a template is: equal recipes give interchangeable templates.

    `parts` is text by name (image digest, VMM and its version, machine configuration, ...);
    `title` is for people, and decides nothing.
    """

    parts: Mapping[str, str]
    title: str = ""

    @property
    def digest(self) -> str:
        """What names the template: the SHA-256 of format and parts, in hexadecimal."""
        return hashlib.sha256(
            json.dumps({"format": FORMAT, **self.parts}, sort_keys=True).encode()
        ).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The template that another one stands on: its digest, and that very making of it.

    The same recipe made twice gives two machines that behave alike, but not the same bytes.
    """

    digest: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """manifest.json: the recipe, the nonce of the boot that was frozen, sizes and checksums."""

    digest: str
    parts: Mapping[str, str]
    title: str
    nonce: str
    memory_bytes: int
    memory_sha256: str
    state_bytes: int
    state_sha256: str
    console_sha256: str
    disks: SavedDisks
    base: Base | None

    @property
    def content(self) -> str:
        """Which making of the template this is: the SHA-256 of all the others."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A template that another one is made on: as it is named, and its memory."""

    manifest: Manifest
    frozen: Frozen

    @property
    def base(self) -> Base:
        """What the other one says of it."""
        return Base(digest=self.manifest.digest, content=self.manifest.content)


def save_template(
    directory: Path, *, recipe: Recipe, frozen: Frozen, base: Standing | None = None
) -> Manifest:
    """Write a template into an empty directory of ours, for nobody else to read.

    Of its memory, only what is not as in `base`, if it stands on one. The directory counts as a
    template only once all is written: the manifest is the last.
    """
    below = base.frozen.memory if base else None
    memory_sha256 = save_memory(frozen.memory, directory, base=below)
    disks = save_disks(frozen.disks, directory)
    state = frozen.read_state()
    (directory / STATE).write_bytes(state)
    (directory / CONSOLE).write_bytes(frozen.console)
    manifest = Manifest(
        digest=recipe.digest,
        parts=recipe.parts,
        title=recipe.title,
        nonce=frozen.nonce,
        memory_bytes=frozen.memory.size,
        memory_sha256=memory_sha256,
        state_bytes=len(state),
        state_sha256=hashlib.sha256(state).hexdigest(),
        console_sha256=hashlib.sha256(frozen.console).hexdigest(),
        disks=disks,
        base=base.base if base else None,
    )
    form = {"format": FORMAT, **asdict(manifest), "content": manifest.content}
    (directory / MANIFEST).write_text(json.dumps(form, indent=2) + "\n", encoding="utf-8")
    for name in (MEMORY, PAGES, STATE, CONSOLE, MANIFEST):
        (directory / name).chmod(0o400)
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the template in `directory`; TemplateDamaged says what is wrong with it."""
    path = directory / MANIFEST
    try:
        form = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        _require_damage(error)
        raise TemplateDamaged(f"{path}: {error}") from error
    match form:
        case {
            "format": int(number),
            "digest": str(digest),
            "parts": dict(parts),
            "title": str(title),
            "nonce": str(nonce),
            "memory_bytes": int(memory_bytes),
            "memory_sha256": str(memory_sha256),
            "state_bytes": int(state_bytes),
            "state_sha256": str(state_sha256),
            "console_sha256": str(console_sha256),
            "disks": disks,
            "base": base,
            "content": str(content),
        } if number == FORMAT:
            manifest = Manifest(
                digest=digest,
                parts={str(name): str(part) for name, part in parts.items()},
                title=title,
                nonce=nonce,
                memory_bytes=memory_bytes,
                memory_sha256=memory_sha256,
                state_bytes=state_bytes,
                state_sha256=state_sha256,
                console_sha256=console_sha256,
                disks=_parse_disks(disks),
                base=_parse_base(base),
            )
        case {"format": int(number)} if number != FORMAT:
            raise OtherFormat(f"{path}: of format {number}, this is {FORMAT}")
        case _:
            raise TemplateDamaged(f"{path}: not a manifest of format {FORMAT}")
    if manifest.content != content:
        raise TemplateDamaged(f"{path}: it is not as it was written")
    if Recipe(parts=manifest.parts).digest != digest:
        raise TemplateDamaged(f"{path}: its digest is not that of its parts")
    return manifest


def load_template(chain: Sequence[Path], recipe: Recipe, *, room: Path) -> tuple[Manifest, Frozen]:
    """Read it into sealed memory, its disks into a directory in `room`, and check every byte.

    `chain` begins with its own directory; each stands on the next. Raises TemplateDamaged where a
    byte is wrong, it is one of another recipe, or it was made on another making of its base.
    """
    manifests = read_chain(chain)
    top = manifests[0]
    if top.digest != recipe.digest:
        raise TemplateDamaged(f"{chain[0]}: it was made of something else")
    with ExitStack() as undo:
        memory = undo.enter_context(new_memory("vmsandbox-memory", size=top.memory_bytes))
        with _telling_damage():
            for directory, manifest in reversed(list(zip(chain, manifests, strict=True))):
                if load_memory(directory, memory) != manifest.memory_sha256:
                    raise TemplateDamaged(f"{directory}: its memory is not what its manifest says")
            memory.seal()
            state, console = _state(chain[0], top), _console(chain[0], top)
            disks = load_disks(top.disks, chain[0], room=room)
            undo.callback(disks.close)
            frozen = Frozen(
                nonce=top.nonce, memory=memory, disks=disks, state=state_of(state), console=console
            )
        undo.pop_all()
        return top, frozen


def check_template(chain: Sequence[Path], *, every_byte: bool = True) -> None:
    """Compare every byte of the first one with its manifest; TemplateDamaged says what differs.

    Without `every_byte`, only whether the manifests fit each other.
    """
    top = read_chain(chain)[0]
    if not every_byte:
        return
    with _telling_damage():
        if hash_memory(chain[0], size=top.memory_bytes) != top.memory_sha256:
            raise TemplateDamaged(f"{chain[0]}: its memory is not what its manifest says")
        _state(chain[0], top)
        _console(chain[0], top)
        check_disks(top.disks, chain[0])


def read_chain(chain: Sequence[Path]) -> list[Manifest]:
    """The manifests of all of them; TemplateDamaged where one does not stand on the next."""
    manifests = [read_manifest(directory) for directory in chain]
    for directory, manifest, below in zip(chain, manifests, [*manifests[1:], None], strict=True):
        stands_on = below and Base(digest=below.digest, content=below.content)
        if manifest.base != stands_on or (below and below.memory_bytes != manifest.memory_bytes):
            raise TemplateDamaged(f"{directory}: what it was made on is there no more")
    return manifests


@contextmanager
def _telling_damage() -> Iterator[None]:
    """What can't be read in the block, or is not what it should be, makes a template damaged."""
    try:
        yield
    except (OSError, MemoryDamaged, DisksDamaged) as error:
        _require_damage(error)
        raise TemplateDamaged(str(error)) from error


def _require_damage(error: Exception) -> None:
    """Raise it again where it says nothing of the template, but of the host."""
    if isinstance(error, OSError) and error.errno in _OF_THE_HOST:
        raise error


def _state(directory: Path, manifest: Manifest) -> bytes:
    state = (directory / STATE).read_bytes()
    right = (manifest.state_bytes, manifest.state_sha256)
    if (len(state), hashlib.sha256(state).hexdigest()) != right:
        raise TemplateDamaged(
            f"{directory}: the state of its devices is not what its manifest says"
        )
    return state


def _console(directory: Path, manifest: Manifest) -> bytes:
    console = (directory / CONSOLE).read_bytes()
    if hashlib.sha256(console).hexdigest() != manifest.console_sha256:
        raise TemplateDamaged(f"{directory}: its console is not what its manifest says")
    return console


def _parse_disks(form: object) -> SavedDisks:
    try:
        return parse_saved_disks(form)
    except DisksDamaged as error:
        raise TemplateDamaged(str(error)) from error


def _parse_base(form: object) -> Base | None:
    match form:
        case None:
            return None
        case {"digest": str(digest), "content": str(content)}:
            return Base(digest=digest, content=content)
    raise TemplateDamaged(f"no manifest says of its base {form!r}")
