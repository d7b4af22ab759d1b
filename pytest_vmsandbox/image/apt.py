"""Packages from the host's own apt sources, without touching the host's apt state.

apt-get and apt-cache run with private lists, cache and status, so that root and an ordinary user
take the same path and nothing is locked or changed. Sources, keyrings, proxies and preferences are
the host's, and signature checks stay on. Source: apt.conf(5), apt-get(8), deb822(7).
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.image.programs import Program, ProgramFailed

# Of all that a dependency pulls in, only what carries the kernel and its modules is wanted.
_KERNEL_PART: Final = re.compile(r"linux-(image|modules)(-unsigned|-extra)?-[0-9][\w.+~-]*")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_VERSION: Final = re.compile(r"[0-9A-Za-z.+:~-]+")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")

_CONFIGURATION: Final = """\
Dir::State::lists "{state}/lists";
Dir::State::status "{state}/status";
Dir::State::extended_states "{state}/extended_states";
Dir::Cache "{state}/cache";
Dir::Cache::archives "{state}/cache/archives";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
APT::Architecture "{architecture}";
#clear APT::Architectures;
APT::Architectures {{ "{architecture}"; }};
// The state is ours alone, in a folder that user _apt often can't enter.
APT::Sandbox::User "";
Acquire::Languages {{ "none"; }};
Acquire::GzipIndexes "false";
Acquire::Retries "2";
// No index but Packages: not those of appstream, apt-file and their like.
#clear Acquire::IndexTargets;
Acquire::IndexTargets::deb::Packages {{
  MetaKey "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages";
  flatMetaKey "Packages";
  ShortDescription "Packages";
  Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages";
  flatDescription "$(RELEASE) Packages";
  Optional "0";
}};
// The host's hooks are about the host's state.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One version of a package, as a signed index describes it."""

    name: str
    version: str
    architecture: str
    sha256: str

    @property
    def file_name(self) -> str:
        """What its file is called in our cache."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"

    def is_whole(self, path: Path) -> bool:
        """Whether the file at `path` is this package, by its checksum."""
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        except OSError:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stanza:
    package: Package
    depends: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Apt:
    """A private apt, updated, with its state below `state`.

    `update_said` is empty when every source could be fetched and verified. A source that we don't
    need may fail; it is quoted only when a package is then not to be found.
    """

    state: Path
    update_said: str
    apt_get: Program
    apt_cache: Program
    deadline: Deadline

    def first_offered(self, names: Sequence[str]) -> str:
        """The first of `names` that the host's sources offer; HostUnfit if there is none."""
        offered = {stanza.package.name for stanza in self._show(names)}
        for name in names:
            if name in offered:
                return name
        raise self._not_offered(f"one of these packages: {', '.join(names)}")

    def kernel_parts(self, metapackage: str) -> tuple[Package, ...]:
        """The packages with the kernel and its modules, reached from `metapackage`."""
        found: dict[str, Package] = {}
        unread, read = [metapackage], set[str]()
        while unread:
            read.update(unread)
            stanzas = self._show(unread)
            found |= {s.package.name: s.package for s in stanzas if s.package.name != metapackage}
            needed = {name for s in stanzas for name in s.depends if _KERNEL_PART.fullmatch(name)}
            unread = sorted(needed - read)
        if not found:
            raise self._not_offered(f"a package linux-image-VERSION behind {metapackage}")
        return tuple(found[name] for name in sorted(found))

    def named(self, names: Sequence[str]) -> tuple[Package, ...]:
        """Those packages; HostUnfit, naming the missing ones, unless all are offered."""
        found = {stanza.package.name: stanza.package for stanza in self._show(names)}
        if missing := [name for name in names if name not in found]:
            raise self._not_offered(f"the packages {', '.join(missing)}")
        return tuple(found[name] for name in names)

    def download(self, packages: Sequence[Package], into: Path) -> None:
        """Put the files of `packages` into `into`, checked; files that are there are kept.

        A file appears under its name only when it is whole.
        """
        partial = self.state / "downloads"
        partial.mkdir()
        wanted = [f"{package.name}={package.version}" for package in packages]
        try:
            self.apt_get.run(
                [*_options(self.state), "download", *wanted], deadline=self.deadline, cwd=partial
            )
        except ProgramFailed as failed:
            raise _unfit("apt-get download of an image's packages", failed.last_lines) from failed
        for package in packages:
            # apt has its own ways to escape an epoch's colon: match by content, not by name.
            for path in sorted(partial.glob(f"{package.name}_*.deb")):
                if package.is_whole(path):
                    path.replace(into / package.file_name)
                    break
            else:
                raise _unfit("apt-get download", f"no whole {package.file_name} came")

    def _show(self, names: Sequence[str]) -> tuple[_Stanza, ...]:
        # apt-cache ends with 100 when one of several is unknown, and shows the others.
        stanzas: list[_Stanza] = []
        try:
            stanzas += parse_stanzas(self._show_text(names))
        except ProgramFailed:
            if len(names) > 1:
                for name in names:
                    stanzas += self._show([name])
        return tuple(stanzas)

    def _show_text(self, names: Sequence[str]) -> str:
        return self.apt_cache.run(
            [*_options(self.state), "show", "--no-all-versions", *names], deadline=self.deadline
        ).stdout

    def _not_offered(self, need: str) -> HostUnfit:
        seen = f"the host's apt sources do not offer that\n{self.update_said}".rstrip()
        return _unfit(need, seen)


@contextmanager
def open_apt(state: Path, *, architecture: str, deadline: Deadline) -> Iterator[Apt]:
    """A private apt with fresh indexes of the host's sources; its state is removed at the end.

    `state` must not exist. HostUnfit without apt.
    """
    apt_get, apt_cache = Program.find("apt-get"), Program.find("apt-cache")
    (state / "lists" / "partial").mkdir(parents=True)
    (state / "cache" / "archives" / "partial").mkdir(parents=True)
    (state / "status").touch()
    (state / "apt.conf").write_text(
        _CONFIGURATION.format(state=state, architecture=architecture), encoding="utf-8"
    )
    try:
        yield Apt(
            state=state,
            update_said=_update(apt_get, state, deadline),
            apt_get=apt_get,
            apt_cache=apt_cache,
            deadline=deadline,
        )
    finally:
        shutil.rmtree(state, ignore_errors=True)


def _update(apt_get: Program, state: Path, deadline: Deadline) -> str:
    try:
        return apt_get.run([*_options(state), "update"], deadline=deadline).stderr
    except ProgramFailed as failed:
        return failed.last_lines


def _options(state: Path) -> tuple[str, ...]:
    # By -c, which is read after the host's own configuration and so has the last word.
    return ("-q", "-c", str(state / "apt.conf"))


def parse_stanzas(text: str) -> tuple[_Stanza, ...]:
    """Read what `apt-cache show` prints; a package twice counts once, the first time."""
    found: dict[str, _Stanza] = {}
    for paragraph in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+):[ \t]*(.*)$", paragraph, re.MULTILINE))
        if stanza := _parse_stanza(fields):
            found.setdefault(stanza.package.name, stanza)
    return tuple(found.values())


def _parse_stanza(fields: dict[str, str]) -> _Stanza | None:
    package = Package(
        name=fields.get("Package", ""),
        version=fields.get("Version", ""),
        architecture=fields.get("Architecture", ""),
        sha256=fields.get("SHA256", ""),
    )
    sound = (
        _NAME.fullmatch(package.name)
        and _VERSION.fullmatch(package.version)
        and _NAME.fullmatch(package.architecture)
        and _SHA256.fullmatch(package.sha256)
    )
    if not sound:
        return None
    # "name (= 1) | other, name:any": the first alternative is the one that apt prefers.
    depends = re.split(r"[\s(:|]", fields.get("Depends", "").replace(",", "\n"))
    wanted = tuple(word for word in depends if _NAME.fullmatch(word))
    return _Stanza(package=package, depends=wanted)


def _unfit(need: str, seen: str) -> HostUnfit:
    return HostUnfit(
        "VMS-IMAGE-PACKAGES",
        need,
        seen,
        "check the network and the apt sources, or use --vm-image=PATH (docs/images.md)",
    )
