"""Cold boot: from nothing to the result of the first command."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.by_hand import MEMORY_MIB, open_by_hand
from benchmarks.by_hand_image import ByHandImage, prepare_by_hand_image
from benchmarks.measurement import Measurement, Unit, alternate
from benchmarks.ours import accel_of, open_machine, open_worker, prepared_image
from benchmarks.setting import Setting
from pytest_vmsandbox.image.image import Image, open_image
from pytest_vmsandbox.image.manifest import MANIFEST_NAME, read_manifest

_PEER = "QEMU and qemu-guest-agent, by hand"


def measure_boot(setting: Setting) -> Sequence[Measurement]:
    """Ours beside by hand; and ours with the compressed kernel, which by hand has too."""
    with open_worker(setting.cache_dir) as worker:
        image, accel = prepared_image(worker), accel_of(worker)
    by_hand = prepare_by_hand_image(image, setting)
    with setting.scratch() as scratch:
        compressed = _with_compressed_kernel(image, scratch)
        seconds = alternate(
            {
                "ours": lambda: _boot(setting.cache_dir, "mini"),
                "by hand": lambda: _boot_by_hand(by_hand, accel),
                "compressed": lambda: _boot(setting.cache_dir, str(compressed)),
            },
            rounds=setting.rounds,
        )
    how = f"worker made, machine booted, run(['true']) answered; {accel}, {MEMORY_MIB} MiB, q35"
    rows = (("cold boot to first answer", "ours"), ("the same, bzImage as shipped", "compressed"))
    return [
        Measurement(
            benchmark="boot",
            what=what,
            unit=Unit.SECONDS,
            values=seconds[side],
            how=how,
            peer=_PEER,
            peer_values=seconds["by hand"],
        )
        for what, side in rows
    ]


def _boot(cache_dir: Path, image: str) -> float:
    started = time.perf_counter()
    with (
        open_worker(cache_dir) as worker,
        open_machine(worker, image=image, lifecycle="booted") as machine,
    ):
        machine.run(["true"], check=True)
        return time.perf_counter() - started


def _boot_by_hand(image: ByHandImage, accel: str) -> float:
    started = time.perf_counter()
    with open_by_hand(image, accel=accel) as agent:
        status = agent.run(["true"]).returncode
        seconds = time.perf_counter() - started
    if status != 0:
        raise RuntimeError(f"true ended with {status}")
    return seconds


def _with_compressed_kernel(image: Image, directory: Path) -> Path:
    """The same image in `directory`, made to boot the kernel as it was shipped."""
    if image.compressed_kernel is None:
        return image.directory
    for path in (image.compressed_kernel, image.initramfs, image.modules):
        if path is not None:
            os.link(path, directory / path.name)
    manifest = replace(
        read_manifest(image.directory), kernel=image.compressed_kernel.name, compressed_kernel=None
    )
    (directory / MANIFEST_NAME).write_text(manifest.render(), encoding="utf-8")
    return open_image(directory).directory
