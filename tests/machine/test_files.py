"""Files and trees, in and out."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest

from pytest_vmsandbox import Machine

MIB = 1024 * 1024


def _digests(root: Path) -> dict[str, tuple[str, int, str]]:
    """Each path below `root`: its kind, its mode, and a digest of its content or its target."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        if path.is_symlink():
            what = ("link", 0, str(path.readlink()))
        elif path.is_dir():
            what = ("directory", mode, "")
        else:
            what = ("file", mode, hashlib.sha256(path.read_bytes()).hexdigest())
        found[str(path.relative_to(root))] = what
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two thousand files in many directories, with links and unusual modes and names."""
    chance = random.Random(7)
    root = tmp_path / "tree"
    root.mkdir()
    for number in range(2000):
        directory = root / f"d{number % 37}" / f"e{number % 5}"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"file {number} ž"
        path.write_bytes(chance.randbytes(chance.randrange(3000)))
        path.chmod(chance.choice([0o644, 0o600, 0o755, 0o444]))
    (root / "to a file").symlink_to("d1/e1/file 1 ž")
    (root / "to nowhere").symlink_to("/no/such/place")
    (root / "empty").mkdir(mode=0o700)
    return root


def test_a_tree_of_two_thousand_files_comes_back_equal(
    vm_module: Machine, tree: Path, tmp_path: Path
) -> None:
    vm_module.push(tree, "/root/tree")
    vm_module.pull("/root/tree", tmp_path / "back")
    inside = vm_module.run("find /root/tree -type f | wc -l").stdout.strip()
    vm_module.run("rm -rf /root/tree", check=True)

    assert inside == "2000"
    assert _digests(tmp_path / "back") == _digests(tree)


@pytest.mark.vm(memory_mib=256)
def test_sixty_four_megabytes_come_back_equal(vm: Machine, tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.write_bytes(os.urandom(64 * MIB))
    source.chmod(0o640)

    vm.push(source, "/root/big")
    inside = vm.run("sha256sum < /root/big; stat -c %a /root/big").stdout.split()
    vm.pull("/root/big", tmp_path / "back")

    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert inside[0] == digest
    assert inside[-1] == "640"
    assert hashlib.sha256((tmp_path / "back").read_bytes()).hexdigest() == digest
    assert (tmp_path / "back").stat().st_mode == source.stat().st_mode


def test_small_texts_and_bytes(vm_module: Machine) -> None:
    vm_module.write_text("/root/text", "žluť\n")
    vm_module.write_bytes("/root/bytes", b"\x00\xff", mode=0o600)

    assert vm_module.read_text("/root/text") == "žluť\n"
    assert vm_module.read_bytes("/root/bytes") == b"\x00\xff"
    assert vm_module.run("stat -c %a /root/bytes").stdout == "600\n"
    assert vm_module.run("cat /root/text").stdout == "žluť\n"


def test_a_file_of_the_kernel_is_read_though_its_size_is_zero(vm_module: Machine) -> None:
    assert vm_module.read_text("/proc/version").startswith("Linux version ")


@pytest.mark.parametrize(
    ("path", "error"),
    [("/nope", FileNotFoundError), ("/root", IsADirectoryError), ("/root/x/y", FileNotFoundError)],
)
def test_what_can_not_be_read_is_an_oserror_with_its_path(
    vm_module: Machine, path: str, error: type[OSError]
) -> None:
    with pytest.raises(error) as refused:
        vm_module.read_bytes(path)

    assert path in str(refused.value)


def test_a_full_disk_is_told_and_leaves_no_half_a_file(vm_module: Machine) -> None:
    vm_module.run("mkdir -p /mnt/small; mount -t tmpfs -o size=1m tmpfs /mnt/small", check=True)

    with pytest.raises(OSError, match="No space left"):
        vm_module.write_bytes("/mnt/small/file", b"x" * 2 * MIB)

    assert vm_module.run("ls -A /mnt/small").stdout == ""
    vm_module.run("umount /mnt/small", check=True)


def test_a_full_disk_is_told_whenever_the_rest_comes(vm_module: Machine) -> None:
    vm_module.run("mkdir -p /mnt/full; mount -t tmpfs -o size=1m tmpfs /mnt/full", check=True)

    for more in range(100):  # the last bytes meet a transfer that goes on, ends, or is over
        with pytest.raises(OSError, match="No space left"):
            vm_module.write_bytes("/mnt/full/file", b"x" * (MIB + 4096 * (1 + more)))

    assert vm_module.run("ls -A /mnt/full").stdout == ""


def test_a_file_that_something_is_mounted_on_is_written_to(vm: Machine) -> None:
    vm.run("mkdir /a /b && echo beneath > /a/file && echo above > /b/file", check=True)
    vm.run("mount --bind /b/file /a/file", check=True)

    vm.write_text("/a/file", "new\n", mode=0o600)

    assert vm.run("cat /a/file /b/file; ls -A /a").stdout == "new\nnew\nfile\n"
    assert vm.run(["stat", "-c", "%a", "/b/file"]).stdout == "600\n"
    vm.run("umount /a/file", check=True)
    assert vm.run("cat /a/file; ls -A /a").stdout == "beneath\nfile\n"


def test_pushing_what_is_not_there_fails_on_the_host(vm_module: Machine, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        vm_module.push(tmp_path / "missing", "/root/missing")

    assert vm_module.run("test -e /root/missing").returncode == 1


def test_pulling_what_is_not_there_leaves_nothing(vm_module: Machine, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        vm_module.pull("/root/missing", tmp_path / "missing")

    assert list(tmp_path.iterdir()) == []
