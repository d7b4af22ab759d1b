from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_vmsandbox.vmm.disk import DiskFormat, DiskStack, Layer, render_disk
from pytest_vmsandbox.vmm.launch import Handed, Writable

TOP = Writable(7)
BASE = Path("/images/base.raw")
STACK = DiskStack(
    serial="disk0",
    size=1 << 30,
    layers=(
        Layer(file=TOP, format=DiskFormat.QCOW2),
        Layer(file=BASE, format=DiskFormat.RAW),
    ),
)
SEEN: dict[Handed, Path] = {TOP: Path("/proc/self/fd/3"), BASE: Path("/proc/self/fd/4")}


def _node(disk: DiskStack) -> dict[str, Any]:
    words = list(render_disk(disk.seen_through(SEEN), bus="pci"))
    node: dict[str, Any] = json.loads(words[words.index("-blockdev") + 1])
    return node


def test_what_is_written_to_is_handed_over_and_never_opened() -> None:
    words = list(render_disk(STACK.seen_through(SEEN), bus="pci"))

    assert words[:2] == ["-add-fd", "fd=3,set=3"]
    assert _node(STACK)["file"]["filename"] == "/dev/fdset/3"
    assert _node(STACK)["read-only"] is False


def test_qemu_is_told_every_format() -> None:
    node = _node(STACK)

    assert node["driver"] == "qcow2"
    assert node["backing"]["driver"] == "raw"
    assert node["backing"]["file"]["filename"] == "/proc/self/fd/4"


def test_the_lowest_image_leans_on_nothing_whatever_it_says() -> None:
    alone = replace(STACK, layers=STACK.layers[:1])

    assert _node(alone)["backing"] is None


def test_a_read_only_disk_is_never_written_to() -> None:
    disk = replace(STACK, layers=STACK.layers[1:], read_only=True)
    words = list(render_disk(disk.seen_through(SEEN), bus="pci"))

    assert "-add-fd" not in words
    assert _node(disk)["read-only"] is True
    assert disk.written_bytes == 0


def test_an_image_may_come_to_be_longer_than_its_disk() -> None:
    assert STACK.written_bytes > STACK.size
