"""The bundle: exactly those of our modules that run with privilege, sent to a fresh Python.

The user that the warden becomes may not be able to read our package, and root should not import
whatever else lies beside it. So the modules are listed here, and come to the warden as one file.
"""

from __future__ import annotations

import marshal
import os
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import MAGIC_NUMBER, find_spec
from pathlib import Path

_ROOM = "pytest_vmsandbox"

# The whole of what acts with privilege, beside the standard library.
PRIVILEGED = tuple(
    f"{_ROOM}.{name}"
    for name in (
        "errors",
        "deadline",
        "linux.arguments",
        "linux.at",
        "linux.capabilities",
        "linux.cgroups",
        "linux.clone",
        "linux.id_maps",
        "linux.keyring",
        "linux.libc",
        "linux.mount_flags",
        "linux.mount_tree",
        "linux.mountinfo",
        "linux.mounts",
        "linux.namespaces",
        "linux.new_mount",
        "linux.openat2",
        "linux.owned_fd",
        "linux.packets",
        "linux.pidfd",
        "linux.prctl",
        "linux.privileges",
        "linux.seccomp",
        "warden.groups",
        "warden.launch",
        "warden.main",
        "warden.requests",
        "warden.server",
        "warden.steps",
        "warden.validation",
        "warden.view",
    )
)

# What `python -c` runs: it takes the bundle from the first packet on stdin, makes its modules
# importable, none but them, and runs `main`. A Python of our own version gets compiled code.
BOOTSTRAP = """\
import marshal, mmap, os, socket, sys
from importlib.machinery import ModuleSpec
from _frozen_importlib_external import MAGIC_NUMBER

line = socket.socket(fileno=0)
_, (bundle,), _, _ = socket.recv_fds(line, 1, 1)
magic, packages, modules = marshal.loads(mmap.mmap(bundle, 0, prot=mmap.PROT_READ))
os.close(bundle)

class Bundle:
    def find_spec(self, name, path=None, target=None):
        if name in modules or name in packages:
            return ModuleSpec(name, self, origin=f"<{name}>", is_package=name in packages)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        name = module.__spec__.name
        if name in modules:
            source, code = modules[name]
            if magic != MAGIC_NUMBER:
                code = marshal.dumps(compile(source, f"<{name}>", "exec"))
            exec(marshal.loads(code), vars(module))

sys.meta_path.insert(0, Bundle())
from pytest_vmsandbox.warden.main import main
main(line)
"""


def bootstrap_of(module: str) -> str:
    """What `python -c` runs to end up in the `main` of another module than the warden's."""
    return BOOTSTRAP.replace(f"{_ROOM}.warden.main", module)


@cache
def bundle(names: tuple[str, ...] = PRIVILEGED) -> bytes:
    """The modules, each as source and as code, with the version of Python that the code is for."""
    modules = {name: _load(name) for name in names}
    packages = sorted({_ROOM, *(name.rpartition(".")[0] for name in names)})
    return marshal.dumps((MAGIC_NUMBER, tuple(packages), modules))


def open_bundle(names: tuple[str, ...] = PRIVILEGED) -> int:
    """A new descriptor of a file in memory that holds the bundle; it is the caller's."""
    descriptor = os.memfd_create("vmsandbox-warden", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(bundle(names))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _load(name: str) -> tuple[str, bytes]:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f"no module {name}")
    # Not the loader that found it: pytest's rewrites what is its plugin.
    loader = SourceFileLoader(name, spec.origin)
    source = Path(spec.origin).read_text(encoding="utf-8")
    return source, marshal.dumps(loader.get_code(name))
