"""The manifest of an image: manifest.json, read with suspicion and written with care."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from pytest_vmsandbox.errors import RequestInvalid

MANIFEST_NAME: Final = "manifest.json"
MANIFEST_FORMAT: Final = 1
_LONGEST: Final = 1 << 20

_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+~-]{0,99}")
_DIGEST: Final = re.compile(r"[0-9a-f]{16,128}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
# Printable, with neither blank nor control character: one parameter of the kernel's.
_PARAMETER: Final = re.compile(r"[!-~]{1,256}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """What a file must be: its size in bytes and its SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """manifest.json, checked. `made_from` is for people: what went in, by name."""

    name: str
    architecture: str
    kernel_release: str
    kernel: str
    initramfs: str
    digest: str | None = None
    compressed_kernel: str | None = None
    modules: str | None = None
    command_line: tuple[str, ...] = ()
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    made_from: Mapping[str, str] = field(default_factory=dict)

    @property
    def file_names(self) -> tuple[str, ...]:
        """The names of the files that the image consists of."""
        every = (self.kernel, self.initramfs, self.compressed_kernel, self.modules)
        return tuple(dict.fromkeys(name for name in every if name is not None))

    def render(self) -> str:
        """The text of manifest.json."""
        document = {
            "format": MANIFEST_FORMAT,
            "name": self.name,
            "digest": self.digest,
            "architecture": self.architecture,
            "kernel_release": self.kernel_release,
            "kernel": self.kernel,
            "compressed_kernel": self.compressed_kernel,
            "initramfs": self.initramfs,
            "modules": self.modules,
            "command_line": list(self.command_line),
            "files": {
                name: {"size": entry.size, "sha256": entry.sha256}
                for name, entry in sorted(self.files.items())
            },
            "made_from": dict(sorted(self.made_from.items())),
        }
        stated = {key: value for key, value in document.items() if value is not None}
        return json.dumps(stated, indent=2) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """The manifest in `directory`; RequestInvalid, naming file and field, if it is unsound."""
    path = directory / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST + 1)
    except OSError as error:
        raise RequestInvalid(
            f"{path}: {error.strerror}",
            "an image is a directory with manifest.json, a kernel and an initramfs; docs/images.md",
        ) from error
    return parse_manifest(data, source=str(path))


def parse_manifest(data: bytes, *, source: str) -> Manifest:
    """Read the content of a manifest.json; RequestInvalid names `source` and the field.

    Unknown fields are refused: one that was misspelt would otherwise do nothing in silence.
    """
    if len(data) > _LONGEST:
        raise RequestInvalid(f"{source}: longer than {_LONGEST} bytes")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestInvalid(f"{source}: not JSON: {error}") from error
    fields = _Fields(source, document)
    if (written_as := fields.take("format")) != MANIFEST_FORMAT or written_as is True:
        fields.refuse("format", f"must be {MANIFEST_FORMAT}", written_as)
    manifest = Manifest(
        name=fields.word("name"),
        digest=fields.optional_text("digest", _DIGEST, "16 to 128 hexadecimal digits"),
        architecture=fields.word("architecture"),
        kernel_release=fields.word("kernel_release"),
        kernel=fields.word("kernel"),
        compressed_kernel=fields.optional_word("compressed_kernel"),
        initramfs=fields.word("initramfs"),
        modules=fields.optional_word("modules"),
        command_line=fields.command_line(),
        files=fields.files(),
        made_from=fields.made_from(),
    )
    fields.refuse_others()
    return manifest


class _Fields:
    """The fields of a JSON object, taken out one by one, each of its exact type."""

    def __init__(self, source: str, document: object) -> None:
        if not isinstance(document, dict):
            raise RequestInvalid(f"{source}: must be a JSON object")
        self._source = source
        self._left: dict[str, object] = document

    def take(self, name: str) -> object:
        return self._left.pop(name, None)

    def word(self, name: str) -> str:
        value = self.optional_word(name)
        if value is None:
            self.refuse(name, "is missing", None)
        return value

    def optional_word(self, name: str) -> str | None:
        return self.optional_text(name, _WORD, "a name: letters, digits and _.+~-, no slash")

    def optional_text(self, name: str, form: re.Pattern[str], must_be: str) -> str | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, str) or not form.fullmatch(value):
            self.refuse(name, f"must be {must_be}", value)
        return value

    def command_line(self) -> tuple[str, ...]:
        value = self.take("command_line")
        if value is None:
            return ()
        if not isinstance(value, list):
            self.refuse("command_line", "must be a list of kernel parameters", value)
        for parameter in value:
            if not isinstance(parameter, str) or not _PARAMETER.fullmatch(parameter):
                self.refuse("command_line", "each must be printable, without blanks", parameter)
        return tuple(value)

    def files(self) -> dict[str, FileEntry]:
        found = {}
        for name, value in self._object("files").items():
            match value:
                case {"size": int(size), "sha256": str(sha256), **others} if (
                    not others
                    and not isinstance(size, bool)
                    and size >= 0
                    and _SHA256.fullmatch(sha256)
                ):
                    found[name] = FileEntry(size=size, sha256=sha256)
                case _:
                    self.refuse("files", f"{name!r} must have a size and a sha256", value)
        return found

    def made_from(self) -> dict[str, str]:
        found = {}
        for name, value in self._object("made_from").items():
            if not isinstance(value, str):
                self.refuse("made_from", f"{name!r} must be a text", value)
            found[name] = value
        return found

    def refuse_others(self) -> None:
        for name, value in self._left.items():
            self.refuse(name, "is no field of a manifest", value)

    def refuse(self, name: str, why: str, value: object) -> NoReturn:
        shown = "" if value is None else f": {value!r:.80}"
        raise RequestInvalid(f"{self._source}: field {name!r} {why}{shown}")

    def _object(self, name: str) -> dict[str, object]:
        value = self.take(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(name, "must be a JSON object", value)
        return value
