"""A VMM's view: its program with its libraries, a few devices, and a directory of its own.

Nothing else of the host is in it: no home, no /etc but the linker's cache, no /run, no /sys, of
/proc only itself, and nothing that can be written but its own directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from pytest_vmsandbox.warden.steps import Bind, Device, Proc, ReadOnly, Step, Symlink, Tmpfs

# Where a VMM makes its sockets; every machine has its own there.
ROOM = PurePosixPath("/machine")

# For sockets and a screenshot; a VMM that was taken over can't fill more of the host.
ROOM_MIB = 16

_LIBRARIES = (Path("/usr"), Path("/nix/store"))
_LINKED = tuple(Path(f"/{name}") for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"))
_LINKER_CACHE = Path("/etc/ld.so.cache")

# What QEMU looks for around itself: where it was built, where it was installed, and where Homebrew
# did that, whose programs and libraries are links to what lies in two more folders.
_BESIDE: tuple[str, ...] = ("qemu-bundle", "pc-bios")
_INSTALLED = ("lib", "lib64", "libexec", "share/qemu")
_BREWED = (*_INSTALLED, "Cellar", "opt")

_DEVICES = ("null", "zero", "urandom")


def plan_vmm_view(program: Path, *, kvm: bool, shown: Sequence[Step] = ()) -> tuple[Step, ...]:
    """The steps that make the view of a VMM whose program is `program`, an absolute path.

    `shown` is in it as well.
    """
    return (
        Tmpfs(target="/", size_mib=1),
        *_programs(program),
        *(Device(name=name) for name in _DEVICES),
        *((Device(name="kvm"),) if kvm else ()),
        *shown,
        Tmpfs(target=str(ROOM), size_mib=ROOM_MIB, mode=0o700),
        Proc(target="/proc"),
        ReadOnly(target="/", writable=(str(ROOM),)),
    )


def _programs(program: Path) -> Iterator[Step]:
    shown = [path for path in _LIBRARIES if path.is_dir()]
    place = program.parent.resolve() / program.name  # /bin may be a link to /usr/bin
    if not any(place.is_relative_to(path) for path in shown):
        shown += [program, *_brought_by(program)]
    for path in shown:
        yield Bind(source=str(path), target=str(path))
    for path in _LINKED:
        if path.is_symlink():
            yield Symlink(target=str(path), text=str(path.readlink()))
        elif path.is_dir():
            yield Bind(source=str(path), target=str(path))
    if _LINKER_CACHE.exists():
        yield Bind(source=str(_LINKER_CACHE), target=str(_LINKER_CACHE))


def _brought_by(program: Path) -> Iterator[Path]:
    """Where a program outside the system has its libraries and data.

    Not all that lies there: who keeps it in ~/bin, or in ~/.local/bin, keeps more beside it.
    """
    folder = program.parent
    names = _BESIDE
    if folder.name in ("bin", "sbin"):
        folder = folder.parent
        names = _BREWED if (folder / "Cellar").is_dir() else _INSTALLED
    yield from (folder / name for name in names if (folder / name).is_dir())
