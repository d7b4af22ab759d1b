"""What a test may ask for as a disk, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox import Disk, RequestInvalid
from pytest_vmsandbox.machine.disk import parse_size
from pytest_vmsandbox.machine.disk_plan import plan_disks
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.vmm.disk import DiskFormat


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [("1G", 1 << 30), ("512M", 512 << 20), ("4K", 4096), ("8T", 8 << 40), (512, 512)],
)
def test_sizes(size: object, bytes_: int) -> None:
    assert parse_size(size) == bytes_


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        *({"size": size} for size in (0, -512, 1, True, 1.5, "1", "1g", "G", "0G", "-1G", "1.5G")),
        *(
            {"size": size}
            for size in ("1GB", " 1G", "1G\n", "9T", "9" * 5000 + "T", 1 << 80, b"1G")
        ),
        *({"size": "1G", "serial": serial} for serial in ("", "x" * 21, "a/b", "1st", "a b", 7)),
        {"size": "1G", "serial": "vmsandbox-mods"},
        {"size": "1G", "format": "raw"},
        {"size": "1G", "read_only": True},
        {"source": "/x", "read_only": True, "size": "1G"},
        *({"source": source} for source in ("", 7, b"/x", "/x\0y")),
        {"source": "/x", "format": "vmdk"},
        {"source": "/x", "read_only": 1},
    ],
    ids=lambda wrong: repr(wrong)[:40],
)
def test_what_can_not_be_is_refused_by_name(wrong: dict[str, Any]) -> None:
    name = next(reversed(wrong), "size")

    with pytest.raises(RequestInvalid, match=name):
        Disk(**wrong)


@pytest.mark.parametrize(
    ("disks", "complaint"),
    [
        (Disk(size="1G"), "must be a list"),
        (["1G"], "'1G' is no Disk"),
        ([Disk(size="1G")] * 17, "17 are more than 16"),
        ([Disk(size="1G"), Disk(size="1G", serial="disk0")], "two of them .* 'disk0'"),
    ],
)
def test_disks_that_can_not_be_together(disks: Any, complaint: str) -> None:
    with pytest.raises(RequestInvalid, match=complaint):
        MachineSpec().changed({"disks": disks})


def test_a_disk_is_as_long_as_its_source_unless_it_is_to_be_longer(tmp_path: Path) -> None:
    source = tmp_path / "image"
    source.write_bytes(bytes(4096))

    same, longer = plan_disks([Disk(source=source), Disk(source=str(source), size="1M")])

    assert (same.size, longer.size) == (4096, 1 << 20)
    assert [plan.source and plan.source.format for plan in (same, longer)] == [DiskFormat.RAW] * 2


@pytest.mark.parametrize(
    ("content", "wishes", "complaint"),
    [
        (bytes(4096), {"size": 512}, "size=512 is less than the 4096 bytes of source="),
        (bytes(4000), {}, "multiple of 512"),
        (b"", {}, "a disk of 0 bytes"),
        (bytes(4096), {"format": "qcow2"}, "is no qcow2 image"),
        (b"QFI\xfb".ljust(512, b"\0"), {}, "is no qcow2 image"),
    ],
)
def test_a_source_that_can_not_be_one(
    tmp_path: Path, content: bytes, wishes: dict[str, Any], complaint: str
) -> None:
    source = tmp_path / "image"
    source.write_bytes(content)

    with pytest.raises(RequestInvalid, match=complaint) as refused:
        plan_disks([Disk(source=source, **wishes)])

    assert str(source) in str(refused.value)


def test_a_source_is_a_regular_file_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(RequestInvalid, match="No such file"):
        plan_disks([Disk(source=tmp_path / "nowhere")])
    with pytest.raises(RequestInvalid, match="not a regular file"):
        plan_disks([Disk(source=tmp_path)])


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not here")
def test_an_image_that_leans_on_another_file_is_refused(tmp_path: Path) -> None:
    base, over = tmp_path / "base", tmp_path / "over"
    base.write_bytes(bytes(4096))
    words = ("-f", "qcow2", "-b", base, "-F", "raw", over)
    subprocess.run(["qemu-img", "create", "-q", *words], check=True, timeout=60)

    with pytest.raises(RequestInvalid, match="has a backing file"):
        plan_disks([Disk(source=over)])


def test_a_source_that_changed_is_another_one(tmp_path: Path) -> None:
    source = tmp_path / "image"
    source.write_bytes(bytes(4096))
    (before,) = plan_disks([Disk(source=source)])
    told = before.identity

    source.write_bytes(b"x".ljust(4096, b"\0"))

    assert before.identity != told
