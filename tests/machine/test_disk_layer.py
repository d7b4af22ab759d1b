"""Layers of disks that a VMM wrote: those that it should not have are given to no other."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pytest_vmsandbox import Disk, Machine, RequestInvalid
from pytest_vmsandbox.machine.disk_layer import LayerRefused
from pytest_vmsandbox.machine.disk_plan import DiskPlan
from pytest_vmsandbox.machine.disks import Disks, FrozenDisks
from pytest_vmsandbox.machine.templates.disks import DisksDamaged, load_disks, save_disks
from pytest_vmsandbox.vmm.disk import DiskFormat, Layer
from pytest_vmsandbox.vmm.launch import Writable
from pytest_vmsandbox.vmm.qcow2 import write_empty

SIZE = 2 << 20
PLAN = DiskPlan(serial="disk0", size=SIZE)

# What a header says of itself, by offset (QEMU docs/interop/qcow2.rst).
BACKING = (8, (4096).to_bytes(8) + (11).to_bytes(4))
LONGER = (24, (SIZE * 2).to_bytes(8))
ENCRYPTED = (32, (1).to_bytes(4))
DATA_FILE = (72, (1 << 2).to_bytes(8))
NO_IMAGE = (0, b"JUNK")
CHANGES = {
    "backing file": BACKING,
    f"disk of {SIZE * 2} bytes": LONGER,
    "encrypted": ENCRYPTED,
    "another file": DATA_FILE,
    "no qcow2 image": NO_IMAGE,
}
ALL = pytest.mark.parametrize(("why", "change"), CHANGES.items())


def _frozen(directory: Path, change: tuple[int, bytes] | None = None) -> FrozenDisks:
    """A frozen overlay, as if its VMM had written that to it."""
    directory.mkdir()
    path = directory / "disk0.frozen"
    with path.open("w+b") as file:
        write_empty(file.fileno(), size=SIZE)
        if change:
            os.pwrite(file.fileno(), change[1], change[0])
    layers = {"disk0": (Layer(file=path, format=DiskFormat.QCOW2),)}
    return FrozenDisks(layers=layers, directory=directory)


def _top(disks: Disks) -> Writable:
    (stack,) = disks.open()
    assert isinstance(stack.layers[0].file, Writable)
    return stack.layers[0].file


@ALL
def test_no_machine_begins_with_it(tmp_path: Path, why: str, change: tuple[int, bytes]) -> None:
    frozen = _frozen(tmp_path / "frozen", change)
    disks = Disks(frozen.under([PLAN]), directory=tmp_path)
    with closing(disks), pytest.raises(LayerRefused, match=f"disk0.*{why}"):
        disks.open()


@ALL
def test_its_own_machine_is_not_powered_on_with_it_nor_frozen(
    tmp_path: Path, why: str, change: tuple[int, bytes]
) -> None:
    plans = _frozen(tmp_path / "frozen").under([PLAN])
    (tmp_path / "machine").mkdir()
    with closing(Disks(plans, directory=tmp_path / "machine")) as disks:
        os.pwrite(_top(disks).descriptor, change[1], change[0])

        for verb in (disks.open, disks.freeze):
            with pytest.raises(LayerRefused, match=f"disk0.*{why}"):
                verb()
    assert {path.name for path in tmp_path.iterdir()} == {"frozen", "machine"}


@ALL
def test_it_is_not_loaded(tmp_path: Path, why: str, change: tuple[int, bytes]) -> None:
    (tmp_path / "template").mkdir()
    saved = save_disks(_frozen(tmp_path / "frozen", change), tmp_path / "template")

    if change is LONGER:  # a disk's size is not known before there is a machine
        load_disks(saved, tmp_path / "template", room=tmp_path).close()
    else:
        with pytest.raises(DisksDamaged, match=why):
            load_disks(saved, tmp_path / "template", room=tmp_path)


def test_a_raw_one_of_another_length_is_refused(tmp_path: Path) -> None:
    with closing(Disks([PLAN], directory=tmp_path)) as disks:
        os.ftruncate(_top(disks).descriptor, SIZE + 512)

        with pytest.raises(LayerRefused, match=str(SIZE + 512)):
            disks.open()


def test_a_disk_that_was_removed_is_not_made_anew(tmp_path: Path) -> None:
    disks = Disks([PLAN], directory=tmp_path)
    disks.open()
    disks.close()

    with pytest.raises(RequestInvalid, match="removed"):
        disks.open()


@pytest.mark.parametrize("written", [b"", b"x"])
def test_a_blank_disk_stays_raw_until_it_is_written(tmp_path: Path, written: bytes) -> None:
    (tmp_path / "machine").mkdir()
    with closing(Disks([PLAN], directory=tmp_path / "machine")) as disks:
        os.pwrite(_top(disks).descriptor, written, 4096)
        with closing(disks.freeze()) as frozen:
            (plan,) = frozen.under([PLAN])

    assert len(plan.frozen) == len(written)


@pytest.mark.machine
@pytest.mark.vm(disks=[Disk(size="8M"), Disk(size="1M")])
def test_going_back_as_often_as_one_likes_makes_nothing_deeper(
    vm: Machine, open_descriptors: Callable[[], list[str]]
) -> None:
    disk = "/dev/disk/by-id/virtio-disk0"
    vm.run(f"echo first | dd of={disk} conv=fsync", check=True)
    sizes = []
    for _ in range(3):
        with vm.snapshot() as snapshot:
            vm.restore(snapshot)
        stacks = vm._controller.disks.open()
        sizes.append(([len(stack.layers) for stack in stacks], len(open_descriptors())))

    assert [depths for depths, _ in sizes] == [[2, 1]] * 3
    assert len({count for _, count in sizes}) == 1
    assert vm.run(f"head -c 6 {disk}").stdout == "first\n"


@pytest.mark.machine
@pytest.mark.vm(disks=[Disk(size="1M")] * 16)
def test_too_many_generations_are_refused_while_all_runs_on(vm: Machine) -> None:
    def write(text: str) -> None:
        vm.run(f"for disk in /dev/vd[a-p]; do echo {text} > $disk; done; sync", check=True)

    for text in ("one", "two"):
        write(text)
        snapshot = vm.snapshot()
        vm.restore(snapshot)
    write("three")

    for verb in (vm.snapshot, lambda: vm.fork(1)):
        with pytest.raises(RequestInvalid, match=r"64 files.*disk0: 4.*more than 48"):
            verb()
    assert vm.run("for disk in /dev/vd[a-p]; do head -n 1 $disk; done").stdout == "three\n" * 16
    vm.restore(snapshot)
    assert vm.run("head -n 1 /dev/vdp").stdout == "two\n"
