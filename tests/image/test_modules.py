"""Which module depends on which, and in what order they load."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.image.modules import ModuleIndex, copy_modules, module_name, parse_index

NOTHING: frozenset[str] = frozenset()


@pytest.fixture
def index() -> ModuleIndex:
    return parse_index(
        dependencies=(
            "kernel/net/net.ko: kernel/net/failover.ko\n"
            "kernel/net/failover.ko:\n"
            "kernel/drivers/virtio-rng.ko: kernel/drivers/virtio.ko kernel/drivers/ring.ko\n"
            "kernel/drivers/virtio.ko: kernel/drivers/ring.ko\n"
            "kernel/drivers/ring.ko:\n"
        ),
        builtin="kernel/fs/ext4/ext4.ko\nkernel/crypto/crc32c_generic.ko\n",
    )


def test_a_module_loads_after_all_that_it_depends_on(index: ModuleIndex) -> None:
    order = index.load_order(["virtio_rng", "net"], essential=NOTHING)

    assert [module_name(path) for path in order] == [
        *("ring", "virtio", "virtio_rng", "failover", "net"),
    ]


def test_what_is_built_in_needs_no_file(index: ModuleIndex) -> None:
    assert index.load_order(["ext4"], essential=frozenset({"ext4"})) == ()


def test_what_the_kernel_lacks_is_left_out(index: ModuleIndex) -> None:
    assert index.load_order(["pvpanic"], essential=NOTHING) == ()


def test_a_kernel_without_an_essential_module_is_refused(index: ModuleIndex) -> None:
    with pytest.raises(RequestInvalid, match="virtio_console"):
        index.load_order(["virtio_console"], essential=frozenset({"virtio_console"}))


def test_modules_that_depend_on_each_other_end_the_search() -> None:
    circle = parse_index(dependencies="a.ko: b.ko\nb.ko: a.ko\n", builtin="")

    assert sorted(circle.load_order(["a"], essential=NOTHING)) == ["a.ko", "b.ko"]


@pytest.mark.parametrize(
    ("path", "name"),
    [("kernel/a/virtio-rng.ko", "virtio_rng"), ("dm-mod.ko.xz", "dm_mod"), ("x.ko.zst", "x")],
)
def test_a_module_is_named_as_the_kernel_names_it(path: str, name: str) -> None:
    assert module_name(path) == name


def test_compressed_modules_are_copied_uncompressed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "kernel").mkdir(parents=True)
    (source / "kernel" / "a.ko.xz").write_bytes(lzma.compress(b"module a"))
    (source / "kernel" / "b.ko").write_bytes(b"module b")
    (source / "modules.builtin").write_bytes(b"")
    (source / "build").symlink_to("/usr/src")

    copy_modules(source, tmp_path / "copy")

    copied = {p.relative_to(tmp_path / "copy"): p for p in (tmp_path / "copy").rglob("*.*")}
    assert sorted(map(str, copied)) == ["kernel/a.ko", "kernel/b.ko", "modules.builtin"]
    assert copied[Path("kernel/a.ko")].read_bytes() == b"module a"


def test_a_module_that_can_not_be_decompressed_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.ko.xz").write_bytes(b"\xfd7zXZ\0 and then nonsense")

    with pytest.raises(RequestInvalid, match=r"a\.ko\.xz"):
        copy_modules(source, tmp_path / "copy")
