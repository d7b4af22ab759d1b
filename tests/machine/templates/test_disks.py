"""Disks of a template: every byte of them is checked before a machine gets them."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.machine.disk_plan import DiskPlan
from pytest_vmsandbox.machine.disks import Disks, FrozenDisks, keep
from pytest_vmsandbox.machine.templates.disks import (
    DisksDamaged,
    SavedDisks,
    load_disks,
    parse_saved_disks,
    save_disks,
)
from pytest_vmsandbox.vmm.disk import DiskFormat
from pytest_vmsandbox.vmm.launch import Writable

SIZE = 3 << 20
PLAN = DiskPlan(serial="disk0", size=SIZE)


def _frozen(directory: Path, content: bytes = b"written") -> FrozenDisks:
    """What a machine without a VMM has written to one disk."""
    directory.mkdir()
    with closing(Disks([PLAN], directory=directory)) as disks:
        (stack,) = disks.open()
        top = stack.layers[0].file
        assert isinstance(top, Writable)
        with open(f"/proc/self/fd/{top.descriptor}", "r+b") as file:  # noqa: PTH123
            file.write(content)
        return disks.freeze()


@pytest.fixture
def saved(tmp_path: Path) -> SavedDisks:
    (tmp_path / "template").mkdir()
    with closing(_frozen(tmp_path / "machine")) as frozen:
        return save_disks(frozen, tmp_path / "template")


def test_what_was_saved_is_found_to_the_last_byte(tmp_path: Path, saved: SavedDisks) -> None:
    found = load_disks(saved, tmp_path / "template", room=tmp_path)

    (layer,) = found.layers["disk0"]
    assert Path(str(layer.file)).read_bytes() == b"written".ljust(SIZE, b"\0")
    assert layer.format is DiskFormat.RAW
    assert Path(str(layer.file)).stat().st_mode & 0o777 == 0o444


def test_what_was_frozen_changes_no_more_and_goes_with_its_holder(tmp_path: Path) -> None:
    frozen = _frozen(tmp_path / "machine")
    assert frozen.directory is not None

    (layer,) = frozen.layers["disk0"]
    assert Path(str(layer.file)).read_bytes().startswith(b"written")
    assert list((tmp_path / "machine").iterdir()) == []
    frozen.close()
    frozen.close()
    assert not frozen.directory.exists()


def test_a_machine_keeps_its_layers_when_what_was_frozen_is_gone(tmp_path: Path) -> None:
    frozen = _frozen(tmp_path / "machine")
    (tmp_path / "twin").mkdir()
    with closing(Disks(frozen.under([PLAN]), directory=tmp_path / "twin")) as disks:
        (stack,) = disks.open()
        frozen.close()

        assert disks.open() == (stack,)
        assert Path(str(stack.layers[1].file)).read_bytes().startswith(b"written")
        assert [layer.format for layer in stack.layers] == [DiskFormat.QCOW2, DiskFormat.RAW]
        with closing(disks.freeze()) as again:
            assert len(again.layers["disk0"]) == 1, "nothing was written to the second"
    assert list((tmp_path / "twin").iterdir()) == []


@pytest.mark.parametrize("what", ["removed", "made anew"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["one file system", "another one"])
def test_what_was_read_stays_whatever_becomes_of_the_template(
    tmp_path: Path, saved: SavedDisks, *, what: str, elsewhere: bool
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if elsewhere else tmp_path) as room:
        with closing(load_disks(saved, tmp_path / "template", room=Path(room))) as found:
            shutil.rmtree(tmp_path / "template")
            if what == "made anew":
                (tmp_path / "template").mkdir()
                with closing(_frozen(tmp_path / "other", b"another making")) as other:
                    save_disks(other, tmp_path / "template")

            with closing(Disks(found.under([PLAN]), directory=tmp_path / "machine")) as disks:
                (stack,) = disks.open()
                content = Path(str(stack.layers[1].file)).read_bytes()
                assert content == b"written".ljust(SIZE, b"\0")
        assert list(Path(room).iterdir()) == []


@pytest.mark.parametrize("elsewhere", [False, True], ids=["one file system", "another one"])
def test_a_file_is_kept_though_it_has_no_name_any_more(tmp_path: Path, *, elsewhere: bool) -> None:
    (tmp_path / "old").write_bytes(b"this one")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if elsewhere else tmp_path) as room:
        with OwnedFd(os.open(tmp_path / "old", os.O_RDONLY | os.O_CLOEXEC)) as file:
            (tmp_path / "old").unlink()
            (tmp_path / "old").write_bytes(b"another")
            keep(file, Path(room) / "kept")

        assert (Path(room) / "kept").read_bytes() == b"this one"


def test_disks_on_one_file_system_are_kept_without_a_copy(
    tmp_path: Path, saved: SavedDisks
) -> None:
    with closing(load_disks(saved, tmp_path / "template", room=tmp_path)) as found:
        (layer,) = found.layers["disk0"]
        assert Path(str(layer.file)).samefile(tmp_path / "template" / "disk0.0")
        assert Path(str(layer.file)) != tmp_path / "template" / "disk0.0"


def test_a_pipe_in_the_place_of_a_disk_is_seen(tmp_path: Path, saved: SavedDisks) -> None:
    (tmp_path / "template" / "disk0.0").unlink()
    os.mkfifo(tmp_path / "template" / "disk0.0")

    with pytest.raises((DisksDamaged, OSError)):
        load_disks(saved, tmp_path / "template", room=tmp_path)


@pytest.mark.parametrize("place", [0, 6, SIZE - 1])
def test_a_byte_that_is_wrong_is_seen(tmp_path: Path, saved: SavedDisks, place: int) -> None:
    file = tmp_path / "template" / "disk0.0"
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.chmod(0o600)
    file.write_bytes(content)

    before = set(tmp_path.iterdir())
    with pytest.raises(DisksDamaged, match=r"disk0\.0"):
        load_disks(saved, tmp_path / "template", room=tmp_path)
    assert set(tmp_path.iterdir()) == before


def test_a_disk_of_another_length_is_seen(tmp_path: Path, saved: SavedDisks) -> None:
    (layer,) = saved["disk0"]
    longer = {"disk0": (replace(layer, bytes=SIZE + 512),)}

    with pytest.raises(DisksDamaged):
        load_disks(longer, tmp_path / "template", room=tmp_path)


def test_a_disk_that_is_a_link_is_refused(tmp_path: Path, saved: SavedDisks) -> None:
    file = tmp_path / "template" / "disk0.0"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OSError, match="symbolic links"):
        load_disks(saved, tmp_path / "template", room=tmp_path)


def test_what_a_manifest_says_is_read_back(saved: SavedDisks) -> None:
    form = {serial: [asdict(layer) for layer in layers] for serial, layers in saved.items()}

    assert parse_saved_disks(form) == saved


@pytest.mark.parametrize(
    "form",
    [
        None,
        [],
        {"../x": []},
        {"disk0": None},
        {"disk0": 7},
        {"disk0": [{}]},
        {"disk0": [{"format": "vmdk", "bytes": 1, "sha256": ""}]},
        {"disk0": [{"format": "raw", "bytes": "1", "sha256": ""}]},
    ],
)
def test_a_manifest_that_can_not_be_is_damaged(form: object) -> None:
    with pytest.raises(DisksDamaged):
        parse_saved_disks(form)
