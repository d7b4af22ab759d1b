"""The content of files and trees that a setup uses, as a digest."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from pytest_vmsandbox.errors import RequestInvalid


def digest_inputs(paths: Iterable[Path | str]) -> str:
    """The SHA-256 over names, modes and content of files, and of trees with all that is in them.

    Where they lie does not count, nor when they were changed. RequestInvalid names what can't be
    read, or is neither file, directory nor link.
    """
    if isinstance(paths, (str, Path)):
        raise RequestInvalid(f"inputs={str(paths)!r} must be a list of paths")
    digest = hashlib.sha256()
    for path in map(_path, paths):
        for line in _describe(path):
            digest.update(line.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def _path(wanted: object) -> Path:
    if not isinstance(wanted, (str, Path)):
        raise RequestInvalid(f"inputs=[{wanted!r}] must be a list of paths")
    return Path(wanted)


def _describe(path: Path) -> Iterator[str]:
    try:
        if path.is_symlink():  # what is pushed is what it points to
            path = path.resolve(strict=True)
        yield from _describe_below(path, path.name)
    except OSError as error:
        raise RequestInvalid(
            f"the input {path} of a template: {error.strerror or error}"
        ) from error


def _describe_below(path: Path, name: str) -> Iterator[str]:
    state = path.lstat()
    mode = f"{stat.S_IMODE(state.st_mode):04o}"
    if stat.S_ISLNK(state.st_mode):
        yield f"link {name} {path.readlink()}"
    elif stat.S_ISDIR(state.st_mode):
        yield f"directory {name} {mode}"
        for entry in sorted(path.iterdir()):
            yield from _describe_below(entry, f"{name}/{entry.name}")
    elif stat.S_ISREG(state.st_mode):
        with path.open("rb") as file:
            yield f"file {name} {mode} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    else:
        raise RequestInvalid(f"the input {path} of a template is no file, directory or link")
